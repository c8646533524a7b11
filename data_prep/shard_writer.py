"""Rows in, one HDF5 shard out, written whole or not at all; and a folder that one run owns."""

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import h5py
import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from data_prep.errors import DataError, ShardError
from data_prep.masking import IGNORED, MaskingPolicy, mask_tokens
from data_prep.shard_format import (
    IN_PROGRESS,
    ShardEntry,
    file_sha256,
    find_shards,
    sync_folder,
)

WORK = ".work"
# Which random numbers order the rows of a split.
SHUFFLE_STREAM = {"training": 1, "validation": 2}
# What else a run writes into its folder; shards are found by their names.
OTHER_FILES = ("tokenizer.json", "vocab.txt", "token_counts.npy", "manifest.json", "report.html")
# Masks and gzip chunks are made this many rows at a time: about 5 MB of work at S = 128, which
# stays in a core's cache.
ROWS_AT_ONCE = 1024
_NVIDIA_TYPES = {
    "input_ids": "i4",
    "input_mask": "i1",
    "segment_ids": "i1",
    "masked_lm_positions": "i4",
    "masked_lm_ids": "i4",
    "next_sentence_labels": "i1",
}
# ISA-L's level 1 is 7 times as fast as zlib's 4, h5py's default, and its files are 2 % smaller.
_GZIP_LEVEL = 1


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """How rows become files; `masking` set: static masks, NVIDIA's dialect."""

    rows_per_shard: int
    seed: int
    pad_id: int
    attributes: dict[str, int | str]
    masking: MaskingPolicy | None = None


def shard_sizes(num_rows: int, rows_per_shard: int) -> list[int]:
    """Deal rows to the fewest shards of at most `rows_per_shard`, equal to within one row."""
    num_shards = max(1, -(-num_rows // rows_per_shard))
    small, larger = divmod(num_rows, num_shards)
    return [small + (index < larger) for index in range(num_shards)]


def write_shard(
    path: Path, rows: npt.NDArray[np.void], first: int, layout: ShardLayout
) -> ShardEntry:
    """Write rows (`instances.row_type`) as one file.

    `first` is the global number of the first row: it names the rows for their static masks.
    """

    def fill(file: h5py.File) -> None:
        if layout.masking is None:
            for name in rows.dtype.names or ():
                file.create_dataset(name, data=np.ascontiguousarray(rows[name]))
        else:
            fill_nvidia(
                file,
                len(rows),
                lambda start, stop: _nvidia_block(rows[start:stop], first + start, layout),
            )

    return write_file(path, len(rows), layout.attributes, fill)


def write_file(
    path: Path,
    num_rows: int,
    attributes: Mapping[str, int | str],
    fill: Callable[[h5py.File], None],
) -> ShardEntry:
    """Write one HDF5 file whole or not at all: under a temporary name, flushed, renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with h5py.File(temporary, "w") as file:
        for name, value in attributes.items():
            file.attrs[name] = value
        fill(file)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    entry = ShardEntry(path.name, num_rows, file_sha256(temporary))
    temporary.replace(path)
    sync_folder(path.parent)
    return entry


def fill_nvidia(
    file: h5py.File,
    num_rows: int,
    block_of: Callable[[int, int], Mapping[str, npt.NDArray[np.generic]]],
) -> None:
    """Write the six gzip datasets of NVIDIA's create_pretraining_data.py.

    `block_of(start, stop)` gives their rows; they are asked for ROWS_AT_ONCE at a time.
    """
    chunk = min(ROWS_AT_ONCE, num_rows)
    for start in range(0, num_rows, chunk):
        block = block_of(start, min(start + chunk, num_rows))
        for name, dtype in _NVIDIA_TYPES.items():
            shape = block[name].shape[1:]
            if start == 0:
                file.create_dataset(
                    name, (num_rows, *shape), dtype, compression="gzip", chunks=(chunk, *shape)
                )
            _write_gzip(file[name], start, block[name], chunk)


@contextmanager
def exclusive_folder(out: Path, fingerprint: str = "") -> Iterator[bool]:
    """Own the output folder while shards are made: no second run gets in.

    Yields whether an unfinished run with this `fingerprint` left its work here, to be continued;
    other leftovers are removed. The lock dies with its process. The marker file outlives a kill,
    and an error too where there is a fingerprint: it says that what lies here is ours to remove.
    """
    marker = out / IN_PROGRESS
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in out.iterdir()) if not marker.exists() else []
        if foreign:
            raise ShardError(
                f"{out}: not empty ({', '.join(foreign[:3])}); choose another --out, or remove it"
            )
        stream = marker.open("a+")
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
    with stream:
        _lock(stream, out)
        is_whole = False
        try:
            yield _claim(stream, out, fingerprint)
            is_whole = True
        except OSError as error:
            # Inputs raise their own DataError: what is left is the output.
            raise DataError(
                f"{out}: cannot be written (is the disk full?): {error.strerror or error}"
            ) from error
        finally:
            if is_whole:
                _remove_work(out)
            elif not fingerprint:
                _remove_leftovers(out)
            if is_whole or not fingerprint:
                marker.unlink()


def _claim(stream: IO[str], out: Path, fingerprint: str) -> bool:
    """Write our fingerprint into the marker, unless it is there; remove another run's leftovers."""
    stream.seek(0)
    is_continued = bool(fingerprint) and stream.read() == fingerprint
    if not is_continued:
        _remove_leftovers(out)
        stream.truncate(0)
        stream.write(fingerprint)
        stream.flush()
    return is_continued


def _lock(stream: IO[str], out: Path) -> None:
    busy = f"{out}: another run is writing into this folder; wait for it, or choose another --out"
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ShardError(busy) from error
    # The run that held the lock may have finished and unlinked the marker since we opened it.
    if os.fstat(stream.fileno()).st_nlink == 0:
        raise ShardError(busy)


def _remove_leftovers(out: Path) -> None:
    """Remove what an unfinished run wrote, and nothing else."""
    _remove_work(out)
    ours = [out / name for name in OTHER_FILES]
    ours += [*find_shards(out, "training"), *find_shards(out, "validation"), *out.glob(".*.tmp")]
    for path in ours:
        path.unlink(missing_ok=True)


def _remove_work(out: Path) -> None:
    """Remove the folder of intermediate files; nobody else writes there."""
    folders = [out / WORK]
    for folder in folders:
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir():
                folders.append(path)
            else:
                path.unlink()
    for folder in reversed(folders):
        if folder.is_dir():
            folder.rmdir()


def _write_gzip(
    dataset: h5py.Dataset, start: int, values: npt.NDArray[np.generic], chunk: int
) -> None:
    """Write one compressed chunk as HDF5's own gzip filter would; the last one is padded."""
    whole = np.zeros((chunk, *values.shape[1:]), dataset.dtype)
    whole[: len(values)] = values
    offset = (start, *[0] * (values.ndim - 1))
    dataset.id.write_direct_chunk(offset, isal_zlib.compress(whole.data, _GZIP_LEVEL))


def _nvidia_block(
    block: npt.NDArray[np.void], first: int, layout: ShardLayout
) -> dict[str, npt.NDArray[np.generic]]:
    """Return the six arrays of some rows, label 0 throughout where there are no pairs; `first`: the
    first one's global row number.
    """
    policy = layout.masking
    assert policy is not None, "static masks need a policy"
    originals = block["input_ids"].astype(np.int64)
    indices = np.arange(first, first + len(block))
    masked = mask_tokens(originals, policy, seed=layout.seed, epoch=0, sample_indices=indices)
    has_pairs = "next_sentence_labels" in (block.dtype.names or ())
    return {
        "input_ids": masked.input_ids,
        "input_mask": originals != layout.pad_id,
        "segment_ids": block["segment_ids"],
        "masked_lm_positions": masked.masked_lm_positions,
        "masked_lm_ids": np.where(masked.masked_lm_ids == IGNORED, 0, masked.masked_lm_ids),
        "next_sentence_labels": block["next_sentence_labels"] if has_pairs else 0 * indices,
    }
