"""Which moves, in which order, lead from one model to another: two configurations and the names of
operators in, moves out.

Order, fixed: decoder, pooling, positions, attention, hidden size with heads, inner width, depth.
Each move leaves a whole model, so each operator is the one that is tested alone. Depth is last: all
other moves happen at the old depth, where there are fewest layers, and each layer is given the form
(inner width, shared attention) of the layers that depth will make of it.
"""

from dataclasses import dataclass, replace

import torch

from stacking.config import BertConfig, Stage
from stacking.growth.attention import Unshare
from stacking.growth.contract import GrowthOperator, inner_sizes
from stacking.growth.decoder import Untie
from stacking.growth.depth import DEPTH_OPERATORS, DepthGrowth
from stacking.growth.length import POSITION_OPERATORS, ChangePooling
from stacking.growth.width_ffn import FFN_OPERATORS
from stacking.growth.width_hidden import HIDDEN_OPERATORS, HeadGrowth

INNER_FIELDS = ("intermediate_size", "layer_intermediate_sizes")
# Dimensions in their order, but for depth; a move changes all fields of its own together.
FIELDS: dict[str, tuple[str, ...]] = {
    "decoder": ("tie_word_embeddings",),
    "pooling": ("pooling", "pooling_size"),
    "positions": ("max_position_embeddings",),
    "attention": ("shared_attention_layers",),
    "hidden": ("hidden_size", "num_attention_heads"),
    "ffn": INNER_FIELDS,
}
GROWABLE = {"num_hidden_layers", *(name for names in FIELDS.values() for name in names)}
LEARNED_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", *INNER_FIELDS)
"""What a learned map (LiGO) grows in one; the rest is grown before it."""
_ALLOWED = {
    "depth": tuple(DEPTH_OPERATORS),
    "ffn": tuple(FFN_OPERATORS),
    "hidden": tuple(HIDDEN_OPERATORS),
    "heads": ("replicate", "zero"),
    "positions": tuple(POSITION_OPERATORS),
}


@dataclass(frozen=True)
class Operators:
    """The operator of each dimension, by its name in recipes (stacking/config_stage.py)."""

    depth: str = "stack"
    ffn: str = "tile"
    hidden: str = "duplicate"
    heads: str = "replicate"
    positions: str = "tile"

    @classmethod
    def of(cls, stage: Stage) -> "Operators":
        """What a stage asks for on entry."""
        return cls(stage.depth, stage.ffn, stage.hidden, stage.heads, stage.positions)

    def faults(self) -> list[str]:
        """Names that there are not."""
        return [
            f"{dimension}: got {getattr(self, dimension)!r}; allowed: {', '.join(names)}"
            for dimension, names in _ALLOWED.items()
            if getattr(self, dimension) not in names
        ]


@dataclass(frozen=True)
class Move:
    """One operator's part of a growth: `source` becomes `target`."""

    dimension: str
    operator: GrowthOperator
    source: BertConfig
    target: BertConfig

    @property
    def name(self) -> str:
        """Dimension and operator, as in "hidden duplicate"; heads where they are not copies."""
        heads = getattr(self.operator, "heads", "replicate")
        suffix = "" if heads == "replicate" else f" with heads {heads}"
        return f"{self.dimension} {self.operator.name}{suffix}"

    def tolerance(self, dtype: torch.dtype) -> float | None:
        """On the relative change of logits; None: the function may change."""
        contract = self.operator.contract(self.target)
        return contract.tolerance[dtype] if self.target.layer_norm in contract.preserves else None


def moves_between(source: BertConfig, target: BertConfig, operators: Operators) -> list[Move]:
    """The moves in their order; their legality is the operators' to check."""
    depth, old = DEPTH_OPERATORS[operators.depth], source.num_hidden_layers
    is_deeper = old != target.num_hidden_layers
    wide = at_old_depth(target, depth, old) if is_deeper else target
    # What does not grow is as in the target from the start; whether it may differ: plan.py.
    has_table = target.position == "learned"
    kept = [name for name in GROWABLE if has_table or name not in FIELDS["positions"]]
    here = target.model_copy(update={name: getattr(source, name) for name in kept})
    moves = []
    for dimension, fields in FIELDS.items():
        there = here.model_copy(update={name: getattr(wide, name) for name in fields})
        if dimension == "ffn":
            changes = inner_sizes(here) != inner_sizes(there)
        else:
            changes = any(getattr(here, name) != getattr(there, name) for name in fields)
        if changes:
            moves.append(Move(dimension, _operator(dimension, operators), here, there))
        here = there
    if is_deeper:
        moves.append(Move("depth", depth, here, target))
    return moves


def _operator(dimension: str, operators: Operators) -> GrowthOperator:
    """The operator of one dimension, depth apart; `operators` has no faults."""
    if dimension == "decoder":
        return Untie()
    if dimension == "pooling":
        return ChangePooling()
    if dimension == "positions":
        return POSITION_OPERATORS[operators.positions]
    if dimension == "attention":
        return Unshare()
    if dimension == "ffn":
        return FFN_OPERATORS[operators.ffn]
    heads: HeadGrowth = "zero" if operators.heads == "zero" else "replicate"
    return replace(HIDDEN_OPERATORS[operators.hidden], heads=heads)


def at_old_depth(target: BertConfig, depth: DepthGrowth, old: int) -> BertConfig:
    """`target` with `old` layers, each in the form of the first layer that `depth` makes of it.

    Whether the others agree is the depth operator's to check.
    """
    layers = depth.layers(old, target.num_hidden_layers)
    first = [layers.index(layer) for layer in range(old)]
    sizes = target.layer_intermediate_sizes and tuple(map(target.inner_size, first))
    shared = [at for at, layer in enumerate(first) if layer in target.shared_attention_layers]
    return target.model_copy(
        update={
            "num_hidden_layers": old,
            "layer_intermediate_sizes": sizes,
            "shared_attention_layers": tuple(shared),
        }
    )
