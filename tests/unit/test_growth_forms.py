"""Growth of what is no size: decoder, pooling, positions, attention, layers of different width."""

import pytest
import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.attention import Unshare
from stacking.growth.contract import Kind, parameter_shapes
from stacking.growth.decoder import Untie
from stacking.growth.depth import CopyLayers, NewLayers
from stacking.growth.length import POSITION_OPERATORS, ChangePooling, GrowPositions
from stacking.growth.width import roles_of
from stacking.growth.width_ffn import FFN_OPERATORS, FfnAki, FfnTile
from stacking.growth.width_hidden import HiddenAki, HiddenDuplicate, HiddenFpi, HiddenUneven
from stacking.modeling import BertForPreTraining

TABLE = "embeddings.position_embeddings.weight"
KINDS: list[Kind] = ["weight", "exp_avg", "exp_avg_sq", "is_old"]


def config_of(**fields: object) -> BertConfig:
    sizes: dict[str, object] = {
        "vocab_size": 37,
        "hidden_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 7,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig.model_validate({**sizes, **fields})


def random_tensors(config: BertConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        + float("norm.weight" in name)
        for name, shape in parameter_shapes(config).items()
    }


def logits(config: BertConfig, tensors: dict[str, Tensor], length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 37, (3, length), generator=generator)
    model = BertForPreTraining(config).double().eval()
    model.load_state_dict(tensors)
    with torch.no_grad():
        found: Tensor = model(ids, masked_lm_positions=torch.tensor([[1, 4], [2, 3], [5, 0]]))[
            "prediction_logits"
        ]
    return found


def moved(
    source: BertConfig, small: dict[str, Tensor], target: BertConfig, large: dict[str, Tensor]
) -> float:
    before, after = logits(source, small), logits(target, large)
    return float((after - before).abs().max() / before.abs().max())


# ---- Decoder ----


@pytest.mark.parametrize("kind", KINDS)
def test_an_untied_decoder_is_a_copy_of_the_embedding_and_no_old_number(kind: Kind) -> None:
    source, target = config_of(), config_of(tie_word_embeddings=False)
    small = random_tensors(source)
    large = Untie().grow(small, source, target, kind=kind)
    decoder = large.pop("mlm_head.decoder.weight")
    embedding = small["embeddings.word_embeddings.weight"]
    assert torch.equal(decoder, torch.zeros_like(embedding) if kind == "is_old" else embedding)
    assert all(torch.equal(tensor, small[name]) for name, tensor in large.items())
    assert decoder.data_ptr() != large["embeddings.word_embeddings.weight"].data_ptr()


def test_untying_keeps_every_logit_to_the_last_bit() -> None:
    source, target = config_of(), config_of(tie_word_embeddings=False)
    small = random_tensors(source)
    assert moved(source, small, target, Untie().grow(small, source, target)) == 0.0


def test_an_untied_decoder_reads_hidden_units_with_their_shares() -> None:
    source = config_of(tie_word_embeddings=False)
    target = config_of(tie_word_embeddings=False, hidden_size=24, num_attention_heads=6)
    small = random_tensors(source)
    large = HiddenDuplicate(noise=0.0).grow(small, source, target)
    for name, factor in {
        "mlm_head.decoder.weight": 0.5,
        "mlm_head.layer_norm.weight": 1.0,
        "embeddings.word_embeddings.weight": 1.0,
    }.items():
        torch.testing.assert_close(large[name], torch.cat([small[name]] * 2, dim=-1) * factor)
    noisy = HiddenDuplicate().grow(small, source, target, generator=torch.Generator())
    decoder = noisy["mlm_head.decoder.weight"]
    assert not torch.equal(decoder[:, :12], decoder[:, 12:])
    torch.testing.assert_close(decoder[:, :12] + decoder[:, 12:], small["mlm_head.decoder.weight"])


# ---- Pooling ----


@pytest.mark.parametrize("kind", ["mean", "max", "concat"])
def test_pooling_ends_without_touching_any_other_weight(kind: str) -> None:
    source, target = config_of(pooling=kind, pooling_size=2), config_of()
    small = random_tensors(source)
    large = ChangePooling().grow(small, source, target)
    dropped = set(small) - set(large)
    assert dropped == (
        {"embeddings.pooling.weight", "embeddings.pooling.bias"} if kind == "concat" else set()
    )
    assert all(torch.equal(tensor, small[name]) for name, tensor in large.items())
    assert not ChangePooling().contract(target).preserves
    assert moved(source, small, target, large) > 1e-3


def test_a_smaller_pool_or_another_kind_is_a_legal_change() -> None:
    source = config_of(pooling="mean", pooling_size=4)
    for fields in ({"pooling": "max", "pooling_size": 4}, {"pooling": "mean", "pooling_size": 2}):
        assert ChangePooling().check(source, config_of(**fields)) == []
    concat = config_of(pooling="concat", pooling_size=2)
    assert ChangePooling().check(concat, config_of(pooling="mean", pooling_size=2)) == []


@pytest.mark.parametrize("kind", ["mean", "max", "concat"])
@pytest.mark.parametrize("layer_norm", ["post", "pre"])
def test_in_a_model_of_one_layer_pooling_changes_no_logit(kind: str, layer_norm: str) -> None:
    source = config_of(num_hidden_layers=1, pooling=kind, pooling_size=3, layer_norm=layer_norm)
    target = config_of(num_hidden_layers=1, layer_norm=layer_norm)
    small = random_tensors(source)
    assert layer_norm in ChangePooling().contract(target).preserves
    large = ChangePooling().grow(small, source, target)
    assert moved(source, small, target, large) < 1e-10


@pytest.mark.parametrize("operator", [HiddenDuplicate(), HiddenUneven()], ids=str)
def test_hidden_growth_keeps_pooling_by_concatenation(
    operator: HiddenDuplicate | HiddenUneven,
) -> None:
    source = config_of(pooling="concat", pooling_size=3)
    target = config_of(pooling="concat", pooling_size=3, hidden_size=24, num_attention_heads=6)
    small = random_tensors(source)
    large = operator.grow(small, source, target, generator=torch.Generator())
    assert moved(source, small, target, large) < 1e-10


# ---- Positions ----


def longer(name: str, old: int, new: int, kind: Kind = "weight") -> tuple[Tensor, Tensor]:
    """The table before and after."""
    source, target = (config_of(max_position_embeddings=size) for size in (old, new))
    small = random_tensors(source)
    operator, fresh = POSITION_OPERATORS[name], random_tensors(target, 9)
    large = operator.grow(small, source, target, kind=kind, fresh=fresh)
    assert all(torch.equal(large[key], small[key]) for key in small if key != TABLE)
    return small[TABLE], large[TABLE]


def test_tiled_positions_repeat_the_table() -> None:
    for kind in KINDS[:3]:
        before, after = longer("tile", 7, 17, kind)
        assert torch.equal(after, torch.cat([before, before, before[:3]]))


def test_fresh_positions_come_from_the_fresh_model_and_have_no_moments() -> None:
    before, after = longer("fresh", 7, 12)
    fresh = random_tensors(config_of(max_position_embeddings=12), 9)[TABLE]
    assert torch.equal(after, torch.cat([before, fresh[7:]]))
    for kind in KINDS[1:]:
        before, after = longer("fresh", 7, 12, kind)
        assert torch.equal(after, torch.cat([before, torch.zeros(5, 12, dtype=before.dtype)]))


@pytest.mark.parametrize(("old", "new"), [(7, 12), (7, 13), (4, 5), (1, 3), (7, 7)])
def test_interpolated_positions_are_torchs_linear_interpolation(old: int, new: int) -> None:
    for kind in KINDS[:3]:
        before, after = longer("interpolate", old, new, kind)
        expected = torch.nn.functional.interpolate(
            before.t()[None], size=new, mode="linear", align_corners=True
        )[0].t()
        torch.testing.assert_close(after, expected)


def test_only_positions_that_interpolation_leaves_whole_are_old() -> None:
    source, target = config_of(max_position_embeddings=4), config_of(max_position_embeddings=7)
    ones = {name: torch.ones_like(tensor) for name, tensor in random_tensors(source).items()}
    flags = GrowPositions("interpolate").grow(ones, source, target, kind="is_old")[TABLE]
    assert flags[:, 0].tolist() == [1, 0, 1, 0, 1, 0, 1]
    single = config_of(max_position_embeddings=1)
    ones = {name: torch.ones_like(tensor) for name, tensor in random_tensors(single).items()}
    flags = GrowPositions("interpolate").grow(ones, single, source, kind="is_old")[TABLE]
    assert flags[:, 0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("name", ["tile", "fresh", "interpolate"])
def test_longer_positions_keep_short_sequences_unless_they_are_stretched(name: str) -> None:
    source, target = config_of(), config_of(max_position_embeddings=16)
    small = random_tensors(source)
    operator = POSITION_OPERATORS[name]
    large = operator.grow(small, source, target, fresh=random_tensors(target, 9))
    is_exact = "post" in operator.contract(target).preserves
    assert is_exact == (name != "interpolate")
    found = moved(source, small, target, large)
    assert found == 0.0 if is_exact else found > 1e-3
    assert logits(target, large, length=16).isfinite().all()


def test_fresh_positions_must_be_given() -> None:
    source, target = config_of(), config_of(max_position_embeddings=9)
    with pytest.raises(GrowthError, match="fresh needs a freshly initialised model"):
        POSITION_OPERATORS["fresh"].grow(random_tensors(source), source, target)


# ---- Attention ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_unshared_layers_get_queries_and_keys_of_the_layer_whose_probabilities_they_used(
    kind: Kind, leaf: str
) -> None:
    source = config_of(shared_attention_layers=[1, 3])
    source = source.model_copy(
        update={"num_hidden_layers": 6, "shared_attention_layers": (1, 2, 4)}
    )
    target = source.model_copy(update={"shared_attention_layers": (1,)})
    small = random_tensors(source)
    large = Unshare().grow(small, source, target, kind=kind)
    for layer, used in [(2, 0), (4, 3)]:  # layer 2 used layer 1's, which were layer 0's
        name = f"encoder.layers.{layer}.attention"
        query, key, value = large[f"{name}.qkv.{leaf}"].chunk(3)
        theirs = small[f"encoder.layers.{used}.attention.qkv.{leaf}"].chunk(3)
        for found, origin in ((query, theirs[0]), (key, theirs[1])):
            assert torch.equal(found, torch.zeros_like(origin) if kind == "is_old" else origin)
        assert torch.equal(value, small[f"{name}.value.{leaf}"])
    gone = {f"encoder.layers.{layer}.attention.value.{leaf}" for layer in (2, 4)}
    assert not gone & set(large)
    kept = set(small) & set(large)
    assert f"encoder.layers.1.attention.value.{leaf}" in kept
    assert all(torch.equal(large[name], small[name]) for name in kept)
    assert list(large) == list(parameter_shapes(target))


def test_unsharing_changes_the_function_as_queries_read_another_input() -> None:
    source, target = config_of(shared_attention_layers=[1]), config_of()
    small = random_tensors(source)
    assert not Unshare().contract(target).preserves
    assert moved(source, small, target, Unshare().grow(small, source, target)) > 1e-3
    # With nothing between the two layers the input is the same, and so is the function.
    pre = {"layer_norm": "pre", "layer_norm_affine": False, "num_hidden_layers": 2}
    source, target = config_of(shared_attention_layers=[1], **pre), config_of(**pre)
    small = random_tensors(source)
    for part in ("attention.output", "feed_forward.output"):
        for leaf in ("weight", "bias"):
            small[f"encoder.layers.0.{part}.{leaf}"].zero_()
    assert moved(source, small, target, Unshare().grow(small, source, target)) < 1e-12


def test_new_layers_between_would_part_a_layer_from_the_attention_that_it_shares() -> None:
    source = config_of(shared_attention_layers=[1], layer_norm="pre")
    fields = {"num_hidden_layers": 8, "shared_attention_layers": (2,)}
    target = source.model_copy(update=fields)
    spread, top = (NewLayers("identity_exact", placement=at) for at in ("spread", "top"))
    small = random_tensors(source)
    large = spread.grow(small, source, target, fresh=random_tensors(target, 9))
    assert not spread.contract(target).preserves
    assert moved(source, small, target, large) > 1e-3
    target = source.model_copy(update={"num_hidden_layers": 8, "shared_attention_layers": (1, 5)})
    large = top.grow(small, source, target, fresh=random_tensors(target, 9))
    assert "pre" in top.contract(target).preserves
    assert moved(source, small, target, large) < 1e-12


# ---- Layers of different width ----


@pytest.mark.parametrize("operator", FFN_OPERATORS.values(), ids=str)
def test_layers_that_do_not_change_are_not_touched(operator: FfnTile) -> None:
    source = config_of(layer_intermediate_sizes=[5, 20, 5, 3])
    target = config_of(layer_intermediate_sizes=[10, 20, 5, 9])
    small = random_tensors(source)
    large = operator.grow(
        small, source, target, fresh=random_tensors(target, 9), generator=torch.Generator()
    )
    assert {name: tensor.shape for name, tensor in large.items()} == parameter_shapes(target)
    assert set(operator.plan(source, target).inner) == {0, 3}
    for name, tensor in small.items():
        is_grown = name.startswith(("encoder.layers.0.feed", "encoder.layers.3.feed"))
        if not is_grown:
            assert torch.equal(large[name], tensor), name
    if operator.contract(source).preserves:
        assert moved(source, small, target, large) < 1e-10


def test_equal_widths_may_be_written_in_two_ways() -> None:
    source = config_of(layer_intermediate_sizes=[20] * 4, intermediate_size=99)
    target = config_of(hidden_size=24, num_attention_heads=6)
    assert HiddenDuplicate().check(source, target) == []
    small = random_tensors(source)
    large = HiddenDuplicate(noise=0.0).grow(small, source, target)
    assert moved(source, small, target, large) < 1e-10


def test_aki_takes_units_of_the_next_layer_only_where_it_has_the_same_form() -> None:
    source = config_of(layer_intermediate_sizes=[5, 5, 3, 5])
    target = config_of(layer_intermediate_sizes=[8, 8, 3, 8])
    small = random_tensors(source)
    large = FfnAki(noise=0.0).grow(small, source, target)
    for layer, origin in [(0, 1), (1, 1), (3, 3)]:
        further = large[f"encoder.layers.{layer}.feed_forward.inner.weight"][5:]
        own = small[f"encoder.layers.{origin}.feed_forward.inner.weight"]
        assert torch.equal(further, own[:3]), layer


def test_depth_copies_layers_of_every_form_and_refuses_others() -> None:
    fields = {"layer_intermediate_sizes": [5, 20], "shared_attention_layers": [1]}
    source = config_of(num_hidden_layers=2, **fields)
    fields = {"layer_intermediate_sizes": [5, 20, 5, 20], "shared_attention_layers": [1, 3]}
    target = config_of(num_hidden_layers=4, **fields)
    small = random_tensors(source)
    large = CopyLayers("stack").grow(small, source, target)
    assert {name: tensor.shape for name, tensor in large.items()} == parameter_shapes(target)
    faults = CopyLayers("interleave").check(source, target)
    assert [fault.split(":")[0] for fault in faults] == [
        "layer_intermediate_sizes",
        "shared_attention_layers",
        "layer_intermediate_sizes",
        "shared_attention_layers",
    ]


# ---- Heads ----


@pytest.mark.parametrize(
    "operator",
    [
        HiddenDuplicate(heads="zero", noise=0.0),
        HiddenUneven(heads="zero"),
        HiddenFpi(heads="zero", noise=0.0),
        HiddenFpi(fan_in="rms", heads="zero", noise=0.0),
        HiddenAki(heads="zero", noise=0.0),
    ],
    ids=str,
)
def test_new_heads_without_output_are_fresh_in_every_operator(
    operator: HiddenDuplicate | HiddenUneven | HiddenFpi | HiddenAki,
) -> None:
    source = config_of(shared_attention_layers=[2])
    target = source.model_copy(update={"hidden_size": 24, "num_attention_heads": 6})
    small, fresh = random_tensors(source), random_tensors(target, 9)
    large = operator.grow(small, source, target, fresh=fresh, generator=torch.Generator())
    for layer, name, parts in [(0, "qkv", 3), (1, "qkv", 3), (2, "value", 1)]:
        key = f"encoder.layers.{layer}.attention.{name}.weight"
        assert torch.equal(*(w[key].view(parts, 6, 4, 24)[:, 3:] for w in (large, fresh)))
        output = large[f"encoder.layers.{layer}.attention.output.weight"]
        assert not output[:, 12:].any()
        assert output[:, :12].all()
    if operator.contract(source).preserves:
        assert moved(source, small, target, large) < 1e-10


def test_every_parameter_of_the_new_forms_has_a_role_on_each_axis() -> None:
    config = config_of(
        tie_word_embeddings=False, pooling="concat", pooling_size=2, shared_attention_layers=[2]
    )
    shapes = parameter_shapes(config)
    assert "mlm_head.decoder.weight" in shapes
    assert all(len(roles_of(name)) == len(shape) for name, shape in shapes.items())
