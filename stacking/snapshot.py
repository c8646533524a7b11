"""The state of training at full size, between engine, checkpoint and growth."""

from dataclasses import dataclass, field

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by their name in every implementation


@dataclass(frozen=True)
class Snapshot:
    """Everything that an optimizer step reads: fp32, on the CPU, independent of ranks and ZeRO."""

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # "exp_avg" -> name -> ...
    optimizer_steps: int = 0  # Adam's own count: since the moments were fresh
    loss_scale: float | None = None  # fp16 only
