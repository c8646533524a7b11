"""Labels and predictions in; GLUE's metrics in per cent out, computed by scikit-learn and scipy.

Both are imported when a metric is asked for: nothing else of the project needs them.
"""

import importlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from stacking.errors import UserError
from stacking.glue_data import GlueError, GlueSet
from stacking.glue_predictions import Doubles
from stacking.glue_tasks import BY_NAME, GlueTask, GridPoint, Metric

Scores = dict[str, float]

CONFIDENCE = 0.95
# The leaderboard's columns; MNLI's two are one. AX is shown beside the average.
_EIGHT = (("CoLA",), ("SST-2",), ("MRPC",), ("STS-B",), ("QQP",), ("MNLI-m", "MNLI-mm"), ("QNLI",),
          ("RTE",))  # fmt: skip


class MissingPackageError(UserError):
    """A package that only the metrics need is not installed."""


@dataclass(frozen=True)
class GlueAverage:
    """What several tasks come to, in per cent."""

    eight_tasks: float | None
    """Without WNLI; None if a task is missing."""
    leaderboard: float | None
    """With WNLI, as the leaderboard has it; None if a task is missing."""
    missing: tuple[str, ...]
    """Tasks that the leaderboard's average lacks."""


@dataclass(frozen=True)
class Summary:
    """Scores of one task over seeds, in per cent."""

    mean: float
    half_width: float | None
    """The 95 % interval is mean - half_width to mean + half_width; None for one seed."""
    num_seeds: int


@dataclass(frozen=True)
class Difference:
    """What one model has over another, in points."""

    mean: float
    half_width: float | None
    """The 95 % interval is mean - half_width to mean + half_width; None where one has one seed."""

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.half_width is not None and abs(self.mean) > self.half_width


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


def over_seeds(scores: Sequence[float]) -> Summary:
    """Mean and 95 % interval by Student's t.

    The paper takes the normal distribution, whose interval is 2.2 times too narrow for 3 seeds and
    1.3 times for 6, the numbers that it uses: its width holds only if the spread were known.
    """
    assert scores, "no seed"
    mean, count = statistics.fmean(scores), len(scores)
    if count == 1:
        return Summary(mean, None, 1)
    quantile = float(_package("scipy.stats").t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Summary(mean, quantile * statistics.stdev(scores) / math.sqrt(count), count)


def difference(scores: Sequence[float], others: Sequence[float]) -> Difference:
    """Mean of `scores` less that of `others`, with Welch's 95 % interval: spreads may differ."""
    assert scores, "no seed"
    assert others, "no seed"
    mean = statistics.fmean(scores) - statistics.fmean(others)
    if min(len(scores), len(others)) == 1:
        return Difference(mean, None)
    # scipy's ttest_ind warns where one side has no spread, as models that say one label have none.
    parts = [(statistics.variance(one) / len(one), len(one) - 1) for one in (scores, others)]
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return Difference(mean, 0.0)
    freedom = total**2 / sum(variance**2 / count for variance, count in parts)
    quantile = float(_package("scipy.stats").t.ppf(0.5 + CONFIDENCE / 2, freedom))
    return Difference(mean, quantile * math.sqrt(total))


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
        stats = _package("scipy.stats")
        correlate = stats.pearsonr if name == "pearson" else stats.spearmanr
        return float(correlate(labels, predictions).statistic)
    metrics = _package("sklearn.metrics")
    if name == "f1":
        return float(metrics.f1_score(labels, predictions, pos_label=1, zero_division=0))
    if name == "matthews":
        return float(metrics.matthews_corrcoef(labels, predictions))
    return float(metrics.accuracy_score(labels, predictions))


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(
            f"GLUE's metrics need scikit-learn and scipy ({error}); install them with this "
            "project's extra: pip install -c constraints.txt -e '.[glue]'"
        ) from error
