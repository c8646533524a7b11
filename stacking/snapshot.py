"""The state of training at full size, between engine, checkpoint and growth.

It is the main rank's alone: no other rank ever holds a full copy.
"""

from collections.abc import Set
from dataclasses import dataclass, field, replace

from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, by their name in every implementation
MOMENTUM = "momentum_buffer"  # Muon's only one


@dataclass(frozen=True)
class LossScaler:
    """fp16's dynamic loss scale, and the counters that decide its next change."""

    scale: float
    steps: int = 0
    """Since the scaler began."""
    last_overflow: int = -1
    """The step of it, counted likewise."""
    hysteresis: int = 1
    """Overflows to go before the scale falls."""
    skipped_steps: int = 0
    """Updates that overflows cost, in the whole run."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that an optimizer step reads: fp32, on the CPU, independent of ranks and ZeRO.

    Its tensors are nobody's to change: an engine may keep those of what is frozen.
    """

    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """"exp_avg" and "exp_avg_sq", or "momentum_buffer" -> name -> tensor.

    Only parameters that have a history are here: Adam's two moments, or Muon's momentum."""
    optimizer_steps: dict[str, int] = field(default_factory=dict)
    """The optimizer's own count of these parameters, at least 1; all others start at 0."""
    new_names: frozenset[str] = frozenset()
    """Parameters that came with the current stage: their rate may have a factor of its own."""
    loss_scaler: LossScaler | None = None
    """fp16 only."""

    def without_tensors(self) -> "Snapshot":
        """What every rank must know: counts, ages and the loss scaler."""
        return replace(self, weights={}, moments={})

    def faults(self) -> list[str]:
        """What contradicts itself, one line each; empty for a sound snapshot."""
        strangers = sorted(self.new_names - self.weights.keys())
        faults = [f"{name}: new, but no weight" for name in strangers]
        for name, count in self.optimizer_steps.items():
            if name not in self.weights:
                faults.append(f"{name}: {count} optimizer steps, but no weight")
            elif count < 1:
                faults.append(f"{name}: got {count} optimizer steps; allowed: 1 or more, or none")
        of_muon = self.moments.get(MOMENTUM, {}).keys()
        of_adam = self.optimizer_steps.keys() - of_muon
        for key in sorted({*self.moments, *(MOMENTS if of_adam else ())}):
            faults += self._moment_faults(key, of_muon)
        return faults

    def _moment_faults(self, key: str, of_muon: Set[str]) -> list[str]:
        if key not in (*MOMENTS, MOMENTUM):
            allowed = f"{' and '.join(MOMENTS)}, or {MOMENTUM}"
            return [f"moments: got {key!r}; allowed: {allowed}"]
        named, counted = self.moments.get(key, {}), self.optimizer_steps.keys()
        both = sorted(named.keys() & of_muon) if key in MOMENTS else []
        faults = [f"{name}: has both {key} and {MOMENTUM}" for name in both]
        lonely = sorted(named.keys() ^ (counted - of_muon if key in MOMENTS else counted & of_muon))
        lonely = [name for name in lonely if name not in both]
        faults += [f"{name}: has either {key} or a step count, not both" for name in lonely]
        shapes = {name: self.weights[name].shape for name in named if name in self.weights}
        faults += [
            f"{name}: {key} has shape {list(named[name].shape)}, the weight {list(shape)}"
            for name, shape in shapes.items()
            if named[name].shape != shape
        ]
        return faults
