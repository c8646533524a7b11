"""Which parameters Adam updates together: a model and its history in, parameter groups out.

Adam corrects the bias of its moments by a step count, and implementations share that count among
the parameters of a group: ZeRO makes one flat vector of them, DeepSpeed's FusedAdam takes the count
of the last one. New parameters with the count of old ones would step up to 6.5 times too far
(beta2 = 0.999), so every cohort, the parameters of one age, is in a group of its own.

Muon corrects nothing and needs no count. It updates the matrices of the layers; embeddings, heads,
biases and LayerNorms stay Adam's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from stacking.config import OptimizerConfig
from stacking.errors import ConfigError
from stacking.snapshot import MOMENTS, MOMENTUM, Snapshot

_MUON_RMS = 0.2  # of an update at rate 1: AdamW's, measured by Liu et al. 2025 (arXiv 2502.16982)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one weight decay, one step count and one learning rate.

    Attributes:
        muon_columns: of the matrices, if Muon updates them; 0: Adam does.
    """

    weight_decay: float
    optimizer_steps: int  # Adam's count when the engine is built
    is_new: bool  # whether they came with the current stage
    names: tuple[str, ...]  # in the model's order
    muon_columns: int = 0

    @property
    def moments(self) -> tuple[str, ...]:
        """What the optimizer keeps of each parameter, by its names in the optimizer's state."""
        return (MOMENTUM,) if self.muon_columns else MOMENTS

    @property
    def rate_factor(self) -> float:
        """Factor on the learning rate, so that one peak suits Muon and Adam.

        An orthogonal matrix of m rows and n columns has a root mean square of 1 / sqrt(max(m, n));
        0.2 sqrt(max(m, n)) makes it AdamW's (Liu et al. 2025, equation 4). DeepSpeed has put
        sqrt(max(1, m / n)) on it already: 0.2 sqrt(n) is left, whatever m.
        """
        return _MUON_RMS * math.sqrt(self.muon_columns) if self.muon_columns else 1.0

    def for_optimizer(self, model: nn.Module) -> dict[str, object]:
        """The group as torch's and DeepSpeed's optimizers take it; Muon's has use_muon besides."""
        named = dict(model.named_parameters())
        parameters = [named[name] for name in self.names]
        # The decay is multiplied by the group's rate, whose factor is for the update alone.
        group: dict[str, object] = {
            "params": parameters, "weight_decay": self.weight_decay / self.rate_factor
        }  # fmt: skip
        return {**group, "use_muon": True} if self.muon_columns else group


def parameter_groups(
    model: nn.Module, optimizer: OptimizerConfig, snapshot: Snapshot, *, with_muon: bool = False
) -> list[ParameterGroup]:
    """Groups of what trains in `model`, none empty; their order is the same on all ranks.

    Of `snapshot` only counts and ages are read. `model` may be on the meta device.

    Weight decay on matrices, none on biases and LayerNorms, unless `decay_all` (2019). Frozen
    parameters are in no group. On an empty group ZeRO 1 and 2 would crash. `with_muon`: the
    matrices of the layers are in groups of their own, one for each number of columns.
    """
    members: dict[tuple[float, int, bool, int], list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = optimizer.decay_all or parameter.ndim > 1
            decay = optimizer.weight_decay if decays else 0.0
            steps = snapshot.optimizer_steps.get(name, 0)
            is_muons = with_muon and parameter.ndim == 2 and name.startswith("encoder.layers.")
            columns = parameter.shape[1] if is_muons else 0
            age = (steps, name in snapshot.new_names)
            members.setdefault((decay, *age, columns), []).append(name)
    in_order = sorted(members, key=lambda key: (-key[0], -key[1], key[2:]))
    return [
        ParameterGroup(decay, steps, is_new, tuple(members[decay, steps, is_new, columns]), columns)
        for decay, steps, is_new, columns in in_order
    ]


def check_history(groups: Sequence[ParameterGroup], snapshot: Snapshot) -> None:
    """ConfigError if the history that `snapshot` has of these groups is another optimizer's."""
    of_muon = snapshot.moments.get(MOMENTUM, {}).keys()
    adams = {name for group in groups if not group.muon_columns for name in group.names}
    muons = {name for group in groups if group.muon_columns for name in group.names}
    faults = []
    for names, theirs, ours in ((adams & of_muon, "Muon's", "AdamW"),
                                (muons & (snapshot.optimizer_steps.keys() - of_muon), "Adam's",
                                 "Muon")):  # fmt: skip
        if names:
            faults.append(
                f"optimizer.type: got '{ours}', but the state to go on from has {theirs} history "
                f"of {len(names)} parameters ({min(names)} first); allowed: the optimizer of the "
                "run, or a new run"
            )
    if faults:
        raise ConfigError(faults)
