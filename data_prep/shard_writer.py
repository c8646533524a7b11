"""Rows in, equal shuffled shards out: nothing half-written is ever taken for whole, and the
manifest comes last.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import h5py
import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError, ShardError
from data_prep.masking import IGNORED, IntArray, MaskingPolicy, hash_chain, mask_tokens
from data_prep.shard_format import (
    MANIFEST,
    TOKEN_COUNTS,
    ShardEntry,
    Split,
    file_sha256,
    find_shards,
    read_manifest,
    sync_folder,
)

IN_PROGRESS = ".in_progress"
SPOOL_SUFFIX = ".spool"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
# Masks and gzip are made this many rows at a time: some 30 MB at S = 512.
ROWS_AT_ONCE = 4096
_SHUFFLE_STREAM = {"training": 1, "validation": 2}


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """How rows become files; `masking` set: static masks, NVIDIA's dialect."""

    rows_per_shard: int
    seed: int
    pad_id: int
    attributes: dict[str, int | str]
    masking: MaskingPolicy | None = None


def check_finished(out: Path, settings: dict[str, object]) -> bool:
    """Say whether `out` already holds what `settings` would make; a ShardError if it holds
    something else.
    """
    manifest = read_manifest(out)
    if manifest is None:
        return False
    differing = sorted(
        key
        for key in settings.keys() | manifest.settings.keys()
        if settings.get(key) != manifest.settings.get(key)
    )
    if differing:
        changes = "; ".join(
            f"{key}: {_short(manifest.settings.get(key))} there, {_short(settings.get(key))} asked"
            for key in differing
        )
        raise ShardError(
            f"{out}: holds shards made with other settings ({changes}); choose another --out, "
            "or remove this folder"
        )
    lost = [
        entry.file
        for entry in manifest.training + manifest.validation
        if not (out / entry.file).exists()
    ]
    if lost:
        raise ShardError(
            f"{out}: finished, but {', '.join(lost[:3])} is gone; remove the folder and "
            "prepare it again"
        )
    return True


@contextmanager
def exclusive_folder(out: Path) -> Iterator[None]:
    """Own the output folder while shards are made: no second run gets in, and what a killed run
    left is removed.

    The lock dies with its process; the marker file stays behind a kill and tells that the rest is
    ours to remove.
    """
    marker = out / IN_PROGRESS
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = sorted(path.name for path in out.iterdir()) if not marker.exists() else []
        if foreign:
            raise ShardError(
                f"{out}: not empty ({', '.join(foreign[:3])}) and not made by this command; "
                "choose another --out"
            )
        stream = marker.open("a")
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
    with stream:
        _lock(stream, out)
        _remove_leftovers(out)
        is_whole = False
        try:
            yield
            is_whole = True
        except OSError as error:
            # Inputs raise their own DataError: what is left is the output.
            raise DataError(f"{out}: cannot be written (is the disk full?): {error}") from error
        finally:
            if not is_whole:
                _remove_leftovers(out)
            for path in out.glob(f"*{SPOOL_SUFFIX}"):
                path.unlink()
            marker.unlink()


class Spool:
    """Rows of one split on disk in the order of their making, before the shuffle; memory stays
    flat.
    """

    def __init__(self, out: Path, split: Split, dtype: np.dtype[np.void]) -> None:
        """Open `<split>.spool` in `out`; `dtype` is `instances.row_type`."""
        self.path = out / f"{split}{SPOOL_SUFFIX}"
        self.split = split
        self.dtype = dtype
        self.num_rows = 0
        self._stream = self.path.open("wb")

    def __enter__(self) -> "Spool":
        """Return the open spool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; the owner of the folder removes it."""
        self._stream.close()

    def append(self, rows: npt.NDArray[np.void]) -> None:
        """Add rows (`instances.row_type`)."""
        self._stream.write(rows.tobytes())
        self.num_rows += len(rows)

    def rows(self) -> npt.NDArray[np.void]:
        """Return all rows, mapped from disk."""
        self._stream.flush()
        return np.memmap(self.path, self.dtype, "r", shape=(self.num_rows,))


def write_shards(spool: Spool, out: Path, layout: ShardLayout) -> tuple[ShardEntry, ...]:
    """Shuffle the spooled rows and write `<split>_<index>.hdf5`, equal to within one row."""
    rows = spool.rows()
    # Sorting by a hash is a shuffle that no version of numpy can change.
    order = np.argsort(
        hash_chain(layout.seed, _SHUFFLE_STREAM[spool.split], np.arange(len(rows))), kind="stable"
    )
    num_shards = max(1, -(-len(rows) // layout.rows_per_shard))
    entries = []
    first = 0
    for index, chosen in enumerate(np.array_split(order, num_shards)):
        path = out / f"{spool.split}_{index:05d}.hdf5"
        _write_shard(path, rows, chosen, first, layout)
        entries.append(ShardEntry(path.name, len(chosen), file_sha256(path)))
        first += len(chosen)
    sync_folder(out)
    return tuple(entries)


def _write_shard(
    path: Path,
    rows: npt.NDArray[np.void],
    chosen: npt.NDArray[np.int64],
    first: int,
    layout: ShardLayout,
) -> None:
    """Write one file under a temporary name, flush it to disk, rename it. `first`: its first global
    row number.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with h5py.File(temporary, "w") as file:
        for name, value in layout.attributes.items():
            file.attrs[name] = value
        if layout.masking is None:
            _write_unmasked(file, rows, chosen)
        else:
            _write_nvidia(file, rows, chosen, first, layout)
    with temporary.open("rb+") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def _write_unmasked(
    file: h5py.File, rows: npt.NDArray[np.void], chosen: npt.NDArray[np.int64]
) -> None:
    for name in rows.dtype.names or ():
        field = rows.dtype[name]
        file.create_dataset(name, (len(chosen), *field.shape), field.base)
    for start in range(0, len(chosen), ROWS_AT_ONCE):
        block = rows[chosen[start : start + ROWS_AT_ONCE]]
        for name in rows.dtype.names or ():
            file[name][start : start + len(block)] = block[name]


def _write_nvidia(
    file: h5py.File,
    rows: npt.NDArray[np.void],
    chosen: npt.NDArray[np.int64],
    first: int,
    layout: ShardLayout,
) -> None:
    """Write the six datasets of NVIDIA's create_pretraining_data.py; label 0 throughout where there
    are no pairs.
    """
    policy = layout.masking
    assert policy is not None, "static masks need a policy"
    num_rows, length, num_predictions = (
        len(chosen),
        rows.dtype["input_ids"].shape[0],
        policy.max_predictions_per_seq,
    )
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "input_ids": ((num_rows, length), "i4"),
        "input_mask": ((num_rows, length), "i1"),
        "segment_ids": ((num_rows, length), "i1"),
        "masked_lm_positions": ((num_rows, num_predictions), "i4"),
        "masked_lm_ids": ((num_rows, num_predictions), "i4"),
        "next_sentence_labels": ((num_rows,), "i1"),
    }
    datasets = {
        name: file.create_dataset(name, shape, dtype, compression="gzip")
        for name, (shape, dtype) in shapes.items()
    }
    for start in range(0, num_rows, ROWS_AT_ONCE):
        block = rows[chosen[start : start + ROWS_AT_ONCE]]
        for name, values in _nvidia_block(block, first + start, policy, layout).items():
            datasets[name][start : start + len(block)] = values


def _nvidia_block(
    block: npt.NDArray[np.void], first: int, policy: MaskingPolicy, layout: ShardLayout
) -> dict[str, IntArray]:
    """Return the six arrays of some rows; `first`: the first one's global row number."""
    originals = block["input_ids"].astype(np.int64)
    indices = np.arange(first, first + len(block))
    masked = mask_tokens(originals, policy, seed=layout.seed, epoch=0, sample_indices=indices)
    has_pairs = "next_sentence_labels" in (block.dtype.names or ())
    return {
        "input_ids": masked.input_ids,
        "input_mask": (originals != layout.pad_id).astype(np.int64),
        "segment_ids": block["segment_ids"],
        "masked_lm_positions": masked.masked_lm_positions,
        "masked_lm_ids": np.where(masked.masked_lm_ids == IGNORED, 0, masked.masked_lm_ids),
        "next_sentence_labels": block["next_sentence_labels"] if has_pairs else 0 * indices,
    }


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
    ours = [out / name for name in (*TOKENIZER_FILES, TOKEN_COUNTS, MANIFEST)]
    ours += [*find_shards(out, "training"), *find_shards(out, "validation")]
    ours += [*out.glob(f"*{SPOOL_SUFFIX}"), *out.glob(".*.tmp")]
    for path in ours:
        path.unlink(missing_ok=True)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
