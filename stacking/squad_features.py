"""Questions and contexts in; windows `[CLS] question [SEP] context [SEP]` out, as numpy arrays.

The windows are those of the original BERT (run_squad.py). Places of answers differ where its are
only guessed: they are exact in characters here, so that of two equal words the annotated one is
meant. E examples, W windows, S tokens in a window, T tokens of a context.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from stacking.errors import ConfigError
from stacking.squad_data import SquadExample
from stacking.tokenizing import encodings, special_ids

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

NUM_SPECIAL = 3  # [CLS] and two [SEP]


@dataclass(frozen=True)
class WindowSettings:
    """How contexts are cut, in tokens; the defaults are the original BERT's."""

    max_seq_length: int = 384
    """Tokens S of a window."""
    doc_stride: int = 128
    """From a window's begin to the next one's."""
    max_query_length: int = 64
    """Of a question; the rest is cut off."""

    def __post_init__(self) -> None:
        """ConfigError with all faults."""
        faults = [
            f"{name}: got {value}; allowed: an integer at least 1"
            for name, value in asdict(self).items()
            if value < 1
        ]
        if self.max_seq_length <= self.max_query_length + NUM_SPECIAL:
            faults.append(
                f"max_seq_length: got {self.max_seq_length}; allowed: more than max_query_length "
                f"{self.max_query_length} and {NUM_SPECIAL} special tokens, as a window needs room "
                "for its context"
            )
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, eq=False)
class SquadFeatures:
    """The windows of all examples, in the order of the examples and of each one's context.

    A window is known by its row: logits [W, S] in this order are what `predict` wants.
    """

    input_ids: IntArray
    """[W, S], padded on the right."""
    input_mask: npt.NDArray[np.int8]
    """[W, S], 1 where there is a token, 0 for padding."""
    segment_ids: npt.NDArray[np.int8]
    """[W, S], 1 for the context and the [SEP] behind it, else 0."""
    start_positions: IntArray
    """[W], first token of the answer in the window; 0 ([CLS]): no answer, or not whole in here."""
    end_positions: IntArray
    """[W], last token of the answer, likewise."""
    example_index: IntArray
    """[W], whose window it is, ascending."""
    context_begin: IntArray
    """[W], position of the window's first context token."""
    context_length: IntArray
    """[W], context tokens in the window."""
    first_token: IntArray
    """[W], which of its context's tokens the first one is."""
    is_max_context: BoolArray
    """[W, S], context tokens that have no more context in another window of theirs."""
    token_spans: tuple[IntArray, ...] = field(repr=False)
    """For each example, [T, 2]: characters [begin, end) of its context's tokens."""
    dropped: tuple[str, ...]
    """Ids of examples without windows: their answer, or their whole context, has no token."""

    def rows_of(self, example: int) -> range:
        """Rows of an example's windows, in the order of its context."""
        first, end = np.searchsorted(self.example_index, [example, example + 1]).tolist()
        return range(first, end)

    def characters(self, row: int, start: int, end: int) -> tuple[int, int]:
        """Characters [begin, end) of the context that the tokens start to end of a window cover."""
        spans = self.token_spans[self.example_index[row]]
        shift = int(self.first_token[row] - self.context_begin[row])
        return int(spans[start + shift, 0]), int(spans[end + shift, 1])


@dataclass(frozen=True)
class _Window:
    """One row to be; `start` and `end` are the answer's positions in it."""

    example: int
    first_token: int
    length: int
    start: int = 0
    end: int = 0


@dataclass(frozen=True, eq=False)
class _Text:
    """A tokenised text: ids [T], characters of each token [T, 2]."""

    ids: IntArray
    spans: IntArray


def squad_features(
    examples: Sequence[SquadExample], tokenizer: Tokenizer, settings: WindowSettings
) -> SquadFeatures:
    """Cut examples into windows; those with an `answer_span` get its positions.

    The tokenizer must be that of the pre-training; its own padding, truncation and template are not
    used. A text that spells a special token, such as "[SEP]", is text.
    """
    special = special_ids(tokenizer)
    questions = _encode([one.question for one in examples], tokenizer)
    distinct = list(dict.fromkeys(one.context for one in examples))
    texts = dict(zip(distinct, _encode(distinct, tokenizer), strict=True))
    contexts = [texts[one.context] for one in examples]
    queries = [question.ids[: settings.max_query_length] for question in questions]
    windows: list[_Window] = []
    dropped = []
    for index, (one, query, context) in enumerate(zip(examples, queries, contexts, strict=True)):
        found = list(_windows(index, one, len(query), context, settings))
        windows += found
        if not found:
            dropped.append(one.id)
    return _filled(windows, queries, contexts, special, settings.max_seq_length, tuple(dropped))


def cut(num_tokens: int, capacity: int, stride: int) -> list[tuple[int, int]]:
    """(first token, length) of the windows over a context of T tokens; the last one ends at T."""
    spans = []
    first = 0
    while first < num_tokens:
        length = min(capacity, num_tokens - first)
        spans.append((first, length))
        if first + length == num_tokens:
            break
        first += min(length, stride)
    return spans


def max_context(spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """For each token of a context, [T], the number of the window in which it has most context.

    Context is the smaller of its sides; the original adds a hundredth of the window's length, and
    the first window wins a tie.
    """
    first, length = np.array(spans).T[:, :, None]  # [windows, 1]
    tokens = np.arange(first[-1, 0] + length[-1, 0])
    left, right = tokens - first, first + length - 1 - tokens
    score = np.where((left < 0) | (right < 0), -1.0, np.minimum(left, right) + 0.01 * length)
    best: npt.NDArray[np.int64] = score.argmax(axis=0)
    return best


def _windows(
    index: int, one: SquadExample, query: int, context: _Text, settings: WindowSettings
) -> Iterator[_Window]:
    """The windows of an example whose question has `query` tokens; none if its answer has none."""
    answer = _answer_tokens(one, context.spans)
    if answer is not None and answer[0] > answer[1]:
        return
    capacity = settings.max_seq_length - query - NUM_SPECIAL
    for first, length in cut(len(context.ids), capacity, settings.doc_stride):
        if answer is None or answer[0] < first or answer[1] >= first + length:
            yield _Window(index, first, length)
        else:
            shift = query + 2 - first
            yield _Window(index, first, length, answer[0] + shift, answer[1] + shift)


def _answer_tokens(one: SquadExample, spans: IntArray) -> tuple[int, int] | None:
    """First and last token that the answer touches; first > last if there is none."""
    if one.answer_span is None:
        return None
    begin, end = one.answer_span
    first = int(np.searchsorted(spans[:, 1], begin, side="right"))
    return first, int(np.searchsorted(spans[:, 0], end, side="left")) - 1


def _filled(
    windows: Sequence[_Window],
    queries: Sequence[IntArray],
    contexts: Sequence[_Text],
    special: dict[str, int],
    max_seq_length: int,
    dropped: tuple[str, ...],
) -> SquadFeatures:
    shape = (len(windows), max_seq_length)
    input_ids = np.full(shape, special["pad_token"], np.int32)
    input_mask, segment_ids = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
    best = _best_windows(windows, contexts)
    is_max_context = np.zeros(shape, np.bool_)
    for row, window in enumerate(windows):
        query, text = queries[window.example], contexts[window.example]
        begin, end = len(query) + 2, len(query) + 2 + window.length
        part = slice(window.first_token, window.first_token + window.length)
        input_ids[row, 0] = special["cls_token"]
        input_ids[row, 1 : begin - 1] = query
        input_ids[row, [begin - 1, end]] = special["sep_token"]
        input_ids[row, begin:end] = text.ids[part]
        input_mask[row, : end + 1] = 1
        segment_ids[row, begin : end + 1] = 1
        is_max_context[row, begin:end] = best[window.example][part] == row
    return SquadFeatures(
        input_ids=input_ids,
        input_mask=input_mask,
        segment_ids=segment_ids,
        start_positions=_column(window.start for window in windows),
        end_positions=_column(window.end for window in windows),
        example_index=_column(window.example for window in windows),
        context_begin=_column(len(queries[window.example]) + 2 for window in windows),
        context_length=_column(window.length for window in windows),
        first_token=_column(window.first_token for window in windows),
        is_max_context=is_max_context,
        token_spans=tuple(context.spans for context in contexts),
        dropped=dropped,
    )


def _column(values: Iterator[int]) -> IntArray:
    return np.fromiter(values, np.int32)


def _best_windows(
    windows: Sequence[_Window], contexts: Sequence[_Text]
) -> dict[int, npt.NDArray[np.int64]]:
    """For each example with windows, [T], the row in which a token has most context."""
    rows: dict[int, list[int]] = {}
    for row, window in enumerate(windows):
        rows.setdefault(window.example, []).append(row)
    return {
        example: own[0]
        + max_context([(windows[row].first_token, windows[row].length) for row in own])
        for example, own in rows.items()
    }


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[_Text]:
    return [
        _Text(np.array(encoding.ids, np.int32), with_silent(text, encoding.offsets))
        for text, encoding in zip(texts, encodings(texts, tokenizer), strict=True)
    ]


def with_silent(text: str, spans: Sequence[tuple[int, int]]) -> IntArray:
    """The tokens' characters, [T, 2], widened over those that make no token: accents, soft hyphens.

    Such a character belongs to the token before it in its word, at a word's begin to the one
    behind it; a word of nothing else belongs to none. Else a text taken from `spans` would lack
    the accent at its end.
    """
    widened = np.array(spans, np.int32).reshape(-1, 2)
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), len(text)]
    for right, (begin, end) in enumerate(zip(ends, begins, strict=True)):
        gap = text[begin:end]
        if not gap or gap.isspace():
            continue
        words = re.split(r"\s", gap)
        if right > 0:
            widened[right - 1, 1] += len(words[0])
        if right < len(spans) and (len(words) > 1 or right == 0):
            widened[right, 0] -= len(words[-1])
    return widened
