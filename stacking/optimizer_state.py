"""fp32 masters and Adam's moments of one DeepSpeed engine, whole and by name, in and out.

`tests/unit/test_engine.py` names every private DeepSpeed attribute used here and fails when a
release moves one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stacking import distributed
from stacking.errors import CheckpointError
from stacking.parameter_groups import ParameterGroup
from stacking.snapshot import MOMENTS, Snapshot

# Names of the flat fp32 partitions in DeepSpeed's ZeRO optimizers: stages 1-2, 3, BF16_Optimizer.
_FLAT_PARTITIONS = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)


class OptimizerState:
    """What an engine's optimizer holds of the parameters that train. Collective throughout."""

    def __init__(self, engine: Any, groups: Sequence[ParameterGroup]) -> None:
        """`groups`: those that `engine`, DeepSpeed's, was given, in their order."""
        self._engine = engine
        self._groups = groups
        self._wrapper = engine.optimizer
        base = getattr(self._wrapper, "optimizer", self._wrapper)  # none around it: ZeRO-0 in fp32
        assert isinstance(base, torch.optim.Optimizer)
        self._base = base
        named = engine.module.named_parameters()  # the same order on all ranks
        self._trained = {name: p for name, p in named if p.requires_grad}

    def write(self, snapshot: Snapshot) -> None:
        """Make weights, moments and counts those of the main rank's `snapshot`."""
        # DeepSpeed makes the masters from the 16-bit copy: put the lost bits back.
        for name, parameter in self._trained.items() if self._flats() else ():
            _write_full(parameter, self._sent(parameter, snapshot.weights.get(name)))
        if any(group.optimizer_steps for group in self._groups):
            self._create_moments()
            self._write_moments(snapshot.moments)

    def read(self) -> Snapshot | None:
        """All of it on the main rank's CPU; None elsewhere, where one tensor at a time is whole."""
        counts = self._counts()
        self._link_moments()
        weights: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in (MOMENTS if counts else ())}
        for name, parameter in self._trained.items():
            _keep(weights, name, _full(parameter))
        for key, named in moments.items():
            for name in counts:
                _keep(named, name, self._moment(name, key))
        return Snapshot(weights, moments, counts) if distributed.is_main() else None

    def _sent(self, parameter: nn.Parameter, value: Tensor | None) -> Tensor:
        """The main rank's fp32 `value` for `parameter`, whole, on every rank's device."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return distributed.from_main(value, torch.empty(shape, device=self._engine.device))

    def _counts(self) -> dict[str, int]:
        """Adam's step count by parameter, of those that have one."""
        counts: dict[str, int] = {}
        for group, keys in zip(self._groups, self._keys(), strict=True):
            states = [self._base.state.get(tensor, {}) for tensor in keys]
            stepped = [state for state in states if "step" in state]
            if not all(set(MOMENTS) <= set(state) for state in stepped):
                raise CheckpointError("only Adam's moments can be saved; choose Adam in the JSON")
            # FusedAdam counts in the state of the group's last parameter alone.
            count = max((int(state["step"]) for state in stepped), default=0)
            counts.update(dict.fromkeys(group.names if count else (), count))
        return counts

    def _create_moments(self) -> None:
        """State of each group with a history, as Adam's first step would make it."""
        is_torch = isinstance(self._base, torch.optim.AdamW | torch.optim.Adam)
        for group, keys in zip(self._groups, self._keys(), strict=True):
            count = group.optimizer_steps
            for tensor in keys if count else ():
                self._base.state[tensor] = {
                    "step": torch.tensor(float(count), device=tensor.device) if is_torch else count,
                    **{key: torch.zeros_like(tensor, dtype=torch.float32) for key in MOMENTS},
                }
        self._link_moments()

    def _write_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        has_history = {n for group in self._groups if group.optimizer_steps for n in group.names}
        for key in MOMENTS:
            for name, parameter in self._trained.items():
                if name not in has_history:
                    continue
                value = self._sent(parameter, moments.get(key, {}).get(name))
                if self._flats():
                    _write_full(parameter, value, key)
                else:
                    self._base.state[parameter][key].copy_(value)

    def _moment(self, name: str, key: str) -> Tensor:
        parameter = self._trained[name]
        if self._flats():
            return _full(parameter, key)
        moment = self._base.state[parameter][key]
        assert isinstance(moment, Tensor)
        return moment

    def _link_moments(self) -> None:
        """Let each parameter find its part of the flat moments (ZeRO 1 and 2).

        DeepSpeed links them when the first parameter group has stepped, before the others have any
        moments, and never again.
        """
        if self._base.state and hasattr(self._wrapper, "_hp_optimizer_states_linked"):
            self._wrapper._hp_optimizer_states_linked = False
            self._wrapper._lazy_init_hp_params_optimizer_state()

    def _keys(self) -> list[list[Tensor]]:
        """By parameter group, the tensors under which Adam keeps its state.

        They are the group's parameters, or under ZeRO its flat partition, of which stage 3 makes
        one or more.
        """
        flats = self._flats()
        if not flats:
            return [[self._trained[name] for name in group.names] for group in self._groups]
        owners = getattr(self._wrapper, "sub_group_to_group_id", range(len(flats)))
        keys: list[list[Tensor]] = [[] for _ in self._groups]
        for index, flat in enumerate(flats):
            keys[owners[index]].append(flat)
        return keys

    def _flats(self) -> list[Tensor]:
        for name in _FLAT_PARTITIONS:
            if hasattr(self._wrapper, name):
                return list(getattr(self._wrapper, name))
        return []


def _full(parameter: nn.Parameter, key: str | None = None) -> Tensor:
    """The whole fp32 weight, or moment `key`, put together from all ranks' parts."""
    full: Tensor
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        full = parameter._z3_optimizer.get_full_hp_param(parameter, key)  # type: ignore[attr-defined]
    elif hasattr(parameter, "_hp_mapping"):
        full = parameter.get_full_hp_param(key)  # type: ignore[attr-defined]
    else:  # ZeRO-0 has no master apart from the parameter, and fp32 there (16 bits are refused).
        assert key is None
        full = parameter.detach()
    return full


def _write_full(parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
    """Write a whole fp32 weight, or moment `key`, of which this rank keeps its part."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        # DeepSpeed's own safe_set_full_* overrun the tensor on the last rank when its size is no
        # multiple of the ranks; the test of odd sizes in test_engine.py tells when that is mended.
        optimizer = parameter._z3_optimizer  # type: ignore[attr-defined]
        part: Tensor = optimizer.get_local_fp32_param(parameter, key)
        whole = torch.zeros(part.numel() * distributed.world_size(), device=value.device)
        whole[: value.numel()] = value.flatten()
        mine = whole.narrow(0, distributed.rank() * part.numel(), part.numel())
        optimizer.set_local_hp_param(mine, parameter, key)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]


def _keep(kept: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """On the main rank a CPU copy, that is no view of a flat buffer, which it would keep alive."""
    if distributed.is_main():
        kept[name] = tensor.detach().float().cpu().clone()
