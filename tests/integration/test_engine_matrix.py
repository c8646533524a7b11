"""The loss curve of one plan is that of plain torch under every ZeRO stage, precision and split.

A plan goes through depths and a frozen stage with one engine each; see stage_plans.py. All cases
of one number of ranks run in one process group, the slow ones in another.
"""

import functools
import gc
import shutil
from collections.abc import Sequence

import pytest
from _pytest.mark import ParameterSet
from deepspeed.accelerator import get_accelerator
from ranks import run_on_ranks
from stage_plans import GLOBAL_BATCH, PLANS, Variant, run_engines, run_torch

from stacking import distributed, engine

Case = tuple[int, Variant]
"""Number of ranks and how the plan is run."""

MOST_DIFFERENCE = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 0.02, "autocast": 0.02}
ZERO_0_FP32 = 2e-6
"""A loss near 4.6 has steps of 4.8e-7; the order of sums moves it by one or two of them."""
NORM = {"fp32": 1e-5, "fp16": 0.01, "bf16": 0.05, "autocast": 0.05}
"""Relative."""


PRECISIONS = [(0, "fp32"), (0, "autocast")] + [
    (zero, precision) for zero in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")
]


def matrix(ranks: int) -> list[Case]:
    """All cases of that many ranks that compile nothing."""
    if ranks == 4:  # of a machine that may have two cores
        some = [(zero, kind) for zero, kind in PRECISIONS if kind != "fp16"]
        few = [Variant("depth", zero, kind, 2) for zero, kind in some]
        few += [Variant("depth", 1, "fp32", 1, 0.0), Variant("depth", 3, "fp32", offload="both")]
        few += [Variant("depth", 3, "fp32", hpz=2)]
        return [(ranks, variant) for variant in few]
    clipped = {"fp32": (1, 2, 4)}
    variants = [
        Variant("depth", zero, precision, accumulation, norm)
        for zero, precision in PRECISIONS
        for norm, accumulations in ((0.5, clipped.get(precision, (1, 4))), (0.0, (2,)))
        for accumulation in accumulations
        if ranks * accumulation <= GLOBAL_BATCH
    ]
    variants += [Variant("depth", z, "fp32", 2, offload="optimizer") for z in (1, 2, 3)]
    variants += [Variant("depth", 3, kind, 2, offload="both") for kind in ("fp32", "bf16")]
    variants += [Variant("depth", 3, "bf16", 2, hpz=2)]
    for plan in sorted(PLANS.keys() - {"depth"}):
        variants += [Variant(plan, z, "fp32") for z in (range(4) if ranks == 2 else (1, 3))]
    return [(ranks, variant) for variant in variants]


QUICK = {
    (2, Variant("depth", 0, "fp32", 2)), (2, Variant("depth", 1, "fp32", 2)),
    (2, Variant("depth", 2, "fp32", 2, 0.0)), (2, Variant("depth", 3, "fp32")),
    (2, Variant("depth", 1, "fp16")), (2, Variant("depth", 2, "bf16", 2, 0.0)),
    (2, Variant("depth", 3, "bf16")), (2, Variant("depth", 0, "autocast")),
    (2, Variant("depth", 3, "fp32", 2, offload="both")),
    (2, Variant("no labels", 1, "fp32")), (2, Variant("untied", 2, "fp32")),
    (2, Variant("a frozen group", 1, "fp32")),
}  # fmt: skip
CASES = [case for ranks in (1, 2, 4) for case in matrix(ranks)]
assert set(CASES) >= QUICK, set(QUICK) - set(CASES)


def parameters(cases: Sequence[Case]) -> list[ParameterSet]:
    return [
        pytest.param(*case, id=f"{case[0]}-{case[1]}",
                     marks=() if case in QUICK else pytest.mark.slow)
        for case in cases
    ]  # fmt: skip


def run_all(variants: list[Variant]) -> dict[Variant, list[tuple[float, float | None]]]:
    """In one process group; loss and gradient norm of each step."""
    # Tiny fp16 engines run on any CPU; DeepSpeed refuses where oneDNN has no fast kernels.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    engine.start()
    gc.freeze()  # each tear-down collects: what is here already need not be looked through
    found = {variant: run_engines(variant) for variant in variants}
    distributed.shut_down()
    return found


@functools.cache
def found_on(ranks: int, is_quick: bool) -> list[dict[Variant, list[tuple[float, float | None]]]]:
    """By rank."""
    variants = [case[1] for case in CASES if case[0] == ranks and (case in QUICK) == is_quick]
    return run_on_ranks(run_all, ranks, variants)  # type: ignore[return-value]


@functools.cache
def reference(plan: str, max_grad_norm: float) -> list[tuple[float, float]]:
    return run_torch(plan, max_grad_norm)


@pytest.mark.parametrize(("ranks", "variant"), parameters(CASES))
def test_losses_and_norms_are_those_of_plain_torch(ranks: int, variant: Variant) -> None:
    expected = reference(variant.plan, variant.max_grad_norm)
    answers = found_on(ranks, (ranks, variant) in QUICK)
    assert all(answer[variant] == answers[0][variant] for answer in answers), "ranks disagree"
    found = answers[0][variant]
    worst = max(abs(ours[0] - theirs[0]) for ours, theirs in zip(found, expected, strict=True))
    exact = variant.precision == "fp32"
    most = MOST_DIFFERENCE[variant.precision]
    assert worst <= (ZERO_0_FP32 if exact and variant.zero_stage == 0 else most)
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=NORM[variant.precision])


@pytest.mark.parametrize("plan", PLANS)
def test_clipping_bites_in_every_stage_of_a_plan(plan: str) -> None:
    """Else the matrix would say nothing about it."""
    clipped, free = reference(plan, 0.5), reference(plan, 0.0)
    assert min(norm for _, norm in clipped) > 0.5
    assert max(abs(ours[0] - theirs[0]) for ours, theirs in zip(clipped, free, strict=True)) > 1e-4


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ninja") is None, reason="needs g++ and ninja"
)
def test_offload_with_deepspeeds_own_cpu_adam_which_it_compiles() -> None:
    variant = Variant("depth", 2, "fp32", 2, offload="optimizer", torch_adam=False)
    (answer,) = run_on_ranks(run_all, 1, [variant])
    found = answer[variant]  # type: ignore[index]
    for ours, theirs in zip(found, reference("depth", 0.5), strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=MOST_DIFFERENCE["fp32"])
