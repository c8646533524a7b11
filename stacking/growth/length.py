"""Sequence length: embedding pooling that ends or changes, learned positions for longer sequences.

Sinusoidal and rotary positions are computed for any length, so there is nothing to grow.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.growth.contract import (
    TOLERANCE,
    Contract,
    GrowthOperator,
    Request,
    fixed_faults,
)

_TABLE = "embeddings.position_embeddings.weight"
_POOLING = ("embeddings.pooling.weight", "embeddings.pooling.bias")

PositionGrowth = Literal["tile", "interpolate", "fresh"]
_POSITION_SOURCES: dict[PositionGrowth, str] = {
    "tile": "Beltagy et al. 2020 (Longformer, arXiv 2004.05150), section 5: copies of the table",
    "interpolate": "Dosovitskiy et al. 2021 (ViT, arXiv 2010.11929), section 3.2; here linear",
    "fresh": "Devlin et al. 2019 (BERT), appendix A.2: positions past 128 are learned last",
}


@dataclass(frozen=True)
class ChangePooling(GrowthOperator):
    """Pooling ends, pools fewer tokens, or otherwise; all other parameters stay as they are.

    Gu et al. 2021 (CompoundGrow), embedding pooling; grow_bert resolution_layer.py. Mean and max
    have no parameters; the weights of concat belong to its size and end with it.
    """

    name: str = "change"

    def contract(self, config: BertConfig) -> Contract:
        """Not exact from two layers on: the second sees other rows.

        The first reads all tokens, pooled or not; a model of one layer gives [CLS] and the masked
        tokens the same rows.
        """
        symmetry, source = "nothing is duplicated", "Gu et al. 2021 (CompoundGrow)"
        if config.num_hidden_layers == 1:
            return Contract(frozenset({"post", "pre"}), dict(TOLERANCE), symmetry, source)
        return Contract(frozenset(), {}, symmetry, source)

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Pooling that begins or becomes coarser; concat, whose weights there are not."""
        faults = fixed_faults(source, target, {"pooling", "pooling_size"})
        before, after = (f"{c.pooling!r} of {c.pooling_size}" for c in (source, target))
        if (source.pooling, source.pooling_size) == (target.pooling, target.pooling_size):
            return faults
        if target.pooling == "concat":
            faults.append(
                f"pooling: got {after} after {before}; allowed: none, mean or max, because the "
                "weights of concat would be new; give 'concat' of this size in all earlier stages"
            )
        elif target.pooling_size > source.pooling_size:
            faults.append(
                f"pooling_size: got {after} after {before}; allowed: at most "
                f"{source.pooling_size}, because sequences only grow; give pooling "
                "in the earlier stages"
            )
        return faults

    def _map(self, request: Request) -> dict[str, Tensor]:
        """Copies of all but the weights of concat."""
        dropped = _POOLING if request.target.pooling != "concat" else ()
        kept = {name: t for name, t in request.tensors.items() if name not in dropped}
        return {name: tensor.detach().clone() for name, tensor in kept.items()}


@dataclass(frozen=True)
class GrowPositions(GrowthOperator):
    """S learned positions become S' >= S.

    `tile`: position j is old position j mod S. `interpolate`: the table is stretched, so that the
    first and last positions stay the ends. `fresh`: new positions as freshly initialised.

    Moments: new positions get no gradient from sequences that the small model takes, so for them
    the law says 0; like all copies, tiled positions get those of their origin instead, as they will
    be used like it. Interpolated ones have no law: both moments are stretched with the table, which
    keeps their size.
    """

    name: PositionGrowth = "tile"

    def contract(self, config: BertConfig) -> Contract:
        """`tile`, `fresh`: exact on sequences no longer than before, which read the old rows."""
        source = _POSITION_SOURCES[self.name]
        if self.name == "interpolate":
            return Contract(frozenset(), {}, "neighbours differ", source)
        symmetry = "they stand at different tokens" if self.name == "tile" else "rows are random"
        return Contract(frozenset({"post", "pre"}), dict(TOLERANCE), symmetry, source)

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Any longer table."""
        faults = fixed_faults(source, target, {"max_position_embeddings"})
        old, new = source.max_position_embeddings, target.max_position_embeddings
        if new < old:
            faults.append(
                f"max_position_embeddings: got {new} after {old}; allowed: at least {old}, because "
                "learned positions cannot shrink; give a max_seq_length that does not fall"
            )
        return faults

    def draws_fresh(self, source: BertConfig, target: BertConfig) -> bool:
        """Only `fresh`."""
        return self.name == "fresh" and source.position == "learned"

    def _map(self, request: Request) -> dict[str, Tensor]:
        """Copies, and the table [S,H] as [S',H]."""
        kind, fresh = request.kind, request.fresh
        grown = {name: tensor.detach().clone() for name, tensor in request.tensors.items()}
        if request.source.position != "learned":
            return grown
        table, new = grown[_TABLE], request.target.max_position_embeddings
        further = table.new_zeros(new - len(table), table.shape[1])
        if self.name == "interpolate":
            grown[_TABLE] = _stretched(table, new, only_whole=kind == "is_old")
            return grown
        if self.name == "tile" and kind != "is_old":
            further = table[torch.arange(len(table), new) % len(table)]
        elif self.name == "fresh" and kind == "weight" and fresh is not None:
            further = fresh[_TABLE][len(table) :].detach().to(table.dtype)
        grown[_TABLE] = torch.cat([table, further])
        return grown


POSITION_OPERATORS: dict[str, GrowPositions] = {
    name: GrowPositions(name) for name in get_args(PositionGrowth)
}
"""By the name that a recipe gives."""


def _stretched(table: Tensor, new: int, *, only_whole: bool) -> Tensor:
    """[S,H] -> [new,H]: row j is old row j (S - 1) / (new - 1), linear between two.

    `only_whole`: zeros in place of rows that lie between two, or repeat a row.
    """
    old = len(table)
    place = torch.arange(new) * (old - 1)
    step = max(new - 1, 1)
    below = place // step
    above = (below + 1).clamp(max=old - 1)
    part = ((place % step).double() / step)[:, None]
    mixed = table.double()[below] * (1 - part) + table.double()[above] * part
    if only_whole:
        is_whole = place % step == 0
        is_first = torch.cat([torch.tensor([True]), below[1:] != below[:-1]])
        mixed = mixed * (is_whole & is_first)[:, None]
    return mixed.to(table.dtype)
