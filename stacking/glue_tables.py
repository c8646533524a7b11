"""GLUE's scores as people read them."""

from collections.abc import Iterator, Mapping

from stacking.glue_metrics import GlueAverage
from stacking.glue_scores import FolderScores


def score_lines(found: FolderScores) -> Iterator[str]:
    """A line a task, then the averages."""
    for name, scores in found.scores.items():
        own = "   ".join(f"{metric} {value:6.2f}" for metric, value in scores.items())
        yield f"{name:<8} {found.task_scores[name]:6.2f}   {own}"
    yield from skipped_lines(found.skipped)
    yield from average_lines(found.average)


def skipped_lines(
    skipped: Mapping[str, str], constants: Mapping[str, float] | None = None
) -> Iterator[str]:
    """Why a task has no score, or only that of a constant answer."""
    for name, reason in skipped.items():
        score = (constants or {}).get(name)
        yield f"{name:<8} {'-' if score is None else f'{score:.2f}':>6}   {reason}"


def average_lines(average: GlueAverage) -> Iterator[str]:
    """Both averages, or what they lack."""
    for what, value, without in (
        ("all nine, as the leaderboard's", average.leaderboard, ()),
        ("the eight without WNLI", average.eight_tasks, ("WNLI",)),
    ):
        missing = ", ".join(name for name in average.missing if name not in without)
        shown = f"-  (missing: {missing})" if value is None else f"{value:.2f}"
        yield f"average of {what}: {shown}"
