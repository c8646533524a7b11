"""Depth growth: which old layer fills each new layer; L layers' weights in, L' layers' out."""

import re
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from stacking.errors import GrowthError

DepthOperator = Literal["stack", "interleave", "copy_top", "random"]

_LAYER = re.compile(r"^encoder\.layers\.(\d+)\.(.+)$")


def layer_sources(operator: DepthOperator, old: int, new: int) -> list[int | None]:
    """For each of `new` layers the old layer that it copies; None: freshly initialised.

    Raises GrowthError where the operator cannot make `new` layers out of `old`.
    """
    if new < old:
        raise GrowthError(
            f"depth cannot shrink: from {old} to {new} layers was asked; give at least {old}"
        )
    if operator == "stack":
        # Gong et al. 2019, section 3, algorithm 1; any ratio as in Gu et al. 2021, transform_model.
        return [layer % old for layer in range(new)]
    if operator == "interleave":
        if new % old:
            raise GrowthError(
                f"interleave repeats each layer equally often: {old} layers cannot become {new}; "
                f"give a multiple of {old} or use depth 'stack'"
            )
        return [layer * old // new for layer in range(new)]
    if operator == "copy_top":
        # Yang et al. 2020 (MSLT): the new top layers copy the top block below them.
        if new > 2 * old:
            raise GrowthError(
                f"copy_top copies the top {new - old} layers, but there are only {old}; "
                f"grow to at most {2 * old} layers or use depth 'stack'"
            )
        return [layer if layer < old else layer - (new - old) for layer in range(new)]
    return [layer if layer < old else None for layer in range(new)]


def grow_depth(
    weights: Mapping[str, Tensor],
    fresh: Mapping[str, Tensor],
    sources: list[int | None],
) -> dict[str, Tensor]:
    """Fill a model of len(sources) layers: outside the encoder as it was, layers as `sources` say.

    `weights`: fp32 tensors of the old model; `fresh`: a freshly initialised target model, the
    source of layers without an origin and the names that must be filled. Tensors are copies.
    """
    grown = {}
    for name, initial in fresh.items():
        match = _LAYER.match(name)
        origin = sources[int(match[1])] if match else None
        if match and origin is None:
            grown[name] = initial.clone()
            continue
        source_name = f"encoder.layers.{origin}.{match[2]}" if match else name
        if source_name not in weights:
            raise GrowthError(f"the model to grow has no tensor {source_name!r} to fill {name!r}")
        grown[name] = weights[source_name].clone()
    return grown
