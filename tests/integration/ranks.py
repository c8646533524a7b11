"""Run a function on several gloo ranks, each a process of its own."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from launching import free_port

Task = Callable[..., object]

LIMIT = 480.0  # seconds for all answers; below pytest's own limit
GRACE = 20.0  # for the other ranks after a fault of one, and for every rank to end


def run_on_ranks(
    task: Task, ranks: int, *arguments: object, limit: float = LIMIT, grace: float = GRACE
) -> list[object]:
    """`task(*arguments)` on every rank; what each returned, by rank.

    AssertionError with what each faulty rank said or how it ended. No child outlives the call.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    readers: list[Connection] = []
    processes = []
    try:
        for rank in range(ranks):
            reader, writer = context.Pipe(duplex=False)
            child = context.Process(
                target=_child, args=(task, rank, ranks, port, arguments, writer)
            )
            child.start()
            writer.close()  # the child's alone: its end is the end of the pipe
            readers.append(reader)
            processes.append(child)
        answers, faults = _read(readers, limit, grace)
        # Only now: a child does not end before its whole answer is read.
        deadline = time.monotonic() + grace
        for rank, child in enumerate(processes):
            child.join(max(0.0, deadline - time.monotonic()))
            if child.exitcode is None:
                faults.setdefault(rank, f"did not end within {grace:.0f} s of the answers; killed")
            elif child.exitcode or rank not in answers:
                text = f"ended with exit code {child.exitcode}"
                faults[rank] = f"{faults[rank]}\n{text}" if rank in faults else text
    finally:
        for child in processes:
            child.kill()
            child.join()
    assert not faults, "\n".join(f"rank {rank}: {faults[rank]}" for rank in sorted(faults))
    return [answers[rank] for rank in range(ranks)]


def _read(
    readers: list[Connection], limit: float, grace: float
) -> tuple[dict[int, object], dict[int, str]]:
    """Answers and faults by rank; after a first fault the others have `grace` seconds left."""
    answers: dict[int, object] = {}
    faults: dict[int, str] = {}
    begin = time.monotonic()
    silent = dict(enumerate(readers))
    while silent:
        ready = wait(silent.values(), max(0.0, begin + limit - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, reader in silent.items() if reader in ready]:
            reader = silent.pop(rank)
            try:
                is_good, answer = reader.recv()
            except EOFError:
                is_good, answer = False, "no answer"
            if is_good:
                answers[rank] = answer
            else:
                faults[rank] = str(answer)
                limit = min(limit, time.monotonic() - begin + grace)
    seconds = time.monotonic() - begin
    for rank in silent:
        faults[rank] = f"no answer after {seconds:.0f} s; killed"
    return answers, faults


def _child(
    task: Task,
    rank: int,
    ranks: int,
    port: int,
    arguments: tuple[object, ...],
    writer: Connection,
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    try:
        writer.send((True, task(*arguments)))
    except Exception:  # a process boundary: the parent fails with this text
        writer.send((False, traceback.format_exc()))
        raise
    # What is no Exception, such as SystemExit, ends the process without an answer: a fault, too.
