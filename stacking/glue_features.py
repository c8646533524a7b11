"""Sentences in; rows `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` out, as numpy arrays.

Tokens are kept once, without padding; rows are put together when a batch is asked for, so that the
sentences of a pair can be swapped anew in each epoch. N examples, T tokens of all sentences, K
sentences of an example (1 or 2), B rows of a batch, S tokens of its longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from stacking.errors import ConfigError
from stacking.glue_data import GlueExample
from stacking.glue_tasks import STS_B_CENTRE, STS_B_HALF, GlueTask
from stacking.tokenizing import encodings, special_ids

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class GlueBatch:
    """Rows as the model reads them."""

    input_ids: IntArray
    """[B, S], padded on the right."""
    input_mask: npt.NDArray[np.int8]
    """[B, S], 1 where there is a token, 0 for padding."""
    segment_ids: npt.NDArray[np.int8]
    """[B, S], 1 for the second sentence and the [SEP] behind it, else 0, as in pre-training."""
    targets: npt.NDArray[np.int64] | npt.NDArray[np.float32] | None
    """[B], as in GlueFeatures."""


@dataclass(frozen=True, eq=False)
class GlueFeatures:
    """The tokens of all examples, in their order."""

    token_ids: IntArray
    """[T]."""
    spans: npt.NDArray[np.int64]
    """[N, K, 2], each sentence's tokens [begin, end) in `token_ids`, not yet truncated."""
    targets: npt.NDArray[np.int64] | npt.NDArray[np.float32] | None
    """[N], what is trained on: the class's number (int64), 0 or 1 for one logit (float32), the
    scaled score (float32); None: a test file.
    """
    max_seq_length: int
    special: dict[str, int]
    """Ids of [PAD], [CLS] and [SEP] by role."""

    def __len__(self) -> int:
        """N."""
        return len(self.spans)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row, truncated and with the special ones, [N]."""
        num_special = self.spans.shape[1] + 1
        tokens: npt.NDArray[np.int64] = np.diff(self.spans, axis=2).sum(axis=(1, 2)) + num_special
        return np.minimum(tokens, self.max_seq_length)

    def swapped(self, is_swapped: BoolArray) -> "GlueFeatures":
        """The same with the sentences of the pairs `is_swapped` [N] in the other order."""
        spans = np.where(is_swapped[:, None, None], self.spans[:, ::-1], self.spans)
        return replace(self, spans=spans)

    def batch(self, rows: Sequence[int] | IntArray | npt.NDArray[np.int64]) -> GlueBatch:
        """The rows [B], padded to the longest of them."""
        assert len(rows) > 0, "a batch has at least one row"
        texts = [self._truncated(int(row)) for row in rows]
        width = max(sum(map(len, pair)) + len(pair) + 1 for pair in texts)
        shape = (len(texts), width)
        input_ids = np.full(shape, self.special["pad_token"], np.int32)
        input_mask, segment_ids = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
        for place, pair in enumerate(texts):
            input_ids[place, 0] = self.special["cls_token"]
            begin = 1
            for segment, ids in enumerate(pair):
                end = begin + len(ids)
                input_ids[place, begin:end] = ids
                input_ids[place, end] = self.special["sep_token"]
                segment_ids[place, begin : end + 1] = segment
                begin = end + 1
            input_mask[place, :begin] = 1
        targets = None if self.targets is None else self.targets[np.asarray(rows)]
        return GlueBatch(input_ids, input_mask, segment_ids, targets)

    def _truncated(self, row: int) -> list[IntArray]:
        """The sentences' tokens as far as they fit, [t1] and [t2]."""
        spans = self.spans[row].tolist()
        room = self.max_seq_length - len(spans) - 1
        kept = truncated([end - begin for begin, end in spans], room)
        return [
            self.token_ids[begin : begin + length]
            for (begin, _), length in zip(spans, kept, strict=True)
        ]


def glue_features(
    examples: Sequence[GlueExample], task: GlueTask, tokenizer: Tokenizer, max_seq_length: int
) -> GlueFeatures:
    """Tokenise examples of a task; ConfigError if `max_seq_length` has no room for the sentences.

    The tokenizer must be that of the pre-training; its own padding, truncation and template are not
    used. A text that spells a special token, such as "[SEP]", is text.
    """
    num_texts = 2 if task.is_pair else 1
    least = 2 * num_texts + 1
    if max_seq_length < least:
        raise ConfigError(
            f"max_seq_length: got {max_seq_length}; allowed: at least {least}, a token of each "
            f"sentence of {task.name} and {num_texts + 1} special ones"
        )
    texts = [text for one in examples for text in _texts(one, task)]
    token_ids = [np.array(one.ids, np.int32) for one in encodings(texts, tokenizer)]
    ends = np.cumsum([0, *map(len, token_ids)], dtype=np.int64)
    return GlueFeatures(
        token_ids=np.concatenate([np.zeros(0, np.int32), *token_ids]),
        spans=np.stack([ends[:-1], ends[1:]], axis=1).reshape(len(examples), num_texts, 2),
        targets=_targets(examples, task),
        max_seq_length=max_seq_length,
        special=special_ids(tokenizer),
    )


def truncated(lengths: Sequence[int], room: int) -> list[int]:
    """Tokens that are kept of each sentence, longest first: of a pair the longer one is cut.

    At equal lengths the second one is, as in the original BERT. Two tokens of room are enough to
    keep a token of both.
    """
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    first, second = lengths
    excess = max(0, first + second - room)
    # The longer one is cut down to the other, then both in turn, the second one first.
    lead = min(excess, abs(first - second))
    rest = excess - lead
    if first > second:
        first -= lead
    else:
        second -= lead
    return [first - rest // 2, second - (rest + 1) // 2]


def symmetric_swaps(num_examples: int, generator: np.random.Generator) -> BoolArray:
    """Which pairs are swapped in one epoch, [N], each with probability 1/2."""
    return generator.random(num_examples) < 0.5


def _texts(one: GlueExample, task: GlueTask) -> list[str]:
    if not task.is_pair:
        return [one.first]
    assert one.second is not None, "the examples are of another task"
    return [one.first, one.second]


def _targets(
    examples: Sequence[GlueExample], task: GlueTask
) -> npt.NDArray[np.int64] | npt.NDArray[np.float32] | None:
    labels = [one.label for one in examples if one.label is not None]
    if len(labels) < len(examples) or not labels:
        return None
    if task.kind == "classes":
        return np.array(labels, np.int64)
    if task.kind == "one_logit":
        return np.array(labels, np.float32)
    return ((np.array(labels) - STS_B_CENTRE) / STS_B_HALF).astype(np.float32)
