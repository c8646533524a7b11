"""Run folders in; runs that may be compared out, or one message with all in which they differ."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.plain_files import read_plain
from stacking.config import BertConfig, Recipe
from stacking.config_loading import JsonObject, load_recipe, read_json_object
from stacking.errors import ConfigError, UserError
from stacking.report_metrics import RunMetrics, read_metrics
from stacking.run_folder import BRANCHES
from stacking.schedule import learning_rate

DECAYED = 0.1
"""A run's rate has come down if it ends at this share of the peak or below."""
MATMUL_SPREAD = 1.3
"""Rates of matrix products of two runs that are farther apart are told."""
_UNKNOWN = "unknown"
_NO_MATTER = {"name", "description", "checkpoint", "seed", "branches", "growth_branches"}
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet", "steps_per_print")


@dataclass(frozen=True)
class Run:
    """One run as it lies in its folder."""

    folder: Path
    recipe: Recipe
    metrics: RunMetrics
    engines: tuple[JsonObject, ...]  # DeepSpeed's JSON of each stage

    @property
    def target(self) -> BertConfig:
        """The model that it ends with."""
        return self.recipe.stage_model(len(self.recipe.stages) - 1)

    @property
    def settings(self) -> str:
        """All that seeds share: equal for two runs that differ in their seed alone."""
        trained = self.recipe.model_dump(mode="json", exclude=_NO_MATTER)
        for cosmetic in ("every_steps", "batch_size"):
            del trained["evaluation"][cosmetic]
        return json.dumps(trained, sort_keys=True)

    @property
    def fault(self) -> str:
        """Why its last loss does not count; empty if it does."""
        last = self.metrics.evaluations[-1] if self.metrics.evaluations else None
        steps = self.recipe.total_steps
        if not self.metrics.is_finished and self.metrics.global_step >= steps:
            return "its end is not in metrics.jsonl; the command that trained it writes it"
        if not self.metrics.is_finished:
            return f"unfinished: step {self.metrics.global_step:,} of {steps:,}"
        if last is None or last.global_step != steps or not math.isfinite(last.val_mlm_loss):
            return "without a validation loss at its end"
        share = _last_rate(self.recipe) / self.recipe.learning_rate.peak
        if share > DECAYED:
            return f"not decayed: it ends at {share:.0%} of the peak learning rate"
        return ""

    def engine(self, stage: int) -> JsonObject:
        """DeepSpeed's JSON of a stage (0-based) without what only reports."""
        return {k: v for k, v in self.engines[stage].items() if k not in _MONITORS}

    def configuration(self, stage: int) -> str:
        """What the time of a step of `stage` (0-based) depends on."""
        recipe = self.recipe
        frozen = recipe.stages[stage].freeze
        start = self.metrics.start
        parts = [
            [start.device, start.precision, start.world_size],
            recipe.stage_model(stage).model_dump(mode="json"),
            recipe.stage_data(stage).model_dump(mode="json"),
            frozen and frozen.model_dump(mode="json"),
            recipe.global_batch_size,
            self.engine(stage),
        ]
        return json.dumps(parts, sort_keys=True)


def with_branches(folder: Path) -> list[Path]:
    """A run's folder, then those of its branches, each with its own."""
    own = sorted(path.parent for path in (folder / BRANCHES).glob("*/recipe.json"))
    return [folder, *(path for branch in own for path in with_branches(branch))]


def each_once(folders: Iterable[Path]) -> list[Path]:
    """Folders in their order, one that is named again, by whatever path, left out."""
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(folder.resolve(), folder)
    return list(once.values())


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders; UserError where one is none, is given twice, or they cannot be compared."""
    runs = [_read_run(folder) for folder in folders]
    _refuse_repeats(runs)
    _refuse_differences(runs)
    return runs


def _read_run(folder: Path) -> Run:
    metrics = read_metrics(folder / "metrics.jsonl")
    path = folder / "recipe.json"
    _content(path)
    try:
        recipe = load_recipe(path)
    except ConfigError as error:
        faults = "; ".join(error.faults)
        raise UserError(f"{path}: is no recipe of this version: {faults}") from error
    settings = folder / "deepspeed.json"
    _content(settings)
    stages = read_json_object(settings).get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f'{settings}: has no list "stages"; was it edited?')
    plans = [(plan.num_hidden_layers, plan.steps) for plan in metrics.start.stages]
    wanted = [(stage.num_hidden_layers, stage.steps) for stage in recipe.stages]
    if plans != wanted or len(stages) != len(wanted):
        raise UserError(
            f"{folder}: recipe.json, deepspeed.json and metrics.jsonl are not of one run: "
            f"stages of (layers, steps) {wanted}, {len(stages)} stages and {plans}"
        )
    return Run(folder, recipe, metrics, tuple(stages))


def _content(path: Path) -> bytes:
    """Of a file that every run folder has."""
    try:
        return read_plain(path)
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: has no {path.name}, which launch/pretrain.py writes beside "
            "metrics.jsonl; was the folder copied in part? Give a whole run folder"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_pilots(folders: Sequence[Path]) -> list[Run]:
    """Runs of any kind, and their branches, whose cost counts, not their losses; each once."""
    paths = [path for folder in folders for path in with_branches(folder)]
    return [_read_run(folder) for folder in each_once(paths)]


def _refuse_repeats(runs: Sequence[Run]) -> None:
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        twin = seen.setdefault((run.settings, run.recipe.seed), run)
        if twin is not run:
            raise UserError(
                f"{twin.folder} and {run.folder}: are the same recipe with the same seed "
                f"{run.recipe.seed}, which is one result, not two; give one of them"
            )


def _refuse_differences(runs: Sequence[Run]) -> None:
    if faults := _differences(runs, list(_facts(runs[0])) if runs else []):
        raise UserError(
            "\n".join(["these runs cannot be compared, their results are of different tasks:",
                       *faults, "give runs that are alike in all of this"])
        )  # fmt: skip


def refuse_other_places(runs: Sequence[Run], pilots: Sequence[Run]) -> None:
    """UserError where the seconds of a pilot's steps are not those of the runs."""
    if faults := _differences([*runs, *pilots], _OF_TIME):
        raise UserError(
            "\n".join(["these pilots cannot be charged, their time is of another kind than that "
                       "of the runs:", *faults, "give pilots that are alike in all of this"])
        )  # fmt: skip


def _differences(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """A line for every value that must be equal and is not, and which run has which."""
    facts = [_facts(run) for run in runs]
    faults = []
    for name in names:
        owners: dict[str, list[str]] = {}
        for run, values in zip(runs, facts, strict=True):
            owners.setdefault(values[name], []).append(str(run.folder))
        if len(owners.keys() - {_UNKNOWN}) > 1:
            told = "; ".join(f"{value} in {', '.join(who)}" for value, who in owners.items())
            faults.append(f"  - {name}: {told}")
    return faults


def _facts(run: Run) -> dict[str, str]:
    """What must be equal for losses and times to be comparable."""
    start, data, recipe = run.metrics.start, run.recipe.data, run.recipe
    prints = {"training data": start.data_fingerprint,
              "evaluation data": start.validation_fingerprint}  # fmt: skip
    values: dict[str, object] = {
        **{name: _UNKNOWN if value is None else value for name, value in prints.items()},
        **{f"masking, data.{name}": value for name, value in data.model_dump().items()},
        "evaluation.max_sequences": recipe.evaluation.max_sequences,
        "global_batch_size": recipe.global_batch_size,
        "model.vocab_size": recipe.model.vocab_size,
        "device": start.device,
        "device's name": start.device_name or _UNKNOWN,
        "ranks": start.world_size,
        "precision": start.precision,
        # What trained weights had cost before is charged to nobody.
        "first weights": start.start_sha256 or "random",
    }
    return {name: str(value) for name, value in values.items()}


_OF_TIME = ("global_batch_size", "device", "device's name", "ranks", "precision")
"""Of the facts, those that a pilot has to share."""


def unchecked(runs: Sequence[Run], timed: Sequence[Run] = ()) -> list[str]:
    """What could not be held against each other, for people; `timed`: runs that alone say what a
    step takes, if any.
    """
    return [*_unknown(runs), *_other_engines(runs), *_other_rates(timed or runs)]


def _unknown(runs: Sequence[Run]) -> list[str]:
    """A note for all facts that the same runs do not tell."""
    missing: dict[str, list[str]] = {}
    for name in _facts(runs[0]) if runs else ():
        silent = [str(run.folder) for run in runs if _facts(run)[name] == _UNKNOWN]
        if silent:
            who = "all runs" if len(silent) == len(runs) else ", ".join(silent)
            missing.setdefault(who, []).append(name)
    return [
        f"Unknown, and so not compared: {', '.join(names)} of {silent} (written by an older "
        "version)."
        for silent, names in missing.items()
    ]


def _other_engines(runs: Sequence[Run]) -> list[str]:
    ends = {json.dumps(run.engine(-1), sort_keys=True) for run in runs}
    parsed = [json.loads(end) for end in ends]
    keys = sorted({k for end in parsed for k in end if any(e.get(k) != end[k] for e in parsed)})
    if not keys:
        return []
    return [
        f"The engines of the last stages differ in {', '.join(keys)}: their steps may differ in "
        "time for another reason than their size."
    ]


def _other_rates(runs: Sequence[Run]) -> list[str]:
    rates = [(run.metrics.start.matmul_flops_per_second, str(run.folder)) for run in runs]
    known = [(rate, folder) for rate, folder in rates if 0 < rate < math.inf]
    if not known or max(known)[0] <= MATMUL_SPREAD * min(known)[0]:
        return []
    (slow, slowest), (fast, fastest) = min(known), max(known)
    return [
        f"When they began, matrix products took {fast / slow:.1f} times as long in {slowest} as in "
        f"{fastest}: another machine, or one that was busy. Where they do not share "
        "configurations, their reference times may not be comparable."
    ]


def _last_rate(recipe: Recipe) -> float:
    """The rate at which the schedule arrives when the last step is made."""
    steps = recipe.total_steps if recipe.learning_rate.scope == "run" else recipe.stages[-1].steps
    return learning_rate(steps, recipe.learning_rate, steps)
