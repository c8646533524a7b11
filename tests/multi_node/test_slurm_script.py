"""The job script where there is no Slurm: who is requeued, and what tasks of a stub train."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from host_runs import STARTS_WITHIN, WHOLE, command_line, steps_of, wait_until
from launching import ROOT, environment, of_session
from same_run import assert_the_same_run

SCRIPT = ROOT / "launch" / "multi_node" / "slurm.sh"
STUB = Path(__file__).with_name("stub_srun.py")
LONG = "700"  # seconds that a job has run: what ends it then has worked before


class Slurm:
    """srun, squeue and scontrol in a folder; jobs that they take part in."""

    def __init__(self, folder: Path, srun: str) -> None:
        """`srun`: its lines of shell."""
        self._programs = folder / "programs"
        self._programs.mkdir()
        self._requeued = folder / "requeued"
        self._requeued.touch()
        said = f'printf "%s " "$@" >>{shlex.quote(str(self._requeued))}'
        for name, lines in (("srun", srun), ("squeue", 'echo "$STATE"'), ("scontrol", said)):
            program = self._programs / name
            program.write_text(f"#!/bin/sh\n{lines}\n")
            program.chmod(0o755)

    def start(self, *words: object, folder: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
        """The job script of two tasks, as slurmd runs it."""
        told = {
            "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "STATE": "RUNNING",
            "PATH": f"{self._programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            **variables,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, words)], env={**environment(), **told}, cwd=folder,
            text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def requeued(self) -> str:
        """What scontrol was told."""
        return self._requeued.read_text()


@pytest.mark.parametrize(
    ("code", "words", "seconds", "state", "is_requeued"),
    [
        (3, "--run-dir r", "0", "RUNNING", True),
        (3, "--run-dir r --time-limit 2h", "0", "RUNNING", True),
        (3, "--run-dir r --max-steps 8", "0", "RUNNING", False),  # a stop that was asked for
        (3, "--run-dir r", "0", "COMPLETING", False),  # cancelled
        (3, "--run-dir r", "0", "", False),
        (0, "--run-dir r", LONG, "RUNNING", False),
        (1, "--run-dir r", LONG, "RUNNING", False),
        (2, "--run-dir r", LONG, "RUNNING", False),
        (4, "--run-dir r", LONG, "RUNNING", True),
        (4, "--run-dir r", "30", "RUNNING", False),  # it would be lost again
        (137, "--run-dir r", LONG, "RUNNING", True),
        (143, "--run-dir r", LONG, "RUNNING", True),
        (143, "--run-dir r", "30", "RUNNING", False),
    ],
)
def test_a_job_is_requeued_if_it_can_go_on(
    tmp_path: Path, code: int, words: str, seconds: str, state: str, is_requeued: bool
) -> None:
    slurm = Slurm(tmp_path, f"exit {code}")
    job = slurm.start(*words.split(), SECONDS=seconds, STATE=state)
    said = job.communicate(timeout=30)[0]
    assert job.returncode == code, said
    assert slurm.requeued == ("requeue 12345 " if is_requeued else "")
    assert said == (f"slurm.sh: exit code {code}; the job goes back into the queue and on from the "
                    "last checkpoint\n" if is_requeued else "")  # fmt: skip


def test_words_and_cores_reach_every_task(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, 'printf "%s|" "$OMP_NUM_THREADS" "$SRUN_CPUS_PER_TASK" "$@"')
    job = slurm.start("--set", "name=two words", SLURM_CPUS_PER_TASK="3", OMP_NUM_THREADS="")
    said = job.communicate(timeout=30)[0].split("|")[:-1]
    srun = ["--kill-on-bad-exit=0", "--wait=0", "python", "launch/pretrain.py"]
    assert said == ["3", "3", *srun, "--set", "name=two words"]


def test_another_folder_than_the_checkouts_is_refused(tmp_path: Path) -> None:
    job = Slurm(tmp_path, "exit 0").start(folder=tmp_path)
    said = job.communicate(timeout=30)[0]
    assert job.returncode == 2
    assert said.startswith(f"error: no launch/pretrain.py in {tmp_path}; call sbatch in")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tasks_of_srun_train_and_go_on_after_sigterm_as_if_it_had_not_come(
    tiny_data: Path, tmp_path: Path, one_host: Path
) -> None:
    slurm = Slurm(tmp_path, f'exec {shlex.quote(sys.executable)} {shlex.quote(str(STUB))} "$@"')
    run_dir = tmp_path / "run"
    words = command_line(tiny_data, run_dir, WHOLE)
    job = slurm.start(*words)
    wait_until(lambda: max(steps_of(run_dir)) >= 1, job, STARTS_WITHIN)
    tasks = [pid for pid, w in of_session(job.pid).items() if w[1] == "launch/pretrain.py"]
    assert len(tasks) == 2
    for pid in tasks:
        os.kill(pid, signal.SIGTERM)
    said = job.communicate(timeout=STARTS_WITHIN)[0]
    assert job.returncode == 3, said
    assert slurm.requeued == "requeue 12345 "
    assert 1 <= max(steps_of(run_dir)) < 12
    job = slurm.start(*words)
    said = job.communicate(timeout=STARTS_WITHIN)[0]
    assert job.returncode == 0, said
    assert slurm.requeued == "requeue 12345 "
    assert_the_same_run(run_dir, one_host)
