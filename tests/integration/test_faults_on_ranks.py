"""A fault that one rank alone sees is told to the user, with the rank, and ends all ranks."""

from ranks import run_on_ranks

from stacking import distributed, engine
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
        assert answer.startswith("on rank 1: ")
        assert "the mount is missing" in answer


def test_a_fault_of_the_main_rank_is_everybodys() -> None:
    for answer in run_on_ranks(told, 2, 0, True):
        assert "the mount is missing" in str(answer)
