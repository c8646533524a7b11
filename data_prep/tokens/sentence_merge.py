"""The 2019 rules for sentences that are too short, too long, or no sentences at all.

StackingBERT's steps 7, 11 and 12: sentences of punctuation alone are dropped; inside a paragraph
short neighbours are merged; what is still too short or too long is dropped. A word is what stands
between two spaces (there: a token of the Moses tokenizer, which counts punctuation).
W: words of a block; Q: its sentences.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.text_block import BoolArray, IntArray

Bytes = npt.NDArray[np.uint8]

# What merging over an end mark costs, in words: pieces without one are joined first.
END_MARK_PENALTY = 5
END_MARKS = b'."!?'

_IS_ASCII_WORD = np.array([bytes([code]).isalnum() for code in range(256)])
_IS_END_MARK = np.isin(np.arange(256), list(END_MARKS))


@dataclass(frozen=True, kw_only=True)
class MergeRules:
    """Which sentences are merged or dropped; the defaults are those of 2019."""

    drops_punctuation: bool = True
    """Whether sentences without a letter or digit are dropped."""
    min_words: int = 5
    """Neighbours are merged until each sentence of the paragraph has so many words; 1: never."""
    max_words: int = 250
    """No merged sentence has more words."""
    min_chars: int = 20
    """Shorter sentences are dropped after merging; 0: none."""
    max_chars: int = 1_000_000
    """Longer sentences are dropped after merging."""

    def check(self) -> None:
        """Raise one DataError that lists every impossible value."""
        faults = [
            f"min_words {self.min_words}: at least 1" if self.min_words < 1 else "",
            f"max_words {self.max_words}: at least min_words ({self.min_words})"
            if self.max_words < self.min_words
            else "",
            f"min_chars {self.min_chars}: at least 0" if self.min_chars < 0 else "",
            f"max_chars {self.max_chars}: at least min_chars ({self.min_chars})"
            if self.max_chars < self.min_chars
            else "",
        ]
        if any(faults):
            raise DataError("; ".join(fault for fault in faults if fault))


@dataclass(frozen=True, kw_only=True)
class MergeCounts:
    """Sentences that each rule took out of one block."""

    punctuation_only: int = 0
    merged: int = 0
    """Sentences that went into their neighbour."""
    too_short: int = 0
    too_long: int = 0


@dataclass(frozen=True, eq=False)
class Sentences:
    """The sentences of a block, as words; a word's bytes include the space behind it."""

    data: Bytes
    """The block's text."""
    word_ends: IntArray
    """Byte offset behind each word, ascending, [W]."""
    ends_paragraph: BoolArray
    """Whether each word is the last of its paragraph, [W]."""
    ends_sentence: BoolArray
    """Whether each word is the last of its sentence, [W]; true where a paragraph ends."""


def merge_sentences(
    rules: MergeRules, block: Sentences
) -> tuple[BoolArray, BoolArray, MergeCounts]:
    """Return which words are kept, [W], which of them end a sentence, [W], and what was taken
    out.
    """
    last_words = np.flatnonzero(block.ends_sentence)  # [Q]
    words = np.diff(last_words, prepend=-1)
    byte_ends = block.word_ends[last_words]
    is_dropped = np.zeros(len(last_words), np.bool_)
    if rules.drops_punctuation:
        is_dropped = _is_punctuation(block.data, byte_ends)
    num_punctuation = int(is_dropped.sum())
    kept = np.flatnonzero(~is_dropped)
    is_last = block.ends_paragraph[last_words]
    paragraphs: IntArray = np.cumsum(is_last) - is_last
    has_mark = _ends_with_mark(block.data, byte_ends)
    joins = _joins(rules, words[kept], paragraphs[kept], has_mark[kept])
    # A run of joined sentences is one; its last sentence is where it ends.
    last_of_run = np.flatnonzero(~joins)
    chars = _add_runs(_num_chars(block.data, byte_ends)[kept] + 1, last_of_run) - 1
    is_short, is_long = chars < rules.min_chars, chars > rules.max_chars
    is_kept = np.zeros(len(last_words), np.bool_)
    runs: IntArray = np.cumsum(~joins) - ~joins
    is_kept[kept] = ~(is_short | is_long)[runs]
    ends_sentence = np.zeros(len(block.word_ends), np.bool_)
    ends_sentence[last_words[kept[last_of_run[~(is_short | is_long)]]]] = True
    counts = MergeCounts(
        punctuation_only=num_punctuation,
        merged=int(joins.sum()),
        too_short=int(is_short.sum()),
        too_long=int(is_long.sum()),
    )
    return np.repeat(is_kept, words), ends_sentence, counts


def _joins(
    rules: MergeRules, words: IntArray, paragraphs: IntArray, has_mark: BoolArray
) -> BoolArray:
    """Whether each sentence is merged with the next one, [Q]; only paragraphs that hold a short
    sentence and another one are looked at one by one.
    """
    joins = np.zeros(len(words), np.bool_)
    if not len(words):
        return joins
    is_first = np.diff(paragraphs, prepend=-1) != 0
    firsts = np.flatnonzero(is_first)
    ends = np.append(firsts[1:], len(words))
    is_affected = np.logical_or.reduceat(words < rules.min_words, firsts) & (ends - firsts > 1)
    for first, end in zip(firsts[is_affected].tolist(), ends[is_affected].tolist(), strict=True):
        marks = has_mark[first:end].tolist()
        for at in merge_paragraph(words[first:end].tolist(), marks, rules):
            joins[first + at] = True
    return joins


def merge_paragraph(words: list[int], has_mark: list[bool], rules: MergeRules) -> list[int]:
    """Return the sentences of a paragraph that are merged with the next one.

    While a sentence has too few words, the pair of neighbours with the fewest words together is
    merged, `END_MARK_PENALTY` added where the first ends with a mark; the earlier pair of equals;
    no pair above the largest size.
    """
    sizes = dict(enumerate(words))  # by the first sentence of each group
    last = list(range(len(words)))  # group -> its last sentence
    after = list(range(1, len(words) + 1))  # group -> the next group
    before = list(range(-1, len(words) - 1))
    num_short = sum(size < rules.min_words for size in words)
    joined: list[int] = []

    def pair(group: int) -> tuple[int, int, int, int]:
        """Return (cost, first group, sizes of both): a pair of other sizes is outdated."""
        size, other = sizes[group], sizes[after[group]]
        return size + other + END_MARK_PENALTY * has_mark[last[group]], group, size, other

    pairs = [pair(group) for group in range(len(words) - 1)]
    heapify(pairs)
    while num_short and pairs:
        _, group, size, other = heappop(pairs)
        following = after[group]
        is_current = sizes.get(group) == size and sizes.get(following) == other
        if not is_current or size + other > rules.max_words:
            continue
        joined.append(last[group])
        is_short = (size < rules.min_words) + (other < rules.min_words)
        num_short -= is_short - (size + other < rules.min_words)
        sizes[group] = size + sizes.pop(following)
        last[group], after[group] = last[following], after[following]
        if after[group] < len(words):
            before[after[group]] = group
            heappush(pairs, pair(group))
        if before[group] >= 0:
            heappush(pairs, pair(before[group]))
    return joined


def _is_punctuation(data: Bytes, ends: IntArray) -> BoolArray:
    """Whether each stretch of bytes holds no letter and no digit, [Q]."""
    starts = np.concatenate(([0], ends[:-1]))
    found = (
        ~np.logical_or.reduceat(_IS_ASCII_WORD[data], starts) if len(ends) else np.zeros(0, bool)
    )
    for index in np.flatnonzero(found).tolist():
        text = data[starts[index] : ends[index]].tobytes().decode()
        found[index] = not any(character.isalnum() for character in text)
    return found


def _ends_with_mark(data: Bytes, ends: IntArray) -> BoolArray:
    """Whether each sentence ends with an end mark in front of its space, [Q]."""
    return _IS_END_MARK[data[np.maximum(ends - 2, 0)]]


def _num_chars(data: Bytes, ends: IntArray) -> IntArray:
    """Return the characters of each sentence without the space behind it, [Q]."""
    if not len(ends):
        return np.zeros(0, np.int64)
    starts = np.concatenate(([0], ends[:-1]))
    counts: IntArray = np.add.reduceat((data & 0xC0) != 0x80, starts, dtype=np.int64)
    return counts - (data[ends - 1] <= 0x20)


def _add_runs(values: IntArray, lasts: IntArray) -> IntArray:
    """Return the sum of each run of values, the runs given by their last places."""
    return np.diff(np.cumsum(values)[lasts], prepend=0)
