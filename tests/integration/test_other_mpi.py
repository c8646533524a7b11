"""Ranks of an mpirun that mpi4py does not belong to: no job of its own for each of them."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import LAUNCH, environment
from same_run import arguments, engine_json

pytestmark = pytest.mark.slow


def test_ranks_that_mpi4py_cannot_join_end_with_one_message_and_write_nothing(
    tiny_data: Path, tmp_path: Path
) -> None:
    """PMI_RANK and PMI_SIZE are all that MPICH's mpirun tells, and no process manager answers."""
    words = map(str, arguments(tiny_data, tmp_path / "run", engine_json(tmp_path, 0), ()))
    command = [sys.executable, str(LAUNCH / "pretrain.py"), *words]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment(), "PMI_RANK": str(rank), "PMI_SIZE": "2"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert said[0][1].startswith("error: mpirun started 2 ranks, which find each other by mpi4py")
    assert said[0][1].count("\n") == 1
    assert said[1] == said[0][:1] + ("",)
    assert not (tmp_path / "run").exists()
