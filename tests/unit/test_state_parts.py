"""Parts of tensors, of whatever size and on whatever rank, come together in buckets."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stacking import distributed, state_parts
from stacking.state_parts import Part, gather_parts

CPU = torch.device("cpu")


class Ranks:
    """Threads in place of ranks: collectives meet at a barrier."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.me = threading.local()
        self.barrier = threading.Barrier(world, timeout=30)
        self.given: list[object] = [None] * world

    def gather_objects(self, value: object) -> list[object]:
        self.given[self.me.rank] = value
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def gather_on_main(self, value: object) -> list[object] | None:
        found = self.gather_objects(value)
        return found if self.me.rank == 0 else None

    def gather_tensors(self, tensor: Tensor, received: Sequence[Tensor]) -> None:
        for place, sent in zip(received, self.gather_objects(tensor.clone()), strict=False):
            assert isinstance(sent, Tensor)
            place.copy_(sent)

    def run(self, parts: Sequence[Sequence[Part]]) -> list[list[Tensor] | None]:
        """What each rank gets."""

        def one(rank: int) -> list[Tensor] | None:
            self.me.rank = rank
            with ExitStack() as stack:
                stack.callback(self.barrier.abort)  # or the others wait for a rank that failed
                found = gather_parts(parts[rank], CPU)
                stack.pop_all()
                return found

        with ThreadPoolExecutor(self.world) as pool:
            ended = [pool.submit(one, rank) for rank in range(self.world)]
        faults = [fault for fault in (one.exception() for one in ended) if fault is not None]
        if faults:
            raise next(f for f in faults if not isinstance(f, threading.BrokenBarrierError))
        return [one.result() for one in ended]


def gathered(
    parts: Sequence[Sequence[Part]], bucket: int, patch: pytest.MonkeyPatch
) -> list[list[Tensor] | None]:
    ranks = Ranks(len(parts))
    patch.setattr(state_parts, "BUCKET_ELEMENTS", bucket)
    patch.setattr(distributed, "world_size", lambda: ranks.world)
    for name in ("gather_objects", "gather_on_main", "gather_tensors"):
        patch.setattr(distributed, name, getattr(ranks, name))
    return ranks.run(parts)


@st.composite
def parted(draw: st.DrawFn) -> tuple[list[Tensor], list[list[Part]]]:
    """Tensors, and how ranks hold them: cut anywhere, in any order of ranks."""
    world = draw(st.integers(1, 4))
    wholes, held = [], [[] for _ in range(world)]  # type: ignore[var-annotated]
    for number in range(draw(st.integers(0, 5))):
        shape = draw(st.lists(st.integers(1, 7), max_size=3))
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + 1000 * number
        wholes.append(whole.view(shape))
        inner = draw(
            st.lists(st.integers(0, whole.numel()), min_size=world - 1, max_size=world - 1)
        )
        edges = [0, *sorted(inner), whole.numel()]
        order = draw(st.permutations(range(world)))
        for place, rank in enumerate(order):
            start, end = edges[place], edges[place + 1]
            values = torch.cat([whole[start:end], torch.full((3,), torch.nan)])  # padded, as ZeRO's
            held[rank].append(
                Part(torch.Size(shape), start, end - start, partial(torch.clone, values))
            )
    return wholes, held


@given(parted(), st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_any_parts_in_buckets_of_any_size_make_the_whole_on_the_main_rank_alone(
    case: tuple[list[Tensor], list[list[Part]]], bucket: int
) -> None:
    wholes, held = case
    with pytest.MonkeyPatch.context() as patch:
        found = gathered(held, bucket, patch)
    assert found[1:] == [None] * (len(held) - 1)
    assert found[0] is not None
    assert [t.shape for t in found[0]] == [t.shape for t in wholes]
    assert all(torch.equal(one, other) for one, other in zip(found[0], wholes, strict=True))


def test_parts_are_asked_for_once_and_only_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def values(rank: int) -> Tensor:
        asked.append(rank)
        return torch.ones(10) * rank

    shape = torch.Size([20])
    held = [[Part(shape, 10 * rank, 10, partial(values, rank))] for rank in range(2)]
    held += [[Part.nothing(shape)]]
    found = gathered(held, 6, monkeypatch)
    assert found[0] is not None
    assert found[0][0].tolist() == [0.0] * 10 + [1.0] * 10
    assert sorted(asked) == [0, 1]


def test_a_gap_between_the_parts_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [[Part(torch.Size([4]), 0, 3, lambda: torch.ones(3))]]
    with pytest.raises(AssertionError, match="gaps"):
        gathered(held, 8, monkeypatch)


def test_what_is_gathered_is_no_view_of_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.zeros(3, 2)
    found = gathered([[Part.whole(held)]], 4, monkeypatch)
    held.fill_(1.0)
    assert found[0] is not None
    assert not found[0][0].any()
