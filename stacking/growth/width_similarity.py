"""The lock detector: tensors and plan in, how alike the copies of duplicated units are out.

Copies that start equal and receive equal gradients stay equal, and the width is wasted.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stacking.growth.width import Units, WidthPlan, layer_of, short_name

_MEMBERS = {
    "ffn": ("feed_forward.inner.weight",),
    "heads": ("attention.qkv.weight", "attention.value.weight"),
    "hidden": ("attention.output.weight", "feed_forward.output.weight"),
    "embeddings": ("embeddings.word_embeddings.weight",),
    "mlm_head": ("mlm_head.dense.weight",),
    "pooler": ("nsp_head.pooler.weight",),
}


def duplicate_similarity(tensors: Mapping[str, Tensor], plan: WidthPlan) -> dict[str, float]:
    """Mean cosine between each further copy of a unit and its first copy, by what they read; of the
    tensor where it is largest, so that one locked layer is seen.

    1: the copies compute the same and the width is wasted; units without a copy do not count. Noise
    on what a unit itself reads lowers its cosine at once, although the copies still compute the
    same; embeddings (never with noise) and ffn then show whether training sets them apart.
    Keys, where they grow: ffn (rows of W1), heads (rows of QKV), hidden (rows of W_O and W2),
    embeddings (columns), mlm_head and pooler (rows of their Linear).
    """
    found: dict[str, float] = {}
    for name, tensor in tensors.items():
        for key, members in _MEMBERS.items():
            units = _units_of(key, name, plan)
            if short_name(name) in members and units is not None:
                vectors = _unit_vectors(key, tensor.detach().double(), units)
                cosines = _cosines_with_first(vectors, units)
                if cosines.numel():
                    found[key] = max(found.get(key, -1.0), cosines.mean().item())
    return found


def _units_of(key: str, name: str, plan: WidthPlan) -> Units | None:
    if layer_of(name) in plan.new_layers:
        return None
    if key == "ffn":
        return plan.inner.get(layer_of(name))
    return plan.heads if key == "heads" else plan.units.get("hidden")


def _unit_vectors(key: str, tensor: Tensor, units: Units) -> Tensor:
    """[units, numbers]: what belongs to each unit of the axis that writes."""
    if key == "embeddings":
        return tensor.t()
    if key == "heads":
        parts = tensor.shape[0] // tensor.shape[1]  # queries, keys and values, or values alone
        return tensor.view(parts, len(units.source), -1, tensor.shape[1]).transpose(0, 1).flatten(1)
    return tensor


def _cosines_with_first(vectors: Tensor, units: Units) -> Tensor:
    copy = units.copy
    first = torch.zeros(int(units.source.max()) + 1, dtype=torch.int64)
    is_first = (copy == 0) & (units.source >= 0)
    first[units.source[is_first]] = is_first.nonzero().flatten()
    further = ((copy > 0) & (units.source >= 0)).nonzero().flatten()
    return torch.cosine_similarity(vectors[further], vectors[first[units.source[further]]], dim=-1)
