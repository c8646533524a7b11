"""Third step: the rows of all chunks to shuffled, equal shards, in memory that does not grow.

Each chunk's rows lie sorted by their keys, so the rows of one shard, a range of keys, are one
stretch of every chunk: no row is read twice and none is held that is not needed.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.row_step import ChunkRows
from data_prep.shard_format import ShardEntry, Split, file_sha256
from data_prep.shard_writer import ShardLayout, shard_sizes, write_shard
from data_prep.workspace import Workspace, load_json, save_json

_BINS_BITS = 16
_KEY_BYTES = 8
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ShardJob:
    """One shard and the stretches of rows that it is made of; carried to a worker."""

    out: Path
    split: Split
    index: int
    first: int
    """Global number of its first row."""
    stretches: tuple[tuple[int, int, int], ...]
    """(chunk, first row, number of rows)"""
    dtype: np.dtype[np.void]
    layout: ShardLayout


@dataclass(frozen=True)
class DoneShard:
    """A finished shard."""

    split: Split
    entry: ShardEntry
    seconds: dict[str, float]


def shard_jobs(
    out: Path,
    split: Split,
    chunks: Sequence[ChunkRows],
    dtype: np.dtype[np.void],
    layout: ShardLayout,
) -> Iterator[ShardJob]:
    """Yield the jobs that make all shards of one split."""
    sizes = shard_sizes(sum(chunk.num_rows for chunk in chunks), layout.rows_per_shard)
    firsts = [0, *accumulate(sizes)]
    bounds = _bounds(out, split, chunks, firsts[1:-1])
    for index in range(len(sizes)):
        stretches = tuple(
            (chunk.index, int(bounds[number, index]), int(bounds[number, index + 1] - start))
            for number, chunk in enumerate(chunks)
            if (start := bounds[number, index]) < bounds[number, index + 1]
        )
        yield ShardJob(out, split, index, firsts[index], stretches, dtype, layout)


def shard_job(job: ShardJob) -> DoneShard:
    """Gather, shuffle, mask and write one shard, unless an earlier run has done so."""
    workspace = Workspace(job.out)
    known = workspace.shard(job.split, job.index)
    path = job.out / f"{job.split}_{job.index:05d}.hdf5"
    fact = load_json(known)
    if fact and path.exists() and file_sha256(path) == fact["sha256"]:
        return DoneShard(job.split, ShardEntry(**fact), {})
    start = time.perf_counter()
    parts = [_read(workspace, job, stretch) for stretch in job.stretches]
    keys = np.concatenate([keys for keys, _ in parts])
    rows = np.concatenate([rows for _, rows in parts])
    del parts
    rows = rows[np.argsort(keys)]
    gathered = time.perf_counter()
    entry = write_shard(path, rows, job.first, job.layout)
    save_json(known, entry.__dict__)
    seconds = {"shuffling": gathered - start, "writing shards": time.perf_counter() - gathered}
    return DoneShard(job.split, entry, seconds)


def _read(
    workspace: Workspace, job: ShardJob, stretch: tuple[int, int, int]
) -> tuple[Keys, npt.NDArray[np.void]]:
    chunk, first, count = stretch
    path = workspace.rows(job.split, chunk)
    keys = np.fromfile(path.with_suffix(".keys"), np.uint64, count, offset=first * _KEY_BYTES)
    rows = np.fromfile(path, job.dtype, count, offset=first * job.dtype.itemsize)
    return keys, rows


def _bounds(
    out: Path, split: Split, chunks: Sequence[ChunkRows], ranks: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return where each shard's rows begin in each chunk, [chunks, shards + 1].

    `ranks` are the global numbers of the shards' first rows, without shard 0's. A histogram of the
    keys' upper bits tells the bin of each; only the keys of those bins are then sorted.
    """
    histogram = np.zeros(1 << _BINS_BITS, np.int64)
    for chunk in chunks:
        histogram += np.bincount(_bins(_keys(out, split, chunk)), minlength=len(histogram))
    before = np.concatenate([[0], np.cumsum(histogram)])
    bins = np.searchsorted(before, ranks, side="right") - 1
    is_needed = np.zeros(len(histogram), np.bool_)
    is_needed[bins] = True
    found = [keys[is_needed[_bins(keys)]] for keys in (_keys(out, split, c) for c in chunks)]
    candidates = np.sort(np.concatenate([*found, np.zeros(0, np.uint64)]))
    # The candidates of the bins below come first: subtract the keys that were left out.
    left_out = np.concatenate([[0], np.cumsum(np.where(is_needed, 0, histogram))])
    edges = candidates[np.asarray(ranks, np.int64) - left_out[bins]]
    bounds = np.zeros((len(chunks), len(ranks) + 2), np.int64)
    for number, chunk in enumerate(chunks):
        bounds[number, 1:-1] = np.searchsorted(_keys(out, split, chunk), edges, side="left")
        bounds[number, -1] = chunk.num_rows
    return bounds


def _keys(out: Path, split: Split, chunk: ChunkRows) -> Keys:
    path = Workspace(out).rows(split, chunk.index).with_suffix(".keys")
    return np.fromfile(path, np.uint64)


def _bins(keys: Keys) -> npt.NDArray[np.int64]:
    return (keys >> np.uint64(64 - _BINS_BITS)).astype(np.int64)
