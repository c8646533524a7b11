"""Growing one model into another: two configurations and names of operators in, a plan out.

The plan says what it is, whether it keeps the function, and does it; the order of its moves:
stacking/growth/moves.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.contract import (
    Kind,
    fixed_faults,
    parameter_shapes,
    require_tensors,
)
from stacking.growth.depth import DEPTH_OPERATORS, LAYER_FIELDS, DepthGrowth
from stacking.growth.moves import (
    GROWABLE,
    INNER_FIELDS,
    LEARNED_FIELDS,
    Move,
    Operators,
    at_old_depth,
    moves_between,
)
from stacking.growth.width import WidthOperator, WidthPlan
from stacking.modeling import BertForPreTraining, init_weights

__all__ = [
    "GrowthPlan",
    "Move",
    "Operators",
    "before_learning",
    "grow",
    "grow_weights",
    "growth_faults",
    "plan_growth",
]


@dataclass(frozen=True)
class GrowthPlan:
    """A legal growth: build it with `plan_growth`."""

    source: BertConfig
    target: BertConfig
    moves: tuple[Move, ...]

    @property
    def name(self) -> str:
        """As in "hidden duplicate + ffn tile + depth stack"; "nothing" when nothing grows."""
        return " + ".join(move.name for move in self.moves) or "nothing"

    def tolerance(self, dtype: torch.dtype = torch.float32) -> float | None:
        """Bound on max |logit difference| / max |logit| in eval mode, on inputs `source` takes.

        The sum over the moves; 0.0 when nothing grows, None when the function may change.
        """
        bounds = [move.tolerance(dtype) for move in self.moves]
        known = [bound for bound in bounds if bound is not None]
        return sum(known) if len(known) == len(bounds) else None

    def grow(
        self, tensors: Mapping[str, Tensor], *, kind: Kind = "weight", seed: int = 0
    ) -> dict[str, Tensor]:
        """Tensors of `source` turned into tensors of `target`; the input is untouched.

        Deterministic in the arguments, hence the same on every rank. Raises GrowthError where
        `tensors` are not those of `source`.
        """
        require_tensors(tensors, self.source, "the model to grow")
        generator = torch.Generator().manual_seed(seed)
        grown = dict(tensors)
        for move in self.moves:
            operator, sizes = move.operator, (move.source, move.target)
            needs_fresh = kind == "weight" and operator.draws_fresh(*sizes)
            fresh = _fresh_weights(move.target, generator) if needs_fresh else None
            grown = operator.grow(grown, *sizes, kind=kind, fresh=fresh, generator=generator)
        if not self.moves:
            grown = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return {name: grown[name] for name in parameter_shapes(self.target)}

    def width_plans(self) -> tuple[WidthPlan, ...]:
        """For `duplicate_similarity` on the grown model: one plan for each move in width."""
        plans = [
            move.operator.plan(move.source, move.target)
            for move in self.moves
            if isinstance(move.operator, WidthOperator)
        ]
        last = self.moves[-1].operator if self.moves else None
        if not isinstance(last, DepthGrowth):
            return tuple(plans)
        layers = last.layers(self.source.num_hidden_layers, self.target.num_hidden_layers)
        return tuple(_deepened(plan, layers) for plan in plans)


def plan_growth(
    source: BertConfig, target: BertConfig, operators: Operators | None = None
) -> GrowthPlan:
    """The moves from `source` to `target`. GrowthError lists every fault."""
    operators = operators or Operators()
    if faults := growth_faults(source, target, operators):
        raise GrowthError("this growth is impossible: " + "; ".join(faults))
    return GrowthPlan(source, target, tuple(moves_between(source, target, operators)))


def growth_faults(
    source: BertConfig, target: BertConfig, operators: Operators | None = None
) -> list[str]:
    """Why `source` cannot grow into `target`; each line starts with the field that is wrong."""
    operators = operators or Operators()
    if faults := operators.faults():
        return faults
    faults = fixed_faults(source, target, GROWABLE, "no operator changes it")
    old, new = source.num_hidden_layers, target.num_hidden_layers
    if map_faults := DEPTH_OPERATORS[operators.depth].map_faults(old, new):
        # What becomes of single layers is unknown; the other dimensions are checked all the same.
        kept = {name: getattr(source, name) for name in LAYER_FIELDS}
        if not target.layer_intermediate_sizes:
            kept |= {name: getattr(target, name) for name in INNER_FIELDS}
        target = target.model_copy(update={"num_hidden_layers": old, **kept})
        faults += map_faults
    for move in moves_between(source, target, operators):
        faults += move.operator.check(move.source, move.target)
    return list(dict.fromkeys(faults))


def before_learning(source: BertConfig, target: BertConfig) -> BertConfig:
    """`target` without what a learned map then grows: what operators grow `source` into first."""
    kept = {name: getattr(source, name) for name in LEARNED_FIELDS}
    shared = source.shared_attention_layers
    if target.num_hidden_layers >= source.num_hidden_layers:  # else there is no such growth
        stack = DEPTH_OPERATORS["stack"]  # as the map starts
        shared = at_old_depth(target, stack, source.num_hidden_layers).shared_attention_layers
    return target.model_copy(update={**kept, "shared_attention_layers": shared})


def grow_weights(
    weights: Mapping[str, Tensor],
    source: BertConfig,
    target: BertConfig,
    *,
    operators: Operators | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weights of `source` turned into weights of `target`: plan and act in one."""
    return plan_growth(source, target, operators).grow(weights, seed=seed)


def grow(
    model: BertForPreTraining,
    target: BertConfig,
    *,
    depth: str = "stack",
    ffn: str = "tile",
    heads: str = "replicate",
    hidden: str = "duplicate",
    positions: str = "tile",
    seed: int = 0,
) -> BertForPreTraining:
    """A new model of size `target` grown from `model`, which stays as it is."""
    operators = Operators(depth, ffn, hidden, heads, positions)
    weights = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    grown = BertForPreTraining(target)
    weights = grow_weights(weights, model.config, target, operators=operators, seed=seed)
    grown.load_state_dict(weights)
    return grown


def _fresh_weights(config: BertConfig, generator: torch.Generator) -> dict[str, Tensor]:
    model = BertForPreTraining(config)
    init_weights(model, generator)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _deepened(plan: WidthPlan, layers: list[int | None]) -> WidthPlan:
    """The same plan, its layers where depth has put them."""
    origins = {new: old for new, old in enumerate(layers) if old is not None}
    inner = {new: plan.inner[old] for new, old in origins.items() if old in plan.inner}
    fresh = frozenset(range(len(layers))) - set(origins)
    return replace(plan, inner=inner, new_layers=fresh)
