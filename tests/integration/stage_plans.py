"""Plans of stages that an engine and plain torch both train: the same numbers must come out.

The global batch is 8 sequences whatever the ranks and micro batches, and dropout is off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from engines import STILL, Settings, fresh_weights, settings
from torch import Tensor

from stacking import distributed
from stacking.config import BertConfig, Freeze, OptimizerConfig
from stacking.dataset import MaskedLMBatch
from stacking.engine import TrainEngine
from stacking.freezing import apply_freeze
from stacking.growth import grow_weights
from stacking.modeling import BertForPreTraining
from stacking.snapshot import Snapshot

GLOBAL_BATCH, STEPS, RATE = 8, 5, 5e-3
OPTIMIZER = OptimizerConfig(weight_decay=0.1, eps=1e-3)
"""Epsilon is as large as gradients are: with less, Adam would hide a wrong factor on them all."""


@dataclass(frozen=True)
class Stage:
    """One engine's life."""

    config: BertConfig
    freeze: Freeze | None = None
    new: str = ""
    """Start of the names of the parameters that are in a group of their own."""


@dataclass(frozen=True)
class Variant:
    """How a plan is run."""

    plan: str
    zero_stage: int
    precision: str  # fp32, bf16, fp16, autocast
    accumulation: int = 1
    max_grad_norm: float = 0.5
    offload: str = ""  # or optimizer, both
    torch_adam: bool = True
    hpz: int = 1
    """Ranks that part the weights among themselves for the backward pass (ZeRO 3)."""

    def __str__(self) -> str:
        words = [
            self.plan, f"zero{self.zero_stage}", self.precision,
            f"accumulate{self.accumulation}" if self.accumulation > 1 else "",
            "" if self.max_grad_norm else "unclipped",
            f"offload_{self.offload}" if self.offload else "",
            "" if self.torch_adam else "deepspeed_adam",
            f"hpz{self.hpz}" if self.hpz > 1 else "",
        ]  # fmt: skip
        return "-".join(word for word in words if word)

    @property
    def optimizer(self) -> OptimizerConfig:
        return OPTIMIZER.model_copy(update={"max_grad_norm": self.max_grad_norm})


def _deep(config: BertConfig, layers: int) -> BertConfig:
    return config.model_copy(update={"num_hidden_layers": layers})


_UNTIED = STILL.model_copy(update={"tie_word_embeddings": False, "layer_norm": "pre"})

PLANS: dict[str, list[Stage]] = {
    "depth": [
        Stage(_deep(STILL, 1)),
        Stage(_deep(STILL, 2), Freeze(layers=1)),
        Stage(_deep(STILL, 4)),
    ],
    "untied": [Stage(_deep(_UNTIED, 1)), Stage(_deep(_UNTIED, 3))],
    "no labels": [Stage(_deep(STILL, 1)), Stage(_deep(STILL, 2))],
    "one layer": [Stage(_deep(STILL, 1)), Stage(_deep(STILL, 1))],
    "a frozen group": [
        Stage(_deep(STILL, 2)),
        Stage(_deep(STILL, 2), Freeze(layers=1, decoder="train"), new="encoder.layers.0."),
    ],
}
"""`no labels`: the next-sentence head and its pooler get no gradient."""


def sequences(plan: str, step: int, rows: range) -> MaskedLMBatch:
    """These rows of the step's global batch; lengths and counts of masked tokens differ."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(5, 53, (GLOBAL_BATCH, 9), generator=generator)
    lengths = torch.randint(5, 10, (GLOBAL_BATCH, 1), generator=generator)
    labels = torch.randint(0, 2, (GLOBAL_BATCH,), generator=generator)
    masked = ids[:, [1, 3, 4]]
    masked[1::3, 1:] = -100
    attention = torch.arange(9) < lengths
    chosen = list(rows)
    return MaskedLMBatch(
        input_ids=ids[chosen],
        token_type_ids=(torch.arange(9) > 2).long().expand(len(chosen), 9).contiguous(),
        attention_mask=attention[chosen],
        masked_lm_positions=torch.tensor([[1, 3, 4]] * len(chosen)),
        masked_lm_ids=masked[chosen],
        next_sentence_labels=None if plan == "no labels" else labels[chosen],
        sample_indices=np.array(chosen),
        num_masked=int((masked[chosen] != -100).sum()),
        num_real_tokens=int(attention[chosen].sum()),
    )


def _losses_of(totals: Tensor, counts: Sequence[float]) -> float:
    return float(totals[0] / counts[0] + totals[1] / counts[1])


def _document(variant: Variant) -> Settings:
    """The DeepSpeed JSON of a variant: small buckets, and ZeRO-3 parts every parameter."""
    made = settings(variant.zero_stage, variant.precision)
    zero: dict[str, object] = {**made.deepspeed["zero_optimization"]}  # type: ignore[dict-item]
    if variant.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if variant.offload == "both":
        zero["offload_param"] = {"device": "cpu"}
    if variant.hpz > 1:
        zero["zero_hpz_partition_size"] = variant.hpz
    numbers = {"lr": 0.0, "betas": list(OPTIMIZER.betas), "eps": OPTIMIZER.eps}
    if variant.torch_adam:
        numbers |= {"torch_adam": True, "fused": True}
    document = made.deepspeed | {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH
        // (variant.accumulation * distributed.world_size()),
        "gradient_accumulation_steps": variant.accumulation,
        "gradient_clipping": variant.max_grad_norm,
        "optimizer": {"type": "AdamW", "params": numbers},
        "fp16": {"enabled": variant.precision == "fp16"},
        "torch_autocast": {"enabled": variant.precision == "autocast", "dtype": "bfloat16"},
        "zero_force_ds_cpu_optimizer": not variant.torch_adam,
        "zero_optimization": zero,
    }
    return replace(made, deepspeed=document)


def build_stage(variant: Variant, stage: Stage, snapshot: Snapshot | None) -> TrainEngine:
    """An engine that holds `snapshot`, whose parameters called `stage.new` are in own groups."""
    return TrainEngine(
        stage.config, variant.optimizer, _document(variant), snapshot, stage.freeze  # type: ignore[arg-type]
    )  # fmt: skip


def train_engine(
    trained: TrainEngine, variant: Variant, steps: range
) -> list[tuple[float, float | None]]:
    """Loss over all ranks and gradient norm of each step."""
    found = []
    share = GLOBAL_BATCH // distributed.world_size()
    micro = share // variant.accumulation
    assert micro, f"{variant}: 8 sequences are too few"
    first = share * distributed.rank()
    for step in steps:
        whole = sequences(variant.plan, step, range(GLOBAL_BATCH))
        counts = [float(whole.num_masked), float(GLOBAL_BATCH)]
        totals = trained.train_step(
            [
                sequences(variant.plan, step, range(start, start + micro))
                for start in range(first, first + share, micro)
            ],
            learning_rate=RATE,
            counts=torch.tensor(counts, device=trained.device),
            seed=step,
        )
        loss = _losses_of(distributed.sum_over_ranks(totals), counts)
        found.append((loss, trained.grad_norm))
    return found


def grown(snapshot: Snapshot | None, before: Stage, after: Stage) -> Snapshot | None:
    """On the main rank what the next stage starts from: fresh moments."""
    if snapshot is None:
        return None
    weights = snapshot.weights
    if before.config != after.config:
        weights = grow_weights(weights, before.config, after.config)
    return Snapshot(weights, new_names=_new_names(weights, after))


def _new_names(weights: dict[str, Tensor], stage: Stage) -> frozenset[str]:
    return frozenset(n for n in weights if stage.new and n.startswith(stage.new))


def run_engines(variant: Variant) -> list[tuple[float, float | None]]:
    """The whole plan through one engine after another; loss and gradient norm of each step."""
    stages = PLANS[variant.plan]
    snapshot: Snapshot | None = Snapshot(fresh_weights(stages[0].config))
    found = []
    for index, stage in enumerate(stages):
        if index:
            snapshot = grown(snapshot, stages[index - 1], stage)
        trained = build_stage(variant, stage, snapshot)
        found += train_engine(trained, variant, range(STEPS * index, STEPS * (index + 1)))
        snapshot = trained.snapshot()
        trained.destroy()
    return found


def run_torch(plan: str, max_grad_norm: float) -> list[tuple[float, float]]:
    """The same in plain torch, one process and one batch a step, AdamW made anew each stage."""
    stages, found = PLANS[plan], []
    weights = fresh_weights(stages[0].config)
    for index, stage in enumerate(stages):
        if index and stages[index - 1].config != stage.config:
            weights = grow_weights(weights, stages[index - 1].config, stage.config)
        model = BertForPreTraining(stage.config)
        model.load_state_dict(weights)
        apply_freeze(model, stage.freeze)
        step_once = _stepper(model, plan, max_grad_norm)
        found += [step_once(step) for step in range(STEPS * index, STEPS * (index + 1))]
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


def _stepper(
    model: BertForPreTraining, plan: str, max_grad_norm: float
) -> Callable[[int], tuple[float, float]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=RATE, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)

    def step_once(step: int) -> tuple[float, float]:
        batch = sequences(plan, step, range(GLOBAL_BATCH))
        counts = [float(batch.num_masked), float(GLOBAL_BATCH)]
        # What no loss reads has a zero gradient in DeepSpeed, and so decays.
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        model.train()
        sums = model(**batch.inputs())
        nsp = sums.get("nsp_loss_sum", torch.zeros(()))
        (sums["mlm_loss_sum"] / counts[0] + nsp / counts[1]).backward()
        limit = max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        adam.step()
        totals = torch.stack([sums["mlm_loss_sum"].detach(), nsp.detach()])
        return _losses_of(totals, counts), float(norm)

    return step_once
