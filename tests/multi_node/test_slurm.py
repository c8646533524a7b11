"""The job script under a real Slurm of two nodes: who goes back into the queue, and what comes out.

slurmctld and slurmd are Debian's, started by the test (slurm_cluster.py). Where they are missing
test_slurm_script.py still runs the script, with a stub of srun.
"""

import re
from pathlib import Path

import pytest
from host_runs import STARTS_WITHIN, WHOLE, command_line, steps_of
from launching import ROOT
from same_run import assert_the_same_run
from slurm_cluster import Slurm, obstacle
from two_hosts import EXAMPLES, INTERFACE, NAMES, Host

from stacking.doctor_hostfile import read_hostfile

pytestmark = [pytest.mark.slow, pytest.mark.multi_node, pytest.mark.timeout(900)]

SCRIPT = EXAMPLES / "slurm.sh"
# In the place of python: ranks that train until they are sent SIGTERM, or are wrong at once.
RANK = """#!/bin/sh
case "$*" in *wrong*) exit 2 ;; esac
[ -z "$SLURM_RESTART_COUNT" ] || exit 0
trap 'exit 3' TERM
echo training
while :; do sleep 0.1; done
"""
SOON = 30.0  # seconds
SIGNAL_WITHIN = 90.0  # slurmctld looks at time limits every 30 s; a requeued job waits for 5


@pytest.fixture
def slurm(hosts: tuple[Host, Host], tmp_path: Path) -> Slurm:
    """Started anew; where it cannot be, the test skips and says why."""
    if reason := obstacle():
        pytest.skip(reason)
    folder = tmp_path / "slurm"
    folder.mkdir()
    try:
        return Slurm(hosts, folder)
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_job_that_gets_sigterm_goes_back_into_the_queue_and_trains_the_very_same_run(
    slurm: Slurm, tiny_data: Path, tmp_path: Path, one_host: Path
) -> None:
    run_dir = tmp_path / "run"
    words = command_line(tiny_data, run_dir, WHOLE)
    nodes = ("--nodes=2", "--ntasks-per-node=1")
    job = slurm.submit(*nodes, SCRIPT, *words, variables={"GLOO_SOCKET_IFNAME": INTERFACE})
    slurm.wait_until(lambda: max(steps_of(run_dir)) > 0, job, STARTS_WITHIN)
    slurm.run("scancel", "--signal=TERM", job)  # what the time limit does, only sooner
    found = slurm.wait_for(job, "COMPLETED", STARTS_WITHIN)
    said = slurm.said(job)
    assert found["Restarts"] == "1", said
    assert "slurm.sh: exit code 3; the job goes back into the queue" in said
    assert "resuming from" in said
    assert_the_same_run(run_dir, one_host)


def test_the_time_limit_requeues_a_job_and_neither_scancel_nor_a_mistake_does(
    slurm: Slurm, tmp_path: Path
) -> None:
    python = tmp_path / "programs" / "python"
    python.parent.mkdir()
    python.write_text(RANK)
    python.chmod(0o755)

    def submit(*words: object) -> str:
        path = slurm.run("sh", "-c", f"echo {python.parent}:$PATH")
        return slurm.submit("--ntasks=2", *words, variables={"PATH": path})

    late = submit("--time=1", SCRIPT)
    cancelled = submit(SCRIPT)
    wrong = submit(SCRIPT, "wrong")
    found = slurm.wait_for(wrong, "FAILED", SOON)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    slurm.wait_until(lambda: slurm.said(cancelled).count("training") == 2, cancelled, SOON)
    slurm.run("scancel", cancelled)
    slurm.wait_for(cancelled, "CANCELLED", SOON)
    assert slurm.wait_for(late, "COMPLETED", SIGNAL_WITHIN)["Restarts"] == "1"
    assert "slurm.sh: exit code 3; the job goes back into the queue" in slurm.said(late)
    found = slurm.state(cancelled)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert "queue" not in slurm.said(cancelled)


def test_the_readmes_line_makes_a_hostfile_of_an_allocation(slurm: Slurm, tmp_path: Path) -> None:
    [line] = re.findall(r"`(scontrol show hostnames .+?)`", (ROOT / "README.md").read_text())
    slurm.run("salloc", "--nodes=2", "env", f"--chdir={tmp_path}", "bash", "-c", line)
    hostfile = read_hostfile(tmp_path / "hostfile")
    assert hostfile.slots == dict.fromkeys(NAMES, 8)
    assert not hostfile.refused
