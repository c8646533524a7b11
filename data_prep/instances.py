"""Tokenised documents in, training rows out: packed full sentences, or sentence pairs.

A row is [CLS] span [SEP] span [SEP] ...; a span is a stretch of the block's flat token ids, so rows
are planned on offsets alone and their tokens are gathered once, at the end.
S: tokens in a row, T: tokens of the block, Q: its sentences, N: rows.
"""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_prep.tokens.encoder import TokenBlock

IntArray = npt.NDArray[np.int64]
Span = tuple[int, int]
"""First token and the one behind the last, offsets into the block's ids."""
Pair = tuple[Span, Span, bool]
"""A, B, and whether their order is broken: B is random, or A and B are swapped."""
Pairs = Literal["none", "nsp", "lines", "sop"]

# Devlin et al. 2019, section A.2: shorter sequences lessen the gap to fine-tuning.
SHORT_SEQ_PROB = 0.1
RANDOM_NEXT_PROB = 0.5  # Devlin et al. 2019, section 3.1; Lan et al. 2020 swap as often
# A sentence is cut at the row's end only where keeping it whole would leave more than S / 16 of the
# row empty.
MAX_GAP_DIVISOR = 16


@dataclass(frozen=True, kw_only=True)
class RowBuilder:
    """What every kind of row needs to know."""

    max_seq_length: int
    cls_id: int
    sep_id: int
    pad_id: int
    dtype: np.dtype[np.void]
    """`row_type`."""
    is_continuation: npt.NDArray[np.bool_]
    """[V], true for "##" pieces: sentences are cut before whole words."""
    short_seq_prob: float = SHORT_SEQ_PROB

    def rows(self, block: TokenBlock, pairs: Pairs, generator: random.Random) -> "Rows":
        """Return the rows of a block, [N] of `dtype`; `generator` draws pairs and lengths."""
        if pairs == "none":
            return self._fill(block, self.pack(block), None)
        planned = {"nsp": self.pair_nsp, "lines": self.pair_lines, "sop": self.pair_sop}[pairs](
            block, generator
        )
        spans = [[first, second] for first, second, _ in planned]
        return self._fill(block, spans, [is_broken for _, _, is_broken in planned])

    def pack(self, block: TokenBlock) -> list[list[Span]]:
        """Fill rows with full sentences; pairs "none".

        A document fills rows of its own, [CLS] sentences [SEP], with RoBERTa's full sentences; a
        sentence is cut (before a whole word) only where keeping it whole would waste over S/16 of
        the row, and its rest opens the next row, so no token is lost. What is left of each
        document, and short documents, share rows: [CLS] a [SEP] b [SEP], packed best fit, longest
        first. All segment ids are 0, and attention is not blocked between texts that share a row.
        """
        ends = block.sentence_ends.tolist()
        # A byte a token, 0 where a word begins: bytes.rfind looks for the last one at C speed.
        continues = self.is_continuation[block.ids].tobytes()
        rows: list[list[Span]] = []
        tails: list[Span] = []
        room = self.max_seq_length - 2
        start = 0
        for stop in block.sentence_ends[block.document_ends - 1].tolist():
            while stop - start > room:
                cut = self._cut(start, start + room, ends, continues)
                rows.append([(start, cut)])
                start = cut
            if room - (stop - start) <= self.max_seq_length // MAX_GAP_DIVISOR:
                rows.append([(start, stop)])
            else:
                tails.append((start, stop))
            start = stop
        return rows + _best_fit(tails, self.max_seq_length - 1)

    def pair_nsp(self, block: TokenBlock, generator: random.Random) -> list[Pair]:
        """Make BERT's sentence pairs (Devlin et al. 2019, section A.2).

        Google's algorithm: sentences of one document are gathered up to a target length, cut in A
        and B at a random sentence; half of the time (always, where there is one sentence) B is a
        stretch of another document and the unused sentences are given back. The longer side is
        trimmed at a random end, so tokens are lost here, and rows are padded. A block of one
        document takes its random B from that document.
        """
        sentences = _Sentences(block)
        room = self.max_seq_length - 3
        pairs: list[Pair] = []
        for index in range(sentences.num_documents):
            position, stop = sentences.of_document(index)
            target = self._target(room, generator)  # Google draws it once a document
            while position < stop:
                last = sentences.gather(position, stop, target)
                size = last + 1 - position
                middle = position + 1 + (int(generator.random() * (size - 1)) if size > 1 else 0)
                first = sentences.span(position, middle)
                is_random = size == 1 or generator.random() < RANDOM_NEXT_PROB
                if is_random:
                    second = sentences.elsewhere(index, target - (first[1] - first[0]), generator)
                    position = middle
                else:
                    second = sentences.span(middle, last + 1)
                    position = last + 1
                pairs.append((*_trim(first, second, room, generator), is_random))
        return pairs

    def pair_lines(self, block: TokenBlock, generator: random.Random) -> list[Pair]:
        """Make StackingBERT's pairs (its bert_dataset.py): every sentence with the next one or,
        half of the time and at a document's end, with a random one of the block.
        """
        sentences = _Sentences(block)
        room = self.max_seq_length - 3
        pairs: list[Pair] = []
        for index in range(sentences.num_documents):
            begin, stop = sentences.of_document(index)
            for line in range(begin, stop):
                is_random = line + 1 == stop or generator.random() < RANDOM_NEXT_PROB
                other = int(generator.random() * sentences.num_sentences) if is_random else line + 1
                # Drawn at random, the true next line is not a broken order.
                is_broken = other != line + 1 or line + 1 == stop
                first, second = sentences.span(line, line + 1), sentences.span(other, other + 1)
                pairs.append((*_trim(first, second, room, generator), is_broken))
        return pairs

    def pair_sop(self, block: TokenBlock, generator: random.Random) -> list[Pair]:
        """Make ALBERT's pairs (Lan et al. 2020, section 3.1): A and B follow each other in one
        document, half of the time swapped. One sentence alone is cut in its middle.
        """
        sentences = _Sentences(block)
        room = self.max_seq_length - 3
        pairs: list[Pair] = []
        for index in range(sentences.num_documents):
            position, stop = sentences.of_document(index)
            target = self._target(room, generator)
            while position < stop:
                last = sentences.gather(position, stop, target)
                start, end = sentences.span(position, last + 1)
                size = last + 1 - position
                if size > 1:
                    middle = sentences.span(
                        position, position + 1 + int(generator.random() * (size - 1))
                    )[1]
                else:
                    middle = (start + end) // 2
                position = last + 1
                if middle == start:
                    continue  # one token cannot be two texts
                first, second = _trim((start, middle), (middle, end), room, generator)
                if generator.random() < RANDOM_NEXT_PROB:
                    pairs.append((second, first, True))
                else:
                    pairs.append((first, second, False))
        return pairs

    def _cut(self, start: int, limit: int, ends: Sequence[int], continues: bytes) -> int:
        """Return where a row that starts at `start` ends, at most at `limit`."""
        at = bisect_right(ends, limit)
        whole = max(ends[at - 1], start) if at else start
        if limit - whole <= self.max_seq_length // MAX_GAP_DIVISOR:
            return whole
        word = continues.rfind(b"\0", whole + 1, limit + 1)
        if word > whole:
            return word
        return whole if whole > start else limit  # one word longer than the row

    def _target(self, room: int, generator: random.Random) -> int:
        is_short = generator.random() < self.short_seq_prob
        return 2 + int(generator.random() * (room - 1)) if is_short else room

    def _fill(
        self, block: TokenBlock, rows: Sequence[Sequence[Span]], labels: Sequence[bool] | None
    ) -> "Rows":
        """Gather the planned rows' tokens."""
        made = np.zeros(len(rows), self.dtype)
        if not len(rows):
            return made
        counts = np.array([len(spans) for spans in rows], np.int64)
        spans = np.array([span for spans in rows for span in spans], np.int64)
        lengths = spans[:, 1] - spans[:, 0]
        first_of_row = np.cumsum(counts) - counts
        before = np.cumsum(lengths + 1) - (lengths + 1)  # tokens and [SEP]s in front, all rows
        columns = before - np.repeat(before[first_of_row], counts) + 1  # behind [CLS]
        places = np.repeat(np.arange(len(rows)), counts) * self.max_seq_length + columns
        ids = np.full(len(rows) * self.max_seq_length, self.pad_id, self.dtype["input_ids"].base)
        ids[:: self.max_seq_length] = self.cls_id
        ids[places + lengths] = self.sep_id
        # Tokens stand between edges: +1 where a span begins, -1 behind it.
        edges = np.zeros(len(ids) + 1, np.int8)
        edges[places] = 1
        edges[places + lengths] = -1
        ids[np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)] = block.ids[
            _ranges(spans[:, 0], lengths)
        ]
        made["input_ids"] = ids.reshape(len(rows), self.max_seq_length)
        if labels is not None:
            a, b = lengths[::2, None], lengths[1::2, None]
            column = np.arange(self.max_seq_length)[None, :]
            made["segment_ids"] = (column >= a + 2) & (column < a + b + 3)
            made["next_sentence_labels"] = labels
        return made


Rows = npt.NDArray[np.void]


def row_type(max_seq_length: int, vocab_size: int, has_pairs: bool) -> np.dtype[np.void]:
    """Return the record of one row: input_ids [S], segment_ids [S] and, with pairs,
    next_sentence_labels (1: the order is broken, NVIDIA's polarity).
    """
    ids = "<u2" if vocab_size <= 65_535 else "<u4"
    fields: list[tuple[str, str, tuple[int, ...]]] = [
        ("input_ids", ids, (max_seq_length,)),
        ("segment_ids", "i1", (max_seq_length,)),
    ]
    if has_pairs:
        fields.append(("next_sentence_labels", "i1", ()))
    return np.dtype(fields)


class _Sentences:
    """A block's sentences as plain lists: Python reads them faster than arrays."""

    def __init__(self, block: TokenBlock) -> None:
        self._starts = [0, *block.sentence_ends.tolist()]  # [Q + 1]
        self._documents = [0, *block.document_ends.tolist()]  # [D + 1]
        self.num_sentences = len(self._starts) - 1
        self.num_documents = len(self._documents) - 1

    def of_document(self, index: int) -> tuple[int, int]:
        """First sentence of a document and the one behind its last."""
        return self._documents[index], self._documents[index + 1]

    def span(self, first: int, stop: int) -> Span:
        """Return the tokens of some sentences."""
        return self._starts[first], self._starts[stop]

    def gather(self, first: int, stop: int, target: int) -> int:
        """Return the last of the sentences from `first` on that together reach `target` tokens."""
        return min(
            bisect_left(self._starts, self._starts[first] + target, first + 1, stop + 1), stop
        ) - 1  # fmt: skip

    def elsewhere(self, index: int, target: int, generator: random.Random) -> Span:
        """Gather sentences of another document from a random one on (at least one)."""
        if self.num_documents > 1:
            other = int(generator.random() * (self.num_documents - 1))
            index = other + (other >= index)
        first, stop = self.of_document(index)
        first += int(generator.random() * (stop - first))
        return self.span(first, self.gather(first, stop, target) + 1)


def _best_fit(texts: Sequence[Span], room: int) -> list[list[Span]]:
    """Pack texts, each costing its length + 1 for [SEP], into the fewest rows found by best fit,
    longest first.
    """
    bins: list[list[Span]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), ascending
    for text in sorted(texts, key=lambda span: span[0] - span[1]):
        cost = text[1] - text[0] + 1
        at = bisect_left(free, (cost, 0))
        if at == len(free):
            bins.append([])
            left, index = room, len(bins) - 1
        else:
            left, index = free.pop(at)
        bins[index].append(text)
        entry = (left - cost, index)
        free.insert(bisect_left(free, entry), entry)
    return bins


def _trim(first: Span, second: Span, room: int, generator: random.Random) -> tuple[Span, Span]:
    """Drop tokens of the longer side, one at a time at a random end, until both fit in `room`."""
    a, b = first[1] - first[0], second[1] - second[0]
    excess = a + b - room
    if excess <= 0:
        return first, second
    # One at a time from the longer side, B where both are equal, comes to this:
    one_sided = min(excess, abs(a - b))
    rest = excess - one_sided
    from_a = (one_sided if a > b else 0) + rest // 2
    return _cut_ends(first, from_a, generator), _cut_ends(second, excess - from_a, generator)


def _cut_ends(span: Span, size: int, generator: random.Random) -> Span:
    """Drop `size` tokens, each at the front or the back with equal chance."""
    if size <= 0:
        return span
    front = generator.getrandbits(size).bit_count()  # binomial: `size` fair coins
    return span[0] + front, span[1] - (size - front)


def _ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """Concatenate the ranges [start, start + length)."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
