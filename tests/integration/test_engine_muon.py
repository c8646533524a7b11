"""Muon on two gloo ranks under every ZeRO stage: exact state in and out, one training for all."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from engines import CONFIG, OPTIMIZER, Case, fresh_weights, quick_and_slow, settings, train
from ranks import run_on_ranks

from stacking import distributed, engine
from stacking.deepspeed_config import ClientOptimizer
from stacking.engine import TrainEngine
from stacking.snapshot import MOMENTS, MOMENTUM, Snapshot

MUON = ClientOptimizer(
    "muon",
    {"lr": 0.0, "betas": [0.9, 0.999], "eps": 1e-7, "momentum": 0.9, "ns_method": "gram"},
)
UNCLIPPED = OPTIMIZER.model_copy(update={"max_grad_norm": 0.0})
KINDS = ["0-fp32", "1-fp32", "2-fp32", "3-fp32", "1-bf16", "2-bf16", "3-bf16", "1-bf16_fp32"]
"""ZeRO stage and precision; bf16_fp32 accumulates in fp32: another class inside DeepSpeed."""
CASES: list[Case] = [
    (int(kind[0]), kind[2:], "muon", ranks)
    for ranks in (1, 2, 3)
    for kind in (KINDS if ranks < 3 else KINDS[1:4])
]
QUICK: list[Case] = [(1, "fp32", "muon", 2), (3, "bf16", "muon", 2)]


def build(zero_stage: int, precision: str, snapshot: Snapshot | None) -> TrainEngine:
    """An engine whose layers' matrices Muon updates."""
    found = settings(zero_stage, precision)
    document = {key: value for key, value in found.deepspeed.items() if key != "optimizer"}
    document["gradient_clipping"] = 0.0
    zero = document["zero_optimization"]
    assert isinstance(zero, dict)
    document["zero_optimization"] = {**zero, "reduce_scatter": zero_stage != 3}
    resolved = replace(found, deepspeed=document, client_optimizer=MUON)
    return TrainEngine(CONFIG, UNCLIPPED, resolved, snapshot)  # type: ignore[arg-type]


def steps(
    zero_stage: int, precision: str, start: Snapshot | None, span: range
) -> tuple[list[float], Snapshot | None]:
    """Losses of these steps, and the state after them (before any, if there are none)."""
    built = build(zero_stage, precision, start)
    losses = train(built, span)
    end = built.snapshot()
    built.destroy()
    return losses, end


Answer = tuple[list[float], list[float], list[str]]
"""Losses with a rebuild between, without, and what differs in the end."""


def rebuild(zero_stage: int, precision: str) -> Answer:
    """3 + 3 steps with two rebuilds between, and 6 at once."""
    case = (zero_stage, precision)
    losses, middle = steps(*case, Snapshot(fresh_weights()), range(3))
    _, again = steps(*case, middle, range(0))
    further, end = steps(*case, again, range(3, 6))
    expected, reference = steps(*case, Snapshot(fresh_weights()), range(6))
    return losses + further, expected, [*differing(again, middle), *differing(end, reference)]


def differing(found: Snapshot | None, reference: Snapshot | None) -> list[str]:
    """Names of tensors that are not bit for bit the same, and faults; on the main rank."""
    if found is None or reference is None:
        return [] if found is reference else ["a snapshot"]
    assert not found.faults(), found.faults()
    momenta = reference.moments[MOMENTUM]
    assert len(momenta) == 4 * CONFIG.num_hidden_layers
    assert momenta.keys().isdisjoint(reference.moments["exp_avg"])
    pairs = [("weight", found.weights, reference.weights)]
    pairs += [(key, found.moments[key], reference.moments[key]) for key in (*MOMENTS, MOMENTUM)]
    bad = [f"{key} of {name}" for key, ours, theirs in pairs for name in theirs
           if not torch.equal(ours[name], theirs[name])]  # fmt: skip
    return bad + ["counts"] * (found.optimizer_steps != reference.optimizer_steps)


def rebuild_all(cases: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Answer]:
    """In one process group."""
    engine.start()
    answers = {case: rebuild(*case) for case in cases}
    distributed.shut_down()
    return answers


_SEEN: dict[tuple[int, bool], list[dict[tuple[int, str], Answer]]] = {}


def answers_of(case: Case) -> list[Answer]:
    """By rank. The quick cases share one job, the slow ones of a number of ranks another."""
    ranks, is_quick = case[3], case in QUICK
    if (ranks, is_quick) not in _SEEN:
        shared = [one[:2] for one in CASES if one[3] == ranks and (one in QUICK) == is_quick]
        found = run_on_ranks(rebuild_all, ranks, shared)
        _SEEN[ranks, is_quick] = found  # type: ignore[assignment]
    return [answer[case[:2]] for answer in _SEEN[ranks, is_quick]]


@pytest.mark.parametrize("case", quick_and_slow(CASES, QUICK))
def test_an_engine_of_muon_that_was_rebuilt_continues_bit_for_bit(case: Case) -> None:
    for losses, expected, bad in answers_of(case):
        assert losses == expected
        assert bad == []
    assert expected[-1] < expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_muon_trains_the_same_model_under_every_zero_stage(zero_stage: int) -> None:
    plain, parted = (answers_of((stage, "fp32", "muon", 2))[0][1] for stage in (0, zero_stage))
    assert parted == pytest.approx(plain, rel=1e-4)
