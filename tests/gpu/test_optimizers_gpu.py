"""LAMB and Muon on one GPU: DeepSpeed's kernel, apex's, and the state of both in and out.

bash tests/run.sh tests/gpu. Kernels that cannot be built here are skipped with the reason.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from engines import CONFIG, OPTIMIZER, fresh_weights, settings, train

from stacking import distributed, engine
from stacking.deepspeed_config import Accelerator, ClientOptimizer
from stacking.engine import TrainEngine
from stacking.snapshot import MOMENTS, MOMENTUM, Snapshot

NUMBERS = {"lr": 0.0, "betas": [0.9, 0.999], "eps": 1e-7}
LAMB = {"type": "Lamb", "params": {**NUMBERS, "max_coeff": 10.0, "min_coeff": 0.01}}
MUON = {**NUMBERS, "momentum": 0.9, "ns_method": "gram"}
CASES = ["deepspeed_lamb", "apex_lamb", "muon-0-fp32", "muon-1-bf16", "muon-2-bf16", "muon-3-bf16",
         "muon-1-fp16"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def accelerator() -> Iterator[Accelerator]:
    """A process group of one rank, and what the device can do."""
    found = engine.start()
    yield found
    distributed.shut_down()


def build(case: str, snapshot: Snapshot | None) -> TrainEngine:
    """An engine with the optimizer of that name."""
    name, _, rest = case.partition("-")
    stage, _, precision = (rest or "0-fp32").partition("-")
    found = settings(int(stage), precision)
    document = {**found.deepspeed, "gradient_clipping": 0.0 if name == "muon" else 0.5}
    document["fp16"] = {"enabled": precision == "fp16", "initial_scale_power": 8}
    zero = document["zero_optimization"]
    assert isinstance(zero, dict)
    document["zero_optimization"] = {**zero, "reduce_scatter": stage != "3"}
    del document["optimizer"]
    client: ClientOptimizer | None = ClientOptimizer("apex_lamb", NUMBERS)
    if name == "deepspeed_lamb":
        document["optimizer"], client = LAMB, None
    elif name == "muon":
        client = ClientOptimizer("muon", MUON)
    resolved = replace(found, deepspeed=document, client_optimizer=client)
    optimizer = OPTIMIZER.model_copy(update={"max_grad_norm": document["gradient_clipping"]})
    return TrainEngine(CONFIG, optimizer, resolved, snapshot)  # type: ignore[arg-type]


def steps(case: str, start: Snapshot | None, span: range) -> tuple[list[float], Snapshot]:
    """Losses, and the state after them."""
    built = build(case, start)
    losses, end = train(built, span), built.snapshot()
    built.destroy()
    assert end is not None
    return losses, end


@pytest.mark.parametrize("case", CASES)
def test_a_rebuilt_engine_continues_bit_for_bit(case: str, accelerator: Accelerator) -> None:
    if case == "apex_lamb" and importlib.util.find_spec("apex") is None:
        pytest.skip("NVIDIA apex is not installed")
    if case == "deepspeed_lamb" and not accelerator.fused_lamb:
        pytest.skip("no CUDA toolkit to build DeepSpeed's FusedLamb with")
    losses, middle = steps(case, Snapshot(fresh_weights()), range(3))
    further, end = steps(case, middle, range(3, 6))
    expected, reference = steps(case, Snapshot(fresh_weights()), range(6))
    assert losses + further == expected
    assert end.optimizer_steps == reference.optimizer_steps
    assert set(end.optimizer_steps.values()) == {6}
    keys = {*MOMENTS, *([MOMENTUM] if case.startswith("muon") else [])}
    assert reference.moments.keys() == keys
    pairs = [(end.moments[key], reference.moments[key]) for key in sorted(keys)]
    for ours, theirs in ((end.weights, reference.weights), *pairs):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(importlib.util.find_spec("apex") is None, reason="apex is not installed")
def test_both_lambs_move_decayed_matrices_the_same_way(accelerator: Accelerator) -> None:
    """Without decay apex's takes no ratio; the clamp of DeepSpeed's is wide enough here."""
    if not accelerator.fused_lamb:
        pytest.skip("no CUDA toolkit to build DeepSpeed's FusedLamb with")
    start = fresh_weights()
    ends = [steps(case, Snapshot(start), range(1))[1].weights for case in CASES[:2]]
    for name, weight in start.items():
        if weight.ndim > 1:
            ours, theirs = (end[name] - weight for end in ends)
            assert float((ours - theirs).norm() / theirs.norm()) < 0.02
