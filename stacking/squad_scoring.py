"""SQuAD's files in, anybody's; official scores out, and the answers at another threshold."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from stacking.squad_data import SquadError, SquadExample, read_squad
from stacking.squad_metrics import Scores, score_version_1, score_version_2, silenced
from stacking.squad_predictions import read_null_odds, read_predictions, write_texts

NULL_THRESHOLD = 1.0
"""The official script's: with probabilities for odds nothing exceeds it."""


def score_files(
    gold: Path,
    predictions: Path,
    null_odds: Path | None = None,
    null_threshold: float | None = None,
    out: Path | None = None,
) -> Scores:
    """The scores under their official names; SquadError if the files do not belong together.

    `predictions`: predictions.json or nbest_predictions.json. `out`: where the answers go that are
    scored, "" where the null odds exceed the threshold.
    """
    examples = read_squad(gold)
    texts = read_predictions(predictions)
    odds = None if null_odds is None else read_null_odds(null_odds)
    threshold = NULL_THRESHOLD if null_threshold is None else null_threshold
    if not examples.is_version_2:
        for flag, value in (("odds", odds), ("threshold", null_threshold)):
            if value is not None:
                raise SquadError(f"--null-{flag}: {gold} is of version 1.1, which has none")
        _tell_unanswered(examples.examples, texts)
        scores = score_version_1(examples.examples, texts)
    else:
        scores = score_version_2(examples.examples, texts, odds, threshold)
    if out is not None:
        silent = silenced(odds or {}, threshold)
        asked = [one.id for one in examples.examples if one.id in texts]
        _write(out, {key: "" if key in silent else texts[key] for key in asked})
    return scores


def _tell_unanswered(examples: Sequence[SquadExample], texts: Mapping[str, str]) -> None:
    unanswered = sum(one.id not in texts for one in examples)
    if unanswered:
        print(f"{unanswered} of {len(examples)} questions have no prediction and count "
              "as 0", file=sys.stderr)  # fmt: skip


def _write(out: Path, texts: Mapping[str, str]) -> None:
    try:
        write_texts(out, texts)
    except OSError as error:
        raise SquadError(f"--out: {out} cannot be written: {error.strerror or error}") from error
