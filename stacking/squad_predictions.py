"""Start and end logits of windows in; the best answers of each question, and its files, out.

What is taken, and in which order, is as in the original BERT (run_squad.py). The text is cut out of
the context by characters, so nothing is joined back from tokens. W windows, S tokens in a window.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, FiniteFloat, TypeAdapter, ValidationError

from data_prep.plain_files import read_plain
from data_prep.shard_format import write_atomically
from stacking.errors import ConfigError, NonFiniteError
from stacking.squad_data import MOST_BYTES, SquadError, SquadExample
from stacking.squad_features import SquadFeatures

Logits = npt.NDArray[np.floating]
_Doubles = npt.NDArray[np.float64]
_Value = TypeVar("_Value", str, float)

PREDICTIONS = "predictions.json"
NBEST = "nbest_predictions.json"
NULL_ODDS = "null_odds.json"


@dataclass(frozen=True)
class AnswerSettings:
    """What counts as an answer; the defaults are the original BERT's."""

    n_best_size: int = 20
    """Starts and ends tried in each window, and answers kept for each question."""
    max_answer_length: int = 30
    """Tokens."""

    def __post_init__(self) -> None:
        """ConfigError with all faults."""
        faults = [
            f"{name}: got {value}; allowed: an integer at least 1"
            for name, value in asdict(self).items()
            if value < 1
        ]
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True)
class Candidate:
    """One answer with its logits; the text "" is no answer."""

    text: str
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        """What candidates are ranked by."""
        return self.start_logit + self.end_logit


@dataclass(frozen=True)
class Prediction:
    """What a model says to one question."""

    id: str
    nbest: tuple[Candidate, ...]
    """Best first, at least one, texts that differ; version 2: with "", behind `n_best_size` others
    at the latest.
    """
    best_text: str
    """The best text that is an answer; "" where no span is possible."""
    null_odds: float | None
    """Score of no answer less that of `best_text`; None: questions have answers (version 1.1)."""

    def text(self, null_score_diff_threshold: float = 0.0) -> str:
        """The answer, or "" if the null odds exceed the threshold."""
        if self.null_odds is not None and self.null_odds > null_score_diff_threshold:
            return ""
        return self.best_text

    def probabilities(self) -> list[float]:
        """Softmax of the scores over `nbest`."""
        scores = np.array([one.score for one in self.nbest])
        weights = np.exp(scores - scores.max())
        return [float(weight) for weight in weights / weights.sum()]


def predict(
    examples: Sequence[SquadExample],
    features: SquadFeatures,
    start_logits: Logits,
    end_logits: Logits,
    settings: AnswerSettings,
    *,
    is_version_2: bool,
) -> list[Prediction]:
    """Return a prediction for each example; logits are [W, S] in the order of the windows' rows.

    A span starts where its token has most context, ends in the same window's context, and is no
    longer than allowed; the best `n_best_size` starts and ends of each window are paired. In
    version 2 the score of no answer is that of [CLS] in the window that is surest of an answer.
    NonFiniteError if a logit is no number.
    """
    shape = features.input_ids.shape
    assert start_logits.shape == end_logits.shape == shape, (start_logits.shape, shape)
    assert len(examples) == len(features.token_spans), "the features are of other examples"
    if not (np.isfinite(start_logits).all() and np.isfinite(end_logits).all()):
        raise NonFiniteError(
            "SQuAD: the model's logits hold NaN or infinity; nothing can be predicted with it"
        )
    start, end = start_logits.astype(np.float64), end_logits.astype(np.float64)
    return [
        _prediction(
            one,
            _ranked(one, features, start, end, rows, settings),
            _null(start, end, rows) if is_version_2 else None,
            settings.n_best_size,
        )
        for one, rows in zip(examples, map(features.rows_of, range(len(examples))), strict=True)
    ]


def write_predictions(
    folder: Path, predictions: Sequence[Prediction], null_score_diff_threshold: float = 0.0
) -> None:
    """Write the original script's files; null_odds.json for version 2 only."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {one.id: one.text(null_score_diff_threshold) for one in predictions}
    nbest = {
        one.id: [
            {
                "text": candidate.text,
                "probability": probability,
                "start_logit": candidate.start_logit,
                "end_logit": candidate.end_logit,
            }
            for candidate, probability in zip(one.nbest, one.probabilities(), strict=True)
        ]
        for one in predictions
    }
    odds = {one.id: one.null_odds for one in predictions if one.null_odds is not None}
    write_texts(folder / PREDICTIONS, texts)
    _write_json(folder / NBEST, nbest)
    if odds:
        _write_json(folder / NULL_ODDS, odds)


def write_texts(path: Path, texts: Mapping[str, str]) -> None:
    """Write a predictions.json: question id -> text."""
    _write_json(path, dict(texts))


def read_predictions(path: Path) -> dict[str, str]:
    """Read a predictions.json or an nbest_predictions.json, ours or anybody's: question id -> text.

    Of an n-best list it is the best text that is an answer, whatever the null odds; "" if none is.
    """
    form = TypeAdapter(dict[str, Annotated[str, BeforeValidator(_best_text)]])
    return _read(path, form, '{"QUESTION ID": "TEXT", ...}, or an n-best list for each TEXT')


def read_null_odds(path: Path) -> dict[str, float]:
    """Read a null_odds.json: question id -> how much rather no answer than one, any number."""
    return _read(path, TypeAdapter(dict[str, FiniteFloat]), '{"QUESTION ID": NUMBER, ...}')


def _ranked(
    one: SquadExample,
    features: SquadFeatures,
    start_logits: _Doubles,
    end_logits: _Doubles,
    rows: range,
    settings: AnswerSettings,
) -> list[Candidate]:
    """The best spans of all windows of an example, with texts that differ, best first."""
    found = [_spans(features, row, start_logits[row], end_logits[row], settings) for row in rows]
    places = [(row, start, end) for row, spans in zip(rows, found, strict=True)
              for start, end in spans.tolist()]  # fmt: skip
    scores = [start_logits[row, start] + end_logits[row, end] for row, start, end in places]
    candidates: dict[str, Candidate] = {}
    for at in np.argsort(-np.array(scores), kind="stable").tolist():
        row, start, end = places[at]
        begin, behind = features.characters(row, start, end)
        text = one.context[begin:behind].strip()
        if text and text not in candidates:
            candidates[text] = Candidate(
                text, float(start_logits[row, start]), float(end_logits[row, end])
            )
        if len(candidates) == settings.n_best_size:
            break
    return list(candidates.values())


def _spans(
    features: SquadFeatures,
    row: int,
    start_logits: _Doubles,
    end_logits: _Doubles,
    settings: AnswerSettings,
) -> npt.NDArray[np.int64]:
    """(start, end) positions of the spans in a window that may be an answer, [spans, 2]."""
    # Stable, as the original's order is: equal logits keep the order of their positions.
    starts = np.argsort(-start_logits, kind="stable")[: settings.n_best_size]
    ends = np.argsort(-end_logits, kind="stable")[: settings.n_best_size]
    starts = starts[features.is_max_context[row, starts]]  # of the context only
    ends = ends[ends < features.context_begin[row] + features.context_length[row]]
    grid = np.stack(np.meshgrid(starts, ends, indexing="ij"), axis=-1)
    pairs: npt.NDArray[np.int64] = grid.reshape(-1, 2)
    further = pairs[:, 1] - pairs[:, 0]
    is_answer: npt.NDArray[np.bool_] = (further >= 0) & (further < settings.max_answer_length)
    return pairs[is_answer]


def _null(start_logits: _Doubles, end_logits: _Doubles, rows: range) -> Candidate:
    """No answer, with the logits of the window that is least for it."""
    if not rows:
        return Candidate("", 0.0, 0.0)
    own = slice(rows.start, rows.stop)
    row = rows.start + int((start_logits[own, 0] + end_logits[own, 0]).argmin())
    return Candidate("", float(start_logits[row, 0]), float(end_logits[row, 0]))


def _prediction(
    one: SquadExample, ranked: Sequence[Candidate], null: Candidate | None, n_best_size: int
) -> Prediction:
    """`ranked` are the answers, best first, and none of them if no span is possible.

    The original then answers "empty" with logits of 0; here it is "", compared with the same.
    """
    best = ranked[0] if ranked else Candidate("", 0.0, 0.0)
    if null is None:
        return Prediction(one.id, tuple(ranked) or (best,), best.text, None)
    # As in the original no answer stands behind answers of the same score, and is always listed.
    place = sum(candidate.score >= null.score for candidate in ranked)
    kept = [*ranked[:place], null, *ranked[place : n_best_size - 1]]
    return Prediction(one.id, tuple(kept), best.text, null.score - best.score)


def _best_text(value: Any) -> Any:
    """The best answer of an n-best list; what is none is left to be refused, or is a text."""
    if not isinstance(value, list):
        return value
    texts = [one.get("text") if isinstance(one, dict) else None for one in value]
    if not texts or not all(isinstance(text, str) for text in texts):
        return value
    return next(filter(None, texts), "")


def _write_json(path: Path, content: object) -> None:
    write_atomically(path, (json.dumps(content, indent=4) + "\n").encode())


def _read(path: Path, form: TypeAdapter[dict[str, _Value]], example: str) -> dict[str, _Value]:
    try:
        return form.validate_json(read_plain(path, MOST_BYTES), strict=True)
    except OSError as error:
        raise SquadError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise SquadError(
            f"{path}: {place + ': ' if place else ''}{first['msg']}; allowed: {example}"
        ) from error
