"""Exact duplicates in bounded memory: 64-bit hashes of paragraphs or documents in, a flag for each
that was seen before out.
"""

import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.errors import DataError
from data_prep.text_block import BoolArray, TextBlock

Hashes = npt.NDArray[np.uint64]
Solver = Callable[[Hashes], BoolArray]

# Peak bytes a hash while it is solved or partitioned: itself twice, sort keys, order, flags.
_SOLVING_BYTES = 48
# Levels of 8 bits that partition a hash of 64; behind the last one all hashes are equal.
_LEVELS = 8
_ORDER = "order"


def paragraph_hashes(block: TextBlock) -> Hashes:
    """Return the hash of each paragraph's UTF-8 bytes without the line end, [P]."""
    return _hashes(block.text.split(b"\n")[:-1])


def document_hashes(block: TextBlock) -> Hashes:
    """Return the hash of each document's UTF-8 bytes without the last line end, [D]."""
    view = memoryview(block.text)
    ends = block.document_ends.tolist()
    return _hashes([view[a : b - 1] for a, b in pairwise([0, *ends])])


def _hashes(pieces: Sequence[bytes] | Sequence[memoryview]) -> Hashes:
    return np.fromiter(map(xxhash.xxh3_64_intdigest, pieces), np.uint64, len(pieces))


class FirstOccurrences:
    """Finds hashes that were seen before in a stream of any length, within `max_bytes` of memory.

    Streams that do not fit are partitioned by hash into files and solved a partition at a time.
    `folder` must be this object's own: it is made when files are needed, what a killed run left in
    it is deleted, and it is removed at the end. Not counted in max_bytes: 8 bytes a block.
    """

    def __init__(self, folder: Path, max_bytes: int = 128 << 20) -> None:
        self._folder = folder
        self._most = max(1, max_bytes // _SOLVING_BYTES)
        self._sizes = array("q")  # hashes of each block
        self._held: list[Hashes] = []
        self._num_held = 0
        self._partitions: _Partitions | None = None

    def add(self, hashes: Hashes) -> None:
        """Take the hashes of the next block, [n]."""
        if self._num_held and self._num_held + len(hashes) > self._most:
            self._spill()
        self._sizes.append(len(hashes))
        self._held.append(hashes.astype(np.uint64))
        self._num_held += len(hashes)

    def duplicates(self) -> Iterator[BoolArray]:
        """Yield a block's flags, [n], in the order of the blocks: True where the hash came before,
        in an earlier block or earlier in this one. To be called once, after the last add.
        """
        return self._solve(find_duplicates)

    def repeated(self) -> Iterator[BoolArray]:
        """Yield a block's flags like duplicates, but True for the first of several as well."""
        return self._solve(find_repeated)

    def _solve(self, solver: Solver) -> Iterator[BoolArray]:
        try:
            if self._partitions is None:
                yield from cut_flags([solver(self._take())], self._sizes)
            else:
                self._spill()
                yield from cut_flags(self._partitions.flags(solver), self._sizes)
        finally:
            self.close()

    def close(self) -> None:
        """Remove the files; also done when the flags are used up."""
        self._held = []
        if self._partitions is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _spill(self) -> None:
        if self._partitions is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._partitions = _Partitions(self._folder, 0, self._most)
        self._partitions.append(self._take())

    def _take(self) -> Hashes:
        taken = np.concatenate([np.zeros(0, np.uint64), *self._held])
        self._held, self._num_held = [], 0
        return taken


def find_duplicates(hashes: Hashes) -> BoolArray:
    """Return True where the same hash stands further ahead, [n]."""
    return _find(hashes, "later")


def find_repeated(hashes: Hashes) -> BoolArray:
    """Return True where the same hash stands anywhere else, [n]."""
    return _find(hashes, "all")


def _find(hashes: Hashes, which: Literal["later", "all"]) -> BoolArray:
    """Sort one word a hash, its high bits above its index: five times as fast as a stable argsort.
    Hashes that are alike in the high bits, nearly all of them duplicates, are compared whole.
    """
    found = np.zeros(len(hashes), np.bool_)
    if len(hashes) < 2:
        return found
    index_bits = (len(hashes) - 1).bit_length()
    keys = _sorted_keys(hashes, index_bits)
    mask = np.uint64((1 << index_bits) - 1)
    is_alike = (keys[1:] ^ keys[:-1]) <= mask
    in_run = np.zeros(len(hashes), np.bool_)
    in_run[:-1] = is_alike
    in_run[1:] |= is_alike
    keys = keys[in_run]
    places = (keys & mask).astype(np.int64)
    whole = hashes[places]
    is_equal = whole[1:] == whole[:-1]
    if (((keys[1:] ^ keys[:-1]) <= mask) & ~is_equal).any():
        # Rare: different hashes in one run. Equal ones must stand together, in their order.
        order = np.lexsort((places, whole))
        places, whole = places[order], whole[order]
        is_equal = whole[1:] == whole[:-1]
    found[places[1:][is_equal]] = True
    if which == "all":
        found[places[:-1][is_equal]] = True
    return found


def _sorted_keys(values: Hashes, index_bits: int) -> Hashes:
    """Return the values, their low bits replaced by their index, in ascending order, [n]."""
    mask = np.uint64((1 << index_bits) - 1)
    keys = values & ~mask
    keys |= np.arange(len(values), dtype=np.uint64)
    keys.sort()
    return keys


class _Partitions:
    """Hashes on disk by 8 of their bits: for each partition a file of hashes in the order in which
    they came, and a file that says to which partition each one went.
    """

    def __init__(self, folder: Path, level: int, most: int) -> None:
        make_folder(folder)
        self._folder, self._level, self._most = folder, level, most
        self._batch_sizes = array("q")
        self._counts = np.zeros(256, np.int64)  # hashes of each partition

    def append(self, hashes: Hashes) -> None:
        """Write the hashes, [n], behind those before them."""
        if not len(hashes):
            return
        names = (hashes >> np.uint64(56 - 8 * self._level)).astype(np.uint8)
        hashes = hashes[_order_of(names)]
        counts = np.bincount(names, minlength=256)
        ends = np.cumsum(counts).tolist()
        for name, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                append_array(self._path(name), hashes[start:end])
        append_array(self._folder / _ORDER, names)
        self._batch_sizes.append(len(names))
        self._counts += counts

    def flags(self, solver: Solver) -> Iterator[BoolArray]:
        """Solve each partition, then yield the flags in the order of the hashes, batch by batch."""
        for name in np.flatnonzero(self._counts).tolist():
            for flags in self._solved(name, solver):
                append_array(self._flags_path(name), flags)
            self._path(name).unlink()
        read, starts = 0, np.zeros(256, np.int64)
        for size in self._batch_sizes:
            names = np.fromfile(self._folder / _ORDER, np.uint8, size, offset=read)
            counts = np.bincount(names, minlength=256)
            parts = [
                np.fromfile(self._flags_path(name), np.bool_, counts[name], offset=starts[name])
                for name in np.flatnonzero(counts).tolist()
            ]
            flags = np.empty(size, np.bool_)
            flags[_order_of(names)] = np.concatenate(parts)
            yield flags
            read, starts = read + size, starts + counts

    def _solved(self, name: int, solver: Solver) -> Iterator[BoolArray]:
        """Yield the flags of one partition; one that is too large is partitioned again."""
        path, size = self._path(name), int(self._counts[name])
        if size <= self._most:
            yield solver(np.fromfile(path, np.uint64))
            return
        pieces = (
            np.fromfile(path, np.uint64, self._most, offset=8 * start)
            for start in range(0, size, self._most)
        )
        if self._level + 1 == _LEVELS:
            # All equal: more than one, so the flags of two say those of all.
            first, later = solver(np.fromfile(path, np.uint64, 2)).tolist()
            for number, piece in enumerate(pieces):
                flags = np.full(len(piece), later, np.bool_)
                flags[0] = later if number else first
                yield flags
            return
        inner = _Partitions(self._folder / f"{name:02x}", self._level + 1, self._most)
        for piece in pieces:
            inner.append(piece)
        yield from inner.flags(solver)

    def _path(self, name: int) -> Path:
        return self._folder / f"{name:02x}.hashes"

    def _flags_path(self, name: int) -> Path:
        return self._folder / f"{name:02x}.flags"


def _order_of(names: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Return the stable order by name, [n]."""
    index_bits = max(1, (len(names) - 1).bit_length())
    keys = _sorted_keys(names.astype(np.uint64) << np.uint64(56), index_bits)
    return (keys & np.uint64((1 << index_bits) - 1)).astype(np.int64)


def cut_flags(
    batches: Sequence[BoolArray] | Iterator[BoolArray], sizes: "array[int]"
) -> Iterator[BoolArray]:
    """Yield flags cut into blocks of these sizes; a batch holds whole blocks."""
    remaining = iter(batches)
    flags = np.zeros(0, np.bool_)
    for size in sizes:
        if size > len(flags):
            assert not len(flags), "a batch ends inside a block"
            flags = next(remaining)
        yield flags[:size]
        flags = flags[size:]


def make_folder(folder: Path) -> None:
    """Make a folder with its parents; raise DataError where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror or error}") from error


def append_array(path: Path, values: npt.NDArray[np.generic]) -> None:
    """Write values at the end of a file; raise DataError where that fails, as on a full disk."""
    try:
        with path.open("ab") as stream:
            stream.write(np.ascontiguousarray(values).data)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}; de-duplication needs the "
            "disk meanwhile: 9 bytes a paragraph, and 512 a document for near-duplicates"
        ) from error
