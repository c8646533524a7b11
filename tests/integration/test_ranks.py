"""The tests' own helper: long answers arrive, and no fault of a rank is lost or waited for long."""

import multiprocessing
import os
import sys
import time

import pytest
from ranks import run_on_ranks


def long_answer(size: int) -> bytes:
    return os.environ["RANK"].encode() * size


def fault(kind: str) -> str:
    """Of rank 1 alone; rank 0 waits for it in vain where `kind` says so."""
    if os.environ["RANK"] == "0":
        time.sleep(60 if "in vain" in kind else 0)
    elif kind.startswith("raise"):
        raise ValueError("the mount is missing")
    elif kind == "exit":
        sys.exit(0)
    elif kind == "abort":
        os.abort()
    elif kind == "silent":
        time.sleep(60)
    elif kind == "no pickle":
        return lambda: None  # type: ignore[return-value]
    return "good"


def test_answers_longer_than_a_pipe_holds_arrive_in_the_order_of_ranks() -> None:
    size = 1 << 20
    assert run_on_ranks(long_answer, 2, size, limit=60) == [b"0" * size, b"1" * size]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raise", "rank 1:\n?.*Traceback(.|\n)*ValueError: the mount is missing"),
        ("raise, in vain", "rank 0: no answer after .* killed(.|\n)*ValueError: the mount is mis"),
        ("exit", "rank 1: no answer\nended with exit code 0"),
        ("abort", "rank 1: no answer\nended with exit code -6"),
        ("silent", "rank 1: no answer after 3 s; killed"),
        ("no pickle", "rank 1:(.|\n)*pickle"),
    ],
)
def test_a_fault_of_a_rank_is_told_and_ends_all_ranks(kind: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_on_ranks(fault, 2, kind, limit=3 if kind == "silent" else 30, grace=2)
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()
