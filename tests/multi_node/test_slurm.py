"""The job script under a real Slurm of two nodes: who goes back into the queue, and what comes out.

slurmctld and slurmd are Debian's, started by the test (slurm_cluster.py). Where they are missing
test_slurm_script.py still runs the script, with a stub of srun.
"""

import re
from collections.abc import Callable, Iterator
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
REQUEUED = "slurm.sh: exit code 3; the job goes back into the queue"
SOON = 30.0  # seconds
SIGNAL_WITHIN = 90.0  # slurmctld looks at time limits every 30 s; a requeued job waits for 5


@pytest.fixture(scope="module")
def slurm(pair: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """One for all tests; where it cannot be, they skip and say why."""
    if reason := obstacle():
        pytest.skip(reason)
    try:
        yield Slurm(pair, tmp_path_factory.mktemp("slurm"))
    except RuntimeError as error:
        pytest.skip(str(error))
    finally:
        for host in pair:
            host.kill_all()


Submit = Callable[..., str]


@pytest.fixture(scope="module")
def submit(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Submit:
    """Return `(*words) -> job` of two ranks that only wait."""
    python = tmp_path_factory.mktemp("programs") / "python"
    python.write_text(RANK)
    python.chmod(0o755)
    path = slurm.run("sh", "-c", f"echo {python.parent}:$PATH")
    return lambda *words: slurm.submit("--ntasks=2", *words, variables={"PATH": path})


@pytest.fixture(scope="module", autouse=True)
def late(submit: Submit) -> str:
    """A job near its end; it is submitted first, as its signal takes up to half a minute."""
    return submit("--time=1", SCRIPT)


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
    assert REQUEUED in said
    assert "resuming from" in said
    assert_the_same_run(run_dir, one_host)


def test_a_job_that_is_cancelled_does_not_go_back_into_the_queue(
    slurm: Slurm, submit: Submit
) -> None:
    job = submit(SCRIPT)
    slurm.wait_until(lambda: slurm.said(job).count("training") == 2, job, SOON)
    slurm.run("scancel", job)
    slurm.wait_until(lambda: "slurmstepd" in slurm.said(job), job, SOON)
    slurm.wait_until(lambda: not slurm.run("squeue", "--noheader", "--job", job), job, SOON)
    found = slurm.state(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert REQUEUED not in slurm.said(job)


def test_a_job_of_a_mistake_does_not_go_back_into_the_queue(slurm: Slurm, submit: Submit) -> None:
    job = submit(SCRIPT, "wrong")
    found = slurm.wait_for(job, "FAILED", SOON)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")


def test_the_readmes_line_makes_a_hostfile_of_an_allocation(slurm: Slurm, tmp_path: Path) -> None:
    [line] = re.findall(
        r"`(scontrol show hostnames .+?)`", (ROOT / "docs" / "cluster.md").read_text()
    )
    slurm.run("salloc", "--nodes=2", "env", f"--chdir={tmp_path}", "bash", "-c", line)
    hostfile = read_hostfile(tmp_path / "hostfile")
    assert hostfile.slots == dict.fromkeys(NAMES, 8)
    assert not hostfile.refused


def test_the_time_limit_sends_a_job_back_into_the_queue(slurm: Slurm, late: str) -> None:
    assert slurm.wait_for(late, "COMPLETED", SIGNAL_WITHIN)["Restarts"] == "1"
    assert REQUEUED in slurm.said(late)
