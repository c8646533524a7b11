"""The engine on two gloo ranks under every ZeRO stage: exact state in and out."""

from dataclasses import dataclass

import pytest
import torch
from engines import CASES, build, fresh_weights, state_of, train
from ranks import run_on_ranks

from stacking import distributed, engine
from stacking.snapshot import Snapshot


def interrupted_and_whole(zero_stage: int, precision: str) -> tuple[list[float], list[float], bool]:
    """Losses of 3 + 3 steps with a rebuild between, of 6 steps at once, and equality of state."""
    first = build(zero_stage, precision, Snapshot(fresh_weights()))
    losses = train(first, range(3))
    middle = state_of(first)
    first.destroy()
    second = build(zero_stage, precision, middle)
    losses += train(second, range(3, 6))
    end = state_of(second)
    second.destroy()
    whole = build(zero_stage, precision, Snapshot(fresh_weights()))
    expected = train(whole, range(6))
    reference = state_of(whole)
    whole.destroy()
    steps = dict.fromkeys(reference.weights, 6)
    is_same = end.optimizer_steps == reference.optimizer_steps == steps and all(
        torch.equal(end.weights[name], reference.weights[name])
        and torch.equal(end.moments["exp_avg_sq"][name], reference.moments["exp_avg_sq"][name])
        for name in reference.weights
    )
    return losses, expected, is_same


def masters_after_a_build(zero_stage: int) -> float:
    """Largest difference between weights given to a bf16 engine and those it gives back."""
    weights = fresh_weights()
    built = build(zero_stage, "bf16", Snapshot(weights))
    back = state_of(built).weights
    built.destroy()
    return max(float((back[name] - weights[name]).abs().max()) for name in weights)


@dataclass(frozen=True)
class Answer:
    """What one rank found, by ZeRO stage and precision, or by ZeRO stage."""

    rebuilds: dict[tuple[int, str], tuple[list[float], list[float], bool]]
    masters: dict[int, float]


def rebuild_everywhere() -> Answer:
    """In one process group."""
    engine.start()
    rebuilds = {case: interrupted_and_whole(*case) for case in CASES}
    masters = {zero_stage: masters_after_a_build(zero_stage) for zero_stage in (1, 2, 3)}
    distributed.shut_down()
    return Answer(rebuilds, masters)


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    """By rank."""
    return run_on_ranks(rebuild_everywhere, 2)  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rebuilt_engine_continues_bit_for_bit(
    case: tuple[int, str], answers: list[Answer]
) -> None:
    for answer in answers:
        losses, expected, is_same = answer.rebuilds[case]
        assert losses == expected
        assert is_same


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fp32_masters_survive_a_bf16_engine_unrounded(
    zero_stage: int, answers: list[Answer]
) -> None:
    assert [answer.masters[zero_stage] for answer in answers] == [0.0, 0.0]
