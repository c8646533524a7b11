"""The engine on one GPU under NCCL: 16 bits, FusedAdam, offload, switches that leave no memory.

bash tests/run.sh tests/gpu. The plans and their reference are those of the CPU's matrix.
"""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from engines import STILL, fresh_weights
from stage_plans import (
    PLANS,
    Variant,
    build_stage,
    grown,
    run_engines,
    run_torch,
    train_engine,
)

from stacking import distributed, engine
from stacking.deepspeed_config import Accelerator
from stacking.snapshot import Snapshot

MOST_DIFFERENCE = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.05}
SWITCHES = 3


@pytest.fixture(scope="module", autouse=True)
def accelerator() -> Iterator[Accelerator]:
    """A process group of one rank, and what the device can do."""
    found = engine.start()
    assert torch.distributed.get_backend() == "nccl"
    yield found
    distributed.shut_down()


def case(zero_stage: int, precision: str, *, offload: str = "", fused: bool = True) -> Variant:
    """The depth plan in two micro batches a step."""
    return Variant("depth", zero_stage, precision, 2, offload=offload, torch_adam=not fused)


CASES = [
    case(0, "fp32", fused=False),
    case(3, "fp32", fused=False),
    *(case(zero, kind) for zero in (1, 2, 3) for kind in ("fp16", "bf16")),
    *(case(zero, "bf16", offload="optimizer", fused=False) for zero in (1, 2, 3)),
    case(3, "fp16", offload="both", fused=False),
]


def needs(variant: Variant, accelerator: Accelerator) -> None:
    """Skip what this machine cannot build or compute."""
    if not variant.torch_adam and not accelerator.fused_adam:
        pytest.skip("FusedAdam cannot be built here: no nvcc")
    if variant.precision == "bf16" and not accelerator.supports_bf16:
        pytest.skip("this GPU has no bf16")


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_losses_are_those_of_plain_torch(variant: Variant, accelerator: Accelerator) -> None:
    needs(variant, accelerator)
    expected = run_torch(variant.plan, variant.max_grad_norm)
    found = run_engines(variant)
    worst = max(abs(ours[0] - theirs[0]) for ours, theirs in zip(found, expected, strict=True))
    assert worst <= MOST_DIFFERENCE[variant.precision]


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_switches_give_all_memory_back(variant: Variant, accelerator: Accelerator) -> None:
    needs(variant, accelerator)
    before, after = PLANS["depth"][0], PLANS["depth"][2]
    allocated = []
    for step in range(SWITCHES + 1):
        small = build_stage(variant, before, Snapshot(fresh_weights(before.config)))
        train_engine(small, variant, range(step, step + 1))
        old = [weakref.ref(small._engine), weakref.ref(small._engine.module)]
        snapshot = small.snapshot()
        small.destroy()
        large = build_stage(variant, after, grown(snapshot, before, after))
        train_engine(large, variant, range(step, step + 1))
        large.destroy()
        del small, large
        gc.collect()
        assert [ref() for ref in old] == [None, None]
        allocated.append(torch.cuda.memory_allocated())
    # The first round leaves the libraries' own work spaces.
    assert allocated[1:] == allocated[:1] * SWITCHES


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_loss_scale_goes_on_over_a_rebuild(zero_stage: int, accelerator: Accelerator) -> None:
    variant = case(zero_stage, "fp16")
    needs(variant, accelerator)
    stage = PLANS["one layer"][0]
    whole = build_stage(variant, stage, Snapshot(fresh_weights(stage.config)))
    expected = train_engine(whole, variant, range(4))
    end = whole.snapshot()
    whole.destroy()
    first = build_stage(variant, stage, Snapshot(fresh_weights(stage.config)))
    losses = train_engine(first, variant, range(2))
    middle = first.snapshot()
    first.destroy()
    assert middle is not None
    assert end is not None
    assert middle.loss_scaler is not None
    second = build_stage(variant, stage, middle)
    assert second.loss_scale == middle.loss_scaler.scale
    losses += train_engine(second, variant, range(2, 4))
    last = second.snapshot()
    second.destroy()
    assert last is not None
    assert last.loss_scaler == end.loss_scaler
    assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in expected], abs=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fp32_masters_survive_a_16_bit_engine_unrounded(
    zero_stage: int, precision: str, accelerator: Accelerator
) -> None:
    variant = case(zero_stage, precision)
    needs(variant, accelerator)
    weights = fresh_weights(STILL)
    built = build_stage(variant, PLANS["a frozen group"][0], Snapshot(weights))
    back = built.snapshot()
    built.destroy()
    assert back is not None
    assert all(torch.equal(back.weights[name], weight) for name, weight in weights.items())
