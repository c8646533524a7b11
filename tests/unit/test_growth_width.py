"""Width growth: function and gradient of the wider model against the smaller one's."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.contract import GrowthOperator, Kind
from stacking.growth.width import (
    FRESH,
    Units,
    WidthOperator,
    cyclic_units,
    roles_of,
)
from stacking.growth.width_ffn import FFN_OPERATORS, FfnAki, FfnSplit, FfnTile, FfnZero
from stacking.growth.width_hidden import (
    HIDDEN_OPERATORS,
    HiddenAki,
    HiddenDuplicate,
    HiddenFpi,
    HiddenUneven,
    rms_fan_in,
)
from stacking.modeling import BertForPreTraining, init_weights

BATCH, LENGTH, VOCABULARY = 3, 7, 37
QKV, INNER, OUTER = (
    f"encoder.layers.0.{part}.weight"
    for part in ("attention.qkv", "feed_forward.inner", "feed_forward.output")
)

Weights = dict[str, Tensor]


def config_of(**fields: object) -> BertConfig:
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 11,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig.model_validate({**sizes, **fields})


def with_inner(config: BertConfig, size: int) -> BertConfig:
    return config.model_copy(update={"intermediate_size": size})


def with_heads(config: BertConfig, heads: int) -> BertConfig:
    size = config.hidden_size // config.num_attention_heads * heads
    return config.model_copy(update={"num_attention_heads": heads, "hidden_size": size})


def random_weights(
    config: BertConfig, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Weights:
    """Every parameter far from its initial value, biases and LayerNorm affines too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(dtype) * 0.3
        + (1.0 if "layer_norm.weight" in name else 0.0)
        for name, parameter in BertForPreTraining(config).named_parameters()
    }


def fresh_weights(config: BertConfig, dtype: torch.dtype = torch.float64) -> Weights:
    model = BertForPreTraining(config).to(dtype)
    init_weights(model, torch.Generator().manual_seed(9))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def model_of(config: BertConfig, weights: Mapping[str, Tensor]) -> BertForPreTraining:
    model = BertForPreTraining(config).to(next(iter(weights.values())).dtype).eval()
    model.load_state_dict(dict(weights))
    return model


def grown(
    operator: GrowthOperator,
    weights: Mapping[str, Tensor],
    source: BertConfig,
    target: BertConfig,
    kind: Kind = "weight",
) -> Weights:
    dtype = next(iter(weights.values())).dtype
    fresh = fresh_weights(target, dtype) if kind == "weight" else None
    generator = torch.Generator().manual_seed(5)
    return operator.grow(weights, source, target, kind=kind, fresh=fresh, generator=generator)


def batch(config: BertConfig, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.bool)}
    inputs["attention_mask"][1, 5:] = False
    if config.type_vocab_size:
        inputs["token_type_ids"] = (torch.arange(LENGTH) > 3).long().expand(BATCH, LENGTH)
    return inputs


def deviation(source: BertConfig, small: Weights, target: BertConfig, large: Weights) -> float:
    """Largest |logit difference| relative to the largest |logit|, over all heads of the model."""
    with torch.no_grad():
        before = model_of(source, small)(**batch(source))
        after = model_of(target, large)(**batch(target))
    keys = [key for key in before if key.endswith("logits")]
    return max(
        float((after[key] - before[key]).abs().max() / before[key].abs().max()) for key in keys
    )


def gradients(config: BertConfig, weights: Weights) -> Weights:
    model = model_of(config, weights)
    labels = torch.randint(5, VOCABULARY, (BATCH, 2), generator=torch.Generator().manual_seed(3))
    losses = model(
        **batch(config),
        masked_lm_positions=torch.tensor([[1, 4], [2, 3], [5, 6]]),
        masked_lm_ids=labels,
        next_sentence_labels=torch.tensor([1, 0, 1]),
    )
    sum(loss for name, loss in losses.items() if name.endswith("loss_sum")).backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


@st.composite
def configs(draw: st.DrawFn) -> BertConfig:
    """Small models of every form; sizes odd and distinct where the form allows it."""
    labels = draw(st.sampled_from([0, 1, 2]))
    position = draw(st.sampled_from(["learned", "rotary"]))
    head_size = 2 * draw(st.integers(2, 3)) if position == "rotary" else draw(st.integers(4, 6))
    heads = draw(st.integers(1, 3))
    fields: dict[str, object] = {
        "hidden_size": head_size * heads,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(1, 13)),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        "position": position,
        "layer_norm": draw(st.sampled_from(["post", "pre"])),
        "layer_norm_affine": draw(st.booleans()),
        "embedding_layer_norm": draw(st.booleans()),
        "embedding_scale": draw(st.booleans()),
        "mlm_bias": draw(st.booleans()),
        "num_nsp_labels": labels,
        "pooler": draw(st.booleans()) if labels else False,
        "type_vocab_size": 2 if labels else draw(st.sampled_from([0, 3])),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5])),
    }
    return config_of(**fields)


FFN_CASES = [FfnTile(), FfnTile(noise=0.0), FfnSplit(), FfnSplit(alpha=0.9), FfnZero()]
HIDDEN_CASES = [
    HiddenDuplicate(),
    HiddenDuplicate(noise=0.0),
    HiddenDuplicate(heads="zero"),
    HiddenUneven(),
    HiddenUneven(alpha=0.8),
]


def target_of(operator: GrowthOperator, config: BertConfig, ratio: int, extra: int) -> BertConfig:
    if operator in FFN_CASES:
        size = config.intermediate_size * ratio
        return with_inner(config, size if isinstance(operator, FfnTile) else size + extra)
    return with_heads(config, config.num_attention_heads * ratio)


# ---- The function ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("operator", [*FFN_CASES, *HIDDEN_CASES], ids=str)
@settings(deadline=None, max_examples=15)
@given(data=st.data(), ratio=st.integers(1, 4), extra=st.integers(0, 3))
def test_a_wider_model_computes_what_its_contract_promises(
    operator: WidthOperator, dtype: torch.dtype, data: st.DataObject, ratio: int, extra: int
) -> None:
    source = data.draw(configs())
    target = target_of(operator, source, ratio, extra)
    contract = operator.contract(source)
    assert source.layer_norm in contract.preserves
    small = random_weights(source, dtype)
    large = grown(operator, small, source, target)
    # Of three near-equal numbers LayerNorm amplifies any rounding: no more is asked of the wide
    # model than the narrow one keeps itself.
    accurate = {name: tensor.double() for name, tensor in small.items()}
    own_rounding = deviation(source, accurate, source, small)
    tolerance = max(contract.tolerance[dtype], 32 * own_rounding)
    assert deviation(source, small, target, large) < tolerance


@pytest.mark.parametrize("operator", [*FFN_CASES, *HIDDEN_CASES], ids=str)
@pytest.mark.parametrize("layer_norm", ["post", "pre"])
def test_a_model_of_usual_shape_keeps_its_logits_in_fp32(
    operator: WidthOperator, layer_norm: str
) -> None:
    source = config_of(
        hidden_size=64, num_attention_heads=4, intermediate_size=256, layer_norm=layer_norm
    )
    target, small = target_of(operator, source, 2, 0), random_weights(source, torch.float32)
    assert deviation(source, small, target, grown(operator, small, source, target)) < 1e-5


@pytest.mark.parametrize("operator", FFN_CASES, ids=str)
@pytest.mark.parametrize("layer_norm", ["post", "pre"])
def test_ffn_growth_is_exact_with_sinusoidal_positions_too(
    operator: WidthOperator, layer_norm: str
) -> None:
    source = config_of(position="sinusoidal", layer_norm=layer_norm, embedding_scale=True)
    target, small = with_inner(source, 60), random_weights(source)
    assert deviation(source, small, target, grown(operator, small, source, target)) < 1e-10


def test_ffn_then_hidden_growth_is_exact() -> None:
    source = config_of()
    wide, target = with_heads(source, 6), with_inner(with_heads(source, 6), 60)
    small = random_weights(source)
    large = grown(FfnTile(), grown(HiddenUneven(), small, source, wide), wide, target)
    assert deviation(source, small, target, large) < 1e-10


def test_hidden_growth_promises_nothing_with_sinusoidal_positions() -> None:
    source = config_of(position="sinusoidal")
    target, small = with_heads(source, 6), random_weights(source)
    for operator in (HiddenDuplicate(), HiddenUneven()):
        assert not operator.contract(source).preserves
        assert deviation(source, small, target, grown(operator, small, source, target)) > 1e-3


@pytest.mark.parametrize(
    ("operator", "heads"), [(HiddenFpi(), 4), (HiddenFpi(fan_in="rms"), 5), (HiddenAki(), 6)]
)
def test_operators_that_promise_nothing_really_change_the_function(
    operator: WidthOperator, heads: int
) -> None:
    source = config_of()
    target, small = with_heads(source, heads), random_weights(source)
    large = grown(operator, small, source, target)
    assert not operator.contract(source).preserves
    assert not operator.contract(source).tolerance
    assert 1e-3 < deviation(source, small, target, large) < 10.0


def test_ffn_aki_changes_the_function() -> None:
    source = config_of()
    target, small = with_inner(source, 27), random_weights(source)
    assert not FfnAki().contract(source).preserves
    assert deviation(source, small, target, grown(FfnAki(), small, source, target)) > 1e-3


def test_fpi_is_duplication_where_the_ratio_is_an_integer() -> None:
    source = config_of()
    target, small = with_heads(source, 9), random_weights(source)
    expected = grown(HiddenDuplicate(noise=0.0), small, source, target)
    for operator in (HiddenFpi(noise=0.0), HiddenFpi(fan_in="rms", noise=0.0)):
        for name, tensor in grown(operator, small, source, target).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=0)


# ---- The tensors ----


def test_tile_is_compound_grows_formula() -> None:
    source = config_of()
    target, small = with_inner(source, 60), random_weights(source)
    large = grown(FfnTile(noise=0.0), small, source, target)
    torch.testing.assert_close(large[INNER], small[INNER].repeat(3, 1), rtol=0, atol=0)
    torch.testing.assert_close(large[OUTER], small[OUTER].repeat(1, 3) / 3)
    for name in small:
        if "feed_forward." not in name or name.endswith("output.bias"):
            torch.testing.assert_close(large[name], small[name], rtol=0, atol=0)


def test_noise_on_two_copies_is_antisymmetric_and_of_the_stated_size() -> None:
    source = config_of(intermediate_size=400, hidden_size=30)
    target, small = with_inner(source, 800), random_weights(source)
    half = small[OUTER] / 2
    noise = grown(FfnTile(noise=0.2), small, source, target)[OUTER] - half.repeat(1, 2)
    torch.testing.assert_close(noise[:, :400], -noise[:, 400:])
    assert noise.std().item() == pytest.approx(0.2 * half.std().item(), rel=0.03)


def test_noise_on_three_copies_adds_up_to_zero_and_differs() -> None:
    source = config_of(intermediate_size=400, hidden_size=30)
    target, small = with_inner(source, 1200), random_weights(source)
    third = small[OUTER] / 3
    noise = grown(FfnTile(noise=0.2), small, source, target)[OUTER] - third.repeat(1, 3)
    first, second, last = noise[:, :400], noise[:, 400:800], noise[:, 800:]
    torch.testing.assert_close(first + second, -last)
    assert (first - second).abs().min() > 0
    assert noise.std().item() == pytest.approx(0.2 * third.std().item(), rel=0.03)


def test_split_gives_two_copies_alpha_and_the_rest() -> None:
    source = config_of()
    target, small = with_inner(source, 33), random_weights(source)
    large = grown(FfnSplit(alpha=0.7), small, source, target)[OUTER]
    torch.testing.assert_close(large[:, 20:], 0.3 * small[OUTER][:, :13])
    torch.testing.assert_close(large[:, :13], 0.7 * small[OUTER][:, :13])
    torch.testing.assert_close(large[:, 13:20], small[OUTER][:, 13:], rtol=0, atol=0)


def test_zero_fills_new_rows_with_fresh_weights_and_new_columns_with_zeros() -> None:
    source = config_of()
    target, small = with_inner(source, 33), random_weights(source)
    large, fresh = grown(FfnZero(), small, source, target), fresh_weights(target)
    torch.testing.assert_close(large[INNER][20:], fresh[INNER][20:], rtol=0, atol=0)
    torch.testing.assert_close(large[INNER][:20], small[INNER], rtol=0, atol=0)
    assert large[OUTER][:, 20:].abs().max() == 0
    assert large[INNER][20:].abs().min() > 0


def test_hidden_growth_repeats_whole_heads_in_each_projection() -> None:
    source = config_of(layer_norm="pre")
    target, small = with_heads(source, 6), random_weights(source)
    large = grown(HiddenDuplicate(noise=0.0), small, source, target)
    heads = small[QKV].view(3, 3, 4, 12).repeat(1, 2, 1, 2) / 2
    torch.testing.assert_close(large[QKV], heads.reshape(72, 24))


def test_new_heads_with_zero_output_are_fresh_inside() -> None:
    source = config_of()
    target, small = with_heads(source, 6), random_weights(source)
    large, fresh = (
        grown(HiddenDuplicate(heads="zero", noise=0.0), small, source, target),
        fresh_weights(target),
    )
    new_rows = large[QKV].view(3, 24, 24)[:, 12:]
    torch.testing.assert_close(new_rows, fresh[QKV].view(3, 24, 24)[:, 12:], rtol=0, atol=0)
    output = large["encoder.layers.1.attention.output.weight"]
    assert output[:, 12:].abs().max() == 0
    torch.testing.assert_close(
        output[:, :12], small["encoder.layers.1.attention.output.weight"].repeat(2, 1)
    )


@pytest.mark.parametrize(("scale", "on_rows"), [(False, 1.0), (True, 0.5**0.5)])
def test_the_tied_embedding_and_the_norm_before_it_share_the_scale(
    scale: bool, on_rows: float
) -> None:
    source = config_of(embedding_scale=scale)
    target, small = with_heads(source, 6), random_weights(source)
    large = grown(HiddenDuplicate(), small, source, target)
    for name, factor in {
        "embeddings.word_embeddings.weight": on_rows,
        "mlm_head.layer_norm.weight": 0.5 / on_rows,
        "mlm_head.layer_norm.bias": 0.5 / on_rows,
    }.items():
        repeated = torch.cat([small[name]] * 2, dim=-1)
        torch.testing.assert_close(large[name], repeated * factor)


def test_aki_takes_further_units_from_the_next_layer() -> None:
    source = config_of(num_hidden_layers=3)
    target, small = with_inner(source, 33), random_weights(source)
    large = grown(FfnAki(), small, source, target)
    for layer, following in [(0, 1), (1, 2), (2, 2)]:
        rows = large[f"encoder.layers.{layer}.feed_forward.inner.weight"]
        own = small[f"encoder.layers.{layer}.feed_forward.inner.weight"]
        further = small[f"encoder.layers.{following}.feed_forward.inner.weight"][:13]
        torch.testing.assert_close(rows, torch.cat([own, further]), rtol=0, atol=0)


def test_hidden_aki_takes_further_heads_from_the_next_layer_on_all_inputs() -> None:
    source = config_of()
    target, small = with_heads(source, 4), random_weights(source)
    large = grown(HiddenAki(noise=0.0), small, source, target)
    following = small["encoder.layers.1.attention.qkv.weight"].view(3, 3, 4, 12)[:, 0]
    further = large[QKV].view(3, 4, 4, 16)[:, 3]
    torch.testing.assert_close(further[..., 4:12], following[..., 4:])
    torch.testing.assert_close(further[..., :4], following[..., :4] / 2)
    torch.testing.assert_close(further[..., 12:], following[..., :4] / 2)
    norm = "encoder.layers.0.attention_layer_norm.weight"  # of the layer itself
    torch.testing.assert_close(large[norm], small[norm][torch.arange(16) % 12], rtol=0, atol=0)


@given(old=st.integers(1, 40), new=st.integers(1, 200))
def test_rms_fan_in_keeps_the_size_of_a_random_sum(old: int, new: int) -> None:
    """The variance of sum_j x_g(j) over independent x, counted: factor^2 * sum of C^2 = old."""
    new += old
    copies = torch.bincount(torch.arange(new) % old).double()
    expected = (old / copies.square().sum()).sqrt().item()
    if new <= 2 * old or new % old == 0:
        assert rms_fan_in(old, new) == pytest.approx(expected)


@given(old=st.integers(1, 30), extra=st.integers(0, 90), alpha=st.floats(0.5, 0.95))
def test_shares_of_a_units_copies_add_up_to_one(old: int, extra: int, alpha: float) -> None:
    units = cyclic_units(old, old + extra, alpha)
    total = torch.zeros(old, dtype=torch.float64).index_add_(0, units.source, units.share)
    torch.testing.assert_close(total, torch.ones(old, dtype=torch.float64))
    assert units.source[:old].tolist() == list(range(old))


def test_features_follow_their_head_and_fresh_heads_stay_fresh() -> None:
    heads = Units(torch.tensor([0, 1, 0, FRESH]), torch.tensor([0.25, 1.0, 0.75, 0.0]).double())
    qkv = heads.features(2, parts=3)
    part = [0, 1, 2, 3, 0, 1, FRESH, FRESH]
    moved = [[unit if unit == FRESH else unit + 4 * block for unit in part] for block in range(3)]
    assert qkv.source.tolist() == [unit for block in moved for unit in block]
    assert qkv.share.tolist() == [0.25, 0.25, 1.0, 1.0, 0.75, 0.75, 0.0, 0.0] * 3
    assert heads.copy.tolist() == [0, 0, 1, 0]
    assert heads.copies.tolist()[:3] == [2, 1, 2]


@pytest.mark.parametrize("form", ["post", "pre"])
def test_every_parameter_of_every_form_has_a_role_on_each_axis(form: str) -> None:
    for config in (config_of(layer_norm=form), config_of(layer_norm=form, position="rotary")):
        for name, parameter in BertForPreTraining(config).named_parameters():
            assert len(roles_of(name)) == parameter.dim(), name


# ---- The form of an operator ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    "operator", [*FFN_OPERATORS.values(), *HIDDEN_OPERATORS.values(), *HIDDEN_CASES], ids=str
)
def test_growth_is_pure_and_keeps_names_shapes_and_dtype(
    operator: WidthOperator, kind: Kind, dtype: torch.dtype
) -> None:
    source = config_of()
    is_ffn = operator in FFN_OPERATORS.values()
    target = with_inner(source, 40) if is_ffn else with_heads(source, 6)
    small = random_weights(source, dtype)
    kept = {name: tensor.clone() for name, tensor in small.items()}
    large = grown(operator, small, source, target, kind)
    again = grown(operator, small, source, target, kind)
    expected = dict(BertForPreTraining(target).named_parameters())
    assert list(large) == list(expected)
    for name, tensor in large.items():
        assert tensor.shape == expected[name].shape
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, again[name], rtol=0, atol=0)
        tensor.add_(1.0)
    for name, tensor in small.items():
        torch.testing.assert_close(tensor, kept[name], rtol=0, atol=0)


def test_the_same_size_gives_equal_copies() -> None:
    source, small = config_of(), random_weights(config_of())
    for operator in [*FFN_CASES, *HIDDEN_CASES, HiddenFpi(), HiddenAki(), FfnAki()]:
        for name, tensor in grown(operator, small, source, source).items():
            torch.testing.assert_close(tensor, small[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("operator", "fields", "message"),
    [
        (FfnTile(), {"intermediate_size": 30}, "multiple of 20"),
        (FfnSplit(), {"intermediate_size": 19}, "got 19 after 20 in layers 0, 1"),
        (FfnZero(), {"hidden_size": 24}, "hidden_size: got 24 after 12; allowed: 12"),
        (FfnSplit(alpha=0.5), {"intermediate_size": 30}, "more than 0.5"),
        (FfnSplit(alpha=1.0), {"intermediate_size": 30}, "less than 1"),
        (FfnTile(noise=-0.1), {"intermediate_size": 40}, "0 or more"),
        (FfnTile(noise=float("nan")), {"intermediate_size": 40}, "0 or more"),
        (HiddenUneven(alpha=0.4), {"hidden_size": 24, "num_attention_heads": 6}, "even split"),
        (HiddenDuplicate(), {"hidden_size": 16, "num_attention_heads": 4}, "multiple of 12"),
        (HiddenUneven(), {"hidden_size": 20, "num_attention_heads": 5}, "'fpi' or 'aki'"),
        (HiddenFpi(), {"hidden_size": 8, "num_attention_heads": 2}, "cannot shrink"),
        (HiddenDuplicate(), {"num_attention_heads": 6}, "head size from 4 to 2.*give 24 hidden"),
        (HiddenDuplicate(), {"hidden_size": 24}, "head size from 4 to 8.*give 12 hidden"),
        (HiddenAki(), {"vocab_size": 40}, "vocab_size: got 40 after 37; allowed: 37"),
        (
            HiddenDuplicate(),
            {"hidden_size": 24, "num_attention_heads": 6, "layer_norm": "pre"},
            "layer_norm: got 'pre' after 'post'; allowed: 'post'",
        ),
    ],
)
def test_illegal_growth_is_refused_with_the_reason(
    operator: WidthOperator, fields: dict[str, object], message: str
) -> None:
    source = config_of()
    target = source.model_copy(update=fields)
    assert operator.check(source, target)
    with pytest.raises(GrowthError, match=message):
        operator.grow(random_weights(source), source, target)


def test_what_is_missing_is_named() -> None:
    source = config_of()
    target, small = with_inner(source, 40), random_weights(source)
    with pytest.raises(GrowthError, match="zero needs a freshly initialised model .*give `fresh`"):
        FfnZero().grow(small, source, target)
    with pytest.raises(GrowthError, match="noise 0.5 needs a generator"):
        FfnTile().grow(small, source, target)
    del small[INNER]
    with pytest.raises(GrowthError, match=r"layers\.0\.feed_forward\.inner\.weight"):
        FfnSplit().grow(small, source, target)


def test_moments_need_neither_fresh_weights_nor_a_generator() -> None:
    source = config_of()
    moments = random_weights(source)
    wide = with_heads(source, 6)
    for operator in HIDDEN_CASES:
        operator.grow(moments, source, wide, kind="exp_avg")
    FfnZero().grow(moments, source, with_inner(source, 33), kind="exp_avg_sq")


# ---- The gradients, hence the moments ----


@pytest.mark.parametrize(
    "operator",
    [FfnTile(noise=0.0), FfnSplit(), FfnSplit(alpha=0.9), HiddenDuplicate(noise=0.0)],
    ids=str,
)
@settings(deadline=None, max_examples=15)
@given(data=st.data(), ratio=st.integers(1, 4), extra=st.integers(0, 3))
def test_moments_map_as_autograd_says(
    operator: WidthOperator, data: st.DataObject, ratio: int, extra: int
) -> None:
    source = data.draw(configs())
    target = target_of(operator, source, ratio, extra)
    small = random_weights(source)
    before = gradients(source, small)
    after = gradients(target, grown(operator, small, source, target))
    assert_close_to_largest(after, grown(operator, before, source, target, "exp_avg"))
    squares = {name: tensor.square() for name, tensor in before.items()}
    assert_close_to_largest(
        {name: tensor.square() for name, tensor in after.items()},
        grown(operator, squares, source, target, "exp_avg_sq"),
    )


@pytest.mark.parametrize("operator", [FfnZero(), HiddenDuplicate(heads="zero", noise=0.0)], ids=str)
@pytest.mark.parametrize("layer_norm", ["post", "pre"])
def test_moments_of_old_units_map_as_autograd_says_beside_fresh_ones(
    operator: WidthOperator, layer_norm: str
) -> None:
    source = config_of(layer_norm=layer_norm)
    target = with_inner(source, 33) if operator == FfnZero() else with_heads(source, 6)
    small = random_weights(source)
    after = gradients(target, grown(operator, small, source, target))
    mapped = grown(operator, gradients(source, small), source, target, "exp_avg")
    plan = operator.plan(source, target)
    for name, tensor in after.items():
        for axis, role in enumerate(roles_of(name)):
            if (units := plan.of(name, role)) is not None:
                fresh = (units.source == FRESH).nonzero().flatten()
                assert mapped[name].index_select(axis, fresh).count_nonzero() == 0
                tensor = tensor.index_fill(axis, fresh, 0.0)
        after[name] = tensor
    assert_close_to_largest(after, mapped)


@pytest.mark.parametrize(
    "operator", [HiddenUneven(), HiddenUneven(alpha=0.9), HiddenDuplicate(noise=0.3)], ids=str
)
@pytest.mark.parametrize("layer_norm", ["post", "pre"])
def test_with_unequal_readers_the_gradients_of_written_copies_add_up_to_the_old_one(
    operator: WidthOperator, layer_norm: str
) -> None:
    source = config_of(layer_norm=layer_norm)
    target, small = with_heads(source, 9), random_weights(source)
    before = gradients(source, small)
    after = gradients(target, grown(operator, small, source, target))
    mapped = grown(operator, before, source, target, "exp_avg")
    for name in (
        "embeddings.position_embeddings.weight",
        "embeddings.layer_norm.bias",
        "encoder.layers.0.attention.output.bias",
        "encoder.layers.1.attention_layer_norm.weight",
        "encoder.layers.1.feed_forward.output.bias",
        "mlm_head.dense.bias",
        "nsp_head.pooler.bias",
    ):
        for found in (after, mapped):
            total = found[name].view(*found[name].shape[:-1], 3, 12).sum(-2)
            torch.testing.assert_close(total, before[name], rtol=1e-9, atol=1e-9)


def assert_close_to_largest(actual: Weights, expected: Weights) -> None:
    """To 1e-10 of the largest entry of all."""
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    for name, tensor in actual.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=1e-10 * max(largest, 1e-3), msg=name
        )
