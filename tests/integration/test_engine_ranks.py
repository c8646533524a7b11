"""The engine on two gloo ranks under every ZeRO stage: exact state in and out, and no leaks."""

import gc
import weakref
from dataclasses import dataclass

import numpy as np
import psutil
import pytest
import torch
from ranks import run_on_ranks

from stacking import distributed, engine
from stacking.config import BertConfig, OptimizerConfig
from stacking.dataset import MaskedLMBatch
from stacking.engine import TrainEngine
from stacking.growth import grow_weights
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot

CONFIG = BertConfig(
    vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
    max_position_embeddings=9, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)  # fmt: skip
OPTIMIZER = OptimizerConfig(weight_decay=0.1, max_grad_norm=1.0)


@dataclass(frozen=True)
class Settings:
    """What TrainEngine reads of a ResolvedEngine."""

    deepspeed: dict[str, object]
    apex_layer_norm: bool = False


def settings(zero_stage: int, precision: str) -> Settings:
    optimizer = {
        "type": "AdamW",
        "params": {"lr": 0.0, "betas": [0.9, 0.99], "eps": 1e-6, "torch_adam": True, "fused": True},
    }
    return Settings(
        {
            "train_batch_size": 3 * distributed.world_size(),
            "train_micro_batch_size_per_gpu": 3,
            "gradient_clipping": 1.0,
            "optimizer": optimizer,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {
                "stage": zero_stage,
                "reduce_bucket_size": 1000,
                "stage3_param_persistence_threshold": 0,
            },
        }
    )


def fresh_weights(config: BertConfig = CONFIG) -> dict[str, torch.Tensor]:
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(3))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batch(step: int) -> MaskedLMBatch:
    generator = torch.Generator().manual_seed(100 * step + distributed.rank())
    ids = torch.randint(5, 53, (3, 7), generator=generator)
    return MaskedLMBatch(
        input_ids=ids,
        token_type_ids=torch.zeros_like(ids),
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        masked_lm_positions=torch.tensor([[1, 4]] * 3),
        masked_lm_ids=ids[:, [1, 4]],
        next_sentence_labels=torch.tensor([0, 1, 0]),
        sample_indices=np.arange(3),
        num_masked=6,
        num_real_tokens=21,
    )


def train(trained: TrainEngine, steps: range) -> list[float]:
    losses = []
    counts = torch.tensor([6.0, 3.0]) * distributed.world_size()
    for step in steps:
        totals = trained.train_step([batch(step)], learning_rate=1e-2, counts=counts, seed=step)
        losses.append(float(totals[0]))
    return losses


def build(zero_stage: int, precision: str, snapshot: Snapshot, config: BertConfig) -> TrainEngine:
    return TrainEngine(config, OPTIMIZER, settings(zero_stage, precision), snapshot)  # type: ignore[arg-type]


def interrupted_and_whole(zero_stage: int, precision: str) -> tuple[list[float], list[float], bool]:
    """Losses of 3 + 3 steps with a rebuild between, of 6 steps at once, and equality of state."""
    engine.start()
    first = build(zero_stage, precision, Snapshot(fresh_weights()), CONFIG)
    losses = train(first, range(3))
    middle = first.snapshot()
    first.destroy()
    second = build(zero_stage, precision, middle, CONFIG)
    losses += train(second, range(3, 6))
    end = second.snapshot()
    second.destroy()
    whole = build(zero_stage, precision, Snapshot(fresh_weights()), CONFIG)
    expected = train(whole, range(6))
    reference = whole.snapshot()
    whole.destroy()
    is_same = end.optimizer_steps == reference.optimizer_steps == 6 and all(
        torch.equal(end.weights[name], reference.weights[name])
        and torch.equal(end.moments["exp_avg_sq"][name], reference.moments["exp_avg_sq"][name])
        for name in reference.weights
    )
    distributed.shut_down()
    return losses, expected, is_same


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_a_rebuilt_engine_continues_bit_for_bit(zero_stage: int, precision: str) -> None:
    for answer in run_on_ranks(interrupted_and_whole, 2, zero_stage, precision):
        assert isinstance(answer, tuple)
        losses, expected, is_same = answer
        assert losses == expected
        assert is_same


def masters_after_a_build(zero_stage: int) -> float:
    """Largest difference between weights given to a bf16 engine and those it gives back."""
    engine.start()
    weights = fresh_weights()
    built = build(zero_stage, "bf16", Snapshot(weights), CONFIG)
    back = built.snapshot().weights
    built.destroy()
    distributed.shut_down()
    return max(float((back[name] - weights[name]).abs().max()) for name in weights)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fp32_masters_survive_a_bf16_engine_unrounded(zero_stage: int) -> None:
    assert run_on_ranks(masters_after_a_build, 2, zero_stage) == [0.0, 0.0]


def switch_many_times(zero_stage: int, switches: int) -> dict[str, object]:
    """Grow 1 -> 2 layers again and again; resident memory after each, and what is still alive."""
    engine.start()
    small = CONFIG.model_copy(update={"num_hidden_layers": 1})
    weights, resident, alive = fresh_weights(small), [], 0
    for step in range(switches):
        first = build(zero_stage, "fp32", Snapshot(weights), small)
        train(first, range(step, step + 1))
        grown = grow_weights(first.snapshot().weights, small, CONFIG)
        watched = [weakref.ref(first._engine), weakref.ref(first._engine.module)]
        first.destroy()
        second = build(zero_stage, "fp32", Snapshot(grown), CONFIG)
        train(second, range(step, step + 1))
        second.destroy()
        gc.collect()
        alive += sum(ref() is not None for ref in watched)
        resident.append(psutil.Process().memory_info().rss)
    is_linear_original = torch.nn.functional.linear is torch._C._nn.linear
    handles = psutil.Process().num_fds()
    distributed.shut_down()
    return {"alive": alive, "rss": resident, "linear": is_linear_original, "fds": handles}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_switches_leave_no_engine_module_or_patch_behind(zero_stage: int) -> None:
    for answer in run_on_ranks(switch_many_times, 2, zero_stage, 8):
        assert isinstance(answer, dict)
        assert answer["alive"] == 0
        assert answer["linear"] is True
        # After the second switch memory stays flat: within 2 % of itself.
        assert answer["rss"][-1] <= 1.02 * answer["rss"][1]
