"""LiGO: weights of a small model in, of a larger one out, through a linear map learned on the loss.

Wang et al. 2023 (ICLR, arXiv 2303.00980), section 3. H hidden, N heads, F inner, L layers; a prime
marks the grown model; i counts its layers, j the old ones.

    width   V_j = B W_j A^T         for each old layer and, with one matrix, outside the layers
    depth   W'_i = sum_j w_ij V_j   w of each kind of tensor, queries, keys and values by themselves

Ties, as in the paper: one B_emb for embeddings, residual stream, LayerNorms and heads, which also
is what their readers read with; B_q, B_k, B_v and B_fc1 of each layer; the output projection reads
with B_v, the second inner matrix with B_fc1. Biases and LayerNorms are mapped by the B that writes.

The start is stacking in w and cyclic copies in B, plus noise. Our addition: a reader's A is its B
with each row times a constant, one over the number of copies at the start, and the tied embedding
and the LayerNorm before the decoder have the factors of stacking/growth/width.py. So, without
noise, the start is 'duplicate', 'tile' and 'stack' in one, exact where these are, and the logits
have the right scale. What does not grow has no map.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.contract import (
    Contract,
    fixed_faults,
    inner_sizes,
    parameter_shapes,
    require_legal,
    require_tensors,
)
from stacking.growth.width import Role, cyclic_units, layer_of, roles_of, short_name
from stacking.masked_lm_loss import IGNORED_LABEL
from stacking.modeling import BertForPreTraining

CONTRACT = Contract(
    frozenset(),
    {},
    "noise, then learned mixing: no two units stay alike",
    "Wang et al. 2023 (LiGO, arXiv 2303.00980), section 3",
)
"""Nothing is preserved: the map lowers the loss instead."""

NOISE = 0.15
"""Root mean square of what a copy gets of all other units or layers together, were they unit
vectors at right angles; the copy itself has 1. With 0.05, 0.15, 0.3 and 0.5 a tiny model from 12 to
24 hidden units ended 100 steps at a loss of 1.92, 1.93, 2.01 and 2.33, with a mean cosine of 0.998,
0.98, 0.92 and 0.80 between the copies of a hidden unit (smaller is better)."""

_GROWABLE = {
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
    "layer_intermediate_sizes", "shared_attention_layers",
}  # fmt: skip
_PROJECTIONS = ("query", "key", "value")
_STORED_TOGETHER = "attention.qkv."


@dataclass(frozen=True, eq=False)
class GrowthMap:
    """The learned numbers, and what they make of a model's weights.

    Attributes:
        source: the model that is mapped.
        target: what it becomes.
        tensors: "hidden" [H', H]; of each old layer j "layers.j.query", "key", "value" [H', H] and
            "layers.j.ffn" [largest F', F_j], whose first rows serve narrower layers; of each kind
            of tensor "depth.kind" [L', old layers that have it].
    """

    source: BertConfig
    target: BertConfig
    tensors: dict[str, Tensor]

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "GrowthMap":
        """The same map there, ready to be learned."""
        moved = {name: t.detach().to(device, dtype) for name, t in self.tensors.items()}
        return replace(self, tensors={name: t.requires_grad_() for name, t in moved.items()})

    def expand(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of `source`, on the map's device and in its dtype, as weights of `target`.

        Differentiable in the map. Where nothing grows a tensor is the very one that was given.
        """
        made: dict[tuple[str, int], dict[int, Tensor]] = {}
        grown = {}
        for name in self._names:
            layer, short = layer_of(name), short_name(name)
            if layer < 0:
                grown[name] = self._widened(weights[name], name, layer, 0)
                continue
            size = self.target.inner_size(layer) if short.startswith("feed_forward.") else 0
            parts = []
            for kind in _kinds_of(short):
                if (kind, size) not in made:
                    made[kind, size] = self._mixed(weights, kind, size)
                parts.append(made[kind, size][layer])
            grown[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return grown

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(parameter_shapes(self.target))

    def _mixed(self, weights: Mapping[str, Tensor], kind: str, size: int) -> dict[int, Tensor]:
        """W'_i by i, for one kind of tensor; `size` is F' of the layers that it is meant for."""
        holders = _holders(self.source, kind)
        wide = [self._widened(_stored(weights, j, kind), kind, j, size) for j in holders]
        shares = self.tensors.get(f"depth.{kind}")
        if shares is None:
            return dict(zip(holders, wide, strict=True))
        # One product for all layers; indexing its result would make a gradient of full size each.
        return dict(enumerate(torch.tensordot(shares, torch.stack(wide), dims=1).unbind()))

    def _widened(self, tensor: Tensor, kind: str, layer: int, size: int) -> Tensor:
        """V_j: every axis of one tensor mapped."""
        for axis, role in enumerate(_roles(kind)):
            matrix = None if role is None else self._matrix(role, kind, layer, size)
            if matrix is None:
                continue
            if axis == 0:
                tensor = torch.tensordot(matrix, tensor, dims=1)
            else:
                # Pooling by concatenation reads several hidden vectors one after the other.
                blocks = tensor.reshape(len(tensor), -1, matrix.shape[1])
                tensor = (blocks @ matrix.t()).flatten(1)
        return tensor

    def _matrix(self, role: Role, kind: str, layer: int, size: int) -> Tensor | None:
        """B [new, old], or A where the axis reads; None: the axis does not grow."""
        if role.group in ("hidden", "pooled"):
            matrix = self.tensors.get("hidden")
        elif role.group == "context":
            own = kind.split(".")[1]
            projection = own if own in _PROJECTIONS else "value"
            matrix = self.tensors.get(f"layers.{layer}.{projection}")
        else:
            matrix = self.tensors.get(f"layers.{layer}.ffn")
            matrix = None if matrix is None else matrix[:size]
        if matrix is None:
            return None
        new, old = matrix.shape
        # Heads grow by the ratio of the hidden size: the copies are counted alike.
        shares = cyclic_units(old, new).share.to(matrix)[:, None]
        is_scaled = self.source.embedding_scale
        factor = math.sqrt(self.source.hidden_size / self.target.hidden_size) if is_scaled else 1.0
        if role.side == "tied_embedding":
            return matrix * factor
        if role.side == "reads":
            return matrix * shares
        if role.side == "tied_norm" and self.source.tie_word_embeddings:
            return matrix * (shares / factor)
        return matrix


def initial_map(
    source: BertConfig,
    target: BertConfig,
    *,
    noise: float = NOISE,
    generator: torch.Generator | None = None,
) -> GrowthMap:
    """Stacking and cyclic copies, plus normal noise; fp32, CPU. All randomness: `generator`."""

    def copies(old: int, new: int) -> Tensor:
        drawn = torch.randn(new, old, generator=generator)
        return torch.eye(old)[torch.arange(new) % old] + noise / math.sqrt(old) * drawn

    tensors = {}
    kinds = _kinds(source)
    old_layers, new_layers = source.num_hidden_layers, target.num_hidden_layers
    if target.hidden_size != source.hidden_size:
        tensors["hidden"] = copies(source.hidden_size, target.hidden_size)
        for projection in _PROJECTIONS:
            for layer in _holders(source, f"attention.{projection}.weight"):
                made = copies(source.hidden_size, target.hidden_size)
                tensors[f"layers.{layer}.{projection}"] = made
    if len({*inner_sizes(source), *inner_sizes(target)}) > 1:
        for layer, size in enumerate(inner_sizes(source)):
            tensors[f"layers.{layer}.ffn"] = copies(size, max(inner_sizes(target)))
    if new_layers != old_layers:
        for kind in kinds:
            # A layer that lacks the kind has a row too, which nobody asks for.
            tensors[f"depth.{kind}"] = copies(old_layers, new_layers)[:, _holders(source, kind)]
    return GrowthMap(source, target, tensors)


@torch.enable_grad()
def learn_growth(
    weights: Mapping[str, Tensor],
    source: BertConfig,
    target: BertConfig,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, Tensor]:
    """Weights of `source` turned into weights of `target`: LearnedGrowth from begin to end.

    `batches`: one for each step, on the device to compute on; `on_step`: called after each step
    with its number, from 0, and the loss before it. GrowthError as there, or without a batch.
    """
    learner = None
    for step, batch in enumerate(batches):
        if learner is None:
            device = batch["input_ids"].device
            learner = LearnedGrowth(
                weights, source, target, device=device, learning_rate=learning_rate, seed=seed
            )
        loss = learner.step(batch)
        if on_step is not None:
            on_step(step, loss)
    if learner is None:
        raise GrowthError("learned growth: got no batch; allowed: one for each step, at least 1")
    return learner.result()


class LearnedGrowth:
    """A growth map on its way, step by step.

    Deterministic in its arguments on one device. Memory there: the weights, the map with gradient
    and moments, the old layers at the new width and the grown model, both with gradients.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        source: BertConfig,
        target: BertConfig,
        *,
        device: torch.device,
        learning_rate: float,
        seed: int,
    ) -> None:
        """Begin with copies plus noise.

        Args:
            weights: by the names of BertForPreTraining's parameters; stay as they are.
            source: the model that the weights belong to.
            target: the model to be filled.
            device: where to compute.
            learning_rate: AdamW's, constant; no weight decay.
            seed: of the noise.

        Raises GrowthError where `learned_faults` finds faults or the weights are not `source`'s.
        """
        require_legal("learned growth", learned_faults(source, target))
        require_tensors(weights, source, "the model to grow")
        self._weights = {
            name: tensor.detach().to(device, torch.float32) for name, tensor in weights.items()
        }
        start = initial_map(source, target, generator=torch.Generator().manual_seed(seed))
        self._map = start.to(device)
        with torch.device("meta"):  # functional_call brings the weights
            self._model = BertForPreTraining(target).eval()
        tensors = self._map.tensors.values()
        self._optimizer = torch.optim.AdamW(tensors, lr=learning_rate, weight_decay=0.0)
        self._learning_rate = learning_rate
        self._steps = 0

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """One AdamW step on the map; the loss before it: MLM mean plus next-sentence mean, nats.

        `batch`: keyword arguments of BertForPreTraining.forward, with masked_lm_ids, on the device.
        GrowthError without these, or if the loss is not finite.
        """
        grown = self._map.expand(self._weights)
        loss = _loss(functional_call(self._model, grown, (), dict(batch)), batch)
        value = loss.item()
        self._require_finite(math.isfinite(value), f"the loss at step {self._steps} is {value}")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._steps += 1
        return value

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The grown weights, fp32, CPU; GrowthError if one is not finite."""
        grown = self._map.expand(self._weights)
        for name, tensor in grown.items():
            is_finite = bool(tensor.isfinite().all())
            self._require_finite(is_finite, f"{name} has an infinite or undefined number")
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in grown.items()}

    def _require_finite(self, is_finite: bool, what: str) -> None:
        if not is_finite:
            raise GrowthError(
                f"learned growth: {what}, with learning rate {self._learning_rate}; use a smaller "
                "learned.learning_rate, or look whether the smaller model's weights are finite"
            )


def learned_faults(source: BertConfig, target: BertConfig) -> list[str]:
    """Why the learned map cannot turn `source` into `target`, one line each; empty: it can."""
    faults = fixed_faults(source, target, _GROWABLE, "the learned map does not change it")
    for field in ("num_hidden_layers", "hidden_size"):
        before, after = getattr(source, field), getattr(target, field)
        if after < before:
            faults.append(_shrinks(field, after, before))
    before, after = source.num_attention_heads, target.num_attention_heads
    if source.hidden_size * after != target.hidden_size * before:
        head_size = source.hidden_size // before
        faults.append(
            f"num_attention_heads: got {after} after {before} with hidden_size "
            f"{target.hidden_size} after {source.hidden_size}; allowed: heads of {head_size} as "
            f"before; give {after * head_size} hidden units for {after} heads"
        )
    faults += _layer_faults(source, target)
    sizes = [(c.num_hidden_layers, c.hidden_size, inner_sizes(c)) for c in (source, target)]
    if not faults and sizes[0] == sizes[1]:
        faults.append(
            "learned: got a stage in which neither layers nor hidden nor inner size grow; allowed: "
            "a map where there is something to learn; leave `learned` out"
        )
    return faults


def _layer_faults(source: BertConfig, target: BertConfig) -> list[str]:
    """Layers that cannot start as the layer that stacking puts there."""
    field = "layer_intermediate_sizes" if target.layer_intermediate_sizes else "intermediate_size"
    faults = []
    for new in range(target.num_hidden_layers):
        old = new % source.num_hidden_layers
        before, after = source.inner_size(old), target.inner_size(new)
        if after < before:
            faults.append(f"{_shrinks(field, after, before)} (layer {new} starts as layer {old})")
        if (new in target.shared_attention_layers) != (old in source.shared_attention_layers):
            verb = "shares" if new in target.shared_attention_layers else "does not share"
            faults.append(
                f"shared_attention_layers: got a layer {new} that {verb} attention, which starts "
                f"as layer {old}; allowed: the same in both"
            )
    return faults


def _shrinks(field: str, after: int, before: int) -> str:
    return f"{field}: got {after} after {before}; allowed: at least {before}: a model cannot shrink"


def _loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the masked positions plus, where the batch has labels, mean over the pairs."""
    if "mlm_loss_sum" not in outputs:
        raise GrowthError("learned growth: got a batch without masked_lm_ids; allowed: with them")
    loss = outputs["mlm_loss_sum"] / _counted(batch["masked_lm_ids"])
    if "nsp_loss_sum" in outputs:
        loss = loss + outputs["nsp_loss_sum"] / _counted(batch["next_sentence_labels"])
    return loss


def _counted(labels: Tensor) -> Tensor:
    return (labels != IGNORED_LABEL).sum().clamp(min=1)


def _kinds_of(short: str) -> list[str]:
    """The kinds of tensor that one parameter of a layer holds: three in qkv, else itself."""
    if not short.startswith(_STORED_TOGETHER):
        return [short]
    return [f"attention.{p}.{short.removeprefix(_STORED_TOGETHER)}" for p in _PROJECTIONS]


def _kinds(config: BertConfig) -> list[str]:
    """All kinds of tensor in a model's layers."""
    inside = [short_name(name) for name in parameter_shapes(config) if layer_of(name) >= 0]
    return list(dict.fromkeys(kind for short in inside for kind in _kinds_of(short)))


def _holders(config: BertConfig, kind: str) -> list[int]:
    """The layers that hold a kind of tensor: those that share attention have values alone."""
    lacking = config.shared_attention_layers if kind.split(".")[1] in ("query", "key") else ()
    return [layer for layer in range(config.num_hidden_layers) if layer not in lacking]


def _stored(weights: Mapping[str, Tensor], layer: int, kind: str) -> Tensor:
    """One kind of tensor of one layer, out of qkv where it lies in there."""
    name = f"encoder.layers.{layer}.{kind}"
    if name in weights:
        return weights[name]
    _, projection, leaf = kind.split(".")
    together = weights[f"encoder.layers.{layer}.{_STORED_TOGETHER}{leaf}"]
    return together.chunk(3)[_PROJECTIONS.index(projection)]


def _roles(kind: str) -> tuple[Role | None, ...]:
    """What each axis does; queries and keys are written as values are, each by its own B."""
    for projection in ("query", "key"):
        kind = kind.replace(f"attention.{projection}.", "attention.value.")
    return roles_of(kind)
