"""Which operators turn one stage's model into the next, whether that is legal, and the act."""

from collections.abc import Mapping

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.depth import DepthOperator, grow_depth, layer_sources
from stacking.modeling import BertForPreTraining, init_weights


def grow_weights(
    weights: Mapping[str, Tensor],
    source: BertConfig,
    target: BertConfig,
    *,
    depth: DepthOperator = "stack",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weights (fp32, CPU) of `source` turned into weights of `target`; the input is untouched.

    Deterministic in (weights, source, target, depth, seed), hence the same on every rank.
    Raises GrowthError where the sizes differ in more than depth or the operator does not fit.
    """
    _check_only_depth_differs(source, target)
    sources = layer_sources(depth, source.num_hidden_layers, target.num_hidden_layers)
    model = BertForPreTraining(target)
    init_weights(model, torch.Generator().manual_seed(seed))
    fresh = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    return grow_depth(weights, fresh, sources)


def grow(
    model: BertForPreTraining, target: BertConfig, depth: DepthOperator = "stack"
) -> BertForPreTraining:
    """A new model of size `target` grown from `model`, which stays as it is."""
    weights = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    grown = BertForPreTraining(target)
    grown.load_state_dict(grow_weights(weights, model.config, target, depth=depth))
    return grown


def _check_only_depth_differs(source: BertConfig, target: BertConfig) -> None:
    ours, theirs = source.model_dump(), target.model_dump()
    faults = [
        f"{key}: {ours[key]!r} cannot become {theirs[key]!r}"
        for key in ours
        if ours[key] != theirs[key] and key != "num_hidden_layers"
    ]
    if faults:
        raise GrowthError("only num_hidden_layers can grow; " + "; ".join(faults))
