"""Norms of a step's gradients, apart for parameters that a stage began with and for new ones.

They are read off what DeepSpeed holds between the last backward pass and its step, before it clips.
`tests/unit/test_engine.py` names every private DeepSpeed attribute used here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from stacking import distributed
from stacking.parameter_groups import ParameterGroup

# Where DeepSpeed's optimizers keep reduced gradients: ZeRO 1 to 3, each rank its part, by parameter
# group or ZeRO 3's parts of one; BF16_Optimizer, all of them on every rank.
_PARTED, _WHOLE = "averaged_gradients", "fp32_groups_gradients"
_OFFLOADING = ("cpu_offload", "offload_optimizer")  # names of a flag at ZeRO 1 and 2, and 3


class CohortNorms:
    """Measures one engine's gradients.

    Attributes:
        is_known: whether it can, the same on all ranks. Not where a stage has parameters of one age
            only; not with Muon, whose update ZeRO 1 and 2 have put in the gradient's place by then;
            and not with an optimizer on the host, to which DeepSpeed still copies.
    """

    def __init__(self, engine: Any, groups: Sequence[ParameterGroup]) -> None:
        """`groups`: those that `engine`, DeepSpeed's, was given, in their order."""
        self._engine = engine
        self._groups = groups
        self._wrapper = engine.optimizer
        offloads = any(getattr(self._wrapper, name, False) for name in _OFFLOADING)
        with_muon = any(group.muon_columns for group in groups)
        ages = {group.is_new for group in groups}
        self.is_known = len(ages) == 2 and not with_muon and not offloads

    @torch.no_grad()
    def measure(self, loss_scale: float) -> Tensor:
        """[2] norms of the old and of the new parameters' gradients, on the device. Collective.

        Reads what this rank keeps of the gradients once, and waits for nothing. fp16 gradients are
        divided by `loss_scale`.
        """
        squares = torch.zeros(2, device=self._engine.device)
        for index, gradients in self._gradients():
            norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
            if norms:
                squares[int(self._groups[index].is_new)] += torch.stack(norms).square().sum()
        if hasattr(self._wrapper, _PARTED):
            squares = distributed.sum_over_ranks(squares)
        return squares.sqrt() / loss_scale

    def _gradients(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Reduced gradients that this rank keeps, by the number of their parameter group."""
        if hasattr(self._wrapper, _PARTED):
            owners = getattr(self._wrapper, "sub_group_to_group_id", None)  # ZeRO 3
            for index, gradients in getattr(self._wrapper, _PARTED).items():
                yield index if owners is None else owners[index], gradients
        elif hasattr(self._wrapper, _WHOLE):
            yield from enumerate(getattr(self._wrapper, _WHOLE))
        else:
            named = dict(self._engine.module.named_parameters())
            for index, group in enumerate(self._groups):
                found = (named[name].grad for name in group.names)
                yield index, [gradient for gradient in found if gradient is not None]
