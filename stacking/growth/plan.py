"""Which operators turn one stage's model into the next, whether that is legal, and the act."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.contract import GrowthOperator
from stacking.growth.depth import DEPTH_OPERATORS
from stacking.modeling import BertForPreTraining, init_weights


def grow_weights(
    weights: Mapping[str, Tensor],
    source: BertConfig,
    target: BertConfig,
    *,
    depth: str = "stack",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weights (fp32, CPU) of `source` turned into weights of `target`; the input is untouched.

    Deterministic in (weights, source, target, depth, seed), hence the same on every rank.
    Raises GrowthError where the sizes differ in more than depth or the operator does not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    model = BertForPreTraining(target)
    init_weights(model, generator)
    fresh = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    operator = _operator(depth)
    return operator.grow(weights, source, target, fresh=fresh, generator=generator)


def promised_tolerance(source: BertConfig, target: BertConfig, *, depth: str) -> float | None:
    """How far fp32 logits may move, relative to the largest; None: the function may change."""
    contract = _operator(depth).contract(target)
    if source.num_hidden_layers == target.num_hidden_layers:
        return 0.0  # nothing grows, every tensor is copied
    if target.layer_norm not in contract.preserves:
        return None
    return contract.tolerance[torch.float32]


def grow(model: BertForPreTraining, target: BertConfig, depth: str = "stack") -> BertForPreTraining:
    """A new model of size `target` grown from `model`, which stays as it is."""
    weights = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    grown = BertForPreTraining(target)
    grown.load_state_dict(grow_weights(weights, model.config, target, depth=depth))
    return grown


def _operator(depth: str) -> GrowthOperator:
    if depth not in DEPTH_OPERATORS:
        raise GrowthError(f"no depth operator {depth!r}; allowed: {', '.join(DEPTH_OPERATORS)}")
    return DEPTH_OPERATORS[depth]
