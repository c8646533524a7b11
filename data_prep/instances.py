"""Tokenised documents in, training sequences out: packed full sentences, or BERT's sentence pairs.

A document here is a list of sentences, a sentence a non-empty list of ids without special tokens.
S: tokens in a sequence.
"""

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError

TokenSentence = list[int]
TokenDocument = list[TokenSentence]

SHORT_SEQ_PROB = (
    0.1  # Devlin et al. 2019, section A.2: shorter sequences lessen the gap to fine-tuning
)
RANDOM_NEXT_PROB = 0.5  # Devlin et al. 2019, section 3.1
# A sentence is cut at the row's end only where keeping it whole would leave more than S / 16 of the
# row empty.
MAX_GAP_DIVISOR = 16


@dataclass(frozen=True)
class PretrainInstance:
    """One sequence of at most S tokens with its special tokens; no masks."""

    token_ids: list[int]
    segment_ids: list[int]
    is_random_next: bool | None = None
    """Whether B comes from another document; None: there are no pairs."""


@dataclass(frozen=True, kw_only=True)
class InstanceBuilder:
    """What both kinds of sequence need to know about the vocabulary and the length."""

    max_seq_length: int
    cls_id: int
    sep_id: int
    is_continuation: Sequence[bool]
    """[V], true for "##" pieces: sentences are cut before whole words."""

    def pack(self, documents: Sequence[TokenDocument]) -> list[PretrainInstance]:
        """Fill rows with full sentences; "--pairs none".

        A document fills rows of its own, [CLS] sentences [SEP], with RoBERTa's full sentences; a
        sentence is cut (before a whole word) only where keeping it whole would waste over S/16 of
        the row, and its rest opens the next row, so no token is lost. What is left of each
        document, and short documents, share rows: [CLS] a [SEP] b [SEP], packed best fit, longest
        first. All segment ids are 0, and attention is not blocked between texts that share a row.
        """
        rows: list[PretrainInstance] = []
        tails: list[TokenSentence] = []
        room = self.max_seq_length - 2
        for document in documents:
            *full, last = self._cut(document, room)
            rows += [self._single([piece]) for piece in full]
            is_full = room - len(last) <= self.max_seq_length // MAX_GAP_DIVISOR
            if is_full:
                rows.append(self._single([last]))
            else:
                tails.append(last)
        return rows + [self._single(texts) for texts in _best_fit(tails, self.max_seq_length - 1)]

    def pair(
        self, documents: Sequence[TokenDocument], generator: random.Random
    ) -> list[PretrainInstance]:
        """Make BERT's sentence pairs [CLS] a [SEP] b [SEP]; "--pairs nsp" (Devlin et al. 2019,
        section A.2).

        Google's algorithm: sentences of one document are gathered up to a target length, cut in A
        and B at a random sentence; half of the time (always, where there is one sentence) B is a
        stretch of another document and the unused sentences are given back. The longer side is
        trimmed at a random end, so tokens are lost here, and rows are padded.
        """
        if len(documents) < 2:
            raise DataError(
                "sentence pairs need at least two documents: a random next sentence comes "
                "from another one"
            )
        return [
            instance
            for index in range(len(documents))
            for instance in self._pairs_of(documents, index, generator)
        ]

    def _cut(self, document: TokenDocument, room: int) -> list[TokenSentence]:
        """Cut one document in pieces of at most `room` tokens; only the last may leave more than
        the largest gap.
        """
        pieces: list[TokenSentence] = []
        current: TokenSentence = []
        max_gap = self.max_seq_length // MAX_GAP_DIVISOR
        for sentence in document:
            rest = sentence
            while len(current) + len(rest) > room:
                free = room - len(current)
                cut = self._word_start(rest, free) if free > max_gap else 0
                if cut == 0 and not current:
                    cut = room  # one word longer than the row
                pieces.append(current + rest[:cut])
                current, rest = [], rest[cut:]
            current = current + rest
        return [*pieces, current]

    def _word_start(self, sentence: TokenSentence, limit: int) -> int:
        """Return the largest offset <= limit at which a word begins."""
        cut = limit
        while cut > 0 and self.is_continuation[sentence[cut]]:
            cut -= 1
        return cut

    def _single(self, texts: Sequence[TokenSentence]) -> PretrainInstance:
        tokens = [self.cls_id]
        for text in texts:
            tokens += [*text, self.sep_id]
        return PretrainInstance(tokens, [0] * len(tokens))

    def _pairs_of(
        self, documents: Sequence[TokenDocument], index: int, generator: random.Random
    ) -> Iterator[PretrainInstance]:
        """Yield the pairs whose A comes from document `index`."""
        document = documents[index]
        room = self.max_seq_length - 3
        target = self._target(room, generator)
        chunk: list[TokenSentence] = []
        position = 0
        while position < len(document):
            chunk.append(document[position])
            position += 1
            if position < len(document) and sum(map(len, chunk)) < target:
                continue
            a_end = generator.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            first = _flat(chunk[:a_end])
            is_random = len(chunk) == 1 or generator.random() < RANDOM_NEXT_PROB
            if is_random:
                second = _random_next(documents, index, target - len(first), generator)
                position -= len(chunk) - a_end
            else:
                second = _flat(chunk[a_end:])
            yield self._pair(*_trim(first, second, room, generator), is_random)
            chunk = []
            target = self._target(room, generator)

    def _target(self, room: int, generator: random.Random) -> int:
        return generator.randint(2, room) if generator.random() < SHORT_SEQ_PROB else room

    def _pair(
        self, first: TokenSentence, second: TokenSentence, is_random: bool
    ) -> PretrainInstance:
        tokens = [self.cls_id, *first, self.sep_id, *second, self.sep_id]
        segments = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        return PretrainInstance(tokens, segments, is_random)


def row_type(max_seq_length: int, vocab_size: int, has_pairs: bool) -> np.dtype[np.void]:
    """Return the record of one row: input_ids [S], segment_ids [S] and, with pairs,
    next_sentence_labels.
    """
    ids = "<u2" if vocab_size <= 65_535 else "<u4"
    fields: list[tuple[str, str, tuple[int, ...]]] = [
        ("input_ids", ids, (max_seq_length,)),
        ("segment_ids", "i1", (max_seq_length,)),
    ]
    if has_pairs:
        fields.append(("next_sentence_labels", "i1", ()))
    return np.dtype(fields)


def to_rows(
    instances: Sequence[PretrainInstance], dtype: np.dtype[np.void], pad_id: int
) -> npt.NDArray[np.void]:
    """Lay instances out as records, padded on the right; label 1 = random next (as NVIDIA)."""
    rows = np.zeros(len(instances), dtype)
    rows["input_ids"] = pad_id
    for row, instance in zip(rows, instances, strict=True):
        length = len(instance.token_ids)
        row["input_ids"][:length] = instance.token_ids
        row["segment_ids"][:length] = instance.segment_ids
    if "next_sentence_labels" in (dtype.names or ()):
        rows["next_sentence_labels"] = [bool(instance.is_random_next) for instance in instances]
    return rows


def _best_fit(texts: Sequence[TokenSentence], room: int) -> list[list[TokenSentence]]:
    """Pack texts, each costing its length + 1 for [SEP], into the fewest rows found by best fit,
    longest first.
    """
    bins: list[list[TokenSentence]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), ascending
    for text in sorted(texts, key=len, reverse=True):
        cost = len(text) + 1
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


def _random_next(
    documents: Sequence[TokenDocument], index: int, target: int, generator: random.Random
) -> TokenSentence:
    """Gather sentences of another document from a random one on, up to `target` tokens (at least
    one sentence).
    """
    other = generator.randrange(len(documents) - 1)
    document = documents[other + (other >= index)]
    tokens: TokenSentence = []
    for sentence in document[generator.randrange(len(document)) :]:
        tokens += sentence
        if len(tokens) >= target:
            break
    return tokens


def _trim(
    first: TokenSentence, second: TokenSentence, room: int, generator: random.Random
) -> tuple[TokenSentence, TokenSentence]:
    """Drop tokens of the longer side, one at a time at a random end, until both fit in `room`."""
    bounds = [[0, len(first)], [0, len(second)]]
    while sum(end - start for start, end in bounds) > room:
        longer = (
            bounds[0] if bounds[0][1] - bounds[0][0] > bounds[1][1] - bounds[1][0] else bounds[1]
        )
        if generator.random() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return first[slice(*bounds[0])], second[slice(*bounds[1])]


def _flat(sentences: Sequence[TokenSentence]) -> TokenSentence:
    return [token for sentence in sentences for token in sentence]
