"""A GLUE folder and a folder of submission files in; scores on the dev sets out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stacking.glue_data import GlueError, find_file, read_glue
from stacking.glue_metrics import GlueAverage, Scores, glue_average, score_submission, task_score
from stacking.glue_predictions import read_submission, submission_file
from stacking.glue_tasks import TASKS, GlueTask


@dataclass(frozen=True)
class FolderScores:
    """Scores in per cent, and what has none."""

    scores: dict[str, Scores]
    """Tasks by name, each with its metrics."""
    skipped: dict[str, str]
    """Tasks by name that are not scored, each with the reason."""
    notes: tuple[str, ...]
    """What is to be told about the gold files, a line each."""

    @property
    def task_scores(self) -> Scores:
        """One number a task."""
        return {
            task.name: task_score(task, self.scores[task.name])
            for task in TASKS
            if task.name in self.scores
        }

    @property
    def average(self) -> GlueAverage:
        """Over the tasks."""
        return glue_average(self.task_scores)


def score_folders(gold: Path, predictions: Path, tasks: Sequence[GlueTask]) -> FolderScores:
    """Score what both folders have of the tasks' dev sets; GlueError if that is nothing."""
    scores: dict[str, Scores] = {}
    skipped: dict[str, str] = {}
    notes: list[str] = []
    for task in tasks:
        reason = _reason(gold, predictions, task)
        if reason:
            skipped[task.name] = reason
            continue
        dev = read_glue(gold, task, "dev")
        notes += dev.notes()
        said = read_submission(predictions / submission_file(task), task)
        scores[task.name] = score_submission(dev, said)
    if not scores:
        told = "\n".join(f"  - {name}: {reason}" for name, reason in skipped.items())
        raise GlueError(f"no task can be scored:\n{told}")
    return FolderScores(scores, skipped, tuple(notes))


def _reason(gold: Path, predictions: Path, task: GlueTask) -> str:
    """Why a task cannot be scored, or ""."""
    if task.dev is None:
        return "has no dev set with labels"
    if find_file(gold, task, "dev") is None:
        return f"{gold / task.dev.path} is missing"
    if not (predictions / submission_file(task)).exists():
        return f"{predictions / submission_file(task)} is missing"
    return ""
