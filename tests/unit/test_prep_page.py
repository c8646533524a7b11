"""The page needs nothing but itself, shows every count, and no text of the data can break it."""

import base64
import html
import re
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning.funnel import RULES, Funnel, Row
from data_prep.report.figures import (
    SLIVER,
    compact,
    document_lengths,
    funnel,
    percent,
    row_lengths,
    seconds,
)
from data_prep.report.page import MAX_ROWS, page, write_page
from data_prep.report.report import PrepareReport
from data_prep.shard_format import Manifest, ShardEntry

HOSTILE = "<script>alert('$title & \"more\"')</script>"
VOID = {"meta", "img", "source", "wbr"}


class Reader(HTMLParser):
    """Checks the nesting; keeps the text of cells, all tags, and all links."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "srcset", "href"}]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag in {"td", "th"}:
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def funnel_of_all_rules() -> Funnel:
    counts = Funnel()
    counts.add("read", 90_000, 700_000, 50_000_000)
    for number, rule in enumerate(RULES[1:], 1):
        counts.add(rule, number, 10 * number, 1_000 * number + 7)
    return counts


def a_report(out: Path = Path("shards/wiki")) -> PrepareReport:
    manifest = Manifest(
        format_version=1,
        dialect="nvidia",
        max_seq_length=7,
        max_predictions_per_seq=2,
        vocab_size=30_522,
        tokenizer_sha256="07ec" * 16,
        special_token_ids={"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103},
        has_next_sentence_labels=True,
        seed=41,
        num_documents={"training": 3302, "validation": 16},
        settings={
            "inputs": [["wiki.jsonl", "ab" * 32], ["books.txt", "cd" * 32]],
            "rules": {"join_lines": True, "max_line_chars": None},
            "validation": [],
        },
        statistics={
            "training_tokens": 1234.0,
            "validation_tokens": 56.0,
            "training_padding_share": 0.0793,
            "validation_padding_share": 0.0761,
        },
        training=(ShardEntry("training_00000.hdf5", 9100, "3fa9" * 16),),
        validation=(ShardEntry("validation_00000.hdf5", 260, "77b1" * 16),),
    )
    return PrepareReport(
        out=out,
        funnel=funnel_of_all_rules(),
        num_workers=3,
        manifest=manifest,
        num_input_bytes=50_000_000,
        seconds={"cleaning": 1.5, "rows": 8.5},
        worker_seconds={"parsing": 1.0, "tokenising": 3.0},
        row_lengths=[0, 0, 0, 5, 90, 3, 1, 9001],
        document_lengths=[0, 0, 4, 300, 17, *[0] * 19],
    )


@lru_cache
def the_page() -> str:
    return page(a_report())


def texts_of(svg: bytes) -> list[str]:
    """What a figure says: matplotlib leaves each text as a comment beside its outlines."""
    found = re.findall(r"<!-- (.*?) -->", svg.decode(), re.S)
    texts = [html.unescape(" ".join(text.split())) for text in found]
    return [text.replace("\N{MINUS SIGN}", "-") for text in texts]


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    content = the_page()
    reader = Reader(content)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert len(reader.links) == 6
    assert all(link.startswith("data:image/svg+xml;base64,") for link in reader.links)
    assert "url(" not in content
    assert "//" not in re.sub(r"base64,[\w+/=]+", "", content)
    for link in reader.links:
        figure = base64.b64decode(link.split(",")[1])
        assert ElementTree.fromstring(figure).tag.endswith("svg")
        assert not re.search(rb'href="[^#]', figure)


def test_each_row_of_the_funnel_is_in_the_table_and_in_both_figures() -> None:
    report = a_report()
    rows = report.funnel.rows()
    assert len(rows) == len(RULES) + 1
    cells = Reader(the_page()).cells
    for row in rows:
        start = cells.index(row.label.strip())
        counts = [row.documents, row.paragraphs, row.characters]
        assert cells[start + 1 : start + 4] == [f"{count:,}" for count in counts]
    for is_narrow in (False, True):
        texts = texts_of(funnel(rows, is_narrow))
        # A long label has two lines, which are two texts.
        assert all(row.label.strip() in " ".join(texts) for row in rows)


def test_the_summary_the_settings_and_the_shards_are_there() -> None:
    reader = Reader(the_page())
    pairs = list(zip(reader.cells, reader.cells[1:], strict=False))
    facts = dict(reversed(pairs))  # of each name the first
    assert facts["documents"] == "3,302"
    assert facts["dialect"] == "nvidia"
    assert facts["seed"] == "41"
    assert facts["tokenizer sha256"] == "07ec" * 16
    assert facts["padding"] == "7.93%"
    assert facts["inputs 2"] == f"books.txt, {'cd' * 32}"
    assert facts["rules.join_lines"] == "yes"
    assert facts["rules.max_line_chars"] == "none"
    start = reader.cells.index("validation_00000.hdf5")
    assert reader.cells[start + 1 : start + 3] == ["260", "77b1" * 3]
    assert "5.0 MB/s" in reader.text
    assert "98.91% of the rows are full" in reader.text
    assert "4.00 s summed" in reader.text


def test_text_of_the_data_is_shown_and_never_obeyed() -> None:
    report = a_report(Path("shards") / HOSTILE.replace("/", ""))
    manifest = report.manifest
    assert manifest is not None
    report.messages = [f"a.jsonl:3: {HOSTILE}", "\udcff\0 bad name"]
    report.manifest = replace(
        manifest,
        tokenizer_sha256=HOSTILE,
        settings={HOSTILE: HOSTILE, "inputs": [[HOSTILE, "ab"]]},
        training=(ShardEntry(HOSTILE, 1, HOSTILE),),
    )
    content = page(report).encode("ascii", "xmlcharrefreplace").decode("ascii")
    reader = Reader(content)
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) == 6  # a message, a setting's name and value, ...
    assert f"a.jsonl:3: {HOSTILE}" in reader.text


def test_the_same_report_gives_the_same_bytes() -> None:
    assert page(a_report()) == the_page()
    assert page(replace(a_report(), row_lengths=[0, 0, 0, 5, 90, 3, 1, 9002])) != the_page()


def test_a_long_table_ends_with_what_it_leaves_out() -> None:
    report = a_report()
    assert report.manifest is not None
    shards = tuple(ShardEntry(f"training_{i:05}.hdf5", 2, "0" * 64) for i in range(MAX_ROWS + 6))
    report.manifest = replace(report.manifest, training=shards)
    reader = Reader(page(report))
    assert f"training_{MAX_ROWS - 1:05}.hdf5" in reader.cells
    assert f"training_{MAX_ROWS:05}.hdf5" not in reader.cells
    assert "7 more in manifest.json" in reader.text


def test_faults_that_were_passed_by_are_told_only_where_there_are_some() -> None:
    assert 'class="banner"' not in the_page()
    report = replace(a_report(), cut_documents=1200, broken_files=1, messages=["b.txt:9: bad"])
    text = Reader(page(report)).text
    assert "1,200 times" in text
    assert "1 broken file." in text
    assert "b.txt:9: bad" in text


def test_write_page_replaces_the_page_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    write_page(a_report(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    written = (tmp_path / "report.html").read_bytes().decode("ascii")
    assert Reader(written).cells == Reader(the_page()).cells


def test_matplotlib_is_imported_only_when_a_page_is_drawn() -> None:
    code = "import sys, data_prep.pipeline; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def bars_of(svg: bytes) -> list[tuple[str, float, float]]:
    """Colour, left and right edge in points of each bar, as drawn."""
    found = re.findall(
        r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*" clip-path="[^"]*" style="fill: (#\w+)"/>',
        svg.decode(), re.S,
    )  # fmt: skip
    return [(colour, float(left), float(right)) for left, right, colour in found]


def test_a_small_share_is_a_bar_that_can_be_seen_and_a_label() -> None:
    rows = [
        Row("read", 10_000_000, 0, 10**12),
        Row("  removed: empty documents", 1, 0, 2),
        Row("kept", 9_999_999, 0, 10**12 - 2),
    ]
    figure = funnel(rows)
    texts = texts_of(figure)
    assert {"-1", "-2", "<0.01%", ">99.99%", "1.0T"} <= set(texts)
    slivers = [right - left for colour, left, right in bars_of(figure) if colour == "#c8452d"]
    assert slivers == pytest.approx([SLIVER * 72] * 2, abs=0.01)


def test_bars_lead_from_what_was_read_to_what_was_kept() -> None:
    rows = [
        Row("read", 0, 0, 1000),
        Row("  changed: punctuation", 0, 0, -200),
        Row("  removed: line too short", 0, 0, 900),
        Row("kept", 0, 0, 300),
    ]
    bars = bars_of(funnel(rows))
    origin, unit = bars[0][1], (bars[0][2] - bars[0][1]) / 1000
    drawn = [
        (colour, (left - origin) / unit, (right - origin) / unit) for colour, left, right in bars
    ]
    expected = [
        ("#3f4756", 0, 1000),  # read
        ("#e3e9f2", 0, 1200),
        ("#2f8f6b", 1000, 1200),  # longer than before
        ("#e3e9f2", 0, 1200),
        ("#c8452d", 300, 1200),
        ("#3b6fb5", 0, 300),  # kept
    ]
    assert [bar[0] for bar in drawn] == [bar[0] for bar in expected]
    for bar, wanted in zip(drawn, expected, strict=True):
        assert bar[1:] == pytest.approx(wanted[1:], abs=1)


@pytest.mark.parametrize("counts", [[0] * 24, [5], [0, 3, 0], [1] * 24, [0] * 23 + [10**9]])
def test_any_lengths_can_be_drawn(counts: list[int]) -> None:
    assert ElementTree.fromstring(document_lengths(counts)).tag.endswith("svg")
    assert ElementTree.fromstring(row_lengths(counts)).tag.endswith("svg")


def test_the_length_axes_say_what_the_bars_hold() -> None:
    texts = texts_of(document_lengths([0, 0, 4, 300, 17, *[0] * 19]))
    assert {"2", "4", "8", "16", "32", "300", "17"} <= set(texts)
    texts = texts_of(row_lengths([0, 0, 0, 5, 90, 3, 1, 9001]))
    assert "training rows (log scale)" in texts
    assert "training rows" in texts_of(row_lengths([0, 7, 9, 5]))


def test_times_have_their_texts_and_none_is_fine() -> None:
    assert {"a $x$ b", "3 s"} <= set(texts_of(seconds({"a $x$ b": 3.0}, ["3 s"], 5)))
    assert ElementTree.fromstring(seconds({}, [], 1)).tag.endswith("svg")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"), (-12, "12"), (9_999, "9,999"), (10_000, "10.0k"), (99_949, "99.9k"),
        (99_950, "100k"), (999_499, "999k"), (999_500, "1.0M"), (123_456_789_012, "123B"),
        (5 * 10**15, "5,000.0T"),
    ],
)  # fmt: skip
def test_compact_rounds_to_the_next_unit(count: int, text: str) -> None:
    assert compact(count) == text


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_a_share_reads_as_all_or_nothing_only_where_it_is(part: int, rest: int) -> None:
    share = part / (part + rest)
    assert (percent(share) == "0%") == (part == 0)
    assert percent(share) not in {"100%", "100.00%", "0.00%"}
