"""What `launch/glue.py train` left of several models, side by side; the first is the baseline.

usage:
  python benchmarks/glue_table.py OUT_BASELINE OUT... [--glue GLUE_DIR]

A line a task (its one number, in per cent): of each model the mean over the seeds with its 95 %
interval, of all but the first also what it has over the first, with Welch's interval; * where that
leaves 0 out. The last line is the mean of these tasks, taken seed by seed. With --glue a column
says what the training file's most frequent label scores (for STS-B any constant: 0). Only tasks
that every folder has are shown, and they must be of the same data and setting. Then what is to be
told of the files; the last line is JSON.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stacking.errors import ConfigError, UserError
from stacking.glue_data import read_glue
from stacking.glue_metrics import score_rows, task_score
from stacking.glue_tasks import BY_NAME, TASKS, GlueTask
from stacking.score_statistics import difference, over_seeds

Seeds = dict[int, dict[str, Any]]
"""Contents of result files by seed."""


@dataclass(frozen=True)
class Line:
    """One task, or the mean of all."""

    name: str
    scores: dict[str, list[float]]
    """By model, of each seed."""
    constant: float | None


def main() -> int:
    """Print the table; 2: the user's mistake."""
    asked = parse_arguments()
    try:
        found = {folder.name: read_folder(folder) for folder in asked.folders}
        if len(found) < len(asked.folders):
            raise ConfigError("folders: two have one name; rename one")
        lines = lines_of(found, asked.glue)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(lines)))
    for note in dict.fromkeys(note for seeds in next(iter(found.values())).values()
                              for note in next(iter(seeds.values()))["notes"]):  # fmt: skip
        print(f"- {note}")
    print(json.dumps({line.name: as_json(line) for line in lines}))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT")
    parser.add_argument("--glue", type=Path, metavar="GLUE_DIR")
    return parser.parse_args()


def read_folder(folder: Path) -> dict[str, Seeds]:
    """Results by task, then seed; ConfigError where there are none."""
    found: dict[str, Seeds] = {}
    for task in TASKS:
        for path in sorted(folder.glob(f"seed_*/{task.name}.json")):
            seed = int(path.parent.name.removeprefix("seed_"))
            found.setdefault(task.name, {})[seed] = json.loads(path.read_bytes())
    if not found:
        raise ConfigError(f"{folder}: no results; give the --out of `launch/glue.py train`")
    return found


def lines_of(found: dict[str, dict[str, Seeds]], glue: Path | None) -> list[Line]:
    """The tasks that all models have; ConfigError where they are of other data or settings."""
    names = [task for task in next(iter(found.values()))
             if all(task in tasks for tasks in found.values())]  # fmt: skip
    if not names:
        raise ConfigError("the folders have no task in common")
    lines = []
    for name in names:
        require_alike(name, {model: tasks[name] for model, tasks in found.items()})
        task = BY_NAME[name]
        scores = {
            model: [task_score(task, one["scores"]) for one in tasks[name].values()]
            for model, tasks in found.items()
        }
        lines.append(Line(name, scores, None if glue is None else constant_score(glue, task)))
    require_equal_seeds(lines)
    return [*lines, mean_line(lines)]


def require_alike(name: str, models: dict[str, Seeds]) -> None:
    """ConfigError unless seeds, files and settings are the same for all."""
    told = {
        model: [
            {key: value for key, value in one["conditions"].items() if key != "model"}
            for one in seeds.values()
        ]
        for model, seeds in models.items()
    }
    first = next(iter(told))
    for model, conditions in told.items():
        if conditions != told[first]:
            raise ConfigError(
                f"{name}: {model} has other seeds, data or settings than {first}; train both alike"
            )


def require_equal_seeds(lines: list[Line]) -> None:
    """ConfigError unless all tasks have as many seeds: their mean is taken seed by seed."""
    counts = {line.name: len(next(iter(line.scores.values()))) for line in lines}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ConfigError(f"seeds by task: {told}; give all tasks as many (`glue.py train` again)")


def constant_score(glue: Path, task: GlueTask) -> float:
    """Of the training rows' most frequent label for every dev row."""
    dev = read_glue(glue, task, "dev")
    labels = Counter(one.label for one in read_glue(glue, task, "train").examples)
    said = np.full(len(dev.examples), labels.most_common(1)[0][0], np.float64)
    return task_score(task, score_rows(dev, said))


def mean_line(lines: list[Line]) -> Line:
    """The mean of the tasks for each seed."""
    scores = {
        model: [statistics.fmean(seed) for seed in zip(*(line.scores[model] for line in lines),
                                                       strict=True)]
        for model in lines[0].scores
    }  # fmt: skip
    constants = [line.constant for line in lines if line.constant is not None]
    return Line(f"mean of {len(lines)}", scores, statistics.fmean(constants) if constants else None)


def table(lines: list[Line]) -> list[str]:
    """Markdown."""
    models = list(lines[0].scores)
    head = ["task", *(["most frequent label"] if lines[0].constant is not None else []), *models]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        constant = [] if line.constant is None else [f"{line.constant:.1f}"]
        rows.append([line.name, *constant, *(cell(line, model) for model in models)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def cell(line: Line, model: str) -> str:
    """As in `61.2 +- 1.3 (+0.4 +- 2.1)`."""
    first, own = next(iter(line.scores)), over_seeds(line.scores[model])
    shown = f"{own.mean:.1f}" + ("" if own.half_width is None else f" +- {own.half_width:.1f}")
    if model == first:
        return shown
    over = difference(line.scores[model], line.scores[first])
    half = "" if over.half_width is None else f" +- {over.half_width:.1f}"
    return f"{shown} ({over.mean:+.1f}{half}){'*' if over.is_sure else ''}"


def as_json(line: Line) -> dict[str, object]:
    """All numbers of a line."""
    first = next(iter(line.scores))
    return {
        "most_frequent_label": line.constant,
        "scores": line.scores,
        "over_the_first": {
            model: vars(difference(scores, line.scores[first]))
            for model, scores in line.scores.items() if model != first
        },
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
