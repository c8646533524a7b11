"""Labels and predictions in; GLUE's metrics in per cent out, computed by scikit-learn and scipy.

Both are imported when a metric is asked for.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from stacking.glue_data import GlueError, GlueSet
from stacking.glue_predictions import Doubles
from stacking.glue_tasks import BY_NAME, GlueTask, GridPoint, Metric
from stacking.score_statistics import package

Scores = dict[str, float]

# The leaderboard's columns; MNLI's two are one. AX is shown beside the average.
_EIGHT = (("CoLA",), ("SST-2",), ("MRPC",), ("STS-B",), ("QQP",), ("MNLI-m", "MNLI-mm"), ("QNLI",),
          ("RTE",))  # fmt: skip


@dataclass(frozen=True)
class GlueAverage:
    """What several tasks come to, in per cent."""

    eight_tasks: float | None
    """Without WNLI; None if a task is missing."""
    leaderboard: float | None
    """With WNLI, as the leaderboard has it; None if a task is missing."""
    missing: tuple[str, ...]
    """Tasks that the leaderboard's average lacks."""


def task_metrics(task: GlueTask, labels: Doubles, predictions: Doubles) -> Scores:
    """The task's metrics under their names, in per cent; labels and predictions are [N].

    Where a metric is not defined it is 0: the correlation of a constant, F1 without positives.
    """
    assert labels.shape == predictions.shape, (labels.shape, predictions.shape)
    assert np.isfinite(labels).all()
    assert np.isfinite(predictions).all()
    return {name: 100.0 * _metric(name, labels, predictions) for name in task.metrics}


def score_submission(gold: GlueSet, predictions: Mapping[int, float]) -> Scores:
    """The metrics of predictions by index; GlueError if a row has none or they have other rows."""
    bare = [one.index for one in gold.examples if one.label is None]
    if bare:
        raise GlueError(f"{gold.path}: cannot be scored: it has no labels; give train or dev")
    missing = [one.index for one in gold.examples if one.index not in predictions]
    if missing:
        raise GlueError(
            f"{gold.task.name}: {len(missing)} of {len(gold.examples)} rows of {gold.path} have no "
            f"prediction, the first is {missing[0]}; give predictions of the same file"
        )
    unknown = [index for index in predictions if index >= gold.num_rows]
    if unknown:
        raise GlueError(
            f"{gold.task.name}: {len(unknown)} predictions are of no row of {gold.path}, the first "
            f"is {unknown[0]}; give predictions of the same file"
        )
    labels = np.array([one.label for one in gold.examples], np.float64)
    said = np.array([predictions[one.index] for one in gold.examples], np.float64)
    return task_metrics(gold.task, labels, said)


def score_rows(gold: GlueSet, predictions: Doubles) -> Scores:
    """The metrics of predictions [N] for the rows in their order."""
    rows = zip(gold.examples, predictions.tolist(), strict=True)
    return score_submission(gold, {one.index: value for one, value in rows})


def task_score(task: GlueTask, scores: Mapping[str, float]) -> float:
    """The leaderboard's one number of a task: the mean of its metrics."""
    return statistics.fmean(scores[name] for name in task.metrics)


def glue_average(scores: Mapping[str, float]) -> GlueAverage:
    """The averages of tasks' scores by name (`task_score`); MNLI counts once, AX never."""
    unknown = set(scores) - set(BY_NAME)
    assert not unknown, f"no tasks of GLUE: {sorted(unknown)}"
    missing = [name for names in _EIGHT for name in names if name not in scores]
    means = [
        statistics.fmean(scores[name] for name in names)
        for names in _EIGHT
        if not set(names) & set(missing)
    ]
    eight = None if missing else statistics.fmean(means)
    if "WNLI" not in scores:
        return GlueAverage(eight, None, (*missing, "WNLI"))
    nine = None if missing else statistics.fmean([*means, scores["WNLI"]])
    return GlueAverage(eight, nine, tuple(missing))


def select(dev_scores: Mapping[GridPoint, float]) -> GridPoint:
    """The paper's rule: the setting with the best dev score (`task_score`).

    Of equal ones the first that was tried. The paper selects with the baseline, one run a setting,
    and reuses the choice for all models with new seeds: never report the run that was selected.
    """
    assert dev_scores, "nothing was tried"
    finite = {point: score for point, score in dev_scores.items() if math.isfinite(score)}
    assert finite, "no score is a number"
    return max(finite, key=lambda point: finite[point])


def _metric(name: Metric, labels: Doubles, predictions: Doubles) -> float:
    if name in ("pearson", "spearman"):
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        stats = package("scipy.stats")
        correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
        return float(correlate(labels, predictions).statistic)
    metrics = package("sklearn.metrics")
    if name == "f1":
        return float(metrics.f1_score(labels, predictions, pos_label=1, zero_division=0))
    if name == "matthews":
        return float(metrics.matthews_corrcoef(labels, predictions))
    return float(metrics.accuracy_score(labels, predictions))
