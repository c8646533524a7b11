"""data_prep.workers: results in order, errors at their place, MPI's ranks as workers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.workers import open_workers

ROOT = Path(__file__).resolve().parents[2]


def _square(number: int) -> int:
    if number == 13:
        raise DataError("file:13: no")
    return number * number


def _die(_: int) -> int:
    os._exit(9)


@pytest.mark.parametrize("size", [1, 2])
def test_results_come_in_order_and_jobs_are_taken_late(size: int) -> None:
    taken = 0

    def jobs() -> Iterator[int]:
        nonlocal taken
        for number in range(12):
            taken += 1
            yield number

    with open_workers(size, use_mpi=False) as workers:
        assert workers is not None
        results = workers.run(_square, jobs())
        assert next(results) == 0
        assert taken <= 2 * size + 1
        assert list(results) == [n * n for n in range(1, 12)]


@pytest.mark.parametrize("size", [1, 2])
def test_an_error_of_a_job_is_raised_at_its_place(size: int) -> None:
    with open_workers(size, use_mpi=False) as workers:
        assert workers is not None
        results = workers.run(_square, range(10, 20))
        assert [next(results) for _ in range(3)] == [100, 121, 144]
        with pytest.raises(DataError, match="file:13: no"):
            next(results)


def test_a_killed_worker_is_a_clear_error() -> None:
    with open_workers(2, use_mpi=False) as workers:
        assert workers is not None
        with pytest.raises(DataError, match="worker process was killed"):
            list(workers.run(_die, range(3)))


@pytest.mark.skipif(
    shutil.which("mpirun") is None or importlib.util.find_spec("mpi4py") is None,
    reason="needs mpirun and mpi4py",
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_mpi_ranks_give_the_same_bytes(tmp_path: Path, ranks: int) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_text("\n\n".join(f"The cat number {i} sat. It ran away." for i in range(900)))
    shards = [
        str(ROOT / "launch/prepare_data.py"), "shards", str(corpus), "--vocab-size", "90",
        "--max-seq-length", "16", "--no-page", "--workers", "1",
    ]  # fmt: skip
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in (
        [sys.executable, *shards, "--out", str(tmp_path / "one")],
        [*mpirun, sys.executable, *shards, "--mpi", "--out", str(tmp_path / "mpi")],
    ):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    one, mpi = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "mpi"))
    assert one == mpi
    assert f"with {max(1, ranks - 1)} worker" in done.stdout
    assert done.stdout.count("vocabulary of") == 1, "one rank alone reports"
    wrong = [
        *mpirun,
        sys.executable,
        *shards,
        "--mpi",
        "--seed",
        "-1",
        "--out",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(
        wrong, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("error: --seed -1") == 1
