"""Jobs killed by SIGKILL at a hundred moments lose nothing but the steps since the last commit.

Moments are drawn from a seed, spread over a job's whole life, some of them aimed: at a save that
is under way, at a switch, at the very end. A third kill one rank alone; what is left of the job
then gets SIGTERM after a while, as DeepSpeed's launcher sends it.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from same_run import arguments, assert_the_same_run, engine_json
from warm_jobs import Job, WarmJobs

LIMIT = 120.0  # seconds a job may take to reach what is aimed at
SURVIVOR_SECONDS = 30.0  # in which the ranks that are left must end
WHOLE_LIFE = ("start", "step", "save", "switch", "switch", "start", "step", "save", "any",
              "switch", "step", "save", "any", "end")  # fmt: skip
"""What is aimed at in one run, in this order; "any" may leap to the run's end."""
PHASES = {"start-up", "training", "save", "switch", "end"}
"""What a job may be found doing when it is killed."""


@dataclass
class Setup:
    """A recipe, an engine, and how long the parts of a run take that nobody disturbs."""

    jobs: WarmJobs
    data: Path
    place: Path
    engine: Path
    steps: tuple[int, ...]
    every: int  # steps between saves
    seconds: dict[str, float] = field(default_factory=dict)

    def start(self, run_dir: Path) -> Job:
        changes = [f"stages.{stage}.steps={steps}" for stage, steps in enumerate(self.steps)]
        changes.append(f"checkpoint.every_steps={self.every}")
        return self.jobs.start(arguments(self.data, run_dir, self.engine, changes), self.place)

    def finish(self, run_dir: Path) -> None:
        """Train to the end, from where the run stands."""
        expected, job = newest(run_dir), self.start(run_dir)
        assert job.wait() == [0, 0], job.output() + job.errors()
        assert not job.errors()
        check_session(job, expected)

    def undisturbed(self) -> Path:
        """Train in peace, timing the parts; to be done first."""
        run_dir, began = self.place / "whole", time.monotonic()
        job = self.start(run_dir)
        while not steps_logged(run_dir) and job.is_running:
            time.sleep(0.002)
        first_row = time.monotonic()
        assert job.wait() == [0, 0], job.errors()
        switches = [row["seconds"] for row in events(run_dir, "stage_switch")]
        steps = [row["step_seconds"] for row in events(run_dir, "train")]
        # Of the moments after what is aimed at, except "any": after the start.
        self.seconds = {
            "start": first_row - began, "step": sorted(steps)[len(steps) // 2],
            "save": 0.01, "switch": max(switches), "any": time.monotonic() - began, "end": 0.3,
        }  # fmt: skip
        return run_dir


class Killer:
    """Kills jobs of one run folder at moments that it draws."""

    def __init__(self, setup: Setup, run_dir: Path, seed: int) -> None:
        self.setup = setup
        self.run_dir = run_dir
        self.draw = random.Random(seed)
        self.phases: Counter[str] = Counter()
        self.of_one_rank = 0

    def follow(self, plan: tuple[str, ...]) -> None:
        """Start, reach the aim, kill, check; for every aim, or until the run is done."""
        for aim in plan:
            expected, old = newest(self.run_dir), temporaries(self.run_dir)
            job = self.setup.start(self.run_dir)
            for _ in self._until(aim, old):
                if not job.is_running:
                    break
            seen = newest(self.run_dir)
            phase, complaints = self._phase(job, old), job.errors()
            codes = self._kill(job) if job.is_running else job.wait()
            if -9 in codes:
                self.phases[phase] += 1
            else:
                assert codes == [0, 0], job.output() + job.errors()
            assert not complaints  # before the kill; a survivor then says who has gone
            check_session(job, expected)
            left = newest(self.run_dir)
            assert left >= seen, f"{seen} was committed, {left} is left"

    def _until(self, aim: str, old: set[str]) -> Iterator[None]:
        """Yield until the moment is there: what is aimed at has come, and a random time is over."""
        deadline = time.monotonic() + LIMIT
        begun, rows_to_come = len(steps_logged(self.run_dir)), self.draw.randint(1, 4)
        total = sum(self.setup.steps)
        while True:
            steps = steps_logged(self.run_dir)
            has_come = {
                "start": True,
                "any": True,
                "step": len(steps) >= begun + rows_to_come or steps[-1:] == [total],
                "save": bool(temporaries(self.run_dir) - old),
                "switch": is_in_switch(self.run_dir),
                "end": steps[-1:] == [total],
            }
            if has_come[aim]:
                break
            assert time.monotonic() < deadline, f"no {aim} to kill in after {LIMIT:.0f} s"
            time.sleep(0.0005)
            yield
        moment = time.monotonic() + self.setup.seconds[aim] * self.draw.random()
        while time.monotonic() < moment:
            time.sleep(0.0002)
            yield

    def _kill(self, job: Job) -> list[int]:
        """SIGKILL all ranks, or every third time one of them; exit codes when all have ended."""
        victim = self.draw.randint(0, 1) if sum(self.phases.values()) % 3 == 2 else None
        job.kill(victim)
        if victim is not None:
            self.of_one_rank += 1
            deadline = time.monotonic() + 2
            while job.is_running and time.monotonic() < deadline:
                time.sleep(0.01)
            job.kill(1 - victim, 15)
        return job.wait(SURVIVOR_SECONDS)

    def _phase(self, job: Job, old: set[str]) -> str:
        """What the job is doing."""
        if temporaries(self.run_dir) - old:
            return "save"
        if is_in_switch(self.run_dir):
            return "switch"
        if steps_logged(self.run_dir)[-1:] == [sum(self.setup.steps)]:
            return "end"
        return "training" if "layers)" in job.output() else "start-up"


def check_session(job: Job, expected: tuple[int, int, str]) -> None:
    """It went on from the tag that was newest, and skipped nothing."""
    said = job.output()
    assert "skipping a checkpoint" not in said, said
    assert "set aside" not in said, said
    if "resuming from" in said:
        assert f"resuming from {expected[2]} at step {expected[0]} " in said
    elif "layers)" in said:
        assert expected == NOTHING, f"{expected} was there, but the run began anew\n{said}"


NOTHING = (-1, -1, "")


def newest(run_dir: Path) -> tuple[int, int, str]:
    """Step, stage and name of the furthest committed tag."""
    found = [NOTHING]
    for marker in (run_dir / "checkpoints").glob("[!.]*/COMMITTED"):
        try:
            state = json.loads((marker.parent / "state.json").read_text())["train"]
        except FileNotFoundError:  # it is being deleted: there are newer ones
            continue
        found.append((state["global_step"], state["stage"], marker.parent.name))
    return max(found)


def temporaries(run_dir: Path) -> set[str]:
    """Folders of saves under way or broken off."""
    return {path.name for path in (run_dir / "checkpoints").glob(".*")}


def is_in_switch(run_dir: Path) -> bool:
    """Whether a stage's end is committed and the next one's begin is not."""
    there = {path.parent.name for path in (run_dir / "checkpoints").glob("stage*/COMMITTED")}
    ends = [int(tag[5]) for tag in there if tag.endswith("_end")]
    return any(stage < 3 and f"stage{stage + 1}_begin" not in there for stage in ends)


def events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl as they were written; the line under way is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["event"] == event]


def steps_logged(run_dir: Path) -> list[int]:
    """Of all sessions, in their order."""
    return [row["global_step"] for row in events(run_dir, "train")]


def check_leftovers(run_dir: Path) -> None:
    """Each folder under checkpoints/ is committed: no kill leaves rubbish behind for ever."""
    for path in (run_dir / "checkpoints").iterdir():
        assert (path / "COMMITTED").exists(), f"{path.name} is left over"


def test_kills_lose_nothing(warm_jobs: WarmJobs, tiny_data: Path, tmp_path: Path) -> None:
    setup = Setup(warm_jobs, tiny_data, tmp_path, engine_json(tmp_path, 1), (3, 3, 2), 2)
    theirs = setup.undisturbed()
    killer = Killer(setup, tmp_path / "killed", seed=5)
    killer.follow(("start", "save", "step", "switch", "switch", "end"))
    setup.finish(tmp_path / "killed")
    assert sum(killer.phases.values()) >= 5, killer.phases
    assert_the_same_run(tmp_path / "killed", theirs)
    check_leftovers(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [25, pytest.param(100, marks=pytest.mark.soak)])
def test_many_kills_lose_nothing(
    warm_jobs: WarmJobs, tiny_data: Path, tmp_path: Path, kills: int
) -> None:
    phases: Counter[str] = Counter()
    of_one_rank, runs, began = 0, 0, time.monotonic()
    setups: list[tuple[Setup, Path]] = []
    for zero, is_bf16, every in ((1, False, 2), (3, True, 3), (0, False, 2), (2, True, 3)):
        place = tmp_path / f"{zero}{is_bf16}"
        place.mkdir()
        engine = engine_json(place, zero, is_bf16=is_bf16)
        setup = Setup(warm_jobs, tiny_data, place, engine, (7, 6, 5), every)
        setups.append((setup, setup.undisturbed()))
    while sum(phases.values()) < kills or set(phases) < PHASES:  # or the test's time is over
        setup, theirs = setups[runs % len(setups)]
        runs += 1
        run_dir = setup.place / f"run{runs}"
        killer = Killer(setup, run_dir, seed=runs)
        killer.follow(WHOLE_LIFE)
        setup.finish(run_dir)
        assert_the_same_run(run_dir, theirs)
        check_leftovers(run_dir)
        phases += killer.phases
        of_one_rank += killer.of_one_rank
    print(f"\n{sum(phases.values())} kills, {of_one_rank} of one rank, {runs} whole runs, "
          f"{time.monotonic() - began:.0f} s: {dict(phases)}")  # fmt: skip
    assert set(phases) == PHASES
