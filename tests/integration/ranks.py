"""Run a function on several gloo ranks, each a process of its own."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue

from launching import free_port

Task = Callable[..., object]


def run_on_ranks(task: Task, ranks: int, *arguments: object) -> list[object]:
    """`task(*arguments)` on every rank; what each returned, by rank. Fails with their traceback."""
    context = multiprocessing.get_context("spawn")
    answers: SimpleQueue[tuple[int, bool, object]] = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_child, args=(task, rank, ranks, port, arguments, answers))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        process.kill()
    results = {}
    while not answers.empty():
        rank, is_good, answer = answers.get()
        assert is_good, f"rank {rank}:\n{answer}"
        results[rank] = answer
    assert sorted(results) == list(range(ranks)), f"only ranks {sorted(results)} answered"
    return [results[rank] for rank in range(ranks)]


def _child(
    task: Task,
    rank: int,
    ranks: int,
    port: int,
    arguments: tuple[object, ...],
    answers: "SimpleQueue[tuple[int, bool, object]]",
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    try:
        answers.put((rank, True, task(*arguments)))
    except BaseException:  # a process boundary: the parent fails with this text
        answers.put((rank, False, traceback.format_exc()))
        raise
