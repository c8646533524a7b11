"""sentence_merge: the rules of 2019, against a naive version of themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.tokens.sentence_merge import (
    MergeCounts,
    MergeRules,
    Sentences,
    merge_paragraph,
    merge_sentences,
)

# "|" ends a sentence here, the line end a paragraph.
WORD = st.sampled_from(["a", "bb.", "\u00e9\u00e9!", "...", "\u2014", "\u0436", 'c"', "dddd"])
SENTENCE = st.lists(WORD, min_size=1, max_size=7).map(" ".join)
PARAGRAPH = st.lists(SENTENCE, min_size=1, max_size=8)
RULES = st.builds(
    MergeRules,
    drops_punctuation=st.booleans(),
    min_words=st.integers(1, 6),
    max_words=st.integers(6, 14),
    min_chars=st.integers(0, 8),
    max_chars=st.integers(8, 40),
)


def _merge(paragraphs: list[list[str]], rules: MergeRules) -> tuple[list[list[str]], MergeCounts]:
    """Run the vectorised rules and read the sentences of each paragraph off their result."""
    words = [
        (word, is_last, is_last and index == len(paragraph) - 1)
        for paragraph in paragraphs
        for index, sentence in enumerate(paragraph)
        for number, word in enumerate(sentence.split(" "))
        for is_last in [number == len(sentence.split(" ")) - 1]
    ]
    text = b"".join(word.encode() + (b"\n" if ends else b" ") for word, _, ends in words)
    data = np.frombuffer(text, np.uint8)
    block = Sentences(
        data,
        np.flatnonzero(data <= 0x20) + 1,
        np.array([ends for _, _, ends in words], np.bool_),
        np.array([is_last for _, is_last, _ in words], np.bool_),
    )
    is_kept, ends_sentence, counts = merge_sentences(rules, block)
    found: list[list[str]] = [[]]
    current: list[str] = []
    for (word, _, ends), keeps, is_end in zip(words, is_kept, ends_sentence, strict=True):
        current += [word] if keeps else []
        if is_end:
            found[-1].append(" ".join(current))
            current = []
        if ends:
            found.append([])
    assert not current, "kept words outside a sentence"
    return found[:-1], counts


def _naive(paragraph: list[str], rules: MergeRules) -> tuple[list[str], int]:
    """Return the sentences before the length rules, and how many punctuation sentences went."""
    kept = [
        sentence
        for sentence in paragraph
        if not rules.drops_punctuation or any(map(str.isalnum, sentence))
    ]
    num_dropped = len(paragraph) - len(kept)
    while any(len(sentence.split()) < rules.min_words for sentence in kept):
        sizes = [len(sentence.split()) for sentence in kept]
        pairs = [
            (a + b + (5 if sentence.endswith((".", '"', "!", "?")) else 0), at)
            for at, (a, b, sentence) in enumerate(zip(sizes, sizes[1:], kept, strict=False))
            if a + b <= rules.max_words
        ]
        if not pairs:
            break
        _, at = min(pairs)
        kept[at : at + 2] = [f"{kept[at]} {kept[at + 1]}"]
    return kept, num_dropped


@settings(deadline=None)
@given(paragraphs=st.lists(PARAGRAPH, min_size=1, max_size=4), rules=RULES)
def test_vectorised_rules_do_what_the_naive_ones_do(
    paragraphs: list[list[str]], rules: MergeRules
) -> None:
    found, counts = _merge(paragraphs, rules)
    merged = [_naive(paragraph, rules) for paragraph in paragraphs]
    flat = [sentence for sentences, _ in merged for sentence in sentences]
    too_short = sum(len(sentence) < rules.min_chars for sentence in flat)
    too_long = sum(len(sentence) > rules.max_chars for sentence in flat)
    assert found == [
        [s for s in sentences if rules.min_chars <= len(s) <= rules.max_chars]
        for sentences, _ in merged
    ]
    punctuation = sum(dropped for _, dropped in merged)
    num_read = sum(map(len, paragraphs))
    assert counts == MergeCounts(
        punctuation_only=punctuation,
        merged=num_read - punctuation - len(flat),
        too_short=too_short,
        too_long=too_long,
    )


def test_pieces_without_an_end_mark_are_joined_first() -> None:
    rules = MergeRules(min_words=3, min_chars=0)
    # Sizes 2 + 2 and 2 + 3: the first pair is the smaller, but an end mark stands between.
    assert _merge([["a a.", "b b", "c c c"]], rules)[0] == [["a a. b b c c c"]]
    assert _merge([["a a.", "b b", "c c c"]], MergeRules(min_words=2, min_chars=0))[0] == [
        ["a a.", "b b", "c c c"]
    ]
    assert merge_paragraph([2, 2, 3], [True, False, False], rules) == [1, 0]


def test_many_short_sentences_take_linear_time() -> None:
    number = 50_000
    rules = MergeRules(max_words=8)
    assert len(merge_paragraph([1] * number, [False] * number, rules)) >= number * 3 // 4


def test_impossible_rules_are_told_together() -> None:
    with pytest.raises(DataError, match=r"min_words 0: at least 1; max_chars 3: at least min_ch"):
        MergeRules(min_words=0, max_chars=3).check()
    MergeRules().check()
