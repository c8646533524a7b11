"""line_filters: counts over all lines at once are those of each line."""

import string

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning.line_filters import count_characters, measure_lines
from data_prep.text_block import TextBlock

LINES = st.lists(st.text("aZ@[`{ 0/\\|\u00e9\u4e00\U0001f600", min_size=1, max_size=9), max_size=7)


def _block(lines: list[str]) -> TextBlock:
    return TextBlock.from_texts(["\n".join(lines)] if lines else [])


@given(LINES)
def test_measures_are_those_of_each_line(lines: list[str]) -> None:
    measures = measure_lines(_block(lines))
    assert measures.characters.tolist() == [len(line) for line in lines]
    assert measures.letters.tolist() == [
        sum(character in string.ascii_letters for character in line) for line in lines
    ]
    assert measures.slashes.tolist() == [line.count("/") for line in lines]
    assert measures.backslashes.tolist() == [line.count("\\") for line in lines]
    assert measures.pipes.tolist() == [line.count("|") for line in lines]
    assert measures.begins_with_pipe.tolist() == [line[0] == "|" for line in lines]


@given(LINES)
def test_characters_are_counted_without_line_ends(lines: list[str]) -> None:
    assert count_characters(_block(lines)) == sum(map(len, lines))
    is_counted = np.arange(len(lines)) % 2 == 0
    assert count_characters(_block(lines), is_counted) == sum(map(len, lines[::2]))
