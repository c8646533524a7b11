"""What fine-tuning on GLUE came to, as people and programs read it."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from stacking import distributed
from stacking.fine_tuning_jobs import of_flags, require_writable
from stacking.glue_metrics import GlueAverage, glue_average
from stacking.glue_runs import GlueOutcome, GlueRequest, file_notes, fine_tune_all
from stacking.glue_tables import average_lines, skipped_lines
from stacking.glue_training import GlueResult
from stacking.score_statistics import over_seeds, shown


def train(given: Mapping[str, Any]) -> str:
    """Fine-tune as glue.py's flags say, by name; return the table, or a line of JSON."""
    request = GlueRequest(
        *of_flags(given),
        given["glue"],
        given["out"],
        given["tasks"],
        given["grid"],
        given["grid_from"],
    )
    require_writable(request.out)
    for note in [*request.start.load().notes(), *file_notes(request)]:
        print(note, file=sys.stderr, flush=True)
    try:
        found = fine_tune_all(request, tell)
    finally:
        distributed.shut_down()
    return json.dumps(training_json(found)) if given["json"] else "\n".join(training_lines(found))


def tell(result: GlueResult, done: int, total: int) -> None:
    """A line on stderr for each run that ends."""
    scores = ", ".join(f"{name} {value:.2f}" for name, value in result.scores.items())
    print(f"{result.job.name}: {scores}  ({result.seconds:,.0f} s; "
          f"{done} of {total})", file=sys.stderr, flush=True)  # fmt: skip


def training_lines(outcome: GlueOutcome) -> Iterator[str]:
    """A line a task: its mean over the seeds with the 95 % interval; then the averages."""
    for task in _tasks(outcome):
        summary = over_seeds(outcome.scores(task))
        seeds = "1 seed" if summary.num_seeds == 1 else f"{summary.num_seeds} seeds, 95 % interval"
        metrics = outcome.metrics(task)
        own = [f"{name} {shown(over_seeds(values))}" for name, values in metrics.items()]
        several = f"   mean of {', '.join(own)}" if len(own) > 1 else ""
        yield f"{task:<8} {shown(summary, 6)}   ({seeds}){several}{_chosen(outcome, task)}"
    yield from skipped_lines(outcome.skipped, outcome.constants)
    yield from average_lines(_average(outcome))


def _chosen(outcome: GlueOutcome, task: str) -> str:
    """What a grid found, and how many other settings are as good."""
    if task not in outcome.tried:
        return ""
    point, scores = outcome.chosen[task], outcome.tried[task]
    level = sum(score == scores[point] for score in scores.values()) - 1
    others = f", level with {level} of {len(scores) - 1} others" if level else ""
    return f"   {point}{others}"


def training_json(outcome: GlueOutcome) -> dict[str, object]:
    """All numbers."""
    return {
        "tasks": {task: asdict(over_seeds(outcome.scores(task))) for task in _tasks(outcome)},
        "metrics": {
            task: {name: asdict(over_seeds(values)) for name, values in metrics.items()}
            for task in _tasks(outcome) if (metrics := outcome.metrics(task))
        },
        "grid": [
            {"task": task, **asdict(point), "score": score, "chosen": point == outcome.chosen[task]}
            for task, scores in outcome.tried.items() for point, score in scores.items()
        ],
        "seeds": [
            {"task": one.job.task, "seed": one.job.seed, "scores": one.scores,
             "seconds": one.seconds, "setting": asdict(one.job.setting)}
            for one in outcome.results
        ],
        "skipped": outcome.skipped,
        "constants": outcome.constants,
        "average": asdict(_average(outcome)),
    }  # fmt: skip


def _tasks(outcome: GlueOutcome) -> list[str]:
    return list(dict.fromkeys(one.job.task for one in outcome.results))


def _average(outcome: GlueOutcome) -> GlueAverage:
    """With the constants, as `glue.py score` counts them, which reads their files."""
    means = {task: over_seeds(outcome.scores(task)).mean for task in _tasks(outcome)}
    return glue_average(means | outcome.constants)
