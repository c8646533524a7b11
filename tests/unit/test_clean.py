"""clean: the rules do what they say, and the funnel accounts for every character."""

import dataclasses
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning.clean import (
    PRESETS,
    CleaningRules,
    clean_block,
    clean_documents,
    rules_from,
)
from data_prep.cleaning.funnel import Funnel
from data_prep.cleaning.plain_text import normalise
from data_prep.errors import DataError
from data_prep.sources.blocks import Document

LETTERS = "The quick brown fox jumps over the lazy dog and then it runs away"
TEXTS = st.lists(
    st.text(max_size=20)
    | st.text("ab1 .,\n\t()|/\\*\"'\u00a0\u2019\u201d\u00ab\ue000\ud800e\u0301", max_size=30)
    | st.sampled_from([f"{LETTERS}\nand more (of\nit)", f"| {LETTERS}\n\\", ""])
)
LOOSE_2019 = replace(PRESETS["2019"], min_line_chars=3, min_letters=2)


def _clean(texts: list[str], rules: CleaningRules) -> tuple[list[str], Funnel]:
    funnel = Funnel()
    return clean_documents([Document(text, "x:1") for text in texts], rules, funnel), funnel


def _of(funnel: Funnel, rule: str) -> tuple[int, ...]:
    return dataclasses.astuple(funnel.counts[rule])


@given(TEXTS)
def test_the_defaults_do_what_normalise_does(texts: list[str]) -> None:
    kept, _ = _clean(texts, CleaningRules())
    assert kept == [plain for text in texts if (plain := normalise(text))]


def test_groups_of_documents_do_not_change_the_result() -> None:
    texts = [f"{LETTERS} {index} \u2019" + " x" * 50_000 * (index % 3) for index in range(30)]
    texts[7] = texts[20] = ""
    kept, funnel = _clean(texts, CleaningRules())
    assert kept == [text for text in texts if text]
    assert funnel.kept.documents == 28


@given(TEXTS, st.sampled_from([CleaningRules(), LOOSE_2019, PRESETS["2019"]]))
def test_blocks_keep_their_invariants_and_the_funnel_adds_up(
    texts: list[str], rules: CleaningRules
) -> None:
    funnel = Funnel()
    block = clean_block([Document(text, "x:1") for text in texts], rules, funnel)
    kept = block.texts() if block.num_documents else []
    lines = [line for text in kept for line in text.split("\n")]
    assert len(block.paragraph_ends) == int(block.paragraph_counts.sum()) == len(lines)
    assert all(normalise(text) == text for text in kept)
    assert not re.search("[\0\t\r\v\f]|  |(^| )$|\n\n", "".join(kept)) or not kept
    assert all(kept)
    assert dataclasses.astuple(funnel.kept) == (len(kept), len(lines), sum(map(len, lines)))
    assert funnel.read.documents == len(texts)


def test_no_documents_give_an_empty_block() -> None:
    block = clean_block([], PRESETS["2019"], Funnel())
    assert (block.num_documents, block.text) == (0, b"")


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("Too short a line", "short_line"),
        (LETTERS + "y" * 1_000_000, "long_line"),
        ("1234 " * 10 + "abcd " * 5, "few_letters"),
        (LETTERS + " 12345" * 12, "letter_share"),
        (LETTERS + "/////", "slashes"),
        (LETTERS + "\\\\\\\\\\", "backslashes"),
        (LETTERS + "|||||", "pipes"),
        ("| " + LETTERS, "pipe_start"),
    ],
)
def test_each_filter_drops_its_line_and_says_so(line: str, rule: str) -> None:
    kept, funnel = _clean([f"{LETTERS}.\n{line}.", f"{line}."], PRESETS["2019"])
    assert kept == [LETTERS + "."]
    assert _of(funnel, rule) == (0, 2, 2 * len(line) + 2)
    assert _of(funnel, "no_line_left") == (1, 0, 0)


@pytest.mark.parametrize(
    ("rules", "kept", "dropped"),
    [
        (CleaningRules(min_line_chars=3), "\u00e9bc", "\u00e9b"),
        (CleaningRules(max_line_chars=3), "\u00e9bc", "\u00e9bcd"),
        (CleaningRules(min_letters=2), "a1b", "a1\u00e9"),
        (CleaningRules(min_letter_share=0.7), "aaaaaaa111", "aaaaaa1111"),
        (CleaningRules(max_slash_share=0.05), "/" + "a" * 19, "/" + "a" * 18),
        (CleaningRules(max_backslash_share=0.05), "\\" + "a" * 19, "\\" + "a" * 18),
        (CleaningRules(max_pipe_share=0.05), "a|" + "a" * 18, "a|" + "a" * 17),
        (CleaningRules(drop_pipe_start=True), "a|", "|a"),
    ],
)
def test_thresholds_themselves_are_kept(rules: CleaningRules, kept: str, dropped: str) -> None:
    assert _clean([f"{kept}\n{dropped}"], rules)[0] == [kept]


def test_broken_lines_join_inside_a_document_only() -> None:
    rules = CleaningRules(join_lines=True)
    kept, funnel = _clean(["One line,\nand more\nof it.\nNew", "old end", "lower start"], rules)
    assert kept == ["One line, and more of it.\nNew", "old end", "lower start"]
    assert _of(funnel, "joined") == (0, 2, -2)


def test_rules_follow_one_another_in_the_order_of_2019() -> None:
    text = f"({LETTERS}.... )\n\u201c{LETTERS}\u201d, he told \\ us,\nand said so\u2026"
    kept, _ = _clean([text], PRESETS["2019"])
    assert kept == [f'({LETTERS}...)\n"{LETTERS}," he told us, and said so...']


def test_a_document_of_nothing_printable_goes() -> None:
    kept, funnel = _clean(["\ue000\n\ue001", "\\ \\"], LOOSE_2019)
    assert kept == []
    assert _of(funnel, "no_line_left")[0] == 2


def test_changes_are_made_on_top_of_the_preset() -> None:
    rules = rules_from("2019", ["min_line_chars = 30", "join_lines=false", "max_line_chars=none"])
    assert rules == replace(
        PRESETS["2019"], min_line_chars=30, join_lines=False, max_line_chars=None
    )
    assert rules_from("none") == CleaningRules()
    assert rules_from("none", ["max_line_chars=7", "min_letter_share=.5"]) == CleaningRules(
        max_line_chars=7, min_letter_share=0.5
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("min_line_char=30", "min_line_char: unknown; did you mean min_line_chars?"),
        ("min_line_chars", "'min_line_chars': a change is written key=value"),
        ("min_line_chars=many", "'many' is no value of min_line_chars; allowed is a whole number"),
        ("join_lines=1", "'1' is no value of join_lines; allowed is true or false"),
        ("max_line_chars=", "'' is no value of max_line_chars; allowed is a whole number or none"),
        ("max_pipe_share=5", "max_pipe_share=5.0: not a share; allowed are 0 to 1"),
        ("max_pipe_share=nan", "max_pipe_share=nan: not a share"),
        ("min_letters=-1", "min_letters=-1: below 0"),
        ("max_line_chars=20", "max_line_chars=20: every line would go; .* min_line_chars=50"),
    ],
)
def test_faults_of_rules_are_explained(change: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rules_from("2019", [change])


def test_all_faults_of_rules_are_told_at_once() -> None:
    with pytest.raises(DataError, match=r"pipes: unknown.*join_lines.*min_letters=-2") as caught:
        rules_from("2019", ["pipes=3", "join_lines=maybe", "min_letters=-2"])
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="'2020' are unknown; choose one of none, 2019"):
        rules_from("2020")
