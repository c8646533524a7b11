"""Full and read-only disks and damaged checkpoints: one message, exit code 2, nothing lost.

As soon as the disk is well again, the same command goes on as if nothing had been.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import rows
from mounts import Mounts, can_mount, fill
from same_run import arguments, assert_the_same_run, engine_json, figures, tags
from warm_jobs import Job, WarmJobs

STEPS = (12, 3, 2)
CHANGES = tuple(f"stages.{stage}.steps={steps}" for stage, steps in enumerate(STEPS))
STAGE_2_MOMENTS, STAGE_3_MOMENTS = 170_000, 240_000  # bytes of their files, about
needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="needs to mount a file system in a namespace of its own (root)"
)


class Trains:
    """Starts jobs of one recipe in one folder."""

    def __init__(self, jobs: WarmJobs, data: Path, place: Path) -> None:
        self.jobs, self._data, self.place = jobs, data, place
        self._engine = engine_json(place, 0)

    def start(
        self,
        run_dir: Path,
        *words: object,
        ranks: int = 2,
        every: int = 2,
        file_bytes: int | None = None,
    ) -> Job:
        changes = (*CHANGES, f"checkpoint.every_steps={every}")
        command = [*arguments(self._data, run_dir, self._engine, changes), *words]
        return self.jobs.start(command, self.place, ranks, file_bytes=file_bytes)

    def done(self, run_dir: Path, *words: object, code: int = 0, ranks: int = 2) -> Job:
        job = self.start(run_dir, *words, ranks=ranks)
        assert job.wait() == [code] * ranks, job.output() + job.errors()
        return job


@pytest.fixture(scope="module")
def trains(
    warm_jobs: WarmJobs, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trains:
    return Trains(warm_jobs, tiny_data, tmp_path_factory.mktemp("disks"))


@pytest.fixture(scope="module")
def whole(trains: Trains) -> Path:
    """A run on a good disk."""
    trains.done(trains.place / "whole")
    return trains.place / "whole"


@pytest.fixture
def mounts(trains: Trains, tmp_path: Path) -> Iterator[tuple[Mounts, Path]]:
    """An empty disk of 8 MiB, and where the ranks find it."""
    mounts, disk = Mounts(trains.jobs), tmp_path / "disk"
    disk.mkdir()
    mounts.small_disk(disk, 8 << 20)
    yield mounts, disk
    mounts.undo(disk)


def assert_refused(job: Job, *names: object) -> None:
    """Exit code 2 on all ranks, and one message that says what to do and names these paths."""
    codes = job.wait(60)
    said = job.errors()
    assert codes == [2] * len(codes), job.output() + said
    assert "Traceback" not in said + job.output(), said
    first, *bullets = said.splitlines()
    assert first.startswith("error: "), said
    assert len(bullets) == first.endswith("1 fault in the configuration:"), said
    for name in names:
        assert str(name) in said
    assert "free some space" in said or "give another folder" in said or "writable" in said, said


def wait_for_rows(run_dir: Path, count: int, job: Job) -> None:
    deadline = time.monotonic() + 60
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b'"event": "train"') < count:
        assert job.is_running, job.output() + job.errors()
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- full ----------------------------------------------------------------------------------------


@needs_mounts
def test_a_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(
    trains: Trains, whole: Path, mounts: tuple[Mounts, Path]
) -> None:
    here, disk = mounts[0].seen(mounts[1]), mounts[1]
    job = trains.start(disk / "run")
    wait_for_rows(here / "run", 5, job)
    filler = fill(here)
    assert_refused(job, disk / "run")
    before = tags(here / "run")
    assert before  # the last good one
    assert_refused(trains.start(disk / "run"), disk / "run")
    assert tags(here / "run") == before
    filler.unlink()
    trains.done(disk / "run")
    assert_the_same_run(here / "run", whole)


@needs_mounts
def test_a_disk_that_is_full_from_the_start_is_told_at_once(
    trains: Trains, mounts: tuple[Mounts, Path]
) -> None:
    here, disk = mounts[0].seen(mounts[1]), mounts[1]
    filler = fill(here)
    assert_refused(trains.start(disk / "run"), disk / "run")
    filler.unlink()
    trains.done(disk / "run", "--max-steps", 1, code=3)


def test_a_file_that_may_not_grow_ends_the_run_with_the_last_tag_intact(
    trains: Trains, whole: Path, tmp_path: Path
) -> None:
    """A limit on the size of files, as a full disk for users who may not mount: in stage 3."""
    run_dir, limit = tmp_path / "run", (STAGE_2_MOMENTS + STAGE_3_MOMENTS) // 2
    assert_refused(trains.start(run_dir, file_bytes=limit), run_dir)
    assert "stage3_begin" in tags(run_dir)
    assert not list((run_dir / "checkpoints").glob(".*"))
    trains.done(run_dir)
    assert_the_same_run(run_dir, whole)


def test_rows_that_cannot_be_written_end_the_run_in_no_traceback(
    trains: Trains, tmp_path: Path
) -> None:
    """log.txt and metrics.jsonl reach the limit, long before anything is saved."""
    run_dir = tmp_path / "run"
    assert_refused(trains.start(run_dir, every=1000, file_bytes=7000), run_dir / "metrics.jsonl")
    assert not tags(run_dir)
    trains.done(run_dir, "--max-steps", 9, code=3, ranks=2)
    assert [row["global_step"] for row in rows(run_dir, "train")] == list(range(1, 10))


# -- read-only -----------------------------------------------------------------------------------


@needs_mounts
@pytest.mark.parametrize("part", ["checkpoints", pytest.param(".", marks=pytest.mark.slow)])
def test_a_folder_that_becomes_read_only_ends_the_run_which_goes_on_when_it_is_not(
    trains: Trains, whole: Path, mounts: tuple[Mounts, Path], part: str
) -> None:
    here, disk = mounts[0].seen(mounts[1]), mounts[1]
    job = trains.start(disk / "run")
    wait_for_rows(here / "run", 5, job)
    mounts[0].make_read_only(disk / "run" / part)
    assert_refused(job, disk / "run")
    before = tags(here / "run")
    assert_refused(trains.start(disk / "run"), disk / "run")
    mounts[0].undo(disk / "run" / part)
    assert tags(here / "run") == before
    trains.done(disk / "run")
    assert_the_same_run(here / "run", whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes whatever the mode; mounts do for it")
def test_a_folder_without_the_right_to_write_is_told_at_once(
    trains: Trains, tmp_path: Path
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert_refused(trains.start(folder / "run"), folder / "run")


# -- damaged -------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


Damage = Callable[[Path], None]
FILES = ("weights.safetensors", "moments.safetensors", "state.json", "COMMITTED")
DAMAGES: tuple[Damage, ...] = (flipped, truncated, Path.unlink)
QUICK = {("weights.safetensors", flipped)}
NEWEST, BEFORE = "step_00000004", "step_00000002"


@pytest.fixture(scope="module")
def stopped(trains: Trains) -> Path:
    """A run that stopped after step 4."""
    trains.done(trains.place / "stopped", "--max-steps", 4, code=3)
    assert tags(trains.place / "stopped") == {BEFORE, NEWEST}
    return trains.place / "stopped"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(
            name, damage, id=f"{name}-{damage.__name__}",
            marks=() if (name, damage) in QUICK else pytest.mark.slow,
        )
        for name in FILES for damage in DAMAGES
    ],
)  # fmt: skip
def test_a_damaged_file_leads_to_the_tag_before_with_a_line_that_names_it(
    trains: Trains, whole: Path, stopped: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    damage(run_dir / "checkpoints" / NEWEST / name)
    job = trains.done(run_dir, "--max-steps", 5, code=3)
    said = job.output()
    assert f"resuming from {BEFORE}" in said
    assert "Traceback" not in said + job.errors()
    if (name, damage) != ("COMMITTED", Path.unlink):  # without the marker it never was
        [line] = [line for line in said.splitlines() if "skipping a checkpoint" in line]
        assert str(run_dir / "checkpoints" / NEWEST) in line
    ours, theirs = figures(run_dir, "train"), figures(whole, "train")
    assert ours == {step: row for step, row in theirs.items() if int(str(step)) <= 5}
    assert tags(run_dir) == {BEFORE, NEWEST, "step_00000005"} - {BEFORE}


def test_where_no_tag_can_be_read_the_run_is_refused_and_nothing_is_deleted(
    trains: Trains, stopped: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    for tag in (BEFORE, NEWEST):
        flipped(run_dir / "checkpoints" / tag / "weights.safetensors")
    assert_refused(trains.start(run_dir), run_dir, BEFORE, NEWEST)
    assert tags(run_dir) == {BEFORE, NEWEST}


def test_a_crash_between_the_two_renames_of_a_replacement_loses_no_tag(
    trains: Trains, stopped: Path, tmp_path: Path
) -> None:
    """The old folder is aside, the new one is not there yet."""
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    checkpoints = run_dir / "checkpoints"
    shutil.copytree(checkpoints / NEWEST, checkpoints / f".{NEWEST}.999.tmp")
    (checkpoints / NEWEST).rename(checkpoints / f".{NEWEST}.old")
    job = trains.done(run_dir, "--max-steps", 5, code=3)
    assert f"resuming from {NEWEST}" in job.output()
    assert not list(checkpoints.glob(".*"))
