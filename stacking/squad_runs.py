"""Files and flags in; SQuAD's jobs, one a seed, and the means of their scores out."""

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stacking import distributed
from stacking.errors import ConfigError
from stacking.fine_tuning_jobs import (
    Asked,
    Start,
    of_flags,
    read_done,
    require_writable,
    tell_once,
)
from stacking.score_statistics import over_seeds, package
from stacking.side_by_side import side_by_side
from stacking.squad_data import read_squad, require_answers, training_set
from stacking.squad_metrics import Scores
from stacking.squad_predictions import AnswerSettings
from stacking.squad_training import (
    SquadJob,
    SquadResult,
    default_setting,
    run_job,
    windows_for,
)


@dataclass(frozen=True)
class SquadRequest:
    """What is asked for."""

    start: Start
    asked: Asked
    train: Path
    dev: Path
    out: Path
    windows: Mapping[str, int]
    """What replaces the defaults, by the fields of WindowSettings."""
    answers: AnswerSettings
    null_score_diff_threshold: float

    @classmethod
    def of_flags(cls, given: Mapping[str, Any]) -> "SquadRequest":
        """From the flags' values by name; ConfigError with all faults."""
        names = ("max_seq_length", "doc_stride", "max_query_length")
        threshold = given["null_score_diff_threshold"]
        if math.isnan(threshold):
            raise ConfigError("--null-score-diff-threshold: got nan; allowed: a number")
        return cls(
            *of_flags(given), given["train"], given["dev"], given["out"],
            {name: given[name] for name in names if given[name] is not None},
            AnswerSettings(given["n_best_size"], given["max_answer_length"]), threshold,
        )  # fmt: skip

    def notes(self) -> list[str]:
        """What is to be told before anything is trained, a line each."""
        train, dev = read_squad(self.train), read_squad(self.dev)
        unseen = [f"{self.train} is of version 1.1, {self.dev} of 2.0: the model never sees a "
                  "question without an answer"]  # fmt: skip
        return [*self.start.load().notes(), *training_set(train).notes(),
                *unseen * (dev.is_version_2 and not train.is_version_2)]  # fmt: skip

    def jobs(self) -> list[SquadJob]:
        """One a seed; UserError where files or model cannot be read, or an interval not be had."""
        if self.asked.num_seeds > 1:
            package("scipy.stats")
        setting = replace(default_setting(self.train), **self.asked.settings)  # type: ignore[arg-type]
        require_answers(read_squad(self.dev))
        windows = windows_for(self.start.load().config, self.windows)
        return [
            SquadJob(
                self.start, self.train, self.dev, self.out / f"seed_{seed}", seed, setting,
                windows, self.answers, self.null_score_diff_threshold,
            )
            for seed in self.asked.seeds
        ]  # fmt: skip


def train(given: Mapping[str, Any]) -> list[SquadResult]:
    """Fine-tune as squad.py's flags say, by name; a result for each seed."""
    request = SquadRequest.of_flags(given)
    jobs = request.jobs()
    require_writable(request.out)
    for note in request.notes():
        tell_once(note)
    results = []
    try:
        for one in _run(jobs, request.asked.processes):
            scores = ", ".join(f"{name} {value:.2f}" for name, value in one.scores.items())
            print(f"{one.job.name}: {scores}  ({one.seconds:,.0f} s)", file=sys.stderr, flush=True)
            results.append(one)
    finally:
        distributed.shut_down()
    return sorted(results, key=lambda one: one.job.seed)


def means(results: Sequence[SquadResult]) -> Scores:
    """Over the seeds; a count that all have stays one."""
    values = {name: [one.scores[name] for one in results] for name in results[0].scores}
    return {name: found[0] if len(set(found)) == 1 else statistics.fmean(found)
            for name, found in values.items()}  # fmt: skip


def half_widths(results: Sequence[SquadResult]) -> dict[str, float | None]:
    """Of the means' 95 % intervals, each in the score's own unit; None for one seed."""
    return {name: over_seeds([one.scores[name] for one in results]).half_width
            for name in results[0].scores}  # fmt: skip


def training_json(results: Sequence[SquadResult]) -> dict[str, object]:
    """All numbers."""
    seeds = [{"seed": one.job.seed, "scores": one.scores, "seconds": round(one.seconds, 1)}
             for one in results]  # fmt: skip
    return {**means(results), "half_widths": half_widths(results), "seeds": seeds}


def _run(jobs: Sequence[SquadJob], processes: int) -> Iterator[SquadResult]:
    """The results as they come; those on disk first, which are not done again."""
    done = {
        job: SquadResult(job, *found)
        for job in jobs
        if (found := read_done(job.name, job.result, job.files(), job.conditions()))
    }
    yield from done.values()
    yield from side_by_side(run_job, [job for job in jobs if job not in done], processes)
