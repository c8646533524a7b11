"""Several dimensions at once, on random pairs of models: function, gradients, flags, purity.

What each operator promises alone is tested beside it; here random plans are held to the sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stacking.config import BertConfig
from stacking.growth import GrowthPlan, Operators, plan_growth
from stacking.growth.contract import Kind, inner_sizes, parameter_shapes
from stacking.growth.depth import DEPTH_OPERATORS
from stacking.modeling import BertForPreTraining

Weights = dict[str, Tensor]

BATCH, LENGTH, VOCABULARY = 3, 7, 29
EXACT = {
    "depth": ["identity_exact"],
    "ffn": ["tile", "split", "zero"],
    "hidden": ["duplicate", "uneven"],
    "positions": ["tile", "fresh"],
}
ALL = {
    "depth": [*DEPTH_OPERATORS],
    "ffn": ["tile", "split", "zero", "aki"],
    "hidden": ["duplicate", "uneven", "fpi", "aki"],
    "positions": ["tile", "interpolate", "fresh"],
}


@dataclass(frozen=True)
class Growth:
    """Two models and how the first becomes the second."""

    source: BertConfig
    target: BertConfig
    operators: Operators

    @property
    def plan(self) -> GrowthPlan:
        return plan_growth(self.source, self.target, self.operators)


@st.composite
def sources(draw: st.DrawFn, *, table: bool) -> BertConfig:
    """Small models of every form; `table`: hidden growth can be exact."""
    position = draw(st.sampled_from(["learned", "rotary"] + ["sinusoidal"] * (not table)))
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    # Of fewer numbers LayerNorm amplifies any rounding.
    head_size = draw(st.sampled_from([6, 8] if heads == 1 else [4, 6]))
    labels = draw(st.sampled_from([0, 1, 2]))
    pooling = draw(st.sampled_from(["none", "none", "mean", "max", "concat"]))
    first = 1 if pooling == "none" else 2
    sizes = draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))
    return BertConfig.model_validate(
        {
            "vocab_size": VOCABULARY,
            "hidden_size": heads * head_size,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "intermediate_size": sizes[0],
            "layer_intermediate_sizes": sizes if draw(st.booleans()) else [],
            "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
            "max_position_embeddings": LENGTH,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "position": position,
            "layer_norm": draw(st.sampled_from(["post", "pre"])),
            "layer_norm_affine": draw(st.booleans()),
            "embedding_layer_norm": draw(st.booleans()),
            "embedding_scale": draw(st.booleans()),
            "mlm_bias": draw(st.booleans()),
            "num_nsp_labels": labels,
            "pooler": bool(labels) and draw(st.booleans()),
            "type_vocab_size": 2 if labels else draw(st.sampled_from([0, 3])),
            "tie_word_embeddings": draw(st.booleans()),
            "pooling": pooling,
            "pooling_size": 1 if pooling == "none" else draw(st.integers(2, 4)),
            "shared_attention_layers": [
                layer for layer in range(first, layers) if draw(st.booleans())
            ],
        }
    )


@st.composite
def growths(draw: st.DrawFn, *, exact: bool) -> Growth:
    """A random model, random operators, and a larger model that these can make of it."""
    source, names = draw(sources(table=exact)), EXACT if exact else ALL
    chosen = {key: draw(st.sampled_from(values)) for key, values in names.items()}
    operators = Operators(**chosen, heads=draw(st.sampled_from(["replicate", "zero"])))
    heads = draw(st.integers(1, 3)) * source.num_attention_heads
    if operators.hidden in ("fpi", "aki"):
        heads += draw(st.integers(0, 1))
    old, depth = source.num_hidden_layers, DEPTH_OPERATORS[operators.depth]
    sizes = [_wider(draw, size, operators.ffn) for size in inner_sizes(source)]
    shared = set(source.shared_attention_layers)
    if not exact:
        shared &= set(draw(st.lists(st.integers(0, 2))))
    layers = depth.layers(old, draw(st.sampled_from(_depths(old, operators.depth))))
    first = 1 if source.pooling == "none" else 2
    changes: dict[str, object] = {
        "num_attention_heads": heads,
        "hidden_size": heads * (source.hidden_size // source.num_attention_heads),
        "num_hidden_layers": len(layers),
        "layer_intermediate_sizes": [
            draw(st.integers(1, 9)) if layer is None else sizes[layer] for layer in layers
        ],
        "shared_attention_layers": [
            new
            for new, layer in enumerate(layers)
            if (layer in shared if layer is not None else new >= first and draw(st.booleans()))
        ],
        "max_position_embeddings": LENGTH + draw(st.sampled_from([0, 4, 9])),
        "tie_word_embeddings": source.tie_word_embeddings and draw(st.booleans()),
    }
    if source.pooling != "none" and draw(st.booleans()) and (old == 1 or not exact):
        changes |= {"pooling": "none", "pooling_size": 1}
    target = BertConfig.model_validate({**source.model_dump(), **changes})
    return Growth(source, target, operators)


def _wider(draw: st.DrawFn, size: int, operator: str) -> int:
    wider = size * draw(st.integers(1, 3))
    return wider if operator == "tile" else wider + draw(st.integers(0, 3))


def _depths(old: int, operator: str) -> list[int]:
    """The depths up to 2 L + 1 that an operator can make."""
    return [
        new for new in range(old, 2 * old + 2) if not DEPTH_OPERATORS[operator].map_faults(old, new)
    ]


def random_tensors(config: BertConfig, dtype: torch.dtype = torch.float64) -> Weights:
    """Nothing at its initial value: biases and LayerNorms are random, too."""
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        drawn = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = (drawn + float("norm.weight" in name)).to(dtype)
    return tensors


def inputs(config: BertConfig) -> dict[str, Tensor]:
    """Three sequences, one padded, one with a filling slot."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator),
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.bool),
        "masked_lm_positions": torch.tensor([[1, 4], [2, 3], [5, 0]]),
    }
    batch["attention_mask"][1, 5:] = False
    if config.type_vocab_size:
        batch["token_type_ids"] = (torch.arange(LENGTH) > 3).long().expand(BATCH, LENGTH)
    return batch


def logits(config: BertConfig, tensors: Mapping[str, Tensor]) -> tuple[BertForPreTraining, Weights]:
    model = BertForPreTraining(config).to(next(iter(tensors.values())).dtype).eval()
    model.load_state_dict(tensors)
    outputs = model(**inputs(config))
    return model, {name: out for name, out in outputs.items() if name.endswith("logits")}


def change(ours: Weights, theirs: Weights) -> float:
    """Largest logit difference of any head relative to the largest logit of that head."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name].double() - theirs[name].double()).abs().max() / ours[name].abs().max())
        for name in ours
    )


@settings(deadline=None, max_examples=40)
@given(growths(exact=True))
def test_a_promise_is_kept_whatever_grows_together(growth: Growth) -> None:
    plan = growth.plan
    promised = plan.tolerance()
    assert promised is not None
    small = random_tensors(growth.source)
    with torch.no_grad():
        before = logits(growth.source, small)[1]
        after = logits(growth.target, plan.grow(small, seed=3))[1]
        assert change(before, after) <= 1e-10
        rounded = {name: tensor.float() for name, tensor in small.items()}
        accurate = {name: tensor.double() for name, tensor in rounded.items()}
        before = logits(growth.source, rounded)[1]
        after = logits(growth.target, plan.grow(rounded, seed=3))[1]
        own_rounding = change(before, logits(growth.source, accurate)[1])
    # No more is asked of the grown model than the small one keeps itself.
    assert change(before, after) <= max(promised, 32 * own_rounding)


@settings(deadline=None, max_examples=40)
@given(growths(exact=False))
def test_any_plan_that_promises_is_exact_and_any_gives_a_whole_model(growth: Growth) -> None:
    plan, small = growth.plan, random_tensors(growth.source)
    grown = plan.grow(small, seed=3)
    assert list(grown) == list(parameter_shapes(growth.target))
    with torch.no_grad():
        before, after = logits(growth.source, small)[1], logits(growth.target, grown)[1]
    moved = change(before, after)
    assert moved == moved  # no NaN
    if (tolerance := plan.tolerance(torch.float64)) is not None:
        assert moved <= tolerance


@settings(deadline=None, max_examples=40)
@given(
    growths(exact=False),
    st.sampled_from(["weight", "exp_avg", "exp_avg_sq", "is_old"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_plan_is_pure_and_deterministic(growth: Growth, kind: Kind, dtype: torch.dtype) -> None:
    plan, small = growth.plan, random_tensors(growth.source, dtype)
    if kind == "is_old":
        small = {name: (tensor > 0).to(dtype) for name, tensor in small.items()}
    kept = {name: tensor.clone() for name, tensor in small.items()}
    grown, again = plan.grow(small, kind=kind, seed=5), plan.grow(small, kind=kind, seed=5)
    shapes = parameter_shapes(growth.target)
    assert {name: tensor.shape for name, tensor in grown.items()} == shapes
    everything = [*grown.values(), *small.values()]
    assert len({tensor.data_ptr() for tensor in everything}) == len(everything)
    for name, tensor in grown.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, again[name])
        tensor.add_(1.0)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in small.items())


@settings(deadline=None, max_examples=40)
@given(growths(exact=False), st.booleans())
def test_each_old_number_keeps_its_flag_in_one_place(growth: Growth, all_old: bool) -> None:
    plan = growth.plan
    generator = torch.Generator().manual_seed(2)
    flags = {
        name: torch.ones(shape) if all_old else (torch.rand(shape, generator=generator) < 0.5) * 1.0
        for name, shape in parameter_shapes(growth.source).items()
    }
    grown = plan.grow(flags, kind="is_old")
    assert all(bool(((tensor == 0) | (tensor == 1)).all()) for tensor in grown.values())
    kept = dict(flags)
    moves = {move.dimension: move.operator.name for move in plan.moves}
    if growth.source.pooling == "concat" and "pooling" in moves:
        kept = {name: tensor for name, tensor in flags.items() if ".pooling." not in name}
    if moves.get("positions") == "interpolate":
        kept.pop("embeddings.position_embeddings.weight")
        grown.pop("embeddings.position_embeddings.weight")
    assert count(grown) == count(kept)


@settings(deadline=None, max_examples=25)
@given(growths(exact=False))
def test_a_number_with_its_flag_is_the_old_number(growth: Growth) -> None:
    """Where width scales nothing they are equal; else a flagged number has an origin."""
    plan, small = growth.plan, random_tensors(growth.source)
    ones = {name: torch.ones_like(tensor) for name, tensor in small.items()}
    old = plan.grow(ones, kind="is_old")
    moved = {move.dimension for move in plan.moves}
    if moved & {"hidden", "ffn", "positions"}:
        mapped = plan.grow(ones, kind="exp_avg_sq")
        assert all(bool((mapped[name][flag > 0] > 0).all()) for name, flag in old.items())
        return
    grown = plan.grow(small)
    found = torch.cat([grown[name][flag > 0] for name, flag in old.items()])
    given = [t.flatten() for n, t in small.items() if not (".pooling." in n and "pooling" in moved)]
    assert torch.equal(found.sort().values, torch.cat(given).sort().values)


def count(flags: Weights) -> int:
    return int(sum(tensor.sum() for tensor in flags.values()))


def without_noise(plan: GrowthPlan) -> GrowthPlan:
    """The same with each operator that adds noise adding none."""
    moves = []
    for move in plan.moves:
        operator = move.operator
        if getattr(operator, "noise", 0.0):
            operator = replace(operator, noise=0.0)  # type: ignore[type-var]
        moves.append(replace(move, operator=operator))
    return replace(plan, moves=tuple(moves))


def gradients(config: BertConfig, tensors: Weights) -> Weights:
    """Of a random linear function of all logits, the same for every model of these heads."""
    model, outputs = logits(config, tensors)
    generator = torch.Generator().manual_seed(4)
    drawn = {
        name: torch.randn(out.shape, generator=generator, dtype=out.dtype)
        for name, out in outputs.items()
    }
    torch.stack([(outputs[name] * drawn[name]).sum() for name in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


@settings(deadline=None, max_examples=30)
@given(growths(exact=True))
def test_moments_map_as_the_gradient_does(growth: Growth) -> None:
    """Wherever a number has an origin: equal shares, no noise, no second use of a number."""
    operators = replace(growth.operators, hidden="duplicate", positions="fresh")
    tied = {"tie_word_embeddings": growth.source.tie_word_embeddings}
    target = growth.target.model_copy(update=tied)
    plan = without_noise(plan_growth(growth.source, target, operators))
    small = random_tensors(growth.source)
    before, after = gradients(growth.source, small), gradients(target, plan.grow(small, seed=3))
    squares = {name: tensor.square() for name, tensor in before.items()}
    mapped, mapped_squares = (
        plan.grow(before, kind="exp_avg"),
        plan.grow(squares, kind="exp_avg_sq"),
    )
    ones = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    has_origin = plan.grow(ones, kind="exp_avg_sq")
    largest = max(tensor.abs().max().item() for tensor in before.values())
    for name, gradient in after.items():
        known = has_origin[name] > 0
        error = (gradient - mapped[name])[known].abs()
        assert not error.numel() or error.max() <= 1e-9 * largest, name
        error = (gradient.square() - mapped_squares[name])[known].abs()
        assert not error.numel() or error.max() <= 1e-9 * largest**2, name
        assert not mapped[name][~known].any()
