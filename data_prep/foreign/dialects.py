"""HDF5 shards of any public BERT trainer in, blocks of rows in one neutral form out.

| dialect              | rows                                                                    |
|----------------------|-------------------------------------------------------------------------|
| unmasked             | ours: fixed [N, S], no masks, no input_mask                             |
| nvidia               | fixed [N, S], six datasets (DeepLearningExamples, DeepSpeedExamples)    |
| academic-budget-bert | the same; without sentence pairs no next_sentence_labels                |
| mlperf               | the same in 16 bits, uncompressed                                       |
| mlperf-varlength     | a variable-length array a row, no input_mask                            |
| mlperf-packed        | several sequences a row: packed_input_len, packed_masked_lm_len, labels |

Any integer type, compression and chunking is read. n: rows of a block, S: tokens, P: masks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import numpy.typing as npt

from data_prep.errors import ShardError
from data_prep.masking import BoolArray, IntArray, static_mask_is_real
from data_prep.shard_format import (
    HDF5_ERRORS,
    REQUIRED,
    STATIC_MASKS,
    inspect_shard,
    unreadable,
)

ShardDialect = Literal[
    "unmasked", "nvidia", "academic-budget-bert", "mlperf", "mlperf-varlength", "mlperf-packed"
]
PACKED = ("packed_input_len", "packed_masked_lm_len")
LABELS = "next_sentence_labels"
# A block holds about this many tokens: 8 MiB an array of 64-bit ids.
_TOKENS_AT_ONCE = 1 << 20
# Variable rows are read this many at a time: they are known when they are read, not before.
_VARIABLE_ROWS_AT_ONCE = 1024
# Tokens; longer rows are no text for BERT, but a damaged file.
_LONGEST_ROW = 1 << 14
_CHUNK_CACHE_BYTES = 16 << 20


@dataclass(frozen=True)
class ShardHead:
    """One file, measured without reading its rows."""

    path: Path
    dialect: ShardDialect
    num_rows: int
    """Rows of the file; a packed row holds several sequences."""
    max_seq_length: int
    """S of fixed rows; 0: rows have their own lengths."""
    max_predictions_per_seq: int
    """P of fixed rows; 0: no masks, or rows have their own number of them."""
    has_masks: bool
    has_labels: bool
    rows_at_once: int
    """Rows of a block, whole HDF5 chunks of them."""
    tokenizer_sha256: str | None = None
    """The vocabulary behind the ids, where the file says so."""
    types: tuple[tuple[str, str], ...] = ()
    """(dataset, its type) of fixed rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowBlock:
    """Some sequences of one file, one a row; short ones are padded with zeros."""

    rows: IntArray
    """[n], the file's row that each sequence lies in."""
    input_ids: IntArray
    """[n, S], static masks applied where there are any."""
    segment_ids: IntArray
    """[n, S]."""
    input_mask: IntArray | None
    """[n, S], as it is in the file; None: not there, real tokens are those that are no padding."""
    num_tokens: IntArray | None
    """[n], real tokens; None: told by the padding alone (see `lengths`)."""
    positions: IntArray
    """[n, P], masked positions counted within the sequence; P = 0: no static masks."""
    masked_ids: IntArray
    """[n, P], what stood there."""
    num_masked: IntArray
    """[n], how many of the P are real."""
    labels: IntArray | None
    """[n], next_sentence_labels in the polarity of the file."""

    @property
    def is_masked(self) -> BoolArray:
        """Which of the P slots are real, [n, P]."""
        return np.asarray(np.arange(self.positions.shape[1]) < self.num_masked[:, None])

    def restored(self) -> IntArray:
        """Return input_ids with the originals put back, [n, S]; masks outside the row are left."""
        length = self.input_ids.shape[1]
        fits = self.is_masked & (self.positions >= 0) & (self.positions < length)
        rows, slots = np.nonzero(fits)
        originals = self.input_ids.copy()
        originals[rows, self.positions[rows, slots]] = self.masked_ids[rows, slots]
        return originals

    def lengths(self, pad_id: int, originals: IntArray) -> IntArray:
        """Return the number of real tokens, [n]; without input_mask up to the last that is no
        padding in `originals` (`restored`): a random replacement may be [PAD].
        """
        if self.num_tokens is not None:
            return self.num_tokens
        is_real = originals != pad_id
        last = is_real.shape[1] - np.argmax(is_real[:, ::-1], axis=1)
        return np.where(is_real.any(axis=1), last, 0)


def sniff(path: Path) -> ShardDialect:
    """Name the dialect of one file; a ShardError says what is wrong with it."""
    return inspect_foreign(path).dialect


def inspect_foreign(path: Path) -> ShardHead:
    """Measure one file of any dialect; a ShardError names file, dataset and shape."""
    try:
        with h5py.File(path, "r") as file:
            ids = file.get("input_ids")
            if isinstance(ids, h5py.Dataset) and h5py.check_vlen_dtype(ids.dtype) is not None:
                return _head_of_variable(path, file)
            info = inspect_shard(path)
            has_masks = info.max_predictions_per_seq > 0
            _check_length(path, info.max_seq_length)
            return ShardHead(
                path=path,
                dialect=_fixed_dialect(info.dtypes, has_masks),
                num_rows=info.num_rows,
                max_seq_length=info.max_seq_length,
                max_predictions_per_seq=info.max_predictions_per_seq,
                has_masks=has_masks,
                has_labels=LABELS in info.dtypes,
                rows_at_once=_whole_chunks(file["input_ids"], info.max_seq_length),
                tokenizer_sha256=info.tokenizer_sha256,
                types=tuple(sorted((name, str(kind)) for name, kind in info.dtypes.items())),
            )
    except HDF5_ERRORS as error:
        raise unreadable(path, error) from error


def read_rows(head: ShardHead) -> Iterator[RowBlock]:
    """Yield all sequences of a file in order, in blocks of bounded size."""
    read = {"mlperf-varlength": _variable_block, "mlperf-packed": _packed_block}.get(
        head.dialect, _fixed_block
    )
    try:
        # The cache holds chunks that two blocks share, so that none is decompressed twice.
        with h5py.File(head.path, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES) as file:
            for start in range(0, head.num_rows, head.rows_at_once):
                yield read(file, head, slice(start, min(start + head.rows_at_once, head.num_rows)))
    except HDF5_ERRORS as error:
        raise unreadable(head.path, error) from error


def longest_row(head: ShardHead) -> tuple[int, int]:
    """Return S and P that hold every sequence of a file; variable rows are read through for it."""
    if head.max_seq_length:
        return head.max_seq_length, head.max_predictions_per_seq
    longest = [0, 0]
    for block in read_rows(head):
        tokens, masks = block.input_ids.shape[1], int(block.num_masked.max(initial=0))
        longest = [max(longest[0], tokens), max(longest[1], masks)]
    return longest[0], longest[1]


def _fixed_dialect(dtypes: Mapping[str, np.dtype[np.generic]], has_masks: bool) -> ShardDialect:
    if not has_masks:
        return "unmasked"
    if LABELS not in dtypes or "input_mask" not in dtypes:
        return "academic-budget-bert"
    return "mlperf" if dtypes["input_ids"].itemsize <= 2 else "nvidia"


def _head_of_variable(path: Path, file: h5py.File) -> ShardHead:
    """Measure a file of variable-length rows: 1-d datasets of one length, integer arrays a row."""
    names = sorted(file.keys())
    is_packed = PACKED[0] in names
    needed = (*REQUIRED, *STATIC_MASKS, *(PACKED if is_packed else ()))
    for name in needed:
        if name not in names:
            raise ShardError(f"{path}: dataset {name} is missing; the file holds {names}")
    num_rows = file["input_ids"].shape[0] if file["input_ids"].shape else 0
    if num_rows == 0:
        raise ShardError(f"{path}: dataset input_ids has no rows")
    for name in (*needed, *([LABELS] if LABELS in names else [])):
        dataset = file[name]
        base = h5py.check_vlen_dtype(dataset.dtype)
        is_plain = name == LABELS and not is_packed
        is_integer = (dataset.dtype if is_plain else np.dtype(base or "f4")).kind in "iu"
        if dataset.shape != (num_rows,) or not is_integer:
            wanted = "integers" if is_plain else "variable-length integers"
            raise ShardError(
                f"{path}: dataset {name} is {dataset.dtype} {list(dataset.shape or ())}; expected "
                f"[{num_rows}] {wanted} from input_ids"
            )
    return ShardHead(
        path=path,
        dialect="mlperf-packed" if is_packed else "mlperf-varlength",
        num_rows=num_rows,
        max_seq_length=0,
        max_predictions_per_seq=0,
        has_masks=True,
        has_labels=LABELS in names,
        rows_at_once=_VARIABLE_ROWS_AT_ONCE,
    )


def _fixed_block(file: h5py.File, head: ShardHead, rows: slice) -> RowBlock:
    arrays = {
        name: np.asarray(file[name][rows], np.int64)
        for name in ("input_ids", "segment_ids", "input_mask", *STATIC_MASKS, LABELS)
        if name in file
    }
    num_rows = rows.stop - rows.start
    mask = arrays.get("input_mask")
    positions = arrays.get("masked_lm_positions", np.zeros((num_rows, 0), np.int64))
    return RowBlock(
        rows=np.arange(rows.start, rows.stop),
        input_ids=arrays["input_ids"],
        segment_ids=arrays["segment_ids"],
        input_mask=mask,
        num_tokens=None if mask is None else np.count_nonzero(mask, axis=1),
        positions=positions,
        masked_ids=arrays.get("masked_lm_ids", positions),
        num_masked=np.count_nonzero(static_mask_is_real(positions), axis=1),
        labels=arrays.get(LABELS),
    )


def _variable_block(file: h5py.File, head: ShardHead, rows: slice) -> RowBlock:
    ids, lengths = _flat(file["input_ids"], rows)
    segments, segment_lengths = _flat(file["segment_ids"], rows)
    positions, num_positions = _flat(file["masked_lm_positions"], rows)
    masked_ids, num_ids = _flat(file["masked_lm_ids"], rows)
    _check_lengths(head.path, rows, segment_lengths, lengths, "segment_ids")
    _check_lengths(head.path, rows, num_ids, num_positions, "masked_lm_ids")
    _check_length(head.path, int(lengths.max()))
    padded = _padded(positions, num_positions)
    labels = np.asarray(file[LABELS][rows], np.int64) if head.has_labels else None
    return RowBlock(
        rows=np.arange(rows.start, rows.stop),
        input_ids=_padded(ids, lengths),
        segment_ids=_padded(segments, lengths),
        input_mask=None,
        num_tokens=lengths,
        positions=padded,
        masked_ids=_padded(masked_ids, num_ids),
        # Padding is cut off as a rule; where it is not, it ends the masks as in fixed rows.
        num_masked=np.count_nonzero(static_mask_is_real(padded), axis=1),
        labels=labels,
    )


def _packed_block(file: h5py.File, head: ShardHead, rows: slice) -> RowBlock:
    """Take the sequences of packed rows apart; their positions count from the packed row's start,
    and `packed_masked_lm_len` says where each one's masks end.
    """
    ids, row_tokens = _flat(file["input_ids"], rows)
    segments, segment_lengths = _flat(file["segment_ids"], rows)
    positions, row_masks = _flat(file["masked_lm_positions"], rows)
    masked_ids, num_ids = _flat(file["masked_lm_ids"], rows)
    lengths, per_row = _flat(file[PACKED[0]], rows)  # [n], sequences of each packed row
    num_masked, masks_per_row = _flat(file[PACKED[1]], rows)
    for name, got, wanted in (
        ("segment_ids", segment_lengths, row_tokens),
        ("masked_lm_ids", num_ids, row_masks),
        (PACKED[1], masks_per_row, per_row),
        (f"the sum of {PACKED[0]}", _sums(lengths, per_row), row_tokens),
        (f"the sum of {PACKED[1]}", _sums(num_masked, per_row), row_masks),
    ):
        _check_lengths(head.path, rows, got, wanted, name)
    if lengths.size == 0 or min(lengths.min(), num_masked.min()) < 0:
        raise ShardError(f"{head.path}: rows from {rows.start}: no sequence, or a negative length")
    _check_length(head.path, int(lengths.max()))
    labels = None
    if head.has_labels:
        labels, num_labels = _flat(file[LABELS], rows)
        _check_lengths(head.path, rows, num_labels, per_row, LABELS)
    # A sequence starts in its row where the sequences before it end.
    ends = np.cumsum(lengths)
    starts = ends - lengths - np.repeat(np.cumsum(row_tokens) - row_tokens, per_row)
    return RowBlock(
        rows=np.repeat(np.arange(rows.start, rows.stop), per_row),
        input_ids=_padded(ids, lengths),
        segment_ids=_padded(segments, lengths),
        input_mask=None,
        num_tokens=lengths,
        positions=_padded(positions - np.repeat(starts, num_masked), num_masked),
        masked_ids=_padded(masked_ids, num_masked),
        num_masked=num_masked,
        labels=labels,
    )


def _flat(dataset: h5py.Dataset, rows: slice) -> tuple[IntArray, IntArray]:
    """Return variable-length rows end to end, and the length of each."""
    arrays: Sequence[npt.NDArray[np.generic]] = dataset[rows]
    lengths = np.fromiter((len(array) for array in arrays), np.int64, len(arrays))
    return np.concatenate(arrays).astype(np.int64), lengths


def _padded(flat: IntArray, lengths: IntArray) -> IntArray:
    """Lay sequences end to end out as rows padded with zeros, [n, longest]."""
    result = np.zeros((lengths.size, int(lengths.max(initial=0))), np.int64)
    result[np.arange(result.shape[1]) < lengths[:, None]] = flat
    return result


def _sums(values: IntArray, counts: IntArray) -> IntArray:
    """Sum consecutive groups of `counts` values each."""
    totals = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(counts)
    return np.asarray(totals[ends] - totals[ends - counts], np.int64)


def _check_lengths(path: Path, rows: slice, got: IntArray, wanted: IntArray, name: str) -> None:
    if wrong := np.flatnonzero(got != wanted).tolist():
        at = wrong[0]
        raise ShardError(
            f"{path}: row {rows.start + at}: {name} has {got[at]} values; expected {wanted[at]}"
        )


def _check_length(path: Path, length: int) -> None:
    if length > _LONGEST_ROW:
        raise ShardError(
            f"{path}: a row of {length:,} tokens; more than {_LONGEST_ROW:,} is taken for damage"
        )


def _whole_chunks(dataset: h5py.Dataset, length: int) -> int:
    """Return the rows of a block: whole chunks where chunks are small enough."""
    rows = max(1, _TOKENS_AT_ONCE // length)
    height = dataset.chunks[0] if dataset.chunks else 1
    return max(1, rows // height) * height if height <= rows else rows
