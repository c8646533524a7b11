"""blocks and source_files: which files are read, and that blocks give every document."""

import bz2
import gzip
import json
import lzma
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.errors import DataError
from data_prep.sources import blocks, reading
from data_prep.sources.blocks import Document, SourceOptions, parse_block, read_blocks
from data_prep.sources.files import MAX_MESSAGES, Skipped, find_files, input_bytes

BODY = SourceOptions(field="body")


def _read(*files: Path, options: SourceOptions = BODY) -> tuple[list[Document], Skipped]:
    documents, skipped = [], Skipped()
    for block in read_blocks(files, options):
        # As a worker gets it.
        found, left_out = parse_block(pickle.loads(pickle.dumps(block)), options)
        documents += found
        skipped.merge(left_out)
    return documents, skipped


def _texts(*files: Path, options: SourceOptions = BODY) -> list[str]:
    return [document.text for document in _read(*files, options=options)[0]]


def _json_lines(*texts: str) -> bytes:
    return "".join(json.dumps({"id": 3, "body": text}) + "\n" for text in texts).encode()


def _one_of_each(folder: Path) -> list[Path]:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_json_lines("one", "two")))
    (folder / "b.txt.xz").write_bytes(lzma.compress(b"three\n\nfour\n"))
    page = "<page><ns>0</ns><revision><text>five</text></revision></page>"
    (folder / "c.xml-p1p2.bz2").write_bytes(bz2.compress(f"<mediawiki>{page}</mediawiki>".encode()))
    pq.write_table(pa.table({"body": ["six", "seven"]}), folder / "d.parquet")
    (folder / "e.json.zst").write_bytes(zstandard.compress(_json_lines("eight")))
    return find_files([folder])


NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.mark.parametrize("block", [1, 60, 1 << 20])
def test_every_kind_is_read_in_order_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    files = _one_of_each(tmp_path)
    monkeypatch.setattr(reading, "BLOCK_BYTES", block)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    assert _texts(*files) == NUMBERS
    positions = [found.position for found in read_blocks(files, BODY)]
    assert positions == sorted(positions)
    assert positions[-1] == input_bytes(files) == sum(path.stat().st_size for path in files)


def test_small_files_share_a_block_and_large_ones_have_several(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.jsonl").write_bytes(_json_lines(f"small {i}"))
    files = find_files([tmp_path])
    (block,) = read_blocks(files, BODY)
    assert len(block.parts) == 30
    assert block.num_bytes == input_bytes(files)
    large = tmp_path / "large.jsonl"
    large.write_bytes(_json_lines(*("word " * 1000 for _ in range(2500))))
    sizes = [block.num_bytes for block in read_blocks([large], BODY)]
    assert len(sizes) > 2
    assert max(sizes) <= 1.5 * reading.BLOCK_BYTES
    assert sum(sizes) == input_bytes([large])


def test_folder_gives_known_files_in_name_order(tmp_path: Path) -> None:
    known = ["a.jsonl.xz", "b/z.txt", "c.parquet", "d.xml.bz2", "d2.xml-p1p2.bz2", "e.json.gz",
             "f.ndjson"]  # fmt: skip
    other = ["b/LICENSE.md", ".hidden.txt", ".cache/a.txt", "._a.txt", "info.json", "a.parquet.gz",
             "d-multistream-index.txt.bz2", "d-multistream-index1.txt-p1p2.bz2"]  # fmt: skip
    for name in known + other:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files([tmp_path]) == [tmp_path / name for name in known]
    assert find_files([tmp_path / "info.json"]) == [tmp_path / "info.json"]


def test_unknown_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    for name in ("a.pdf", "a.parquet.gz"):
        (tmp_path / name).touch()
        with pytest.raises(
            DataError, match=rf"{name}: unknown kind of file; allowed are \.jsonl, \.txt, \.xml"
        ):
            find_files([tmp_path / name])
    with pytest.raises(DataError, match="no file in this folder"):
        find_files([tmp_path])
    with pytest.raises(DataError, match="no such file"):
        find_files([tmp_path / "b.txt"])
    with pytest.raises(DataError, match="no input"):
        find_files([])
    (tmp_path / "w-multistream-index.txt.bz2").touch()
    with pytest.raises(DataError, match=r"the index of a dump holds no text; name the \.xml"):
        find_files([tmp_path / "w-multistream-index.txt.bz2"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"x\.jsonl:3: not a JSON object: Unterminated string.* at column 10;"),
        (b"[1]", r"x\.jsonl:3: not a JSON object: got list"),
        (b"9" * 5000, r"x\.jsonl:3: not a JSON object: Exceeds the limit"),
        (b"[" * 200_000, r"x\.jsonl:3: not a JSON object: .*recursion"),
        (b'{"body": "a", "id": 1}', r"x\.jsonl:3: field 'text' is missing.*body, id.*--field"),
        (b'{"text": 5}', r"x\.jsonl:3: field 'text' is not a string"),
        (b'{"text": null}', r"x\.jsonl:3: field 'text' is not a string"),
        (b'{"text": "\xff"}', r"x\.jsonl:3: not valid UTF-8: byte 0xff at byte 10"),
    ],
)
def test_broken_line_is_named_or_counted(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "good"}\r\n \n' + line + b'\n{"text": "last\\ud800"}')
    with pytest.raises(DataError, match=message) as error:
        _texts(path, options=SourceOptions())
    assert "\n" not in str(error.value)
    documents, skipped = _read(path, options=SourceOptions(skip_bad=True))
    assert documents == [Document("good", f"{path}:1"), Document("last\ud800", f"{path}:4")]
    assert (skipped.broken_lines, skipped.num_broken) == (1, 1)
    assert skipped.messages == [str(error.value)]


def test_faults_of_all_files_are_counted_and_the_first_are_told(tmp_path: Path) -> None:
    files = _one_of_each(tmp_path)
    for path in files:
        path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "z.jsonl").write_bytes(b"bad\n" * 9)
    options = SourceOptions(field="body", skip_bad=True)
    _, skipped = _read(*find_files([tmp_path]), options=options)
    assert (skipped.broken_files, skipped.broken_lines) == (len(files), 9)
    assert len(skipped.messages) == MAX_MESSAGES
    for path, message in zip(files, skipped.messages, strict=False):
        assert message.startswith(f"{path}:")
