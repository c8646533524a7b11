"""Blocks of foreign rows in, our records out: originals restored or masks kept, labels in our
polarity, rows cut or padded to one length; and the evidence that the vocabulary is theirs.

n: rows of a block, S: tokens, P: masks, V: vocabulary.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError
from data_prep.foreign.dialects import LABELS, RowBlock
from data_prep.foreign.row_checks import KnownIds, count_masks, infer_ids, known_ids, row_faults
from data_prep.instances import row_type
from data_prep.masking import BoolArray, IntArray
from data_prep.tokens.tokenizer import SubwordTokenizer

LabelPolarity = Literal["nvidia", "stackingbert", "megatron"]
# BERT: [MASK] at 80 % of the masked positions. With another vocabulary it is hardly ever there.
_LEAST_MASK_SHARE = 0.5
_LEAST_MASKS = 20
# Tokens that no text gives: [unusedN], and "##" pieces behind punctuation. None among 5.7 M of
# NVIDIA's own; but bert-base-cased's full stop and comma are [unused...] in the uncased vocabulary,
# a tenth of all text.
_MOST_IMPOSSIBLE_SHARE = 0.05
_LEAST_TOKENS = 1000


@dataclass(frozen=True, kw_only=True)
class RowTarget:
    """What rows are to become."""

    max_seq_length: int
    max_predictions_per_seq: int
    """P of kept masks; 0: originals are restored."""
    has_labels: bool
    labels: LabelPolarity
    may_truncate: bool

    def dtype(self, vocab_size: int) -> np.dtype[np.void]:
        """Return the record of a row: `instances.row_type`, with kept masks behind it."""
        plain = row_type(self.max_seq_length, vocab_size, self.has_labels)
        if not self.max_predictions_per_seq:
            return plain
        ids = plain["input_ids"].base
        width = (self.max_predictions_per_seq,)
        masks = [("masked_lm_positions", ids, width), ("masked_lm_ids", ids, width)]
        return np.dtype([*_fields(plain), *masks, ("num_tokens", ids, ())])


class ForeignRows:
    """Turns blocks into records and gathers what they tell about the vocabulary."""

    def __init__(self, tokenizer: SubwordTokenizer, target: RowTarget) -> None:
        """Take the vocabulary that is said to be behind the ids."""
        self.target = target
        self.dtype = target.dtype(tokenizer.vocab_size)
        self._ids = known_ids(tokenizer.vocab_size, tokenizer.special_token_ids)
        self._pad = tokenizer.special_token_ids["pad"]
        self._evidence = _Evidence(tokenizer)

    def records(self, path: Path, block: RowBlock) -> npt.NDArray[np.void]:
        """Check a block and return its records, [n] of `dtype`; a DataError names file and row."""
        ids = self._ids
        if block.input_mask is not None:
            # academic-budget-bert pads RoBERTa's ids with 0: what is padding the mask knows.
            ids = replace(ids, pad=infer_ids(block).pad)
        self._refuse_faults(path, block, ids)
        originals = block.restored()
        lengths = block.lengths(self._pad, originals)
        self._evidence.add(path, block, originals, lengths)
        long = lengths > self.target.max_seq_length
        if long.any() and not self.target.may_truncate:
            first = int(np.flatnonzero(long)[0])
            raise DataError(
                f"{path}: row {block.rows[first]} has {lengths[first]} tokens, more than "
                f"--max-seq-length {self.target.max_seq_length}; raise it, or cut rows with "
                "--truncate"
            )
        return self._fill(fit_rows(block, lengths, self.target.max_seq_length))

    def finish(self) -> None:
        """Judge the vocabulary on all that was seen, however little."""
        self._evidence.judge(None)

    def _refuse_faults(self, path: Path, block: RowBlock, ids: KnownIds) -> None:
        """Raise the first fault; ids and [CLS] first: a wrong vocabulary explains the rest."""
        faults = {fault.kind: fault for fault in row_faults(block, ids) if fault.kind != "[SEP]"}
        for kind in ("input_ids", "masked_lm_ids", "[CLS]", *faults):
            if kind in faults:
                row = int(np.flatnonzero(faults[kind].is_bad)[0])
                hint = (
                    "; these shards were made with another vocabulary than --tokenizer, or are "
                    "damaged"
                    if kind in ("input_ids", "masked_lm_ids", "[CLS]")
                    else "; look at the folder with launch/prepare_data.py check"
                )
                told = faults[kind].describe(row)
                raise DataError(f"{path}: row {block.rows[row]}: {told}{hint}")

    def _fill(self, block: RowBlock) -> npt.NDArray[np.void]:
        """Lay fitted rows out as records; padding gets the tokenizer's id."""
        assert block.num_tokens is not None, "fitted rows know their lengths"
        is_padding = np.arange(self.target.max_seq_length) >= block.num_tokens[:, None]  # [n, S]
        records = np.zeros(len(block.rows), self.dtype)
        num_slots = self.target.max_predictions_per_seq
        ids = block.input_ids if num_slots else block.restored()
        records["input_ids"] = np.where(is_padding, self._pad, ids)
        records["segment_ids"] = np.where(is_padding, 0, block.segment_ids)
        if num_slots:
            taken = min(num_slots, block.positions.shape[1])
            is_masked = block.is_masked[:, :taken]
            records["masked_lm_positions"][:, :taken] = block.positions[:, :taken] * is_masked
            records["masked_lm_ids"][:, :taken] = block.masked_ids[:, :taken] * is_masked
            records["num_tokens"] = block.num_tokens
        if self.target.has_labels and block.labels is not None:
            is_inverted = self.target.labels == "stackingbert"
            records[LABELS] = 1 - block.labels if is_inverted else block.labels
        return records


def fit_rows(block: RowBlock, lengths: IntArray, max_seq_length: int) -> RowBlock:
    """Cut or pad rows to S = `max_seq_length`; masks move with their tokens.

    As BERT trims pairs, the longer segment loses its end until both fit; [SEP] stays behind each.
    """
    take, lengths = _kept_columns(block, lengths, max_seq_length)
    rows = np.arange(len(block.rows))[:, None]
    is_real = take >= 0
    source = np.maximum(take, 0)
    # Where each old position went; -1: cut off.
    moved = np.full(block.input_ids.shape, -1, np.int64)
    new_rows, new_columns = np.nonzero(is_real)
    moved[new_rows, take[new_rows, new_columns]] = new_columns
    positions = moved[rows, np.where(block.is_masked, block.positions, 0)]
    is_kept = block.is_masked & (positions > 0)
    order = np.argsort(~is_kept, axis=1, kind="stable")
    return replace(
        block,
        input_ids=np.where(is_real, block.input_ids[rows, source], 0),
        segment_ids=np.where(is_real, block.segment_ids[rows, source], 0),
        input_mask=None,
        num_tokens=lengths,
        positions=np.take_along_axis(positions * is_kept, order, axis=1),
        masked_ids=np.take_along_axis(block.masked_ids * is_kept, order, axis=1),
        num_masked=np.count_nonzero(is_kept, axis=1),
    )


def _kept_columns(
    block: RowBlock, lengths: IntArray, max_seq_length: int
) -> tuple[IntArray, IntArray]:
    """Return the old column of each new one, [n, S], -1 in the padding, and the new lengths."""
    is_real = np.arange(block.input_ids.shape[1]) < lengths[:, None]
    second = np.count_nonzero(is_real & (block.segment_ids == 1), axis=1)
    first = lengths - second
    has_pair = (second > 1) & (first > 2)
    # Tokens of text: without [CLS] and [SEP]s.
    a, b = np.where(has_pair, first - 2, lengths - 2), np.where(has_pair, second - 1, 0)
    room = np.where(has_pair, max_seq_length - 3, max_seq_length - 2)
    half = room // 2
    is_long = lengths > max_seq_length
    b_kept = np.where(is_long & has_pair, np.minimum(b, np.maximum(room - a, half)), b)
    a_kept = np.where(is_long, np.minimum(a, room - b_kept), a)
    middle = 1 + a_kept  # column of the [SEP] behind A
    total = np.where(has_pair, middle + b_kept + 2, middle + 1)
    columns = np.arange(max_seq_length)
    middle, last = middle[:, None], total[:, None] - 1
    take = np.where(columns < middle, columns, first[:, None] + columns - middle - 1)
    take = np.where(has_pair[:, None] & (columns == middle), first[:, None] - 1, take)
    take = np.where(columns == last, lengths[:, None] - 1, take)
    return np.where(columns <= last, take, -1), total


class _Evidence:
    """What the rows say against the vocabulary they are read with."""

    def __init__(self, tokenizer: SubwordTokenizer) -> None:
        self._mask_id = tokenizer.special_token_ids["mask"]
        self._continues = np.array(tokenizer.is_continuation, np.bool_)
        self._is_unused = np.array([token.startswith("[unused") for token in tokenizer.tokens])
        # BERT splits words at punctuation: no "##" piece follows it.
        self._is_mark = np.array(
            [
                len(token) == 1 and token.isascii() and not token.isalnum()
                for token in tokenizer.tokens
            ]
        )
        self._tokens = self._impossible = self._masked = self._hidden = 0

    def add(self, path: Path, block: RowBlock, originals: IntArray, lengths: IntArray) -> None:
        masked, hidden, _ = count_masks(block, self._mask_id)
        is_real = np.arange(originals.shape[1]) < lengths[:, None]
        follows = self._is_mark[originals[:, :-1]] & self._continues[originals[:, 1:]]
        strange: BoolArray = self._is_unused[originals] & is_real
        strange[:, 1:] |= follows & is_real[:, 1:]
        self._tokens += int(lengths.sum())
        self._impossible += int(np.count_nonzero(strange))
        self._masked += masked
        self._hidden += hidden
        if self._masked >= _LEAST_TOKENS:
            self.judge(path)

    def judge(self, path: Path | None) -> None:
        """Raise a DataError if the rows cannot have been made with this vocabulary."""
        where = "the shards" if path is None else str(path)
        if self._masked >= _LEAST_MASKS and self._hidden < _LEAST_MASK_SHARE * self._masked:
            raise DataError(
                f"{where}: [MASK] ({self._mask_id}) stands at {self._hidden:,} of "
                f"{self._masked:,} masked positions, 80 % expected: these shards were made with "
                "another vocabulary; give theirs with --tokenizer"
            )
        is_judged = self._tokens >= _LEAST_TOKENS
        if is_judged and self._impossible > _MOST_IMPOSSIBLE_SHARE * self._tokens:
            raise DataError(
                f"{where}: {self._impossible:,} of {self._tokens:,} tokens are pieces that no text "
                "gives in this vocabulary (unused ones, or the rest of a word behind punctuation): "
                "these shards were made with another vocabulary; give theirs with --tokenizer"
            )


def _fields(dtype: np.dtype[np.void]) -> list[tuple[str, np.dtype[np.generic], tuple[int, ...]]]:
    """Return a record's fields as numpy takes them."""
    return [(name, dtype[name].base, dtype[name].shape) for name in dtype.names or ()]
