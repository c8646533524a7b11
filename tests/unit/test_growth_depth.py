"""Depth operators: layer maps against their papers, contracts against the model, moments against
autograd.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.contract import GrowthOperator, Kind, parameter_shapes
from stacking.growth.depth import (
    DEPTH_OPERATORS,
    Addition,
    CopyLayers,
    CopyMap,
    NewLayers,
    Placement,
    layer_sources,
)
from stacking.modeling import BertForPreTraining

SMALL = BertConfig(
    vocab_size=37,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=11,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
POST = [SMALL, SMALL.model_copy(update={"layer_norm_affine": False})]
PRE = [config.model_copy(update={"layer_norm": "pre"}) for config in POST]
FORMS = [*POST, *PRE]
COPIES = [CopyLayers(name) for name in get_args(CopyMap)]
ADDITIONS = [
    NewLayers("random"),
    NewLayers("random", placement="spread"),
    NewLayers("identity"),
    NewLayers("identity", placement="spread"),
    NewLayers("identity_noise", sigma=0.03),
    NewLayers("identity_exact"),
    NewLayers("identity_exact", placement="spread"),
]
OPERATORS: list[CopyLayers | NewLayers] = [*COPIES, *ADDITIONS]
KINDS: list[Kind] = ["weight", "exp_avg", "exp_avg_sq"]
PLACEMENTS: list[Placement] = ["top", "spread"]


def name_of(value: object) -> str:
    if isinstance(value, BertConfig):
        return f"{value.layer_norm}-{'affine' if value.layer_norm_affine else 'plain'}"
    if isinstance(value, NewLayers):
        return f"{value.name}-{value.placement}"
    return value.name if isinstance(value, CopyLayers) else str(value)


def deeper(config: BertConfig, layers: int) -> BertConfig:
    return config.model_copy(update={"num_hidden_layers": layers})


def random_tensors(
    config: BertConfig, seed: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Nothing is at its initial value: biases and LayerNorms are random, too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        drawn = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        tensors[name] = (drawn + float(name.endswith("norm.weight"))).to(dtype)
    return tensors


def model_of(config: BertConfig, tensors: Mapping[str, Tensor]) -> BertForPreTraining:
    model = BertForPreTraining(config).to(next(iter(tensors.values())).dtype)
    model.load_state_dict(tensors)
    return model.eval()


def inputs(config: BertConfig, seed: int = 7) -> dict[str, Tensor]:
    """Three sequences of up to 7 tokens, one of them padded."""
    generator = torch.Generator().manual_seed(seed)
    length = min(7, config.max_position_embeddings)
    ids = torch.randint(1, config.vocab_size, (3, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones(3, length, dtype=torch.bool)}
    batch["attention_mask"][1, max(1, length - 2) :] = False
    if config.type_vocab_size:
        batch["token_type_ids"] = (torch.arange(length) > length // 2).long().repeat(3, 1)
    return batch


def logits(config: BertConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outputs = model_of(config, tensors)(**inputs(config))
    return {name: output for name, output in outputs.items() if name.endswith("logits")}


def change(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest logit difference of any head relative to the largest logit of that head."""
    assert ours.keys() == theirs.keys()
    return max(
        ((ours[name] - theirs[name]).abs().max() / ours[name].abs().max()).item() for name in ours
    )


def change_by(
    operator: GrowthOperator, source: BertConfig, layers: int, dtype: torch.dtype, seed: int = 0
) -> float:
    target = deeper(source, layers)
    tensors = random_tensors(source, seed, dtype)
    fresh = random_tensors(target, seed + 1, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    grown = operator.grow(tensors, source, target, fresh=fresh, generator=generator)
    with torch.no_grad():
        return change(logits(source, tensors), logits(target, grown))


@st.composite
def configs(draw: st.DrawFn) -> BertConfig:
    """Small models of every form."""
    heads = draw(st.integers(1, 3))
    labels: list[Literal[0, 1, 2]] = [0, 1, 2]
    num_nsp_labels = draw(st.sampled_from(labels))
    return BertConfig(
        vocab_size=draw(st.integers(5, 40)),
        hidden_size=heads * draw(st.sampled_from([4, 6, 8])),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 23)),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        max_position_embeddings=draw(st.integers(3, 11)),
        type_vocab_size=draw(st.sampled_from([0, 2, 3])),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5])),
        position=draw(st.sampled_from(["learned", "sinusoidal", "rotary"])),
        layer_norm=draw(st.sampled_from(["post", "pre"])),
        layer_norm_affine=draw(st.booleans()),
        embedding_layer_norm=draw(st.booleans()),
        embedding_scale=draw(st.booleans()),
        mlm_bias=draw(st.booleans()),
        num_nsp_labels=num_nsp_labels,
        pooler=num_nsp_labels > 0 and draw(st.booleans()),
    )


def layers_after_the_2019_script(source: BertConfig, factor: int) -> dict[str, str]:
    """What double.py (factor 2) and quadruple.py (4) of gonglinyuan/StackingBERT do to keys.

    They keep every key and add, for each key of layer i, the keys of layers i + L, i + 2 L, ...
    """
    old = source.num_hidden_layers
    kept = {name: name for name in parameter_shapes(source)}
    added = {}
    for name in kept:
        parts = name.split(".")
        if parts[:2] == ["encoder", "layers"]:
            for copy in range(1, factor):
                above = str(int(parts[2]) + copy * old)
                added[".".join([*parts[:2], above, *parts[3:]])] = name
    return kept | added


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("old", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_stack_is_the_2019_repositorys_double_and_quadruple(
    old: int, factor: int, kind: Kind
) -> None:
    source, target = deeper(PRE[1], old), deeper(PRE[1], old * factor)
    tensors = random_tensors(source, 3)
    grown = CopyLayers("stack").grow(tensors, source, target, kind=kind)
    expected = layers_after_the_2019_script(source, factor)
    assert grown.keys() == expected.keys()
    assert all(torch.equal(grown[new], tensors[name]) for new, name in expected.items())


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("stack", 3, 8, [0, 1, 2, 0, 1, 2, 0, 1]),
        ("interleave", 2, 6, [0, 0, 0, 1, 1, 1]),
        ("copy_top", 4, 6, [0, 1, 2, 3, 2, 3]),
        ("append_last", 3, 5, [0, 1, 2, 2, 2]),
        # MIDAS: blocks of b layers, number ceil(n / 2) of n repeated where it stands.
        ("middle", 3, 6, [0, 1, 2, 0, 1, 2]),  # n = 1
        ("middle", 6, 9, [0, 1, 2, 0, 1, 2, 3, 4, 5]),  # n = 2: the first
        ("middle", 9, 12, [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]),  # n = 3: the second
        ("middle", 12, 15, [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10, 11]),  # n = 4: the second
        ("middle", 5, 7, [0, 1, 2, 1, 2, 3, 4]),  # not whole blocks: centred, rounded down
        ("middle", 4, 4, [0, 1, 2, 3]),
    ],
)
def test_layer_maps(name: CopyMap, old: int, new: int, expected: list[int]) -> None:
    assert layer_sources(name, old, new) == expected


@given(st.integers(1, 30), st.integers(0, 30))
def test_middle_inserts_one_contiguous_copy_right_after_its_original(old: int, extra: int) -> None:
    if extra > old:
        with pytest.raises(GrowthError, match=f"block of {extra} layers"):
            layer_sources("middle", old, old + extra)
        return
    sources = [layer for layer in layer_sources("middle", old, old + extra) if layer is not None]
    breaks = [at for at, (below, above) in enumerate(pairwise(sources), 1) if above != below + 1]
    assert len(breaks) == bool(extra)
    for at in breaks:
        assert sources[:at] + sources[at + extra :] == list(range(old))
        margin = abs(sources[at] - (old - 1 - sources[at - 1]))  # layers below against above
        assert margin <= max(1, extra)


def test_every_operator_goes_by_its_own_name() -> None:
    assert list(DEPTH_OPERATORS) == [*get_args(CopyMap), *get_args(Addition)]
    assert all(operator.name == name for name, operator in DEPTH_OPERATORS.items())


@given(st.integers(1, 12), st.integers(0, 20), st.sampled_from(PLACEMENTS))
def test_new_layers_keep_the_old_ones_in_order_and_spread_evenly(
    old: int, extra: int, placement: Placement
) -> None:
    operator = NewLayers("identity", placement=placement)
    origins = operator.origins(deeper(SMALL, old), deeper(SMALL, old + extra))
    places = [
        (place, origin)
        for place in range(old + extra)
        if (origin := origins[f"encoder.layers.{place}.attention.qkv.weight"])
    ]
    assert [origin for _, origin in places] == [
        f"encoder.layers.{layer}.attention.qkv.weight" for layer in range(old)
    ]
    hosted = [b - a - 1 for (a, _), (b, _) in pairwise([*places, (old + extra, "")])]
    assert sum(hosted) == extra
    if placement == "top":
        assert not any(hosted[:-1])
    else:
        assert max(hosted) - min(hosted) <= 1


@settings(deadline=None, max_examples=150)
@given(configs(), st.sampled_from(ADDITIONS), st.integers(0, 5), st.integers(0, 99))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_growth_keeps_its_promise_on_random_shapes(
    dtype: torch.dtype, config: BertConfig, operator: NewLayers, extra: int, seed: int
) -> None:
    contract = operator.contract(config)
    if config.layer_norm not in contract.preserves:
        operator = NewLayers("identity_exact", placement=operator.placement)
        contract = operator.contract(config)
    measured = change_by(operator, config, config.num_hidden_layers + extra, dtype, seed)
    assert measured <= contract.tolerance[dtype]


@pytest.mark.parametrize("operator", OPERATORS, ids=name_of)
@pytest.mark.parametrize("config", FORMS, ids=name_of)
def test_no_contract_promises_too_much_or_too_little(
    operator: CopyLayers | NewLayers, config: BertConfig
) -> None:
    measured = change_by(operator, config, 4, torch.float64)
    contract = operator.contract(config)
    assert bool(contract.preserves) == bool(contract.tolerance)
    is_exact = config.layer_norm in contract.preserves
    assert measured <= 1e-10 if is_exact else measured > 1e-2


def test_pre_ln_identity_is_exact_to_the_last_bit() -> None:
    for config in PRE:
        for placement in PLACEMENTS:
            operator = NewLayers("identity_exact", placement=placement)
            assert change_by(operator, config, 5, torch.float32) == 0.0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_exact_growth_stays_exact_when_it_is_repeated(placement: Placement) -> None:
    operator = NewLayers("identity_exact", placement=placement)
    tensors = random_tensors(SMALL, 0)
    expected = logits(SMALL, tensors)
    config = SMALL
    for layers in (3, 7, 24):
        target = deeper(config, layers)
        tensors = operator.grow(tensors, config, target, fresh=random_tensors(target, layers))
        config = target
    assert change(expected, logits(config, tensors)) <= 1e-10


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("config", POST, ids=name_of)
def test_epsilon_scales_each_token_as_stated(config: BertConfig, eps: float) -> None:
    """1 + eps / 2 * (1 / v - 1), v = variance before the host's LayerNorm; to first order."""
    config = config.model_copy(update={"layer_norm_eps": eps})
    target = deeper(config, 3)
    tensors = random_tensors(config, 0)
    for name in tensors:  # With bias 0 the token is scaled as a whole.
        if name.endswith("feed_forward_layer_norm.bias"):
            tensors[name] = torch.zeros_like(tensors[name])
    operator = NewLayers("identity_exact")
    grown = operator.grow(tensors, config, target, fresh=random_tensors(target, 1))
    sums: list[Tensor] = []
    small = model_of(config, tensors)
    norm = small.encoder.layers[1].get_submodule("feed_forward_layer_norm")
    norm.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    with torch.no_grad():
        before = small(**inputs(config))["last_hidden_state"]
        after = model_of(target, grown)(**inputs(config))["last_hidden_state"]
    variance = sums[0].var(-1, correction=0)
    stated = eps / 2 * (1 / variance - 1)
    measured = ((after * before).sum(-1) / (before * before).sum(-1)) - 1
    torch.testing.assert_close(measured, stated, rtol=0.05, atol=10 * eps**2)
    assert stated.abs().max() > 0.01 * eps
    with torch.no_grad():
        moved = change(logits(config, tensors), logits(target, grown))
    assert 1e-3 * eps < moved <= operator.contract(config).tolerance[torch.float64]


def test_tolerance_grows_with_epsilon_only_where_it_enters() -> None:
    def bound(config: BertConfig, eps: float) -> float:
        config = config.model_copy(update={"layer_norm_eps": eps})
        return NewLayers("identity_exact").contract(config).tolerance[torch.float64]

    assert bound(SMALL, 1e-12) == 1e-10
    assert bound(SMALL, 1e-5) == pytest.approx(1e-4)
    assert bound(PRE[0], 1e-5) == 1e-10


def test_identity_is_the_2019_papers() -> None:
    """Section 4.1: zero last linear of each block, zero biases, other weights random."""
    target = deeper(PRE[0], 4)
    fresh = random_tensors(target, 1)
    tensors = random_tensors(PRE[0], 0)
    grown = NewLayers("identity").grow(tensors, PRE[0], target, fresh=fresh)
    for name, tensor in grown.items():
        if name in tensors:
            assert torch.equal(tensor, tensors[name])
        elif name.endswith(("bias", "output.weight")):
            assert not tensor.any()
        else:
            assert torch.equal(tensor, fresh[name])


def test_noise_has_the_stated_size_and_lies_on_the_output_projections_only() -> None:
    config = PRE[0].model_copy(update={"hidden_size": 48, "intermediate_size": 96})
    target = deeper(config, 6)
    arguments = (random_tensors(config, 0), config, target)
    fresh = random_tensors(target, 1)
    plain = NewLayers("identity").grow(*arguments, fresh=fresh)
    operator = DEPTH_OPERATORS["identity_noise"]
    noisy, again, other = (
        operator.grow(*arguments, fresh=fresh, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    changed = [name for name in plain if not torch.equal(plain[name], noisy[name])]
    assert len(changed) == 2 * 4
    assert all(name.endswith("output.weight") for name in changed)
    drawn = torch.cat([noisy[name].flatten() for name in changed])
    assert drawn.std().item() == pytest.approx(0.03, rel=0.02)
    assert all(torch.equal(noisy[name], again[name]) for name in noisy)
    assert not any(torch.equal(noisy[name], other[name]) for name in changed)


def test_the_hosts_affine_moves_to_the_last_of_its_new_layers() -> None:
    target = deeper(SMALL, 6)
    tensors = random_tensors(SMALL, 0)
    operator = NewLayers("identity_exact", placement="spread")  # 0 new new 1 new new
    grown = operator.grow(tensors, SMALL, target, fresh=random_tensors(target, 1))
    for host, top in ((0, 2), (3, 5)):
        for leaf, neutral in (("weight", 1.0), ("bias", 0.0)):
            name = f"feed_forward_layer_norm.{leaf}"
            old = tensors[f"encoder.layers.{host // 3}.{name}"]
            assert torch.equal(grown[f"encoder.layers.{top}.{name}"], old)
            for place in range(host, top):
                assert bool((grown[f"encoder.layers.{place}.{name}"] == neutral).all())
    assert torch.equal(grown["encoder.layers.5.attention_layer_norm.weight"], torch.ones(12))


def gradients(
    config: BertConfig, tensors: Mapping[str, Tensor], cotangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    model = model_of(config, tensors)
    outputs = model(**inputs(config))
    loss = torch.stack([(outputs[name] * cotangents[name]).sum() for name in cotangents]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }


EXACT = [
    pytest.param(operator, config, id=f"{name_of(operator)}-{name_of(config)}")
    for operator in OPERATORS
    for config in FORMS
    if config.layer_norm in operator.contract(config).preserves
]


@pytest.mark.parametrize(("operator", "config"), EXACT)
def test_mapped_moments_are_those_of_the_grown_models_gradient(
    operator: CopyLayers | NewLayers, config: BertConfig
) -> None:
    target = deeper(config, 5)
    tensors = random_tensors(config, 0)
    grown = operator.grow(tensors, config, target, fresh=random_tensors(target, 1))
    drawing = torch.Generator().manual_seed(2)
    cotangents = {
        name: torch.randn(output.shape, generator=drawing, dtype=output.dtype)
        for name, output in logits(config, tensors).items()
    }
    small, large = (gradients(*one, cotangents) for one in ((config, tensors), (target, grown)))
    squares = {name: gradient**2 for name, gradient in small.items()}
    mapped = operator.grow(small, config, target, kind="exp_avg")
    mapped_squares = operator.grow(squares, config, target, kind="exp_avg_sq")
    scale = max(gradient.abs().max().item() for gradient in small.values())
    for name, origin in operator.origins(config, target).items():
        if origin is None:
            assert not mapped[name].any()
            assert not mapped_squares[name].any()
            continue
        error = (mapped[name] - large[name]).abs().max().item()
        assert error <= 1e-10 * scale, name
        error = (mapped_squares[name] - large[name] ** 2).abs().max().item()
        assert error <= 1e-10 * scale**2, name


@pytest.mark.parametrize("operator", OPERATORS, ids=name_of)
def test_moments_get_no_noise_and_draw_nothing(operator: NewLayers | CopyLayers) -> None:
    target = deeper(SMALL, 4)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    moments = {name: tensor.abs() for name, tensor in random_tensors(SMALL, 0).items()}
    for kind in KINDS[1:]:
        grown = operator.grow(moments, SMALL, target, kind=kind, generator=generator)
        for name, origin in operator.origins(SMALL, target).items():
            expected = torch.zeros_like(grown[name]) if origin is None else moments[origin]
            assert torch.equal(grown[name], expected)
    assert torch.equal(generator.get_state(), before)
    same = operator.grow(moments, SMALL, SMALL)  # Growth by nothing needs nothing.
    assert list(same) == list(moments)
    assert all(torch.equal(same[name], moments[name]) for name in moments)


@pytest.mark.parametrize("operator", OPERATORS, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_are_pure_and_keep_the_dtype(
    operator: GrowthOperator, kind: Kind, dtype: torch.dtype
) -> None:
    target = deeper(SMALL, 4)
    tensors = random_tensors(SMALL, 0, dtype)
    fresh = random_tensors(target, 1, dtype)
    given = [*tensors.values(), *fresh.values()]
    before = [tensor.clone() for tensor in given]
    for tensor in tensors.values():
        tensor.requires_grad_()
    grown = operator.grow(
        tensors, SMALL, target, kind=kind, fresh=fresh, generator=torch.Generator()
    )
    assert {name: tensor.shape for name, tensor in grown.items()} == parameter_shapes(target)
    assert {tensor.dtype for tensor in grown.values()} == {dtype}
    all_tensors = [*grown.values(), *given]
    assert len({tensor.data_ptr() for tensor in all_tensors}) == len(all_tensors)
    for tensor in grown.values():
        assert not tensor.requires_grad
        tensor.add_(1.0)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


@pytest.mark.parametrize("operator", OPERATORS, ids=name_of)
def test_every_fault_is_reported_before_anything_grows(operator: GrowthOperator) -> None:
    target = SMALL.model_copy(
        update={"num_hidden_layers": 1, "hidden_size": 24, "hidden_dropout_prob": 0.1}
    )
    faults = operator.check(SMALL, target)
    assert len(faults) == 2
    assert "hidden_size: got 24 after 12; allowed: 12" in faults[0]
    assert "num_hidden_layers: got 1 after 2; allowed: at least 2" in faults[1]
    with pytest.raises(GrowthError, match="hidden_size.*cannot shrink"):
        operator.grow({}, SMALL, target)
    assert operator.check(SMALL, deeper(SMALL, 4)) == []


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("interleave", 5, "depth: got 'interleave' from 2 to 5 layers; allowed: a multiple of 2"),
        ("copy_top", 5, "at most 4 layers"),
        ("middle", 5, "at most 4 layers"),
    ],
)
def test_a_ratio_that_an_operator_cannot_make_is_a_fault(
    name: str, layers: int, message: str
) -> None:
    (fault,) = DEPTH_OPERATORS[name].check(SMALL, deeper(SMALL, layers))
    assert message in fault
    with pytest.raises(GrowthError, match="'identity' is no layer map; allowed: stack, "):
        layer_sources("identity", 2, layers)  # type: ignore[arg-type]


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    target = deeper(SMALL, 4)
    tensors = random_tensors(SMALL, 0)
    bias = tensors.pop("encoder.layers.1.attention.qkv.bias")
    tensors["encoder.layers.7.attention.qkv.bias"] = bias
    tensors["mlm_head.bias"] = tensors["mlm_head.bias"][1:]
    with pytest.raises(GrowthError) as caught:
        CopyLayers("stack").grow(tensors, SMALL, target)
    assert "no tensor 'encoder.layers.1.attention.qkv.bias'" in str(caught.value)
    assert "unexpected tensor 'encoder.layers.7.attention.qkv.bias'" in str(caught.value)
    assert "'mlm_head.bias' has shape (36,), expected (37,)" in str(caught.value)
    with pytest.raises(GrowthError, match="the fresh model does not fit"):
        NewLayers("random").grow(
            random_tensors(SMALL, 0), SMALL, target, fresh=random_tensors(SMALL, 1)
        )


def test_what_an_operator_needs_must_be_given() -> None:
    target = deeper(SMALL, 4)
    tensors = random_tensors(SMALL, 0)
    with pytest.raises(GrowthError, match="needs a freshly initialised model"):
        NewLayers("identity").grow(tensors, SMALL, target)
    with pytest.raises(GrowthError, match="needs a generator"):
        DEPTH_OPERATORS["identity_noise"].grow(
            tensors, SMALL, target, fresh=random_tensors(target, 1)
        )
    for sigma, name in ((0.1, "identity_exact"), (-0.1, "identity_noise")):
        with pytest.raises(GrowthError, match=f"sigma: got {sigma} with '{name}'"):
            NewLayers(name, sigma=sigma)  # type: ignore[arg-type]


def trained(config: BertConfig, tensors: Mapping[str, Tensor], steps: int) -> dict[str, Tensor]:
    """After `steps` of AdamW on random targets."""
    model = model_of(config, tensors)
    generator = torch.Generator().manual_seed(9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        ids = torch.randint(1, config.vocab_size, (8, 7), generator=generator)
        losses = model(ids, masked_lm_ids=(ids * 5 + 3) % config.vocab_size)
        optimizer.zero_grad()
        losses["mlm_loss_sum"].div(56).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("operator", COPIES, ids=name_of)
@pytest.mark.parametrize("config", FORMS, ids=name_of)
def test_copies_of_a_layer_are_pulled_apart_by_their_positions(
    operator: CopyLayers, config: BertConfig
) -> None:
    """The updates of two copies after 50 steps are not parallel, in any matrix.

    Measured: at most 0.80 where a layer's copies lie apart, 0.94 where they are neighbours.
    """
    bound = 0.97 if "neighbours" in operator.contract(config).symmetry else 0.9
    target = deeper(config, 4)
    start = operator.grow(random_tensors(config, 0, torch.float32), config, target)
    end = trained(target, start, 50)
    sources = layer_sources(operator.name, 2, 4)
    pairs = [(a, b) for b in range(4) for a in range(b) if sources[a] == sources[b]]
    assert pairs
    for a, b in pairs:
        for leaf in ("attention.qkv", "attention.output", "feed_forward.inner",
                     "feed_forward.output"):  # fmt: skip
            first, second = (
                (end[name] - start[name]).flatten()
                for name in (f"encoder.layers.{layer}.{leaf}.weight" for layer in (a, b))
            )
            assert torch.cosine_similarity(first, second, dim=0) < bound, (a, b, leaf)


@pytest.mark.parametrize("config", FORMS, ids=name_of)
def test_every_weight_of_an_exact_new_layer_learns(config: BertConfig) -> None:
    """The zero side has a gradient at once, the random side from the second step."""
    target = deeper(config, 4)
    tensors = random_tensors(config, 0, torch.float32)
    fresh = random_tensors(target, 1, torch.float32)
    start = NewLayers("identity_exact", placement="spread").grow(
        tensors, config, target, fresh=fresh
    )
    end = trained(target, start, 3)
    for name, before in start.items():
        if name.startswith("encoder.layers.") and name.endswith("weight"):
            moved = (end[name] - before).norm() / math.sqrt(before.numel())
            assert moved > 1e-4, name
