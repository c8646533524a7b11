"""FFN width: F inner units become F', in each layer its own number; all else stays.

Nothing normalises the inner units, so every split of a unit among its copies is exact, in post-LN
and in pre-LN, and the gradient map (stacking/growth/width.py) holds for unequal shares too.
"""

from collections.abc import Callable
from dataclasses import dataclass

from stacking.config import BertConfig
from stacking.growth.contract import Contract, fixed_faults, inner_sizes
from stacking.growth.width import (
    ALPHA,
    NOISE,
    Units,
    WidthOperator,
    WidthPlan,
    alpha_faults,
    cyclic_units,
    exact,
    inexact,
    noise_faults,
    units_with_fresh,
)


@dataclass(frozen=True, kw_only=True)
class FfnTile(WidthOperator):
    """W1 and b1 k times, W2 k times and divided by k: FFN parameter sharing ends.

    Gu et al. 2021 (CompoundGrow), code grow_bert/progressive/masked_lm.py, transform_model; its
    inner units are repeated block after block. The noise is this project's: without it the copies
    receive equal gradients for ever.
    """

    name: str = "tile"
    noise: float = NOISE

    def contract(self, config: BertConfig) -> Contract:
        """Exact, with or without noise."""
        return exact(
            "noise" if self.noise else "asymmetric optimizer state only",
            "Gu et al. 2021 (CompoundGrow), FFN parameter sharing; grow_bert masked_lm.py",
        )

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """A whole number of copies."""
        return (
            _faults(source, target)
            + noise_faults(self.noise)
            + [
                f"ffn: got 'tile' from {old} to {new} inner units in {layers}; allowed: a multiple "
                f"of {old}; or give ffn 'split' or 'zero'"
                for (old, new), layers in _changes(source, target).items()
                if new >= old and new % old
            ]
        )

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Equal shares."""
        return WidthPlan(inner=_inner(source, target, cyclic_units), noise=self.noise)


@dataclass(frozen=True, kw_only=True)
class FfnSplit(WidthOperator):
    """Units are duplicated and their output weights split alpha to 1 - alpha; any F' >= F.

    Wang et al. 2024 (LEMON), figure 3 a.
    """

    name: str = "split"
    alpha: float = ALPHA

    def contract(self, config: BertConfig) -> Contract:
        """Exact for every size."""
        return exact("uneven split", "Wang et al. 2024 (LEMON), figure 3 a")

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Any larger size."""
        return _faults(source, target) + alpha_faults(self.alpha)

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Unequal shares."""
        return WidthPlan(
            inner=_inner(source, target, lambda old, new: cyclic_units(old, new, self.alpha))
        )


@dataclass(frozen=True, kw_only=True)
class FfnZero(WidthOperator):
    """New units have random input weights and zero output weights; any F' >= F.

    Gesmundo & Maile 2023, MLP expansion. At first only the new columns of W2 receive
    a gradient; those of W1 follow.
    """

    name: str = "zero"

    def contract(self, config: BertConfig) -> Contract:
        """Exact for every size."""
        return exact("random side", "Gesmundo & Maile 2023, MLP expansion")

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Any larger size."""
        return _faults(source, target)

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Old units, then new ones without origin."""
        return WidthPlan(inner=_inner(source, target, units_with_fresh))


@dataclass(frozen=True, kw_only=True)
class FfnAki(WidthOperator):
    """The further units of layer l are those of layer l + 1; not exact.

    Chen et al. 2022 (bert2BERT), advanced knowledge initialisation. The noise is this project's:
    the last layer, which has no next one, repeats its own units.
    """

    name: str = "aki"
    noise: float = NOISE

    def contract(self, config: BertConfig) -> Contract:
        """Nothing is preserved."""
        return inexact(
            "copies come from different layers; the last layer's own: "
            + ("noise" if self.noise else "asymmetric optimizer state only"),
            "Chen et al. 2022 (bert2BERT), AKI",
        )

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Any larger size."""
        return _faults(source, target) + noise_faults(self.noise)

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Equal shares; further copies from the next layer."""
        units = _inner(source, target, cyclic_units)
        return WidthPlan(inner=units, extra_from_next=True, noise=self.noise)


FFN_OPERATORS: dict[str, WidthOperator] = {
    operator.name: operator for operator in (FfnTile(), FfnSplit(), FfnZero(), FfnAki())
}
"""By the name that a recipe gives, with default settings."""


def _inner(
    source: BertConfig, target: BertConfig, units: Callable[[int, int], Units]
) -> dict[int, Units]:
    """`units(old, new)` of each layer that changes; the others stay untouched."""
    pairs = enumerate(zip(inner_sizes(source), inner_sizes(target), strict=True))
    return {layer: units(old, new) for layer, (old, new) in pairs if old != new}


def _changes(source: BertConfig, target: BertConfig) -> dict[tuple[int, int], str]:
    """(old, new) inner width -> the layers that change so, in words."""
    if source.num_hidden_layers != target.num_hidden_layers:
        return {}  # said already
    layers: dict[tuple[int, int], list[str]] = {}
    for layer, pair in enumerate(zip(inner_sizes(source), inner_sizes(target), strict=True)):
        if pair[0] != pair[1]:
            layers.setdefault(pair, []).append(str(layer))
    return {
        pair: f"layer{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
        for pair, numbers in layers.items()
    }


def _faults(source: BertConfig, target: BertConfig) -> list[str]:
    field = "layer_intermediate_sizes" if target.layer_intermediate_sizes else "intermediate_size"
    return fixed_faults(source, target, {"intermediate_size", "layer_intermediate_sizes"}) + [
        f"{field}: got {new} after {old} in {layers}; allowed: at least {old}, because a model "
        "cannot shrink"
        for (old, new), layers in _changes(source, target).items()
        if new < old
    ]
