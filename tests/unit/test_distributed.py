"""Faults of one rank and of all, and ranks that do not come; the rest needs ranks."""

import time
from pathlib import Path

import pytest

from stacking import distributed
from stacking.errors import ConfigError, UserError


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
    with distributed.telling_of_missing_ranks(after=0.05):
        time.sleep(0.5)
    assert "for all 3 ranks to meet at node7:29500" in capsys.readouterr().err
    with distributed.telling_of_missing_ranks(after=0.3):
        pass
    time.sleep(0.5)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
         "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
         "OMPI_COMM_WORLD_RANK": "0"},
    ],
    ids=["open_mpi", "mpich", "torchrun"],
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
