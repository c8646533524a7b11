"""Depth growth: which old layer fills each new layer; L layers' tensors in, L' layers' out.

Two families. `CopyLayers` fills every layer with a copy of an old one: the function changes, and
training starts from a good place. `NewLayers` keeps the old layers and puts new ones between or
above them; with zero output projections a new layer passes its input on.

Exactness and moments. Where an operator is exact, grown(map(w)) = small(w) for every w, and each
old number has exactly one place in the grown model; so by the chain rule the gradient there is the
gradient of the small model, and Adam's moments move with their weights by a factor of 1 (its
square: 1). New places hold no history: zeros. Copies have no such law; both copies get the old
layer's moments, as in double.py --double-optimizer of Gong et al. 2019.
"""

import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.contract import (
    TOLERANCE,
    Contract,
    GrowthOperator,
    LayerNormKind,
    Request,
    fixed_faults,
    parameter_shapes,
    require_legal,
)

CopyMap = Literal["stack", "interleave", "copy_top", "append_last", "middle"]
DepthOperator = Literal["stack", "interleave", "copy_top", "append_last", "middle", "random"]
"""The operators that are a layer map and nothing else."""
Addition = Literal["random", "identity", "identity_noise", "identity_exact"]
Placement = Literal["top", "spread"]

PAPER_NOISE = 0.03
"""Standard deviation of `identity_noise` (Gong et al. 2019, section 4.1)."""
EPSILON_SLACK = 10.0
"""A post-LN layer that passes its input on normalises it once more, which scales a token whose
variance before the host's LayerNorm was v by 1 + eps / 2 * (1 / v - 1): within 10 eps of 1 where
v > 0.05. Measured on random models: up to 1.2 eps of the largest logit. With BERT's eps of 1e-12
this drowns in rounding, with StackingBERT's 1e-5 it does not."""

_LAYER = re.compile(r"^encoder\.layers\.(\d+)\.(.+)$")
_OUTPUT_PROJECTIONS = ("attention.output.weight", "feed_forward.output.weight")
_LAST_NORM = "feed_forward_layer_norm"
_NEIGHBOURS = ("interleave", "append_last")
LAYER_FIELDS = ("intermediate_size", "layer_intermediate_sizes", "shared_attention_layers")
"""What says how single layers look; a layer keeps its form where depth puts it."""

_COPY_SOURCES: dict[CopyMap, str] = {
    "stack": "Gong et al. 2019, section 3, algorithm 1; any ratio: Gu et al. 2021, grow_bert's "
    "transform_model",
    "interleave": "Du et al. 2024 (arXiv 2405.15319), appendix H.2",
    "copy_top": "Yang et al. 2020 (MSLT, arXiv 2011.13635); which layers are copied: our reading",
    "append_last": "Reddi et al. 2023 (gradual stacking) with blocks of one layer",
    "middle": "Saunshi et al. 2024 (MIDAS, arXiv 2409.19044), section 2",
}
_ADDITION_SOURCES: dict[Addition, str] = {
    "random": "Bu 2025 (arXiv 2511.04981); the control of every comparison",
    "identity": "Gong et al. 2019, section 4.1",
    "identity_noise": "Gong et al. 2019, section 4.1",
    "identity_exact": "Wang et al. 2024 (LEMON, arXiv 2310.07999), depth expansion of post-LN; "
    "pre-LN: Gong et al. 2019, section 4.1",
}


@dataclass(frozen=True)
class CopyLayers(GrowthOperator):
    """Every layer of the grown model is a copy of an old one, as `layer_sources` says."""

    name: CopyMap

    def contract(self, config: BertConfig) -> Contract:
        """Never exact: in both forms of LayerNorm a repeated layer does its work twice."""
        symmetry = "positions differ"
        if self.name in _NEIGHBOURS:
            symmetry += "; copies are neighbours and come apart more slowly"
        return Contract(frozenset(), {}, symmetry, _COPY_SOURCES[self.name])

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Why `source` cannot grow into `target`; empty: it can."""
        return _faults(self, source, target)

    def map_faults(self, old: int, new: int) -> list[str]:
        """Why `old` layers cannot become `new`."""
        return _layer_faults(self.name, old, new)

    def layers(self, old: int, new: int) -> list[int | None]:
        """For each of `new` layers the old one that it copies."""
        return layer_sources(self.name, old, new)

    def origins(self, source: BertConfig, target: BertConfig) -> dict[str, str | None]:
        """For each tensor of `target` the tensor of `source` that fills it."""
        require_legal(self.name, self.check(source, target))
        return _origins(target, self.layers(source.num_hidden_layers, target.num_hidden_layers))

    def _map(self, request: Request) -> dict[str, Tensor]:
        """Copies of the old layers' tensors, of whatever kind."""
        origins = self.origins(request.source, request.target)
        grown: dict[str, Tensor] = {}
        seen = set()
        for name, origin in origins.items():
            tensor = request.tensors[str(origin)]
            is_further = request.kind == "is_old" and origin in seen
            grown[name] = _zeros(tensor.shape, tensor) if is_further else _copy(tensor)
            seen.add(origin)
        return grown


@dataclass(frozen=True)
class NewLayers(GrowthOperator):
    """The old layers stay, in order; new ones lie above them (`top`) or after each (`spread`).

    `random`: new layers as freshly initialised. `identity`: zero output projections and biases,
    other weights random. `identity_noise`: the same, with noise of standard deviation `sigma` in
    place of those zeros. `identity_exact`: as `identity`, and in post-LN the last LayerNorm's
    weight and bias move from the host (the old layer below) to the top of its new layers; host and
    layers between get weight 1 and bias 0, so that each passes on what is normalised already.
    """

    name: Addition
    sigma: float = 0.0
    placement: Placement = "top"

    def __post_init__(self) -> None:
        """Refuse noise that the operator would not add."""
        if self.sigma < 0 or (self.sigma > 0 and self.name != "identity_noise"):
            raise GrowthError(
                f"sigma: got {self.sigma} with {self.name!r}; allowed: 0, or a positive number "
                "with 'identity_noise'"
            )

    def contract(self, config: BertConfig) -> Contract:
        """Exact in pre-LN with zero output projections; in post-LN as far as the class says.

        Without affine LayerNorms, post-LN has nothing to move: `identity` is then exact as well.
        Spread layers come between a layer that shares attention and the one that it shares with.
        """
        kinds: set[LayerNormKind] = set()
        separates = self.placement == "spread" and bool(config.shared_attention_layers)
        if self.name != "random" and self.sigma == 0 and not separates:
            kinds.add("pre")
            if self.name == "identity_exact" or not config.layer_norm_affine:
                kinds.add("post")
        slack = EPSILON_SLACK * config.layer_norm_eps if config.layer_norm == "post" else 0.0
        tolerance = {dtype: max(bound, slack) for dtype, bound in TOLERANCE.items()}
        learns = "" if self.name == "random" else "; the zero output side learns first"
        return Contract(
            frozenset(kinds),
            tolerance if kinds else {},
            "nothing is duplicated: inner weights are random" + learns,
            _ADDITION_SOURCES[self.name],
        )

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Why `source` cannot grow into `target`; empty: it can."""
        return _faults(self, source, target)

    def map_faults(self, old: int, new: int) -> list[str]:
        """Why `old` layers cannot become `new`."""
        return _shrinking_faults(old, new)

    def layers(self, old: int, new: int) -> list[int | None]:
        """For each of `new` layers the old one that it is; None: a new one."""
        if self.placement == "top":
            return layer_sources("random", old, new)
        # After layer i come as many new ones as bring the total to (i + 1) / old of all.
        layers: list[int | None] = []
        for layer in range(old):
            layers += [layer] + [None] * ((layer + 1) * new // old - len(layers) - 1)
        return layers

    def draws_fresh(self, source: BertConfig, target: BertConfig) -> bool:
        """Where there are new layers."""
        return target.num_hidden_layers > source.num_hidden_layers

    def origins(self, source: BertConfig, target: BertConfig) -> dict[str, str | None]:
        """For each tensor of `target` the tensor of `source` that fills it; None: it is new."""
        require_legal(self.name, self.check(source, target))
        layers = self.layers(source.num_hidden_layers, target.num_hidden_layers)
        origins = _origins(target, layers)
        if not self._moves_norms(target):
            return origins
        for host, top in _hosts_and_tops(layers):
            for leaf in ("weight", "bias"):
                moved = f"encoder.layers.{host}.{_LAST_NORM}.{leaf}"
                receiver = f"encoder.layers.{top}.{_LAST_NORM}.{leaf}"
                origins[receiver], origins[moved] = origins[moved], None
        return origins

    def _map(self, request: Request) -> dict[str, Tensor]:
        """Old tensors at their new places; in new places weights as the class says, moments zero.

        `fresh` gives the random weights, `generator` the noise.
        """
        tensors, target = request.tensors, request.target
        origins = self.origins(request.source, target)
        grown, shapes = {}, parameter_shapes(target)
        like = next(iter(tensors.values()))
        for name, origin in origins.items():
            if origin is not None:
                grown[name] = _copy(tensors[origin])
            elif request.kind != "weight" or request.fresh is None:
                grown[name] = _zeros(shapes[name], like)
            else:
                new = self._new_weight(name, request.fresh[name], target, request.generator)
                grown[name] = new.to(like.device, like.dtype, copy=True)
        return grown

    def _new_weight(
        self, name: str, fresh: Tensor, target: BertConfig, generator: torch.Generator | None
    ) -> Tensor:
        if self.name == "random":
            return fresh.detach()
        if name.endswith(_OUTPUT_PROJECTIONS) and self.sigma > 0:
            if generator is None:
                raise GrowthError(f"{self.name} needs a generator to draw noise for {name!r}")
            return self.sigma * torch.randn(fresh.shape, generator=generator, dtype=torch.float32)
        if name.endswith((".bias", *_OUTPUT_PROJECTIONS)):
            return torch.zeros_like(fresh)
        if self._moves_norms(target) and name.endswith("layer_norm.weight"):
            return torch.ones_like(fresh)
        return fresh.detach()

    def _moves_norms(self, target: BertConfig) -> bool:
        is_post = target.layer_norm == "post"
        return self.name == "identity_exact" and is_post and target.layer_norm_affine


DepthGrowth = CopyLayers | NewLayers
DEPTH_OPERATORS: dict[str, DepthGrowth] = {
    **{name: CopyLayers(name) for name in get_args(CopyMap)},
    "random": NewLayers("random"),
    "identity": NewLayers("identity"),
    "identity_noise": NewLayers("identity_noise", sigma=PAPER_NOISE),
    "identity_exact": NewLayers("identity_exact"),
}
"""Every depth operator with its published settings."""


def layer_sources(operator: DepthOperator, old: int, new: int) -> list[int | None]:
    """For each of `new` layers the old layer that it copies; None: freshly initialised.

    Raises GrowthError where the operator cannot make `new` layers out of `old`.
    """
    if faults := _layer_faults(operator, old, new):
        raise GrowthError("; ".join(faults))
    if operator == "stack":
        # Gong et al. 2019, section 3, algorithm 1; any ratio as in Gu et al. 2021, transform_model.
        return [layer % old for layer in range(new)]
    if operator == "interleave":
        return [layer * old // new for layer in range(new)]
    if operator == "copy_top":
        # Yang et al. 2020 (MSLT): the new top layers copy the top block below them.
        return [layer if layer < old else layer - (new - old) for layer in range(new)]
    if operator == "append_last":
        return [min(layer, old - 1) for layer in range(new)]
    if operator == "middle":
        end = _middle_block_start(old, new - old) + new - old
        return [layer if layer < end else layer - (new - old) for layer in range(new)]
    return [layer if layer < old else None for layer in range(new)]


def form_faults(
    name: str, layers: list[int | None], source: BertConfig, target: BertConfig
) -> list[str]:
    """Layers of `target` whose form is not that of the layer of `source` that they copy."""
    faults = []
    field = "layer_intermediate_sizes" if target.layer_intermediate_sizes else "intermediate_size"
    for new, old in enumerate(layers):
        if old is None:
            continue
        width, wanted = target.inner_size(new), source.inner_size(old)
        if width != wanted:
            faults.append(
                f"{field}: got {width} in layer {new}, which depth {name!r} fills with layer "
                f"{old} of width {wanted}; allowed: one width for all copies of a layer; give "
                "layer_intermediate_sizes that agree, or change them at another stage"
            )
        if (new in target.shared_attention_layers) != (old in source.shared_attention_layers):
            has, copied = (
                "shares attention" if layer in config.shared_attention_layers else "has its own"
                for layer, config in ((new, target), (old, source))
            )
            faults.append(
                f"shared_attention_layers: layer {new} {has}, but layer {old}, which depth "
                f"{name!r} puts there, {copied}; allowed: the same for all copies of a layer; "
                "give shared_attention_layers that agree, or change them at another stage"
            )
    return faults


def _faults(operator: DepthGrowth, source: BertConfig, target: BertConfig) -> list[str]:
    """Fields that no depth operator changes, a layer map that there is not, forms that differ."""
    old, new = source.num_hidden_layers, target.num_hidden_layers
    faults = fixed_faults(source, target, {"num_hidden_layers", *LAYER_FIELDS})
    if map_faults := operator.map_faults(old, new):
        return faults + map_faults
    return faults + form_faults(operator.name, operator.layers(old, new), source, target)


def _layer_faults(operator: DepthOperator, old: int, new: int) -> list[str]:
    if operator not in get_args(DepthOperator):
        allowed = ", ".join(get_args(DepthOperator))
        return [f"depth: {operator!r} is no layer map; allowed: {allowed}"]
    if faults := _shrinking_faults(old, new):
        return faults
    got = f"depth: got {operator!r} from {old} to {new} layers; allowed:"
    if operator == "interleave" and new % old:
        return [
            f"{got} a multiple of {old}, because it repeats each layer equally often; "
            "or give depth 'stack'"
        ]
    if operator in ("copy_top", "middle") and new > 2 * old:
        return [
            f"{got} at most {2 * old} layers, because it copies a block of {new - old} layers out "
            f"of {old}; or give depth 'stack'"
        ]
    return []


def _shrinking_faults(old: int, new: int) -> list[str]:
    if new >= old:
        return []
    return [
        f"num_hidden_layers: got {new} after {old}; allowed: at least {old}, because a model "
        "cannot shrink"
    ]


def _middle_block_start(old: int, block: int) -> int:
    """First layer of the middle block of `block` layers, which is repeated right after itself.

    Saunshi et al. 2024, section 2: of n = old / block blocks it is number ceil(n / 2), counted
    from 1. Where the block does not divide the depth: the centred one, rounded down.
    """
    if block and old % block == 0:
        return (-(-(old // block) // 2) - 1) * block
    return (old - block) // 2


def _origins(target: BertConfig, layers: list[int | None]) -> dict[str, str | None]:
    """Tensor names from the layer map: outside the encoder's layers each fills itself."""
    origins: dict[str, str | None] = {}
    for name in parameter_shapes(target):
        match = _LAYER.match(name)
        layer = layers[int(match[1])] if match else None
        if not match:
            origins[name] = name
        else:
            origins[name] = None if layer is None else f"encoder.layers.{layer}.{match[2]}"
    return origins


def _hosts_and_tops(layers: list[int | None]) -> list[tuple[int, int]]:
    """(old layer, last of the new layers right above it), as places in the grown model."""
    hosts = [place for place, layer in enumerate(layers) if layer is not None]
    ends = [*hosts[1:], len(layers)]
    return [(host, end - 1) for host, end in zip(hosts, ends, strict=True) if end - 1 > host]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _zeros(shape: torch.Size, like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
