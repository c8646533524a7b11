"""Frozen parameters in the engine: they cost nothing, and they are there again bit for bit."""

import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from engines import CASES, STILL, Case, build, fresh_weights, quick_and_slow, state_of, train
from hand_written_adam import HandWrittenAdam, gradients, norm, worst_share
from ranks import run_on_ranks
from torch import Tensor

from stacking import distributed, engine
from stacking.config import Freeze
from stacking.engine import TrainEngine
from stacking.freezing import trained_names
from stacking.snapshot import Snapshot

STEPS, RATE = 6, 1e-3
MOST_DEVIATION = {"fp32": 1e-3, "bf16": 0.05, "bf16_fp32": 0.05}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_fp32": torch.bfloat16}
FREEZES = {"all": Freeze(layers=1), "but the decoder": Freeze(layers=1, decoder="train")}


@dataclass(frozen=True)
class Stages:
    """What a stage with frozen parameters did, between two that train everything."""

    num_trained: int  # numbers that trained
    is_kept: bool  # whether the frozen weights leave as they came, in fp32
    copies_are_kept: bool  # the module's own, in its precision
    moves_what_trains: bool  # this and nothing else
    all_move_after: bool  # in the joint stage
    counts: frozenset[tuple[bool, int]]  # (is trained, Adam's count) of what has moments
    counts_after: frozenset[tuple[bool, int]]
    state_numel: int  # numbers of Adam's moments on this rank
    reduced_numel: int  # numbers given to reducing collectives in one step
    grad_norm: float | None
    norm_by_hand: float
    deviation: float  # from Adam by hand, clipped over what trains


def record_reductions(sizes: list[int]) -> None:
    """Note the size of what this process gives to reducing collectives; before the group exists."""

    def recorded(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            given = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
            sizes.append(max(tensor.numel() for tensor in given))
            return real(*arguments, **options)

        return call

    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
        setattr(torch.distributed, name, recorded(getattr(torch.distributed, name)))


def copies(trained: TrainEngine, names: frozenset[str]) -> dict[str, Tensor]:
    """The module's own weights, in its precision, whole."""
    gathered = sys.modules["deepspeed"].zero.GatheredParameters
    found = {}
    for name, parameter in trained._engine.module.named_parameters():
        if name in names:
            with gathered([parameter]) if hasattr(parameter, "ds_id") else nullcontext():
                found[name] = parameter.detach().clone()
    return found


def state_numel(trained: TrainEngine) -> int:
    """Numbers that this rank's optimizer keeps besides weights."""
    optimizer = trained._engine.optimizer
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    return sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in states)


def moved(start: Snapshot, end: Snapshot) -> frozenset[str]:
    return frozenset(n for n, w in start.weights.items() if not torch.equal(end.weights[n], w))


def freeze_and_thaw(zero_stage: int, precision: str, freeze: Freeze, sizes: list[int]) -> Stages:
    """Full steps, steps with `freeze`, full steps; each stage in an engine of its own."""
    first = build(zero_stage, precision, Snapshot(fresh_weights(STILL)), STILL)
    train(first, range(2), RATE)
    start = state_of(first)
    first.destroy()
    names = trained_names(STILL, freeze)
    still = frozenset(start.weights.keys() - names)
    second = build(zero_stage, precision, start, STILL, freeze)
    before = copies(second, still)
    sizes.clear()
    train(second, range(2, 3), RATE)
    reduced = sum(sizes)
    train(second, range(3, STEPS), RATE)
    after, grad_norm, numbers = copies(second, still), second.grad_norm, state_numel(second)
    end = state_of(second)
    second.destroy()
    third = build(zero_stage, precision, end, STILL)
    train(third, range(STEPS, STEPS + 2), RATE)
    last = state_of(third)
    third.destroy()
    by_hand, norm_by_hand = train_by_hand(start, sorted(names), precision)
    ours = {name: end.weights[name] for name in names}
    return Stages(
        num_trained=sum(tensor.numel() for tensor in ours.values()),
        is_kept=all(torch.equal(end.weights[n], start.weights[n]) for n in still),
        copies_are_kept=all(
            torch.equal(after[n], before[n]) and after[n].dtype == DTYPES[precision] for n in still
        ),
        moves_what_trains=moved(start, end) == names,
        all_move_after=moved(end, last) == start.weights.keys(),
        counts=frozenset((n in names, c) for n, c in end.optimizer_steps.items()),
        counts_after=frozenset((n in names, c) for n, c in last.optimizer_steps.items()),
        state_numel=numbers,
        reduced_numel=reduced,
        grad_norm=grad_norm,
        norm_by_hand=norm_by_hand,
        deviation=worst_share(ours, by_hand.weights, since=start.weights),
    )


def train_by_hand(
    start: Snapshot, names: list[str], precision: str
) -> tuple[HandWrittenAdam, float]:
    """The frozen stage's steps, and the gradient norm of the last one over `names`."""
    by_hand = HandWrittenAdam(start)
    dtype = torch.float64 if precision == "fp32" else DTYPES[precision]
    found: dict[str, Tensor] = {}
    for step in range(2, STEPS):
        found = gradients(by_hand.weights, names, step, dtype)
        by_hand.step(found, RATE, RATE)
    assert by_hand.clipped_steps
    return by_hand, norm(found)


EVERYWHERE = [(*case, kind, ranks) for ranks in (1, 2) for case in CASES for kind in FREEZES]
QUICK = [
    (0, "fp32", "all", 2),
    (1, "bf16", "but the decoder", 2),
    (2, "fp32", "but the decoder", 2),
    (3, "fp32", "all", 2),
]
"""Every ZeRO stage; the other cases are slow ones."""


def freeze_everywhere(cases: list[Case]) -> dict[Case, Stages]:
    """In one process group."""
    sizes: list[int] = []
    record_reductions(sizes)
    engine.start()
    found = {case: freeze_and_thaw(case[0], case[1], FREEZES[case[2]], sizes) for case in cases}
    distributed.shut_down()
    return found


@functools.cache
def frozen_on(ranks: int, is_quick: bool) -> list[dict[Case, Stages]]:
    """By rank; the slow cases in processes of their own."""
    cases = [case for case in EVERYWHERE if case[3] == ranks and (case in QUICK) == is_quick]
    return run_on_ranks(freeze_everywhere, ranks, cases)  # type: ignore[return-value]


CASE = pytest.mark.parametrize("case", quick_and_slow(EVERYWHERE, QUICK))


def stages_of(case: Case) -> list[Stages]:
    return [answers[case] for answers in frozen_on(case[3], case in QUICK)]


@CASE
def test_what_is_frozen_keeps_every_bit_and_the_rest_moves(case: Case) -> None:
    for found in stages_of(case):
        assert found.is_kept
        assert found.copies_are_kept
        assert found.moves_what_trains
        assert found.all_move_after


@CASE
def test_what_is_frozen_has_no_moments_and_no_gradients_to_reduce(case: Case) -> None:
    zero_stage, _, _, ranks = case
    for found in stages_of(case):
        # ZeRO pads its partitions, of each group or parameter; norms and flags are reduced too.
        here = 2 * found.num_trained / (ranks if zero_stage else 1)
        assert here <= found.state_numel < 1.02 * here + 100
        assert found.num_trained <= found.reduced_numel < 1.02 * found.num_trained + 200


@CASE
def test_norm_and_clipping_are_of_what_trains(case: Case) -> None:
    zero_stage, precision, _, _ = case
    for found in stages_of(case):
        assert found.deviation < MOST_DEVIATION[precision]
        if zero_stage:  # ZeRO-0 in fp32 does not tell its norm
            close = 1e-3 if precision == "fp32" else 0.05
            assert found.grad_norm == pytest.approx(found.norm_by_hand, rel=close)


@CASE
def test_kept_moments_go_on_and_thawed_parameters_start_afresh(case: Case) -> None:
    for found in stages_of(case):
        assert found.counts == {(True, STEPS)}
        assert found.counts_after == {(True, STEPS + 2), (False, 2)}
