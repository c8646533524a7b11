"""dedup: the flags of a dictionary of everything seen, whatever the memory allowed."""

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning import dedup
from data_prep.cleaning.dedup import (
    FirstOccurrences,
    Hashes,
    document_hashes,
    find_duplicates,
    find_repeated,
    paragraph_hashes,
)
from data_prep.errors import DataError
from data_prep.text_block import BoolArray, TextBlock

# Few values, alike in their high or low bits, and many.
HASHES = st.sampled_from([0, 1, 2, 1 << 63, (1 << 63) + 1, 2**64 - 1, 1 << 56, 3 << 40]) | (
    st.integers(0, 2**64 - 1)
)
BLOCKS = st.lists(st.lists(HASHES, max_size=9), max_size=9)
TINY = 48 * 5  # bytes: five hashes at a time


def _seen_before(blocks: list[list[int]]) -> list[list[bool]]:
    seen: set[int] = set()
    flags: list[list[bool]] = []
    for block in blocks:
        flags.append([])
        for value in block:
            flags[-1].append(value in seen)
            seen.add(value)
    return flags


def _elsewhere(blocks: list[list[int]]) -> list[list[bool]]:
    values = [value for block in blocks for value in block]
    return [[values.count(value) > 1 for value in block] for block in blocks]


def _array(values: list[int]) -> Hashes:
    return np.array(values, np.uint64)


def _filled(folder: Path, blocks: list[list[int]], max_bytes: int) -> FirstOccurrences:
    first = FirstOccurrences(folder, max_bytes)
    for block in blocks:
        first.add(_array(block))
    return first


def test_hashes_are_those_of_the_utf8_bytes() -> None:
    block = TextBlock.from_texts(["a b\n\u00e9", "c"])
    expected = [xxhash.xxh3_64_intdigest(text.encode()) for text in ("a b", "\u00e9", "c")]
    assert paragraph_hashes(block).tolist() == expected
    whole = [xxhash.xxh3_64_intdigest(text.encode()) for text in ("a b\n\u00e9", "c")]
    assert document_hashes(block).tolist() == whole
    assert paragraph_hashes(TextBlock.from_texts([])).shape == (0,)
    assert document_hashes(TextBlock.from_texts([])).shape == (0,)


@given(st.lists(HASHES))
def test_solving_in_memory_agrees_with_a_dictionary(values: list[int]) -> None:
    assert find_duplicates(_array(values)).tolist() == _seen_before([values])[0]
    assert find_repeated(_array(values)).tolist() == _elsewhere([values])[0]


@given(BLOCKS, st.sampled_from([1, TINY, 1 << 20]))
@settings(max_examples=40, deadline=None)
def test_flags_do_not_depend_on_the_memory(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[list[int]], max_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("dedup") / "own"
    flags = list(_filled(folder, blocks, max_bytes).duplicates())
    assert [block.tolist() for block in flags] == _seen_before(blocks)
    flags = list(_filled(folder, blocks, max_bytes).repeated())
    assert [block.tolist() for block in flags] == _elsewhere(blocks)
    assert not folder.exists()


def test_a_value_that_fills_the_corpus_is_solved_in_bounded_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [[7] * 4, [9, 7, 7], [7] * 5, [7, 9]]
    first = _filled(tmp_path / "own", blocks, TINY)
    sizes: list[int] = []

    def solver(hashes: Hashes) -> BoolArray:
        sizes.append(len(hashes))
        return find_duplicates(hashes)

    monkeypatch.setattr(dedup, "find_duplicates", solver)
    assert [block.tolist() for block in first.duplicates()] == _seen_before(blocks)
    assert max(sizes) <= 5


def test_a_large_stream_on_disk_gives_the_flags_of_memory(tmp_path: Path) -> None:
    values = np.random.default_rng(5).integers(0, 40_000, 100_000).astype(np.uint64)
    values *= np.uint64(0x9E3779B97F4A7C15)
    first = FirstOccurrences(tmp_path / "own", 48 * 3_000)
    for block in np.array_split(values, 61):
        first.add(block)
    assert (tmp_path / "own").exists()
    assert np.array_equal(np.concatenate(list(first.duplicates())), find_duplicates(values))


def test_small_streams_touch_no_disk(tmp_path: Path) -> None:
    first = _filled(tmp_path / "own", [[1, 2], [2]], 1 << 20)
    assert not (tmp_path / "own").exists()
    assert [flags.tolist() for flags in first.duplicates()] == [[False, False], [True]]


def test_blocks_may_be_changed_after_they_were_added(tmp_path: Path) -> None:
    first = FirstOccurrences(tmp_path / "own")
    block = _array([1, 2])
    first.add(block)
    block[:] = 2
    assert next(first.duplicates()).tolist() == [False, False]


def test_what_a_killed_run_left_is_not_read(tmp_path: Path) -> None:
    blocks = [[1, 2, 3, 4], [1, 5, 6]]
    killed = _filled(tmp_path / "own", [*blocks, [8, 9, 10]], TINY)
    assert (tmp_path / "own").exists()
    del killed
    again = _filled(tmp_path / "own", blocks, TINY)
    assert [flags.tolist() for flags in again.duplicates()] == _seen_before(blocks)


def test_files_go_when_the_reader_stops_early(tmp_path: Path) -> None:
    flags: Iterator[object] = _filled(tmp_path / "own", [[1, 2, 3], [1, 2, 3]], TINY).duplicates()
    next(flags)
    assert (tmp_path / "own").exists()
    del flags
    assert not (tmp_path / "own").exists()


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _filled(tmp_path / "own", [[1, 2, 3]], TINY)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DataError, match=r"own/.*: cannot be written: No space left on device"):
        first.add(_array([4, 5, 6]))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first = _filled(tmp_path / "file" / "own", [[1, 2, 3]], TINY)
    with pytest.raises(DataError, match="own: cannot be made: Not a directory"):
        first.add(_array([4, 5, 6]))
