"""Faults of one rank and of all, and ranks that do not come; the rest needs ranks."""

import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from stacking import distributed
from stacking.errors import ConfigError, UserError, everybodys


def missing() -> str:
    return Path("/no/such/file").read_text()


def mistaken() -> str:
    raise ConfigError("the mount is missing")


@pytest.mark.parametrize("spread", [distributed.together, distributed.on_main])
@pytest.mark.parametrize("step", [missing, mistaken])
def test_what_the_user_has_to_mend_is_told_as_everybodys(spread, step) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as raised:
        spread(step)
    assert raised.value.is_everybodys
    assert not ConfigError("alone").is_everybodys


@pytest.mark.parametrize(
    ("rank", "is_shared", "have_met", "tells"),
    [("0 0", False, True, True), ("0 0", True, False, True), ("3 1", True, True, False),
     ("3 1", False, True, True), ("3 1", False, False, False), ("2 0", False, False, True)],
)  # fmt: skip
def test_a_mistake_is_told_by_one_rank_that_knows_it(
    rank: str, is_shared: bool, have_met: bool, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rank`: of all, and on its host; before they meet no rank knows who else has it."""
    for name, value in zip(("RANK", "LOCAL_RANK"), rank.split(), strict=True):
        monkeypatch.setenv(name, value)
    error = everybodys(UserError("a")) if is_shared else UserError("a")
    assert distributed.tells(error, have_met=have_met) == tells


def test_an_error_without_a_file_stays_what_it_is() -> None:
    def broken() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        distributed.together(broken)


def test_ranks_that_do_not_come_are_spoken_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("WORLD_SIZE", "3"), ("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with distributed.meeting_of_ranks(after=0.05):
        time.sleep(0.5)
    assert "for all 3 ranks to meet at node7:29500" in capsys.readouterr().err
    with distributed.meeting_of_ranks(after=0.3):
        pass
    time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_ranks_that_cannot_meet_are_the_users_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        where = rf"rank 0 could not meet the others at 127\.0\.0\.1:{port}: .*EADDRINUSE.*\ndocs/"
        with pytest.raises(UserError, match=where), distributed.meeting_of_ranks():
            TCPStore("127.0.0.1", port, world_size=2, is_master=True)


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
         "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
         "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "LOCAL_SIZE": "2"},
    ],
    ids=["open_mpi", "mpich", "torchrun", "slurm"],
)  # fmt: skip
def test_a_rank_knows_its_place_before_the_ranks_have_met(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (distributed.rank(), distributed.world_size()) == (3, 4)
    assert (distributed.local_rank(), distributed.local_world_size()) == (1, 2)
    assert not distributed.is_main()


PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher has said anything, and what is said here is forgotten."""
    for name in list(os.environ):
        if name in PLACE or name.startswith(("SLURM_", "PMI_", "OMPI_")):
            monkeypatch.delenv(name)
    for name in PLACE:  # so that it is taken back whoever sets it
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_task_of_srun_is_a_rank_and_a_job_script_a_world_of_its_own(
    nowhere: pytest.MonkeyPatch,
) -> None:
    script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    task = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[3-4]", "SLURM_GTIDS": "2,3",
            "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}  # fmt: skip
    for variables, place in (
        (script, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}),
        (task, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "MASTER_ADDR": "n3"}),
    ):
        for name, value in variables.items():
            nowhere.setenv(name, value)
        distributed.prepare_environment()
        assert dict(os.environ).items() >= place.items()
        for name in PLACE:
            nowhere.delenv(name)


def fake_mpi(ranks: int) -> SimpleNamespace:
    """mpi4py.MPI of a world of so many ranks."""
    world = SimpleNamespace(Get_size=lambda: ranks)
    version = "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4"
    return SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: version)


@pytest.mark.parametrize(("rank", "size"), [("PMI_RANK", "PMI_SIZE"),
                         ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")])  # fmt: skip
def test_ranks_that_mpi4py_does_not_see_are_refused_before_they_train_alone(
    nowhere: pytest.MonkeyPatch, rank: str, size: str
) -> None:
    nowhere.setenv(rank, "2")
    nowhere.setenv(size, "4")
    distributed.prepare_environment()
    assert "RANK" not in os.environ
    nowhere.setitem(sys.modules, "mpi4py.MPI", fake_mpi(4))
    distributed.require_its_mpi()
    for found, message in (
        (
            fake_mpi(1),
            "started 4 ranks, .*sees 1, .*built for another MPI .Open MPI v4.1.4.; start",
        ),
        (None, "started 4 ranks, which find each other by mpi4py: .*mpi4py.*; start"),
    ):
        nowhere.setitem(sys.modules, "mpi4py.MPI", found)
        with pytest.raises(UserError, match=message) as raised:
            distributed.require_its_mpi()
        assert raised.value.is_everybodys
        assert not distributed.is_main()


def test_mpi_is_nobodys_business_without_mpirun(nowhere: pytest.MonkeyPatch) -> None:
    nowhere.setitem(sys.modules, "mpi4py.MPI", None)
    distributed.require_its_mpi()
    nowhere.setenv("PMI_RANK", "0")
    nowhere.setenv("RANK", "0")  # by `deepspeed --launcher mpich`
    distributed.require_its_mpi()
