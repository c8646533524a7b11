"""Ranks that are killed, stopped, hang or fail, on real gloo: who notices, when, and what it says.

The limits are a second or two; the shipped ones are in WatchLimits.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from launching import free_port
from ranks import run_on_ranks

from stacking import distributed
from stacking.errors import UserError
from stacking.rank_agreement import require_equal
from stacking.rank_ledger import SOON, WatchLimits
from stacking.rank_watch import EXIT_CODE, RankWatch

LIMITS = WatchLimits(dead_after=1.5, hung_after=2.0, error_grace=1.0)
SLACK = 4.0  # seconds on a busy machine beyond the stated ones
TURN = 4  # the step in which something happens
LAST = 8
Act = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """What the culprit does, and whether the others' collectives notice it as gloo's do."""

    act: Act
    culprit: int
    is_deaf: bool = False  # as under NCCL, where a collective waits for a dead peer
    limits: WatchLimits = LIMITS


@dataclass(frozen=True)
class End:
    """How a rank ended: exit code (None: still there), seconds after the deed, stderr."""

    code: int | None
    seconds: float
    said: str

    @property
    def message(self) -> str:
        """The one line of ours."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.said
        assert "Traceback" not in self.said
        return lines[0]


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    time.sleep(60)


def fail() -> None:
    raise ValueError("a bug on one rank")


def refuse() -> None:
    raise UserError("the disk is full")


def do_nothing() -> None:
    pass


def train(watch: RankWatch, plan: Plan, folder: Path) -> None:
    is_everyone = plan.culprit < 0
    for step in range(LAST):
        watch.mark(step, "reading data")
        if step == TURN and (is_everyone or distributed.rank() == plan.culprit):
            pauses = 1 + distributed.rank() * is_everyone
            time.sleep(2.5 * plan.limits.interval * pauses)  # the others know of this place
            (folder / "deed").write_text(str(time.time()))
            plan.act()
        watch.mark(step, "training")
        if step >= TURN and plan.is_deaf:
            sleep()
        distributed.barrier()
    if is_everyone:
        time.sleep(1.2 * distributed.rank())  # rank 2 leaves when the main rank has gone


def rank_process(rank: int, ranks: int, port: int, plan: Plan, folder: Path) -> None:
    errors = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.distributed.init_process_group("gloo")
    try:
        with RankWatch(plan.limits) as watch:
            train(watch, plan, folder)
    except UserError:
        sys.exit(2)
    finally:
        distributed.shut_down()


def ends(plan: Plan, ranks: int, folder: Path, limit: float = 20.0) -> list[End]:
    """Run the plan; how each rank ended, the culprit left alone where it cannot end."""
    # torch is imported once, in the server: a rank is there in no time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "stacking.rank_watch"])
    port = free_port()
    processes = [
        context.Process(target=rank_process, args=(rank, ranks, port, plan, folder))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        ended = watched(processes, limit, plan.culprit if plan.act is be_stopped else None)
    finally:
        for process in processes:
            process.kill()
            process.join()
    deed = float((folder / "deed").read_text()) if (folder / "deed").exists() else 0.0
    said = [(folder / f"{rank}.err").read_text() for rank in range(ranks)]
    return [
        End(ended[rank][0], ended[rank][1] - deed, said[rank])
        if rank in ended
        else End(None, 0.0, said[rank])
        for rank in range(ranks)
    ]


def watched(
    processes: Sequence[BaseProcess], limit: float, stopped: int | None
) -> dict[int, tuple[int | None, float]]:
    """Exit code and time of each rank's end."""
    ended: dict[int, tuple[int | None, float]] = {}
    deadline = time.time() + limit
    awaited = set(range(len(processes))) - {stopped}
    while awaited - set(ended) and time.time() < deadline:
        for rank, process in enumerate(processes):
            if rank not in ended and process.exitcode is not None:
                ended[rank] = (process.exitcode, time.time())
        time.sleep(0.02)
    return ended


def check(found: list[End], culprit: int, after: float, before: float, message: str) -> None:
    """All but the culprit ended with our code, in time, with one line that names it."""
    for rank, end in enumerate(found):
        if rank == culprit:
            continue
        assert end.code == EXIT_CODE, (rank, end)
        assert after <= end.seconds <= before + SLACK, (rank, end)
        assert re.search(message, end.message), (rank, end)
        assert "the same command continues" in end.message


NAME = r"rank {} \(host \S+, pid \d+\)"
SILENT = rf"error: {NAME} has given no sign of life for \d+ s \(last: step {TURN}, reading data\)"


def test_a_killed_rank_is_named_though_gloo_fails_first(tmp_path: Path) -> None:
    found = ends(Plan(be_killed, 1), 3, tmp_path)
    assert found[1].code == -signal.SIGKILL
    check(found, 1, LIMITS.soon - 0.5, LIMITS.soon, SILENT.format(1))


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_with_the_shipped_limits_a_failed_collective_is_explained_in_seconds(
    tmp_path: Path, culprit: int
) -> None:
    found = ends(Plan(be_killed, culprit, limits=WatchLimits()), 3, tmp_path, limit=40.0)
    message = SILENT.format(1) if culprit else rf"error: {NAME.format(0)} has gone without a word"
    check(found, culprit, 0.0, SOON + 2.0, message)


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 2])
def test_with_the_shipped_limits_a_stopped_rank_is_named_after_half_a_minute(
    tmp_path: Path, culprit: int
) -> None:
    found = ends(Plan(be_stopped, culprit, limits=WatchLimits()), 3, tmp_path, limit=60.0)
    check(found, culprit, 28.0, 32.0, SILENT.format(culprit))


@pytest.mark.slow
def test_a_rank_killed_under_collectives_that_wait_for_ever_is_named(tmp_path: Path) -> None:
    found = ends(Plan(be_killed, 1, is_deaf=True), 2, tmp_path)
    check(found, 1, LIMITS.dead_after - 0.5, LIMITS.dead_after, SILENT.format(1))


def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    found = ends(Plan(be_stopped, 2), 3, tmp_path)
    assert found[2].code is None
    check(found, 2, LIMITS.dead_after - 0.5, LIMITS.dead_after, SILENT.format(2))


def test_the_main_ranks_death_is_noticed_by_the_others(tmp_path: Path) -> None:
    found = ends(Plan(be_killed, 0, is_deaf=True), 3, tmp_path)
    message = rf"error: {NAME.format(0)} has gone without a word \(last: step {TURN}, "
    check(found, 0, 0.0, 1.0, message)


def test_a_stopped_main_rank_is_noticed_by_the_others(tmp_path: Path) -> None:
    found = ends(Plan(be_stopped, 0), 3, tmp_path)
    check(found, 0, LIMITS.dead_after - 0.5, LIMITS.dead_after, SILENT.format(0))


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_hangs_is_named_on_all(tmp_path: Path, culprit: int) -> None:
    found = ends(Plan(sleep, culprit), 2, tmp_path)
    message = (
        rf"error: {NAME.format(culprit)} has hung for \d s "
        rf"\(last: step {TURN}, reading data; others wait at: step {TURN}, training\)"
    )
    check(found, -1, LIMITS.hung_after - 0.5, LIMITS.hung_after, message)


def test_where_all_hang_at_one_place_nobody_is_blamed(tmp_path: Path) -> None:
    found = ends(Plan(do_nothing, 1, is_deaf=True), 2, tmp_path)
    message = rf"error: no rank has come further than step {TURN}, training for \d s "
    check(found, -1, LIMITS.hung_after - 0.5, LIMITS.hung_after, message)


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_bug_of_one_rank_ends_the_others_with_its_words(tmp_path: Path, culprit: int) -> None:
    found = ends(Plan(fail, culprit), 2, tmp_path)
    assert found[culprit].code == 1
    assert "Traceback" in found[culprit].said
    assert "error: " not in found[culprit].said.replace("ValueError: ", "")
    message = rf"error: {NAME.format(culprit)} ended with an error .*: ValueError: a bug on one"
    check(found, culprit, 0.0, LIMITS.error_grace, message)


@pytest.mark.parametrize("culprit", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bug_is_told_also_where_collectives_wait_for_ever(tmp_path: Path, culprit: int) -> None:
    found = ends(Plan(fail, culprit, is_deaf=True), 2, tmp_path)
    message = rf"error: {NAME.format(culprit)} ended with an error .*: ValueError: a bug on one"
    check(found, culprit, LIMITS.error_grace - 0.5, LIMITS.error_grace, message)


def test_a_users_mistake_on_all_ranks_stays_that(tmp_path: Path) -> None:
    found = ends(Plan(refuse, -1), 3, tmp_path)
    assert [end.code for end in found] == [2, 2, 2]
    assert not any("error: " in end.said for end in found)


def disagree() -> str:
    torch.distributed.init_process_group("gloo")
    try:
        value = "12ab" if distributed.rank() == 1 else "77cd"
        require_equal({"the recipe": value, "the data": "same"})
    except UserError as error:
        return str(error)
    finally:
        distributed.shut_down()
    return "nothing"


def test_ranks_that_hold_different_recipes_hear_the_same_message() -> None:
    answers = run_on_ranks(disagree, 3)
    assert len(set(answers)) == 1
    found = rf"the recipe: {NAME.format(1)} has 12ab, ranks 0 and 2 have 77cd$"
    assert re.search(found, str(answers[0])), answers


def test_an_orderly_end_is_no_fault(tmp_path: Path) -> None:
    found = ends(Plan(do_nothing, -1), 3, tmp_path)
    assert [end.code for end in found] == [0, 0, 0]
    assert [end.said for end in found] == ["", "", ""]
