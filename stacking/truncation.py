"""Rows of the shards' length in, rows of a shorter stage's length out.

Shapes: B rows, S tokens in the shards, T < S tokens kept.
"""

import numpy as np

from data_prep.masking import BoolArray, IntArray

SHORTEST_PAIR = 5
"""[CLS] a [SEP] b [SEP]: with less, one of two texts would be empty and the label meaningless."""


def cut_rows(
    input_ids: IntArray,
    segment_ids: IntArray,
    attention_mask: BoolArray,
    *,
    max_seq_length: int,
    sep_id: int,
) -> tuple[IntArray, IntArray, BoolArray]:
    """Cut ids, segments and attention, each [B, S], to T = `max_seq_length`: each [B, T], new.

    A row that fits loses padding alone. Of a pair, [CLS] A [SEP] B [SEP], the longer text loses its
    last token until both fit, B where they are equally long (google-research/bert, run_classifier,
    _truncate_seq_pair). Any other row, of one document or several, keeps its beginning, and its
    last token becomes [SEP] if the row ended with one. Nothing is drawn: a row is cut alike in
    every epoch and on every rank. Ids must be the originals: masks are drawn after the cut.
    """
    # Each column takes the token as many places on as were dropped before it.
    after_a, dropped_a, after_b, dropped_b = _dropped(
        input_ids, segment_ids, attention_mask, max_seq_length, sep_id
    )
    columns = np.arange(max_seq_length)
    taken = columns + dropped_a * (columns >= after_a) + dropped_b * (columns >= after_b)  # [B, T]
    return (
        np.take_along_axis(input_ids, taken, axis=1),
        np.take_along_axis(segment_ids, taken, axis=1),
        np.take_along_axis(attention_mask, taken, axis=1),
    )


def _dropped(
    input_ids: IntArray,
    segment_ids: IntArray,
    attention_mask: BoolArray,
    max_seq_length: int,
    sep_id: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Where A ends in the new row, tokens dropped there, where B ends, tokens dropped; [B, 1]."""
    width = input_ids.shape[1]
    columns = np.arange(width)
    lengths = np.where(attention_mask, columns + 1, 0).max(axis=1, keepdims=True)
    is_second = (segment_ids == 1) & (columns < lengths)
    second = np.count_nonzero(is_second, axis=1, keepdims=True)
    first = lengths - second
    sep_a, sep_b = (
        (np.take_along_axis(input_ids, np.maximum(ends - 1, 0), axis=1) == sep_id).astype(np.int64)
        for ends in (first, lengths)
    )
    a, b = first - 1 - sep_a, second - sep_b  # tokens of text: without [CLS] and [SEP]s
    is_suffix = np.all(is_second == ((columns >= first) & (columns < lengths)), axis=1)
    is_pair = is_suffix[:, None] & (a > 0) & (b > 0)
    room = max_seq_length - 1 - sep_a - sep_b
    # B keeps what A leaves it, and half the room if that is more; equally long, B loses first.
    kept_b = np.minimum(b, np.maximum(room - a, room // 2))
    kept_a = np.minimum(a, room - kept_b)
    is_long = lengths > max_seq_length
    dropped_a = np.where(is_long & is_pair, a - kept_a, 0)
    dropped_b = np.where(is_long, lengths - max_seq_length - dropped_a, 0)
    return 1 + kept_a, dropped_a, max_seq_length - sep_b, dropped_b
