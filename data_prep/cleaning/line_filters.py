"""What line filters look at, for all paragraphs of a block at once: lengths, letters, slashes."""

from dataclasses import dataclass

import numpy as np

from data_prep.text_block import BoolArray, IntArray, TextBlock

_SLASH, _BACKSLASH, _PIPE = b"/\\|"
_CASE_BIT = 0x20
_LETTERS = (0x61, 0x7A)  # a to z


@dataclass(frozen=True, eq=False)
class LineMeasures:
    """Counts a paragraph, each [P]; characters are code points, the line end is not counted."""

    characters: IntArray
    letters: IntArray
    """ASCII letters."""
    slashes: IntArray
    backslashes: IntArray
    pipes: IntArray
    begins_with_pipe: BoolArray


def measure_lines(block: TextBlock) -> LineMeasures:
    """Return the counts of each paragraph of `block`."""
    text = np.frombuffer(block.text, np.uint8)
    ends = block.paragraph_ends
    starts = np.concatenate([np.zeros(min(1, ends.size), np.int64), ends[:-1]])
    folded = text | _CASE_BIT
    return LineMeasures(
        characters=_count((text & 0xC0) != 0x80, ends) - 1,
        letters=_count((folded >= _LETTERS[0]) & (folded <= _LETTERS[1]), ends),
        slashes=_count_rare(text == _SLASH, ends),
        backslashes=_count_rare(text == _BACKSLASH, ends),
        pipes=_count_rare(text == _PIPE, ends),
        begins_with_pipe=text[starts] == _PIPE,
    )


def count_characters(block: TextBlock, is_counted: BoolArray | None = None) -> int:
    """Return the characters of all paragraphs or of some, [P]; line ends are not counted."""
    starts_character = (np.frombuffer(block.text, np.uint8) & 0xC0) != 0x80
    if is_counted is None:
        return int(np.count_nonzero(starts_character)) - int(block.paragraph_ends.size)
    return int((_count(starts_character, block.paragraph_ends) - 1)[is_counted].sum())


def _count(is_counted: BoolArray, ends: IntArray) -> IntArray:
    """Count in each paragraph, [P]: differences of a running count."""
    running = np.cumsum(is_counted, dtype=np.int64)
    return np.diff(running[ends - 1], prepend=0)


def _count_rare(is_counted: BoolArray, ends: IntArray) -> IntArray:
    owners = np.searchsorted(ends, np.flatnonzero(is_counted), side="right")
    return np.bincount(owners, minlength=ends.size).astype(np.int64)
