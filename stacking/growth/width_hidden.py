"""Hidden size and heads: H becomes H', N becomes N', the head size H / N stays.

BertConfig ties the head size to H / N, so heads and hidden size grow together, by the same ratio.
Heads alone would be cut into smaller ones, and a softmax of a sum is no sum of softmaxes; a larger
head would change the attention scale and the rotary frequencies: both are refused.

An integer ratio is exact: mean and variance of every LayerNorm stay, because each value appears
equally often. Any other ratio changes them, so those operators promise nothing. Sinusoidal
positions are no parameters: the wider table is not the old one in copies, so with them nothing is
promised either, whatever the ratio.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from stacking.config import BertConfig
from stacking.growth.contract import Contract, fixed_faults
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

HeadGrowth = Literal["replicate", "zero"]


@dataclass(frozen=True, kw_only=True)
class HiddenDuplicate(WidthOperator):
    """Every hidden unit k times, read with 1 / k; heads k times, or new ones with zero output.

    Shen et al. 2022 (Staged Training), width operator, and HyperCloning (Samragh et al. 2024). With
    noise 0 the copies stay equal for ever unless dropout or the optimizer's state sets them apart.
    """

    name: str = "duplicate"
    noise: float = NOISE
    heads: HeadGrowth = "replicate"

    def contract(self, config: BertConfig) -> Contract:
        """Exact unless positions are sinusoidal."""
        symmetry = "noise" if self.noise else "asymmetric optimizer state only"
        return _contract(config, symmetry, "Shen et al. 2022 (Staged Training), width operator")

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """An integer ratio."""
        return _integer_faults(self.name, source, target) + noise_faults(self.noise)

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Equal shares."""
        return _plan(source, target, heads=self.heads, noise=self.noise)


@dataclass(frozen=True, kw_only=True)
class HiddenUneven(WidthOperator):
    """Every hidden unit and head k times, read with unequal shares.

    Wang et al. 2024 (LEMON), figure 3. LayerNorm sees equal values, so it stays exact.
    """

    name: str = "uneven"
    alpha: float = ALPHA
    heads: HeadGrowth = "replicate"

    def contract(self, config: BertConfig) -> Contract:
        """Exact unless positions are sinusoidal."""
        return _contract(config, "uneven split", "Wang et al. 2024 (LEMON), figure 3")

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """An integer ratio."""
        return _integer_faults(self.name, source, target) + alpha_faults(self.alpha)

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Unequal shares."""
        return _plan(source, target, heads=self.heads, alpha=self.alpha)


@dataclass(frozen=True, kw_only=True)
class HiddenFpi(WidthOperator):
    """Unit j copies j mod H, for any ratio; not exact, as LayerNorm's statistics change.

    Chen et al. 2022 (bert2BERT), FPI, with a cyclic instead of a random map, so that
    weights and moments have the same one.

    Attributes:
        fan_in: "shares": a reader takes 1 / C from each of C copies. "rms": all its weights are
            multiplied with one number that keeps the root mean square of its output if the inputs
            are independent (SPARKLING, arXiv 2602.02472, both sides copied). The same for integer
            ratios.
    """

    name: str = "fpi"
    fan_in: Literal["shares", "rms"] = "shares"
    noise: float = NOISE
    heads: HeadGrowth = "replicate"

    def contract(self, config: BertConfig) -> Contract:
        """Nothing is preserved."""
        paper = {
            "shares": "Chen et al. 2022 (bert2BERT), FPI",
            "rms": "SPARKLING (arXiv 2602.02472), RMS-preserving scaling",
        }[self.fan_in]
        return inexact("noise" if self.noise else "asymmetric optimizer state only", paper)

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Any ratio at one head size."""
        return _faults(source, target) + noise_faults(self.noise)

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Equal shares of each unit's copies, or one factor for all."""
        factor = None
        if self.fan_in == "rms":
            factor = rms_fan_in(source.hidden_size, target.hidden_size)
        return _plan(source, target, heads=self.heads, noise=self.noise, factor=factor)


@dataclass(frozen=True, kw_only=True)
class HiddenAki(WidthOperator):
    """The further units and heads of layer l are those of layer l + 1; any ratio; not exact.

    Chen et al. 2022 (bert2BERT), AKI. Embeddings, LayerNorms and heads of the model as in
    'fpi'. The noise is this project's: embeddings, the model's heads and the last layer, which has
    no next one, repeat their own units.
    """

    name: str = "aki"
    noise: float = NOISE
    heads: HeadGrowth = "replicate"

    def contract(self, config: BertConfig) -> Contract:
        """Nothing is preserved."""
        return inexact(
            "copies come from different layers; the last layer's, embeddings and heads: "
            + ("noise" if self.noise else "asymmetric optimizer state only"),
            "Chen et al. 2022 (bert2BERT), AKI",
        )

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Any ratio at one head size."""
        return _faults(source, target) + noise_faults(self.noise)

    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Equal shares; further copies from the next layer."""
        return _plan(source, target, heads=self.heads, extra_from_next=True, noise=self.noise)


HiddenOperator = HiddenDuplicate | HiddenUneven | HiddenFpi | HiddenAki
HIDDEN_OPERATORS: dict[str, HiddenOperator] = {
    "duplicate": HiddenDuplicate(),
    "uneven": HiddenUneven(),
    "fpi": HiddenFpi(),
    "aki": HiddenAki(),
}
"""By the name that a recipe gives, with default settings."""


def rms_fan_in(old: int, new: int) -> float:
    """SPARKLING's factor on a reader's weights when input and output units are copied.

    With a share c = new / old - 1 <= 1 of the units copied, a sum of independent terms has 1 - c
    single and c doubled ones: (1 + 3 c) times the variance. Beyond that 1 / (1 + c), the exact one.
    """
    extra = new / old - 1
    return 1 / math.sqrt(1 + 3 * extra) if extra <= 1 else 1 / (1 + extra)


def _contract(config: BertConfig, symmetry: str, paper: str) -> Contract:
    return (inexact if config.position == "sinusoidal" else exact)(symmetry, paper)


def _plan(
    source: BertConfig,
    target: BertConfig,
    *,
    alpha: float = 0.5,
    heads: HeadGrowth = "replicate",
    noise: float = 0.0,
    extra_from_next: bool = False,
    factor: float | None = None,
) -> WidthPlan:
    """Hidden units, QKV rows and context columns; `factor` replaces the shares of copies."""
    hidden = cyclic_units(source.hidden_size, target.hidden_size, alpha)
    if heads == "zero":
        per_head = units_with_fresh(source.num_attention_heads, target.num_attention_heads)
    else:
        per_head = cyclic_units(source.num_attention_heads, target.num_attention_heads, alpha)
        if factor is not None:
            per_head = Units(per_head.source, torch.full_like(per_head.share, factor))
    if factor is not None:
        hidden = Units(hidden.source, torch.full_like(hidden.share, factor))
    head_size = source.hidden_size // source.num_attention_heads
    return WidthPlan(
        {
            "hidden": hidden,
            # Concat pooling reads the hidden units of its neighbours one after the other.
            "pooled": hidden.features(1, parts=source.pooling_size),
            "qkv": per_head.features(head_size, parts=3),
            "context": per_head.features(head_size),
        },
        embedding_factor=(
            math.sqrt(source.hidden_size / target.hidden_size) if source.embedding_scale else 1.0
        ),
        tied=source.tie_word_embeddings,
        extra_from_next=extra_from_next,
        noise=noise,
        heads=per_head,
    )


def _integer_faults(name: str, source: BertConfig, target: BertConfig) -> list[str]:
    old, new = source.hidden_size, target.hidden_size
    faults = _faults(source, target)
    if new > old and new % old:
        faults.append(
            f"hidden_size: got {new} after {old} with hidden {name!r}; allowed: a multiple of "
            f"{old}, because LayerNorm's statistics would change; or give hidden 'fpi' or 'aki', "
            "which are not exact"
        )
    return faults


def _faults(source: BertConfig, target: BertConfig) -> list[str]:
    """Shrinking, a changed head size, other fields that differ."""
    faults = fixed_faults(source, target, {"hidden_size", "num_attention_heads"})
    old, new = source.hidden_size, target.hidden_size
    if new < old:
        faults.append(
            f"hidden_size: got {new} after {old}; allowed: at least {old}, because a model cannot "
            "shrink"
        )
    before, after = source.num_attention_heads, target.num_attention_heads
    if old * after != new * before:
        head_size = old // before
        fitting = f" or {new // head_size} heads for {new}" if new % head_size == 0 else ""
        faults.append(
            f"num_attention_heads: got {after} after {before} with hidden_size {new} after {old}, "
            f"which changes the head size from {head_size} to {new // after}; allowed: heads of "
            f"{head_size} as before; give {after * head_size} hidden units for {after} heads"
            f"{fitting}, or other sizes before"
        )
    return faults
