"""FFN width: F inner units become F'; hidden size, heads and depth stay.

Nothing normalises the inner units, so every split of a unit among its copies is exact, in post-LN
and in pre-LN, and the gradient map (stacking/growth/width.py) holds for unequal shares too.
"""

from dataclasses import dataclass

from stacking.config import BertConfig
from stacking.growth.contract import Contract, fixed_faults
from stacking.growth.width import (
    ALPHA,
    NOISE,
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
        old, new = source.intermediate_size, target.intermediate_size
        faults = _faults(source, target) + noise_faults(self.noise)
        if new >= old and new % old:
            faults.append(
                f"intermediate_size: {old} cannot become {new} by tiling; "
                f"give a multiple of {old}, or use 'split' or 'zero'"
            )
        return faults

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Equal shares."""
        units = cyclic_units(source.intermediate_size, target.intermediate_size)
        return WidthPlan({"ffn": units}, noise=self.noise)


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
        units = cyclic_units(source.intermediate_size, target.intermediate_size, self.alpha)
        return WidthPlan({"ffn": units})


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
        return WidthPlan(
            {"ffn": units_with_fresh(source.intermediate_size, target.intermediate_size)}
        )


@dataclass(frozen=True, kw_only=True)
class FfnAki(WidthOperator):
    """The further units of layer l are those of layer l + 1; not exact.

    Chen et al. 2022 (bert2BERT), advanced knowledge initialisation.
    """

    name: str = "aki"

    def contract(self, config: BertConfig) -> Contract:
        """Nothing is preserved."""
        return inexact(
            "copies come from different layers; the last layer's: asymmetric optimizer state only",
            "Chen et al. 2022 (bert2BERT), AKI",
        )

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Any larger size."""
        return _faults(source, target)

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Equal shares; further copies from the next layer."""
        units = cyclic_units(source.intermediate_size, target.intermediate_size)
        return WidthPlan({"ffn": units}, extra_from_next=True)


FFN_OPERATORS: dict[str, WidthOperator] = {
    operator.name: operator for operator in (FfnTile(), FfnSplit(), FfnZero(), FfnAki())
}
"""By the name that a recipe gives, with default settings."""


def _faults(source: BertConfig, target: BertConfig) -> list[str]:
    faults = fixed_faults(source, target, {"intermediate_size"})
    if target.intermediate_size < source.intermediate_size:
        faults.append(
            f"intermediate_size: {source.intermediate_size} cannot shrink to "
            f"{target.intermediate_size}"
        )
    return faults
