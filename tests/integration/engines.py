"""Engines of a tiny model for the integration tests, and a training state to put into them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from stacking import distributed
from stacking.config import BertConfig, Freeze, OptimizerConfig
from stacking.dataset import MaskedLMBatch
from stacking.deepspeed_config import ClientOptimizer
from stacking.deepspeed_schema import Compile
from stacking.engine import TrainEngine
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot

CONFIG = BertConfig(
    vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
    max_position_embeddings=9, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
)  # fmt: skip
STILL = CONFIG.model_copy(update={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
"""The same without dropout: one model for all ranks computes what they do."""
OPTIMIZER = OptimizerConfig(weight_decay=0.1, betas=(0.9, 0.999), eps=1e-7, max_grad_norm=0.5)
CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"),
         (1, "bf16_fp32")]  # fmt: skip
"""ZeRO stage and precision; stage 0 has no 16 bits. bf16_fp32 adds up gradients in fp32: another
class inside DeepSpeed, that of deepspeed_configs/cpu_bf16.json."""
Case = tuple[int, str, str, int]
"""ZeRO stage, precision, a name and the number of ranks."""


def quick_and_slow(cases: Sequence[Case], quick: Collection[Case]) -> list[ParameterSet]:
    """Parameters of a test; those that are not quick are marked slow."""
    return [
        pytest.param(
            case, id="-".join(map(str, case)), marks=() if case in quick else pytest.mark.slow
        )
        for case in cases
    ]


@dataclass(frozen=True)
class Settings:
    """What TrainEngine reads of a ResolvedEngine."""

    deepspeed: dict[str, object]
    apex_layer_norm: bool = False
    checkpoint_interval: int = 0
    compile: Compile | None = None
    unpads: bool = True
    client_optimizer: ClientOptimizer | None = None
    log_every: int = 1


def settings(zero_stage: int, precision: str) -> Settings:
    """A DeepSpeed JSON of small buckets, in which ZeRO-3 parts every parameter."""
    numbers = {"lr": 0.0, "betas": list(OPTIMIZER.betas), "eps": OPTIMIZER.eps}
    optimizer = {"type": "AdamW", "params": {**numbers, "torch_adam": True, "fused": True}}
    accumulates = {"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16_fp32" else {}
    return Settings(
        {
            **accumulates,
            "train_batch_size": 3 * distributed.world_size(),
            "train_micro_batch_size_per_gpu": 3,
            "gradient_clipping": OPTIMIZER.max_grad_norm,
            "optimizer": optimizer,
            "bf16": {"enabled": precision.startswith("bf16")},
            "zero_optimization": {
                "stage": zero_stage,
                "reduce_bucket_size": 1000,
                "stage3_param_persistence_threshold": 0,
            },
        }
    )


def fresh_weights(config: BertConfig = CONFIG) -> dict[str, torch.Tensor]:
    """A model's initial weights."""
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(3))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batch(step: int, rank: int | None = None) -> MaskedLMBatch:
    """What `rank`, this one by default, trains on in this step."""
    rank = distributed.rank() if rank is None else rank
    generator = torch.Generator().manual_seed(100 * step + rank)
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


def train(
    trained: TrainEngine,
    steps: range,
    learning_rate: float = 1e-2,
    new_learning_rate: float | None = None,
) -> list[float]:
    """Take these steps; the MLM loss sum of this rank in each."""
    losses = []
    counts = torch.tensor([6.0, 3.0]) * distributed.world_size()
    for step in steps:
        totals = trained.train_step(
            [batch(step)],
            learning_rate=learning_rate,
            new_learning_rate=new_learning_rate,
            counts=counts,
            seed=step,
        )
        losses.append(float(totals[0]))
    return losses


def state_of(trained: TrainEngine) -> Snapshot:
    """The engine's state, on every rank: training itself never sends it. Collective."""
    mine = trained.snapshot()
    assert (mine is not None) == distributed.is_main()
    state = distributed.on_main(lambda: mine)
    assert state is not None
    return state


def build(
    zero_stage: int,
    precision: str,
    snapshot: Snapshot | None,
    config: BertConfig = CONFIG,
    freeze: Freeze | None = None,
) -> TrainEngine:
    """An engine; the process group must exist. `snapshot` is the main rank's."""
    resolved = settings(zero_stage, precision)
    return TrainEngine(config, OPTIMIZER, resolved, snapshot, freeze)  # type: ignore[arg-type]
