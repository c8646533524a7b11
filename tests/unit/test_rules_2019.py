"""rules_2019: what the tools of 2019 do to lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning.rules_2019 import (
    clean_up,
    drop_unprintable,
    join_broken_lines,
    normalise_punctuation,
    squeeze,
)


# The right-hand sides were written by Moses' own script (Perl, state of May 2019, language en).
@pytest.mark.parametrize(
    ("line", "moses"),
    [
        ("He said \u201cno\u201d, twice.", 'He said "no," twice.'),
        ("a ( b ) c", "a (b) c"),
        ("(a)(b)", " (a) (b) "),
        ("f(x) . g(y) ;", "f (x). g (y);"),
        ("50 % of : it ;", "50% of: it;"),
        ("don\u2019t \u2018quote\u2019 dogs\u2019", 'don\'t "quote" dogs"'),
        ("1990\u2019s", '1990"s'),
        ("a\u2014b \u2013 c", "a - b - c"),
        ("``x''", ' " x " '),
        ("wait\u2026", "wait..."),
        ("\u00ab oui \u00bb", '" oui "'),
        ('He said "yes".,', 'He said "yes.,"'),
        ("\u00b4x\u00b4", "'x'"),
        ("x\u201d .", 'x" .'),
        ("T (a:b) !", "T (a:b)!"),
        ("caf\u00e9\u2019s", 'caf\u00e9"s'),
    ],
)
def test_punctuation_is_written_as_moses_does(line: str, moses: str) -> None:
    # The script leaves spaces at the ends of a line, which the next tool strips.
    assert normalise_punctuation(line).split() == moses.split()


LINES = st.lists(
    st.text(
        "ab1 (),.:;%!?`'\"*<>-\u2018\u2019\u201c\u201d\u00ab\u00bb\u2014\u2026\u00b4\ue000",
        max_size=9,
    )
)


@given(LINES)
def test_no_rule_but_the_joining_looks_across_a_line_end(lines: list[str]) -> None:
    lines = [" ".join(line.split()) for line in lines]
    for rule in (clean_up, normalise_punctuation, drop_unprintable):
        together = rule("\n".join(lines)).split("\n")
        assert [x.split() for x in together] == [rule(line).split() for line in lines or [""]]


@pytest.mark.parametrize(
    ("line", "mended"),
    [
        ("so.....", "so..."),
        ("so...", "so..."),
        ("<<a>>", "\u00aba\u00bb"),
        ("a,, b,.", "a, b."),
        ("a *b * c*", "a b * c*"),
    ],
)
def test_typing_habits_are_mended(line: str, mended: str) -> None:
    assert clean_up(line) == mended


def test_unprintable_characters_become_spaces_and_others_stay() -> None:
    text = "a\u200db\ue000c\U000f0000d\U000e0041e\ufffef\u2066g"
    assert drop_unprintable(text) == "a b c d e f g"
    kept = "\n a~\u00a1\u0620\u4e00\ufffd\U0001f600"
    assert drop_unprintable(kept) == kept


def test_broken_lines_are_joined_in_chains_and_whole_ones_stay() -> None:
    text = "one,\ntwo\nthree 3\nfour.\nfive\nSix\n7\n\nseven\n\0\neight"
    joined, count = join_broken_lines(text)
    assert joined == "one, two three 3 four.\nfive\nSix\n7\n\nseven\n\0\neight"
    assert count == 3


def test_squeeze_leaves_single_spaces_inside_lines() -> None:
    assert squeeze("a    b  \n   c \n \nd") == "a b\nc\n\nd"
