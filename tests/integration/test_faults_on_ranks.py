"""A fault that one rank alone sees is told to the user, with the rank, and ends all ranks."""

import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path

import pytest
from launching import LAUNCH, free_port
from ranks import run_on_ranks
from same_run import arguments, engine_json, tags

from stacking import distributed, engine
from stacking.checkpoint import CheckpointManager
from stacking.dataset import MaskedLMBatch, PretrainingLoader
from stacking.errors import ConfigError, UserError


def told(faulty_rank: int, on_main_only: bool) -> str:
    engine.start()

    def step() -> int:
        if distributed.rank() == faulty_rank or on_main_only:
            raise ConfigError("the mount is missing")
        return 5

    try:
        distributed.on_main(step) if on_main_only else distributed.together(step)
    except UserError as error:
        return str(error)
    finally:
        distributed.shut_down()
    return "nothing"


def test_a_fault_of_rank_1_is_heard_on_rank_0_with_its_rank() -> None:
    for answer in run_on_ranks(told, 2, 1, False):
        assert isinstance(answer, str)
        assert answer.startswith("on rank 1 (host ")
        assert "the mount is missing" in answer


def test_a_fault_of_the_main_rank_is_everybodys() -> None:
    for answer in run_on_ranks(told, 2, 0, True):
        assert "the mount is missing" in str(answer)


SAVED_AT, FAULT_AT = 4, 6


def train(rank: int, port: int, faulty_rank: int, words: list[str], errors: Path) -> None:
    """pretrain.py on a disk that needs two seconds for a save; a mount goes while it writes."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    save, take = CheckpointManager.save, PretrainingLoader.__next__
    steps = iter(range(1, 100))

    def slowly(self: CheckpointManager, *what: object) -> None:
        time.sleep(2.0)
        save(self, *what)  # type: ignore[arg-type]

    def with_a_fault(self: PretrainingLoader) -> list[MaskedLMBatch]:
        if next(steps) == FAULT_AT and rank == faulty_rank:
            raise ConfigError("the mount is missing")
        return take(self)

    CheckpointManager.save = slowly  # type: ignore[assignment,method-assign]
    PretrainingLoader.__next__ = with_a_fault  # type: ignore[method-assign]
    sys.argv = ["pretrain.py", *words]
    with errors.open("w") as sys.stderr:
        runpy.run_path(str(LAUNCH / "pretrain.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("faulty_rank", [0, 1])
def test_a_save_under_way_is_finished_before_a_fault_ends_the_run(
    faulty_rank: int, tiny_data: Path, tmp_path: Path
) -> None:
    changes = ("stages.0.steps=12", f"checkpoint.every_steps={SAVED_AT}")
    settings = engine_json(tmp_path, 1)
    words = list(map(str, arguments(tiny_data, tmp_path / "run", settings, changes)))
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [
        context.Process(
            target=train, args=(rank, port, faulty_rank, words, tmp_path / f"errors{rank}")
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    said = "".join((tmp_path / f"errors{rank}").read_text() for rank in range(2))
    assert [process.exitcode for process in ranks] == [2, 2], said
    assert "the mount is missing" in said
    assert f"step_{SAVED_AT:08d}" in tags(tmp_path / "run")
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    found, complaints = manager.latest_good()
    assert not complaints
    assert found is not None
    assert found.tag == f"step_{SAVED_AT:08d}"
