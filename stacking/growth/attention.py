"""Attention sharing ends: layers that reused the probabilities of the layer below get their own.

Gu et al. 2021 (CompoundGrow); grow_bert light_attention_layer.py. The new queries and keys are
those of the layer whose probabilities were used. The function changes all the same: they now read
the layer's own input instead of the input of that layer below.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.growth.contract import (
    Contract,
    GrowthOperator,
    Request,
    fixed_faults,
    parameter_shapes,
)

_QKV = re.compile(r"^encoder\.layers\.(\d+)\.attention\.qkv\.(weight|bias)$")


@dataclass(frozen=True)
class Unshare(GrowthOperator):
    """Some or all layers that share attention get queries and keys; values stay.

    Moments: no law, as the old model had no such gradient; they come along with the copies.
    """

    name: str = "unshare"

    def contract(self, config: BertConfig) -> Contract:
        """Never exact; see the module."""
        return Contract(
            frozenset(), {}, "positions differ", "Gu et al. 2021 (CompoundGrow), attention sharing"
        )

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Layers that would begin to share."""
        faults = fixed_faults(source, target, {"shared_attention_layers"})
        before, after = source.shared_attention_layers, target.shared_attention_layers
        if new := sorted(set(after) - set(before)):
            faults.append(
                f"shared_attention_layers: got {list(after)} after {list(before)}; allowed: layers "
                f"out of {list(before)}, because the queries and keys of {new} would be lost; "
                "share them in the earlier stages"
            )
        return faults

    def _map(self, request: Request) -> dict[str, Tensor]:
        """Copies, and [Q, K, V] where there was V."""
        tensors, source = request.tensors, request.source
        grown = {}
        for name in parameter_shapes(request.target):
            match = _QKV.match(name)
            if match is None or name in tensors:
                grown[name] = tensors[name].detach().clone()
                continue
            layer, leaf = int(match[1]), match[2]
            used = _owner(layer, source.shared_attention_layers)
            # [3H, ...]: rows of Q, K and V in thirds.
            whole = tensors[f"encoder.layers.{used}.attention.qkv.{leaf}"].detach()
            queries_and_keys = whole[: 2 * len(whole) // 3]
            if request.kind == "is_old":
                queries_and_keys = torch.zeros_like(queries_and_keys)
            value = tensors[f"encoder.layers.{layer}.attention.value.{leaf}"].detach()
            grown[name] = torch.cat([queries_and_keys, value])
        return grown


def _owner(layer: int, shared: Collection[int]) -> int:
    """The layer at or below `layer` that has queries and keys: whose probabilities it uses."""
    while layer in shared:
        layer -= 1
    return layer
