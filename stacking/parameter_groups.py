"""Which parameters Adam updates together: a model and its history in, parameter groups out.

Adam corrects the bias of its moments by a step count, and implementations share that count among
the parameters of a group: ZeRO makes one flat vector of them, DeepSpeed's FusedAdam takes the count
of the last one. New parameters with the count of old ones would step up to 6.5 times too far
(beta2 = 0.999), so every cohort, the parameters of one age, is in a group of its own.
"""

from dataclasses import dataclass

from torch import nn

from stacking.config import OptimizerConfig
from stacking.snapshot import Snapshot


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one weight decay, one step count and one learning rate."""

    weight_decay: float
    optimizer_steps: int  # Adam's count when the engine is built
    is_new: bool  # whether they came with the current stage
    names: tuple[str, ...]  # in the model's order

    def for_optimizer(self, model: nn.Module) -> dict[str, object]:
        """The group as torch's and DeepSpeed's optimizers take it."""
        named = dict(model.named_parameters())
        parameters = [named[name] for name in self.names]
        return {"params": parameters, "weight_decay": self.weight_decay}


def parameter_groups(
    model: nn.Module, optimizer: OptimizerConfig, snapshot: Snapshot
) -> list[ParameterGroup]:
    """Groups of what trains in `model`, none empty; their order is the same on all ranks.

    Of `snapshot` only counts and ages are read. `model` may be on the meta device.

    Weight decay on matrices, none on biases and LayerNorms, unless `decay_all` (2019). Frozen
    parameters are in no group. On an empty group ZeRO 1 and 2 would crash.
    """
    members: dict[tuple[float, int, bool], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = optimizer.decay_all or parameter.ndim > 1
            decay = optimizer.weight_decay if decays else 0.0
            steps = snapshot.optimizer_steps.get(name, 0)
            members.setdefault((decay, steps, name in snapshot.new_names), []).append(name)
    in_order = sorted(members, key=lambda key: (-key[0], -key[1], key[2]))
    return [ParameterGroup(*key, names=tuple(members[key])) for key in in_order]
