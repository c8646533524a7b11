"""Width growth: which old unit each unit of a wider axis copies; tensors in, wider tensors out.

Dimensions: H hidden, N heads, D = H / N, F inner, V vocabulary; a prime marks the grown model.

Each axis of a parameter either *writes* units (rows of a matrix, biases, LayerNorm affine,
embedding columns) or *reads* them (columns of a matrix). Let unit j of the grown axis copy old unit
g(j) and let s_j be its share, with sum 1 over the copies of a unit. Then (Net2Net, Chen et al.
2015, Net2WiderNet; FPI of bert2BERT, Chen et al. 2022)

    W'[i, j] = W[g(i), g(j)] * s_j      written side: factor 1, read side: the share

leaves all values as they were, each in as many copies as there are. Gradient: copy i is read with
share s_i, so the gradient that arrives at it is s_i times the one at unit g(i), whereas the value
at input j is the one at g(j). Hence

    dL/dW'[i, j] = s_i * dL/dW[g(i), g(j)]      written side: the share, read side: factor 1

and so exp_avg maps; exp_avg_sq maps with the squares. The tied word embedding is written once (the
input) and read once (the decoder), so it has a factor of its own: e = sqrt(H / H') where embeddings
are multiplied by sqrt(hidden_size), else 1. The affine of the MLM head's LayerNorm takes the rest,
s_j / e (Shen et al. 2022, Staged Training, halve it as well). Their gradients: s_j / e and e. An
untied decoder is an ordinary reader, and the LayerNorm before it an ordinary writer.

Behind a LayerNorm the gradient map needs equal shares: LayerNorm's backward subtracts a mean over
H', which gives each of k copies 1 / k of the old mean whatever its share is. With unequal shares,
or with noise, only the sum over the copies of a hidden unit equals the old gradient.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.contract import (
    TOLERANCE,
    Contract,
    GrowthOperator,
    Kind,
    Request,
)

FRESH = -1
"""In `Units.source`: no origin, freshly initialised and at first read by nobody."""

NOISE = 0.5
"""Default standard deviation of noise over the root mean square of the weights that get it.

The noise cancels exactly, so its size costs nothing at first. With TF Model Garden's ratio of 0.1
copies come apart slowly: the cosine of W1's rows after 50 AdamW steps at 1e-2 was 0.991 with 0.1,
0.93 with 0.5, 0.89 with 1, and 1 without noise (tests/unit/test_growth_width_symmetry.py).
"""

ALPHA = 2 / 3
"""Default share of the first of two copies: the 1:2 split that SPARKLING (arXiv 2602.02472) tests.
"""

Group = Literal["hidden", "pooled", "qkv", "context", "ffn"]
Side = Literal["writes", "reads", "tied_embedding", "tied_norm"]


@dataclass(frozen=True)
class Role:
    """What one axis of a parameter does with the units of one group."""

    group: Group
    side: Side


@dataclass(frozen=True)
class Units:
    """Where each unit of a wider axis comes from.

    Attributes:
        source: [new] int64, the old unit that it copies, or FRESH.
        share: [new] fp64, the part of its origin that readers take from it; 0 if fresh.
    """

    source: Tensor
    share: Tensor

    @property
    def copy(self) -> Tensor:
        """[new] int64: 0 for the first unit with this source, 1 for the second, ..."""
        seen: dict[int, int] = {}
        order = []
        for unit in self.source.tolist():
            order.append(seen.get(unit, 0))
            seen[unit] = order[-1] + 1
        return torch.tensor(order)

    @property
    def copies(self) -> Tensor:
        """[new] int64: how many units share this one's source."""
        known = self.source.clamp(min=0)
        return torch.bincount(known[self.source >= 0], minlength=int(known.max()) + 1)[known]

    def features(self, size: int, parts: int = 1) -> "Units":
        """The same for the `size` numbers of each unit, `parts` blocks one after the other."""
        old = int(self.source.max()) + 1
        inner = torch.arange(size)
        source = (self.source[:, None] * size + inner).where(self.source[:, None] >= 0, FRESH)
        blocks = [
            (source + part * old * size).where(source >= 0, FRESH).flatten()
            for part in range(parts)
        ]
        return Units(torch.cat(blocks), self.share.repeat_interleave(size).repeat(parts))


@dataclass(frozen=True)
class WidthPlan:
    """One growth in width, without the weights.

    Attributes:
        units: the groups that grow, but for the inner units.
        inner: the inner units of each layer where they grow.
        embedding_factor: e, on the word embedding.
        tied: whether the decoder is the word embedding.
        extra_from_next: whether further copies in layer l come from layer l + 1 (AKI).
        noise: standard deviation of the noise on readers over the root mean square of their
            weights; its sum over the copies of a unit is 0.
        heads: the group of attention heads where it grows; for `duplicate_similarity`.
        new_layers: layers that were drawn afresh afterwards; they have no copies.
    """

    units: Mapping[Group, Units] = field(default_factory=dict)
    inner: Mapping[int, Units] = field(default_factory=dict)
    embedding_factor: float = 1.0
    tied: bool = True
    extra_from_next: bool = False
    noise: float = 0.0
    heads: Units | None = None
    new_layers: frozenset[int] = frozenset()

    @property
    def has_fresh_units(self) -> bool:
        """Whether some units copy nothing."""
        groups = [*self.units.values(), *self.inner.values()]
        return any(bool((units.source < 0).any()) for units in groups)

    def of(self, name: str, role: Role | None) -> Units | None:
        """The units of one axis of parameter `name`; None: the axis stays."""
        if role is None:
            return None
        if role.group != "ffn":
            return self.units.get(role.group)
        return self.inner.get(layer_of(name))


class WidthOperator(GrowthOperator):
    """A growth operator that is given by its plan."""

    @abstractmethod
    def plan(self, source: BertConfig, target: BertConfig) -> WidthPlan:
        """Which unit comes from where; `check` has found nothing."""

    def draws_fresh(self, source: BertConfig, target: BertConfig) -> bool:
        """Whether some units copy nothing."""
        return self.plan(source, target).has_fresh_units

    def _map(self, request: Request) -> dict[str, Tensor]:
        """Every axis of every tensor by the plan; fresh units and noise for weights alone."""
        plan, is_weight = self.plan(request.source, request.target), request.kind == "weight"
        fresh, generator = request.fresh, request.generator
        if is_weight and plan.noise and generator is None:
            raise GrowthError(f"{self.name} with noise {plan.noise} needs a generator")
        grown = {}
        for name in request.tensors:
            tensor = _widen(request.tensors, name, plan, request.kind)
            if is_weight and fresh is not None:
                tensor = _fill_fresh(tensor, fresh[name], name, plan)
            if is_weight and plan.noise and generator is not None:
                tensor = _add_noise(tensor, name, plan, generator)
            grown[name] = tensor
        return grown


def exact(symmetry: str, source: str) -> Contract:
    """The contract of an operator that preserves the function for both kinds of LayerNorm."""
    return Contract(frozenset({"post", "pre"}), dict(TOLERANCE), symmetry, source)


def inexact(symmetry: str, source: str) -> Contract:
    """The contract of an operator that preserves nothing."""
    return Contract(frozenset(), {}, symmetry, source)


def cyclic_units(old: int, new: int, alpha: float = 0.5) -> Units:
    """Unit j copies j mod old; each further copy has (1 - alpha) / alpha of the share before it.

    alpha = 0.5: equal shares; two copies share alpha to 1 - alpha (Wang et al. 2024, LEMON,
    figure 3), more copies a geometric series, so that no two are equal.
    """
    unit = torch.arange(new)
    ratio = (1 - alpha) / alpha
    weight = ratio ** (unit // old).double()
    total = torch.zeros(old, dtype=torch.float64).index_add_(0, unit % old, weight)
    return Units(unit % old, weight / total[unit % old])


def units_with_fresh(old: int, new: int) -> Units:
    """The old units, then new ones without origin."""
    unit = torch.arange(new)
    return Units(unit.where(unit < old, FRESH), (unit < old).double())


def alpha_faults(alpha: float) -> list[str]:
    """Faults of an uneven split."""
    if 0.5 < alpha < 1:
        return []
    return [f"alpha: got {alpha}; allowed: more than 0.5 (an even split) and less than 1"]


def noise_faults(noise: float) -> list[str]:
    """Faults of a relative noise."""
    if noise >= 0 and math.isfinite(noise):
        return []
    return [f"noise: got {noise}; allowed: 0 or more, in root mean squares of the weights"]


def short_name(name: str) -> str:
    """A parameter's name without the layer that it belongs to."""
    return match[3] if (match := _LAYER.match(name)) else name


def layer_of(name: str) -> int:
    """The layer that a parameter belongs to; -1: none."""
    return int(match[2]) if (match := _LAYER.match(name)) else -1


def roles_of(name: str) -> tuple[Role | None, ...]:
    """What each axis of a parameter does; None: an axis that no width changes."""
    return _ROLES[short_name(name)]


_LAYER = re.compile(r"^(encoder\.layers\.)(\d+)\.(.+)$")

_WRITES, _READS = Role("hidden", "writes"), Role("hidden", "reads")
_VECTOR = (_WRITES,)
_TIED_NORM = (Role("hidden", "tied_norm"),)
_ROLES: Mapping[str, tuple[Role | None, ...]] = {
    "embeddings.word_embeddings.weight": (None, Role("hidden", "tied_embedding")),
    "embeddings.position_embeddings.weight": (None, _WRITES),
    "embeddings.token_type_embeddings.weight": (None, _WRITES),
    "embeddings.layer_norm.weight": _VECTOR,
    "embeddings.layer_norm.bias": _VECTOR,
    "embeddings.pooling.weight": (_WRITES, Role("pooled", "reads")),
    "embeddings.pooling.bias": _VECTOR,
    "attention.qkv.weight": (Role("qkv", "writes"), _READS),
    "attention.qkv.bias": (Role("qkv", "writes"),),
    "attention.value.weight": (Role("context", "writes"), _READS),
    "attention.value.bias": (Role("context", "writes"),),
    "attention.output.weight": (_WRITES, Role("context", "reads")),
    "attention.output.bias": _VECTOR,
    "attention_layer_norm.weight": _VECTOR,
    "attention_layer_norm.bias": _VECTOR,
    "feed_forward.inner.weight": (Role("ffn", "writes"), _READS),
    "feed_forward.inner.bias": (Role("ffn", "writes"),),
    "feed_forward.output.weight": (_WRITES, Role("ffn", "reads")),
    "feed_forward.output.bias": _VECTOR,
    "feed_forward_layer_norm.weight": _VECTOR,
    "feed_forward_layer_norm.bias": _VECTOR,
    "encoder.final_layer_norm.weight": _VECTOR,
    "encoder.final_layer_norm.bias": _VECTOR,
    "mlm_head.dense.weight": (_WRITES, _READS),
    "mlm_head.dense.bias": _VECTOR,
    "mlm_head.layer_norm.weight": _TIED_NORM,
    "mlm_head.layer_norm.bias": _TIED_NORM,
    "mlm_head.decoder.weight": (None, _READS),
    "mlm_head.bias": (None,),
    "nsp_head.pooler.weight": (_WRITES, _READS),
    "nsp_head.pooler.bias": _VECTOR,
    "nsp_head.classifier.weight": (None, _READS),
    "nsp_head.classifier.bias": (None,),
}


def _widen(tensors: Mapping[str, Tensor], name: str, plan: WidthPlan, kind: Kind) -> Tensor:
    """One parameter with all its axes mapped; a new tensor."""
    tensor = _expanded(tensors[name], name, plan, kind)
    match = _LAYER.match(name)
    if not (plan.extra_from_next and match) or "layer_norm" in name or kind == "is_old":
        return tensor
    following = f"{match[1]}{int(match[2]) + 1}.{match[3]}"
    written = plan.of(name, roles_of(name)[0])
    if following not in tensors or written is None:
        return tensor
    if tensors[following].shape != tensors[name].shape:
        return tensor
    # AKI (Chen et al. 2022): the further units of layer l are those of layer l + 1; the last layer
    # has no next one, nor has one before a layer of another form: they repeat their own.
    is_extra = written.copy > 0
    tensor[is_extra] = _expanded(tensors[following], name, plan, kind)[is_extra]
    return tensor


def _expanded(tensor: Tensor, name: str, plan: WidthPlan, kind: Kind) -> Tensor:
    tensor = tensor.detach().clone()
    for axis, role in enumerate(roles_of(name)):
        units = plan.of(name, role)
        if role is None or units is None:
            continue
        factor = _factor(role.side, units, plan, kind)
        shape = [-1 if dim == axis else 1 for dim in range(tensor.dim())]
        tensor = tensor.index_select(axis, units.source.clamp(min=0))
        tensor = tensor * factor.to(tensor.dtype).view(shape)
    return tensor


def _factor(side: Side, units: Units, plan: WidthPlan, kind: Kind) -> Tensor:
    """[new] fp64: what each unit's slice is multiplied with; see the module's docstring."""
    one = (units.source >= 0).double()
    if kind == "is_old":
        return one * (units.copy == 0)
    if side == "tied_norm" and not plan.tied:
        side = "writes"
    embedding = plan.embedding_factor
    weight, gradient = {
        "writes": (one, units.share),
        "reads": (units.share, one),
        "tied_embedding": (one * embedding, units.share / embedding),
        "tied_norm": (units.share / embedding, one * embedding),
    }[side]
    return {"weight": weight, "exp_avg": gradient, "exp_avg_sq": gradient**2}[kind]


def _fill_fresh(tensor: Tensor, initial: Tensor, name: str, plan: WidthPlan) -> Tensor:
    """Written units without origin as a new model has them; nobody reads them yet."""
    for axis, role in enumerate(roles_of(name)):
        units = plan.of(name, role)
        if role is not None and role.side == "writes" and units is not None:
            new = (units.source < 0).nonzero().flatten()
            tensor = tensor.index_copy(
                axis, new, initial.detach().to(tensor.dtype).index_select(axis, new)
            )
    return tensor


def _add_noise(tensor: Tensor, name: str, plan: WidthPlan, generator: torch.Generator) -> Tensor:
    """Noise on readers that adds up to 0 over the copies of each unit: two copies get +d and -d.

    The copies carry equal values, so the noise cancels and the function stays exact, but each copy
    receives another gradient.
    """
    for axis, role in enumerate(roles_of(name)):
        units = plan.of(name, role)
        if role is None or role.side != "reads" or units is None:
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        noise = noise.transpose(axis, -1)
        known, copies = units.source.clamp(min=0), units.copies.double()
        total = torch.zeros(*noise.shape[:-1], int(known.max()) + 1, dtype=torch.float64)
        has_origin = (units.source >= 0).double()
        total.index_add_(-1, known, noise * has_origin)
        # A deviation from the mean of C numbers has (C - 1) / C of their variance.
        scale = has_origin * (copies / (copies - 1).clamp(min=1)).sqrt()
        noise = (noise - total[..., known] / copies) * scale * (copies > 1)
        rms = tensor.double().square().mean().sqrt()
        tensor = tensor + (plan.noise * rms * noise).transpose(axis, -1).to(tensor.dtype)
    return tensor
