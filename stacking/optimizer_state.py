"""fp32 masters and moments (Adam's, Muon's) of one DeepSpeed engine, by name, in and out.

`tests/unit/test_engine.py` names every private DeepSpeed attribute used here and fails when a
release moves one.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from stacking import distributed
from stacking.errors import CheckpointError
from stacking.parameter_groups import ParameterGroup
from stacking.snapshot import MOMENTS, MOMENTUM, Snapshot
from stacking.state_parts import Part, gather_parts

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
        """All of it on the main rank's CPU; None elsewhere, where no tensor is made whole."""
        counts = self._counts()
        self._link_moments()
        wanted = [
            (index, key, name)
            for index, group in enumerate(self._groups)
            for key, name in product(group.moments, group.names) if name in counts
        ]  # fmt: skip
        parts = [_part(parameter) for parameter in self._trained.values()]
        parts += [self._moment(index, key, name) for index, key, name in wanted]
        wholes = gather_parts(parts, self._engine.device)
        if wholes is None:
            return None
        weights = dict(zip(self._trained, wholes, strict=False))
        moments: dict[str, dict[str, Tensor]] = {}
        for (_, key, name), whole in zip(wanted, wholes[len(weights) :], strict=True):
            moments.setdefault(key, {})[name] = whole
        return Snapshot(weights, moments, counts)

    def _sent(self, parameter: nn.Parameter, value: Tensor | None) -> Tensor:
        """The main rank's fp32 `value` for `parameter`, whole, on every rank's device."""
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return distributed.from_main(value, torch.empty(shape, device=self._engine.device))

    def _counts(self) -> dict[str, int]:
        """The optimizer's step count by parameter, of those that have one."""
        found = [
            0 if group.muon_columns else self._count(index, keys)
            for index, (group, keys) in enumerate(zip(self._groups, self._keys(), strict=True))
        ]
        # Muon keeps no count. All groups step together, and some are Adam's.
        updates = max(
            (count - group.optimizer_steps for count, group in zip(found, self._groups, strict=True)
             if not group.muon_columns),
            default=0,
        )  # fmt: skip
        counts: dict[str, int] = {}
        for group, count in zip(self._groups, found, strict=True):
            steps = group.optimizer_steps + updates if group.muon_columns else count
            counts.update(dict.fromkeys(group.names if steps else (), steps))
        return counts

    def _count(self, index: int, keys: Sequence[Tensor]) -> int:
        """Adam's or LAMB's count of one group."""
        if _counts_in_groups(self._base):
            return int(self._base.param_groups[index].get("step", 0))
        states = [self._base.state.get(tensor, {}) for tensor in keys]
        stepped = [state for state in states if "step" in state]
        if not all(set(MOMENTS) <= set(state) for state in stepped):
            raise CheckpointError("only Adam's moments can be saved; choose Adam in the JSON")
        # FusedAdam counts in the state of the group's last parameter alone.
        return max((int(state["step"]) for state in stepped), default=0)

    def _create_moments(self) -> None:
        """State of each group with a history, as the optimizer's first step would make it."""
        for index, (group, keys) in enumerate(zip(self._groups, self._keys(), strict=True)):
            for tensor in keys if group.optimizer_steps else ():
                shape = self._moment_shape(index, tensor)
                self._base.state[tensor] = {
                    key: torch.zeros(shape, device=tensor.device) for key in group.moments
                }
            if group.optimizer_steps and not group.muon_columns:
                self._write_count(index, keys)
        self._link_moments()

    def _write_count(self, index: int, keys: Sequence[Tensor]) -> None:
        count = self._groups[index].optimizer_steps
        if _counts_in_groups(self._base):
            self._base.param_groups[index]["step"] = count
            return
        adam = getattr(self._base, "aux_optimizer", self._base)  # Muon's for what it leaves
        is_torch = isinstance(adam, torch.optim.AdamW | torch.optim.Adam)
        for tensor in keys:
            step = torch.tensor(float(count), device=tensor.device) if is_torch else count
            self._base.state[tensor]["step"] = step

    def _write_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        for index, group in enumerate(self._groups):
            for key, name in product(group.moments, group.names if group.optimizer_steps else ()):
                parameter = self._trained[name]
                value = self._sent(parameter, moments.get(key, {}).get(name))
                if not self._flats():
                    self._base.state[parameter][key].copy_(value)
                elif key == MOMENTUM and self._keeps_whole_momenta():
                    part = self._whole_momenta(index).get(name)
                    if part is not None:
                        part.copy_(value)
                else:
                    _write_full(parameter, value, key)

    def _moment(self, index: int, key: str, name: str) -> Part:
        """This rank's part of moment `key` of a parameter in group `index`."""
        parameter = self._trained[name]
        if not self._flats():
            return _replica(self._base.state[parameter][key])
        if key != MOMENTUM or not self._keeps_whole_momenta():
            return _part(parameter, key)
        holders = self._wrapper.param_to_partition_ids[index][self._wrapper.get_param_id(parameter)]
        if distributed.rank() != min(holders):
            return Part.nothing(parameter.shape)
        return Part.whole(self._whole_momenta(index)[name])

    def _keeps_whole_momenta(self) -> bool:
        """Whether Muon's momentum of a matrix is whole on every rank with a part: ZeRO 1 and 2."""
        return hasattr(self._wrapper, "params_in_partition")

    def _moment_shape(self, index: int, key: Tensor) -> torch.Size:
        """Of a group's moments on this rank; `key`: the tensor under which they are kept."""
        if not (self._groups[index].muon_columns and self._keeps_whole_momenta()):
            return key.shape
        here = self._wrapper.params_in_partition[index]
        return torch.Size([sum(parameter.numel() for parameter in here)])

    def _whole_momenta(self, index: int) -> dict[str, Tensor]:
        """By name, where this rank keeps them: one behind the other, in its partition's order."""
        here = self._wrapper.params_in_partition[index]
        buffer = self._base.state[self._keys()[index][0]].get(MOMENTUM)
        parts = () if buffer is None else buffer.split([parameter.numel() for parameter in here])
        by_parameter = {
            id(parameter): part.view_as(parameter)
            for parameter, part in zip(here, parts, strict=True)
        }
        names = self._groups[index].names
        return {
            name: by_parameter[id(self._trained[name])]
            for name in names if id(self._trained[name]) in by_parameter
        }  # fmt: skip

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


def _counts_in_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a group's step count is in the group: apex's."""
    return type(optimizer).__module__.partition(".")[0] == "apex"


def _part(parameter: nn.Parameter, key: str | None = None) -> Part:
    """This rank's part of the fp32 weight, or of moment `key`."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        shape, each = parameter.ds_shape, parameter.partition_numel()  # type: ignore[attr-defined]
        start = min(distributed.rank() * each, shape.numel())
        optimizer = parameter._z3_optimizer  # type: ignore[attr-defined]
        return Part(
            shape, start, min(each, shape.numel() - start),
            lambda: optimizer.get_local_fp32_param(parameter, key),
        )  # fmt: skip
    if not hasattr(parameter, "_hp_mapping"):
        # ZeRO-0 has no master apart from the parameter, and fp32 there (16 bits are refused).
        assert key is None
        return _replica(parameter)
    mapping: Any = parameter._hp_mapping
    if mapping is None:
        return Part.nothing(parameter.shape)
    place = mapping.lp_fragment_address
    return Part(
        parameter.shape, place.start, place.numel, lambda: mapping.get_hp_fragment(key)
    )  # fmt: skip


def _replica(tensor: Tensor) -> Part:
    """Of a tensor that each rank holds whole: the main rank's serves."""
    return Part.whole(tensor) if distributed.is_main() else Part.nothing(tensor.shape)


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
