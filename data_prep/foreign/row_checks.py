"""Blocks of rows in, what is wrong with them out: the faults that only the values show.

n: rows of a block, S: tokens, P: masks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from data_prep.foreign.dialects import RowBlock
from data_prep.masking import BoolArray, IntArray

# A special id is believed where at least this share of a file's first rows agrees on it.
_AGREEMENT = 0.9


@dataclass(frozen=True, kw_only=True)
class KnownIds:
    """What is known of the vocabulary behind a file's ids; None: nothing."""

    vocab_size: int | None = None
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None

    @property
    def boundaries(self) -> list[int]:
        """Ids that no mask ever hides: masking passes over them."""
        return [token for token in (self.pad, self.cls, self.sep) if token is not None]


@dataclass(frozen=True)
class RowFault:
    """One kind of fault, the rows that have it, [n], and how to tell it of one of them."""

    kind: str
    is_bad: BoolArray
    describe: Callable[[int], str]


def known_ids(vocab_size: int, special_token_ids: Mapping[str, int]) -> KnownIds:
    """Return the ids of a manifest or tokenizer."""
    names = {name: special_token_ids[name] for name in ("pad", "cls", "sep", "mask")}
    return KnownIds(vocab_size=vocab_size, **names)


def infer_ids(block: RowBlock) -> KnownIds:
    """Guess the special ids of a foreign file from its first rows: what nearly all rows begin and
    end with, what stands under the masks and where input_mask is 0.
    """
    originals = block.restored()
    pad = _common(block.input_ids[block.input_mask == 0]) if block.input_mask is not None else None
    if pad is None:
        pad = 0 if np.any(originals[:, -1:] == 0) else None
    lengths = block.lengths(-1 if pad is None else pad, originals)
    filled = np.flatnonzero((lengths > 0) & (lengths <= originals.shape[1]))
    rows, slots = np.nonzero(_valid(block))
    hidden = block.input_ids[rows, block.positions[rows, slots]]
    return KnownIds(
        pad=pad,
        cls=_common(originals[filled, 0]),
        sep=_common(originals[filled, lengths[filled] - 1]),
        mask=_common(hidden, 0.5) if hidden.size >= 20 else None,
    )


def row_faults(block: RowBlock, ids: KnownIds) -> list[RowFault]:
    """Return each kind of fault that some row has."""
    originals = block.restored()
    lengths = block.lengths(-1 if ids.pad is None else ids.pad, originals)
    faults = [
        *_range_faults(block, ids),
        *_mask_faults(block, ids, lengths),
        *_padding_faults(block, ids, lengths),
        *_boundary_faults(block, ids, originals, lengths),
    ]
    return [fault for fault in faults if fault.is_bad.any()]


def count_masks(block: RowBlock, mask_id: int) -> tuple[int, int, int]:
    """Count masked positions, [MASK] among them, and [MASK] anywhere in the rows."""
    rows, slots = np.nonzero(_valid(block))
    hidden = block.input_ids[rows, block.positions[rows, slots]]
    anywhere = np.count_nonzero(block.input_ids == mask_id)
    return rows.size, int(np.count_nonzero(hidden == mask_id)), int(anywhere)


def _range_faults(block: RowBlock, ids: KnownIds) -> list[RowFault]:
    """Values that no row may hold."""
    limits: list[tuple[str, IntArray | None, int | None]] = [
        ("input_ids", block.input_ids, ids.vocab_size),
        ("masked_lm_ids", block.masked_ids, ids.vocab_size),
        ("masked_lm_positions", block.positions, block.input_ids.shape[1]),
        ("segment_ids", block.segment_ids, 2),
        ("input_mask", block.input_mask, 2),
        ("next_sentence_labels", block.labels, 2),
    ]
    return [
        _range_fault(name, values.reshape(len(block.rows), -1), limit)
        for name, values, limit in limits
        if values is not None
    ]


def _range_fault(name: str, values: IntArray, limit: int | None) -> RowFault:
    allowed = f"0 to {'V - 1' if limit is None else limit - 1}"
    # Most blocks are good: two reductions say so.
    top = np.iinfo(np.int64).max if limit is None else limit
    if values.size == 0 or (values.min() >= 0 and values.max() < top):
        return RowFault(name, np.zeros(len(values), np.bool_), str)
    wrong = (values < 0) | (values >= top)

    def describe(row: int) -> str:
        return f"{name} holds {values[row][wrong[row]][0]}; allowed are {allowed}"

    return RowFault(name, _in_row(wrong), describe)


def _mask_faults(block: RowBlock, ids: KnownIds, lengths: IntArray) -> list[RowFault]:
    """Static masks that are out of order, outside the text or at odds with their ids."""
    if not block.positions.shape[1]:
        return []
    positions, is_masked = block.positions, block.is_masked
    follows = is_masked[:, 1:] & (np.diff(positions, axis=1) <= 0)
    is_left = ~is_masked & (positions != 0)
    is_outside = is_masked & ((positions < 1) | (positions >= lengths[:, None]))
    is_special = is_masked & np.isin(block.masked_ids, ids.boundaries)
    is_unequal = (is_masked & (block.masked_ids == 0)) | (~is_masked & (block.masked_ids != 0))
    at_border = is_masked & _is_border(block, ids, lengths)

    def first(wrong: BoolArray, values: IntArray, row: int) -> int:
        return int(values[row][wrong[row]][0])

    return [
        RowFault(
            "order of masks",
            _in_row(follows) | _in_row(is_left),
            lambda row: (
                "masked_lm_positions does not ascend, or goes on after its first 0: "
                f"{positions[row][:8].tolist()}"
            ),
        ),
        RowFault(
            "mask outside",
            _in_row(is_outside),
            lambda row: (
                f"masked_lm_positions points at {first(is_outside, positions, row)}, outside the "
                f"row's {lengths[row]} real tokens"
            ),
        ),
        RowFault(
            "special token masked",
            _in_row(is_special),
            lambda row: (
                f"masked_lm_ids holds {first(is_special, block.masked_ids, row)}, a special token "
                "that is never masked"
            ),
        ),
        RowFault(
            "mask at [SEP]",
            _in_row(at_border) & ~_in_row(is_outside),
            lambda row: (
                f"masked_lm_positions points at {first(at_border, positions, row)}, the place of "
                "[SEP], a special token that is never masked"
            ),
        ),
        RowFault(
            "number of masks",
            _in_row(is_unequal),
            lambda row: (
                f"masked_lm_ids and masked_lm_positions differ in number: {block.num_masked[row]} "
                f"positions, {np.count_nonzero(block.masked_ids[row])} ids"
            ),
        ),
    ]


def _is_border(block: RowBlock, ids: KnownIds, lengths: IntArray) -> BoolArray:
    """Say which masks point at the last token of a segment, where [SEP] belongs, [n, P]."""
    if ids.sep is None:
        return np.zeros(block.positions.shape, np.bool_)
    length = block.input_ids.shape[1]
    rows = np.arange(len(block.rows))[:, None]
    here = np.clip(block.positions, 0, length - 1)
    following = np.minimum(here + 1, length - 1)
    changes = block.segment_ids[rows, here] < block.segment_ids[rows, following]
    is_last = block.positions == lengths[:, None] - 1
    return np.asarray(changes & (following < lengths[:, None]) | is_last)


def _padding_faults(block: RowBlock, ids: KnownIds, lengths: IntArray) -> list[RowFault]:
    """Padding that input_mask and ids do not agree on."""
    if block.input_mask is None:
        return []
    mask = block.input_mask
    is_real = np.arange(mask.shape[1]) < lengths[:, None]  # [n, S]
    is_split = _in_row((mask != 0) != is_real)
    faults = [RowFault("input_mask", is_split, lambda row: "input_mask is not ones, then zeros")]
    if ids.pad is None:
        return faults
    is_pad = block.input_ids == ids.pad
    if ids.pad == ids.cls:
        # academic-budget-bert pads RoBERTa's ids with 0, which is <s>: it may stand in the text.
        is_pad &= ~is_real
    if np.array_equal(is_pad, ~is_real):
        return faults
    # A random replacement may be [PAD]: what stands under the masks is left out.
    rows, slots = np.nonzero(_valid(block))
    columns = block.positions[rows, slots]
    is_pad[rows, columns] = ~is_real[rows, columns]
    wrong = is_pad != ~is_real

    def describe(row: int) -> str:
        at = int(np.flatnonzero(wrong[row])[0])
        return (
            f"input_mask is {mask[row, at]} at position {at}, where input_ids holds "
            f"{block.input_ids[row, at]} ([PAD] is {ids.pad})"
        )

    return [*faults, RowFault("padding", _in_row(wrong) & ~is_split, describe)]


def _boundary_faults(
    block: RowBlock, ids: KnownIds, originals: IntArray, lengths: IntArray
) -> list[RowFault]:
    """Rows without text, or that do not begin and end as BERT's rows do."""
    num_rows, length = originals.shape
    is_empty = lengths < 1
    first, last = originals[:, 0], originals[np.arange(num_rows), np.clip(lengths, 1, length) - 1]
    falls = (np.diff(block.segment_ids, axis=1) < 0) & (np.arange(1, length) < lengths[:, None])
    never = np.zeros(num_rows, np.bool_)
    return [
        RowFault("empty", is_empty, lambda row: "the row holds no token"),
        RowFault(
            "segments", _in_row(falls), lambda row: "segment_ids falls back to 0 inside the row"
        ),
        RowFault(
            "[CLS]",
            never if ids.cls is None else (first != ids.cls) & ~is_empty,
            lambda row: f"begins with {first[row]}, not with [CLS] ({ids.cls})",
        ),
        RowFault(
            "[SEP]",
            never if ids.sep is None else (last != ids.sep) & ~is_empty,
            lambda row: f"ends with {last[row]}, not with [SEP] ({ids.sep})",
        ),
    ]


def _in_row(wrong: BoolArray) -> BoolArray:
    """Say which rows hold a true value, [n, ...] -> [n]."""
    return np.asarray(np.any(wrong, axis=1))


def _valid(block: RowBlock) -> BoolArray:
    """Which masks are real and lie inside the row, [n, P]."""
    length = block.input_ids.shape[1]
    return np.asarray(block.is_masked & (block.positions >= 0) & (block.positions < length))


def _common(values: IntArray, agreement: float = _AGREEMENT) -> int | None:
    """Return the value that at least `agreement` of `values` have."""
    found, counts = np.unique(values, return_counts=True)
    is_common = counts.size > 0 and counts.max() >= agreement * values.size
    return int(found[counts.argmax()]) if is_common else None
