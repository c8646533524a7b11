"""The `deepspeed` launcher over two hosts: it trains what one host trains; a lost host ends it.

Names, ssh, interfaces and the cable are real (two_hosts.py); the scripts are those of
launch/multi_node. What is trained twice, before and after a loss, has to be the same to the bit.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from host_runs import STARTS_WITHIN, WHOLE, command_line, steps_of, wait_until
from launching import rows
from same_run import assert_the_same_run, tags
from two_hosts import EXAMPLES, Host

pytestmark = [pytest.mark.slow, pytest.mark.multi_node, pytest.mark.timeout(900)]

Pair = tuple[Host, Host]

ENDLESS = (
    *WHOLE, "stages.1.steps=100000", "evaluation.every_steps=100000",
    "checkpoint.every_steps=100000",
)  # fmt: skip
"""Nothing is saved after the first switch: what comes after it is trained again after a loss."""
SWITCH = 5  # optimizer steps until the second stage
LOST_AT = SWITCH + 6  # the step that a run has to reach before it is disturbed
ENDS_WITHIN = 60.0  # seconds after a loss
STAGED = "/dev/shm/staged"  # a file system of each host's own
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def launch(kind: str) -> list[object]:
    """`bash launch/multi_node/KIND.sh`."""
    return ["bash", EXAMPLES / f"{kind}.sh"]


def trained(run_dir: Path) -> dict[int, dict[str, object]]:
    return {int(str(row["global_step"])): row for row in rows(run_dir, "train")}


def assert_all_end(hosts: Pair, words: str = "pretrain.py --local") -> None:
    """No rank, whose command line has these `words`, is left on either host in time."""
    deadline = time.monotonic() + ENDS_WITHIN
    while left := [line for host in hosts for line in host.processes(words).values()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_two_hosts_train_what_one_host_trains(
    hosts: Pair, tiny_data: Path, tmp_path: Path, one_host: Path
) -> None:
    run_dir = tmp_path / "run"
    done = hosts[0].run(*launch("pdsh"), *command_line(tiny_data, run_dir, WHOLE))
    assert done.returncode == 0, done.stdout
    assert re.search("^node2: ", done.stdout, re.MULTILINE)  # pdsh says whose line it is
    assert_the_same_run(run_dir, one_host)


def test_a_killed_host_ends_the_other_and_the_run_goes_on_with_both_and_with_one(
    hosts: Pair, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    endless = command_line(tiny_data, run_dir, ENDLESS)
    process = hosts[0].start(*launch("pdsh"), *endless)
    wait_until(lambda: max(steps_of(run_dir)) >= LOST_AT, process, STARTS_WITHIN)
    hosts[1].kill_all()
    assert_all_end(hosts)
    said = process.communicate(timeout=30)[0]
    assert "node1: ssh exited with exit code 4" in said
    assert re.search(r"rank 1 \(host node2, pid \d+\)", said)
    assert process.returncode != 0
    first = trained(run_dir)

    done = hosts[0].run(*launch("pdsh"), *endless, "--max-steps", SWITCH + 3)
    assert done.returncode == 3, done.stdout
    assert "resuming from stage2_begin" in done.stdout
    second = trained(run_dir)
    for step in range(SWITCH + 1, SWITCH + 4):
        assert second[step]["loss"] == first[step]["loss"]

    (tmp_path / "hostfile").write_text("node1 slots=1\n")
    done = hosts[0].run(
        *launch("pdsh"),
        *endless,
        "--max-steps",
        LOST_AT,
        variables={"HOSTFILE": str(tmp_path / "hostfile")},
    )
    assert done.returncode == 3, done.stdout
    third = trained(run_dir)
    for step in range(SWITCH + 4, LOST_AT + 1):
        assert third[step]["loss"] == pytest.approx(first[step]["loss"], rel=1e-4)
        for same in ("lr", "tokens", "sample_hash"):
            assert third[step][same] == first[step][same]
    stage = json.loads((run_dir / "deepspeed.json").read_text())["stages"][1]
    assert stage["train_micro_batch_size_per_gpu"] * stage["gradient_accumulation_steps"] == 12


def test_a_cable_pulled_in_the_middle_of_a_step_ends_both_hosts(
    hosts: Pair, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    endless = command_line(tiny_data, run_dir, ENDLESS)
    process = hosts[0].start(*launch("pdsh"), *endless)
    wait_until(lambda: max(steps_of(run_dir)) >= LOST_AT, process, STARTS_WITHIN)
    hosts[1].pull_cable()
    assert_all_end(hosts)
    said = process.communicate(timeout=90)[0]  # the launcher's ssh finds out by itself
    assert "rank 1 (host node2" in said
    first = trained(run_dir)
    hosts[1].plug_in()
    done = hosts[0].run(*launch("pdsh"), *endless, "--max-steps", LOST_AT)
    assert done.returncode == 3, done.stdout
    assert "resuming from stage2_begin" in done.stdout
    second = trained(run_dir)
    for step in range(SWITCH + 1, LOST_AT + 1):
        assert second[step]["loss"] == first[step]["loss"]


def test_a_cable_pulled_during_a_save_leaves_the_last_committed_state(
    hosts: Pair, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    endless = command_line(tiny_data, run_dir, (*ENDLESS, "checkpoint.every_steps=1"))
    process = hosts[0].start(*launch("pdsh"), *endless)
    wait_until(lambda: newest_step(run_dir) > SWITCH, process, STARTS_WITHIN)
    wait_until(lambda: stopped_in_a_save(hosts[0], run_dir), process, STARTS_WITHIN)
    hosts[0].pull_cable()
    os.kill(hosts[0].ranks()[0], signal.SIGCONT)
    assert_all_end(hosts)
    process.communicate(timeout=90)
    last = newest_step(run_dir)
    hosts[0].plug_in()
    done = hosts[0].run(*launch("pdsh"), *endless, "--max-steps", last + 2)
    assert done.returncode == 3, done.stdout
    assert f"resuming from step_{last:08}" in done.stdout
    assert not list((run_dir / "checkpoints").glob(".*"))


def newest_step(run_dir: Path) -> int:
    """Of the tags committed between the stages' ends."""
    return max([0, *(int(tag[5:]) for tag in tags(run_dir) if tag.startswith("step_"))])


def stopped_in_a_save(host: Host, run_dir: Path) -> bool:
    """Stop the main rank where a checkpoint is half written; False where none was."""

    def half_written() -> list[Path]:
        return list((run_dir / "checkpoints").glob(".*"))

    if not half_written():
        return False
    main = host.ranks()[0]
    os.kill(main, signal.SIGSTOP)
    time.sleep(0.1)  # a thread may be in a call
    if half_written():
        return True
    os.kill(main, signal.SIGCONT)
    return False


def test_hosts_started_by_hand_train_the_same_and_a_lost_main_host_ends_the_other_with_code_4(
    hosts: Pair, tiny_data: Path, tmp_path: Path, one_host: Path
) -> None:
    def start(run_dir: Path, changes: Sequence[str]) -> list[subprocess.Popen[str]]:
        words = command_line(tiny_data, run_dir, changes)
        return [
            host.start(*launch("by_hand"), number, "node1", *words)
            for number, host in enumerate(hosts)
        ]

    both = start(tmp_path / "run", WHOLE)
    said = [process.communicate(timeout=STARTS_WITHIN)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert_the_same_run(tmp_path / "run", one_host)

    main, other = start(tmp_path / "endless", ENDLESS)
    wait_until(lambda: max(steps_of(tmp_path / "endless")) > SWITCH, main, STARTS_WITHIN)
    hosts[0].kill_all()
    words = other.communicate(timeout=ENDS_WITHIN)[0]
    assert other.returncode == 4, words
    assert "rank 0 (host node1" in words
    main.communicate()


def test_each_host_reads_copies_of_its_own_and_the_shared_shards_no_more(
    hosts: Pair, tiny_data: Path, tmp_path: Path, one_host: Path
) -> None:
    shared = Path(shutil.copytree(tiny_data, tmp_path / "shared"))
    words = [*command_line(shared, tmp_path / "run", WHOLE), *staged_on(hosts)]
    done = hosts[0].run(*launch("pdsh"), *words, "--max-steps", SWITCH - 2)
    assert done.returncode == 3, done.stdout
    assert "staging 4 shards (" in done.stdout  # two on each
    assert f"in {staged_on(hosts)[1]}/" in done.stdout
    assert "of 2 nodes; all ranks wait" in done.stdout
    for path in shared.glob("*.hdf5"):
        path.rename(path.with_suffix(".away"))
    done = hosts[0].run(*launch("pdsh"), *words)
    assert done.returncode == 0, done.stdout
    assert "all shards that are needed lie in" in done.stdout
    assert_the_same_run(tmp_path / "run", one_host)


def staged_on(hosts: Pair) -> list[str]:
    """Flag and folder, which each host has for itself."""
    for host in hosts:
        assert host.run("mkdir", "-p", STAGED).returncode == 0
    return ["--stage-data", STAGED]


def test_a_host_with_another_manifest_is_named_by_all(
    hosts: Pair, tiny_data: Path, tmp_path: Path
) -> None:
    shared = Path(shutil.copytree(tiny_data, tmp_path / "shared"))
    others = Path(shutil.copytree(tiny_data, tmp_path / "others"))
    with (others / "manifest.json").open("a") as manifest:
        manifest.write("\n")
    assert hosts[1].run("mount", "--bind", others, shared).returncode == 0
    done = hosts[0].run(*launch("pdsh"), *command_line(shared, tmp_path / "run", WHOLE))
    assert hosts[1].run("umount", shared).returncode == 0
    assert done.returncode == 2, done.stdout
    said = [line for line in done.stdout.splitlines() if re.match(r"node\d: error: ", line)]
    assert len(said) == 1, done.stdout
    assert "the ranks do not agree; mount the same folder on every host" in said[0]
    other = rf"--data {shared}: .*rank 1 \(host node2, pid \d+\) has manifest [0-9a-f]{{12}}"
    assert re.search(other, said[0])


@pytest.fixture
def mpi() -> None:
    """Skip without MPI."""
    missing = [name for name in ("mpirun", "ompi_info") if shutil.which(name) is None]
    if importlib.util.find_spec("mpi4py") is None:
        missing.append("mpi4py")
    if missing:
        pytest.skip(f"needs Open MPI and mpi4py; missing: {', '.join(missing)}")


@pytest.mark.usefixtures("mpi")
def test_open_mpi_starts_both_hosts(
    hosts: Pair, tiny_data: Path, tmp_path: Path, one_host: Path
) -> None:
    words = command_line(tiny_data, tmp_path / "run", WHOLE)
    done = hosts[0].run(*launch("openmpi"), *words, variables=AS_ROOT)
    assert done.returncode == 0, done.stdout
    assert_the_same_run(tmp_path / "run", one_host)


@pytest.mark.usefixtures("mpi")
def test_under_open_mpi_a_killed_host_ends_the_other_and_the_run_goes_on(
    hosts: Pair, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    endless = command_line(tiny_data, run_dir, ENDLESS)
    process = hosts[0].start(*launch("openmpi"), *endless, variables=AS_ROOT)
    wait_until(lambda: max(steps_of(run_dir)) >= LOST_AT, process, STARTS_WITHIN)
    hosts[1].kill_all()
    assert_all_end(hosts, "pretrain.py")
    process.communicate(timeout=30)
    assert process.returncode != 0
    first = trained(run_dir)
    words = *endless, "--max-steps", SWITCH + 3
    done = hosts[0].run(*launch("openmpi"), *words, variables=AS_ROOT)
    assert done.returncode == 3, done.stdout
    assert "resuming from stage2_begin" in done.stdout
    second = trained(run_dir)
    for step in range(SWITCH + 1, SWITCH + 4):
        assert second[step]["loss"] == first[step]["loss"]


@pytest.mark.usefixtures("mpi")
def test_mpirun_alone_starts_the_ranks_of_one_host(
    hosts: Pair, tiny_data: Path, tmp_path: Path, one_host: Path
) -> None:
    words = command_line(tiny_data, tmp_path / "run", WHOLE)
    crowded = {**AS_ROOT, "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    done = hosts[0].run(*launch("mpirun"), *words, variables=crowded)
    assert done.returncode == 0, done.stdout
    assert_the_same_run(tmp_path / "run", one_host)
