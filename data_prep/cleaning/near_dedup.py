"""Near-duplicate documents by MinHash: signatures of documents in, a flag for each but the first of
every group of near copies out.
"""

import importlib
import importlib.util
import shutil
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.cleaning.dedup import FirstOccurrences, Hashes, append_array, make_folder
from data_prep.errors import DataError
from data_prep.text_block import BoolArray, IntArray

Signatures = npt.NDArray[np.uint32]

# Words that make one element of a document's set; 5 as in GPT-3's and the Pile's filters.
SHINGLE_WORDS = 5
_SEED = 1  # of datasketch's permutations
# Of false and of missed candidates in the choice of bands: a false one only costs a comparison.
_WEIGHTS = (0.1, 0.9)
# Above it datasketch finds a single band best, which it then refuses.
_MOST_LSH_THRESHOLD = 0.9
# Shingles hashed at a time: with 128 permutations a matrix of 2 MB, which stays in the cache.
_SHINGLES_A_BATCH = 4096
# Pairs of signatures compared at a time: with 128 permutations 2 x 8 MB.
_PAIRS_A_BATCH = 1 << 14
# A band's bucket of documents that are not alike is compared with at most this many of them.
_MOST_LEADERS = 64
# Odd constants of the splitmix64 generator (Steele et al., 2014).
_MULTIPLIER, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def signatures(texts: Sequence[str], num_perm: int) -> Signatures:
    """Return the MinHash signature of each text, [D, num_perm], over its lower-case word 5-grams.

    A text of fewer words is one shingle. The same on every machine; needs the package datasketch.
    """
    minhash = _datasketch().MinHash
    permutations = minhash(num_perm, seed=_SEED, scheme="affine32").permutations
    found = np.empty((len(texts), num_perm), np.uint32)
    for index, text in enumerate(texts):
        shingles = _shingles(text)
        sketch = minhash(
            num_perm, seed=_SEED, hashfunc=int, permutations=permutations, scheme="affine32"
        )
        for start in range(0, len(shingles), _SHINGLES_A_BATCH):
            sketch.update_batch(shingles[start : start + _SHINGLES_A_BATCH].tolist())
        found[index] = sketch.hashvalues
    return found


def _shingles(text: str) -> npt.NDArray[np.uint32]:
    """Return the hashes of all runs of 5 words, at least one."""
    words = text.lower().encode("utf-8").split()
    hashes = np.zeros(max(len(words), SHINGLE_WORDS), np.uint64)
    hashes[: len(words)] = np.fromiter(
        map(xxhash.xxh3_64_intdigest, words), np.uint64, count=len(words)
    )
    count = len(hashes) - SHINGLE_WORDS + 1
    return (_fold([hashes[k : k + count] for k in range(SHINGLE_WORDS)]) >> np.uint64(32)).astype(
        np.uint32
    )


def _fold(columns: Sequence[Hashes]) -> Hashes:
    """Hash rows of numbers, given as columns [n], to one number each, [n]."""
    folded = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        folded = (folded ^ column.astype(np.uint64)) * _MULTIPLIER
        folded ^= folded >> np.uint64(29)
        folded *= _MIX
        folded ^= folded >> np.uint64(32)
    return folded


class NearDuplicates:
    """Groups documents whose signatures agree in at least `threshold` of their places.

    Candidates share a band of their signatures (locality-sensitive hashing; datasketch chooses the
    number of bands b and their rows); each is compared whole with the first of its bucket. `folder`
    must be this object's own and is removed at the end: it takes 4 * num_perm + 9 * b bytes a
    document. Memory: max_bytes, 8 bytes a block, and about 60 a document that shares a band.
    """

    def __init__(
        self, folder: Path, threshold: float, num_perm: int, max_bytes: int = 128 << 20
    ) -> None:
        assert 0 < threshold <= 1, "a share of equal places"
        self._folder, self._threshold, self._num_perm = folder, threshold, num_perm
        self._bands = FirstOccurrences(folder / "bands", max_bytes)
        self._band_ends: list[tuple[int, int]] = []
        self._sizes = array("q")  # documents of each block

    def add(self, signatures: Signatures) -> None:
        """Take the signatures of the next block, [D, num_perm]."""
        assert signatures.shape[1:] == (self._num_perm,), "the signatures' width is num_perm"
        if not self._sizes:
            self._start()
        self._sizes.append(len(signatures))
        append_array(self._folder / "signatures", signatures.astype(np.uint32))
        self._bands.add(self._band_hashes(signatures).ravel())

    def duplicates(self) -> Iterator[BoolArray]:
        """Yield a block's flags, [D], in the order of the blocks: True for every document of a
        group but its first. To be called once, after the last add.
        """
        try:
            if self._sizes:
                later = self._later_documents()
                for start, end in pairwise(accumulate(self._sizes, initial=0)):
                    first, last = np.searchsorted(later, (start, end))
                    flags = np.zeros(end - start, np.bool_)
                    flags[later[first:last] - start] = True
                    yield flags
        finally:
            self.close()

    def close(self) -> None:
        """Remove the files; also done when the flags are used up."""
        self._bands.close()
        if self._sizes:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        make_folder(self._folder)
        threshold = min(self._threshold, _MOST_LSH_THRESHOLD)
        lsh = _datasketch().MinHashLSH(threshold, self._num_perm, weights=_WEIGHTS)
        self._band_ends = [(band * lsh.r, (band + 1) * lsh.r) for band in range(lsh.b)]

    def _band_hashes(self, signatures: Signatures) -> Hashes:
        """Return a hash a band, [D, b]; the bands' numbers are hashed along."""
        found = np.empty((len(signatures), len(self._band_ends)), np.uint64)
        for band, (start, end) in enumerate(self._band_ends):
            number = np.full(len(signatures), band, np.uint64)
            found[:, band] = _fold([number, *signatures[:, start:end].T])
        return found

    def _later_documents(self) -> IntArray:
        """Return the numbers of the documents that are in a group and not its first, ascending."""
        matched = self._write_matches()
        parents = np.arange(len(matched))
        for band in range(len(self._band_ends)):
            path = self._band_path(band)
            if path.exists():
                hashes, documents = np.fromfile(path, np.uint64).reshape(-1, 2).T
                for pairs in self._alike(hashes, documents.astype(np.int64)):
                    _unite(parents, np.searchsorted(matched, pairs))
        is_later: BoolArray = parents != np.arange(len(matched))
        return np.asarray(matched[is_later], np.int64)

    def _write_matches(self) -> IntArray:
        """Write (hash, document) of the documents that share a band with another, a file a band;
        return the numbers of all these documents, ascending.
        """
        found = [np.zeros(0, np.int64)]
        starts = accumulate(self._sizes, initial=0)
        for start, size, flags in zip(starts, self._sizes, self._bands.repeated(), strict=False):
            if not flags.any():
                continue
            rows = self._read(start, size)
            is_shared = flags.reshape(size, -1)
            hashes = self._band_hashes(rows)
            for band in np.flatnonzero(is_shared.any(axis=0)).tolist():
                inside = np.flatnonzero(is_shared[:, band])
                pairs = np.stack([hashes[inside, band], (inside + start).astype(np.uint64)], 1)
                append_array(self._band_path(band), pairs)
            found.append(np.flatnonzero(is_shared.any(axis=1)) + start)
        return np.concatenate(found)

    def _alike(self, hashes: Hashes, documents: IntArray) -> Iterator[IntArray]:
        """Yield pairs [n, 2] of documents of one bucket that are alike indeed.

        Each document of a bucket is compared with the bucket's first; those unlike it make a bucket
        of their own, and so on.
        """
        order = np.lexsort((documents, hashes))
        hashes, documents = hashes[order], documents[order]
        for _ in range(_MOST_LEADERS):
            is_first = np.concatenate([[True], hashes[1:] != hashes[:-1]])
            leaders = documents[
                np.maximum.accumulate(np.where(is_first, np.arange(len(hashes)), 0))
            ]
            pairs = np.stack([leaders, documents], 1)[~is_first]
            if not len(pairs):
                return
            is_alike = self._are_alike(pairs)
            yield pairs[is_alike]
            hashes, documents = hashes[~is_first][~is_alike], documents[~is_first][~is_alike]
            if not len(hashes):
                return

    def _are_alike(self, pairs: IntArray) -> BoolArray:
        """Compare the signatures of pairs of documents, [n, 2], a batch at a time; return [n]."""
        found = np.empty(len(pairs), np.bool_)
        for start in range(0, len(pairs), _PAIRS_A_BATCH):
            # Mapped anew for each batch, so that pages that were read do not pile up.
            rows = np.memmap(self._folder / "signatures", np.uint32, "r").reshape(
                -1, self._num_perm
            )
            batch = slice(start, start + _PAIRS_A_BATCH)
            num_equal = (rows[pairs[batch, 0]] == rows[pairs[batch, 1]]).sum(axis=1)
            found[batch] = num_equal / self._num_perm >= self._threshold
        return found

    def _read(self, start: int, size: int) -> Signatures:
        width = self._num_perm
        rows = np.fromfile(
            self._folder / "signatures", np.uint32, size * width, offset=4 * start * width
        )
        return rows.reshape(size, width)

    def _band_path(self, band: int) -> Path:
        return self._folder / f"band-{band:03}"


def _unite(parents: IntArray, pairs: IntArray) -> None:
    """Join the groups of each pair, [n, 2]; the parent of a document is its group's first, [M]."""
    while True:
        roots = parents[pairs]
        lower, upper = roots.min(axis=1), roots.max(axis=1)
        if (lower == upper).all():
            return
        np.minimum.at(parents, upper, lower)
        while not np.array_equal(further := parents[parents], parents):
            parents[:] = further


def _datasketch() -> Any:
    """Return the package; it takes most of a second to import."""
    if importlib.util.find_spec("datasketch") is None:
        raise DataError(
            "near-duplicates need the package datasketch (2.0 or later): install it, or leave out "
            "--near-dedup"
        )
    return importlib.import_module("datasketch")
