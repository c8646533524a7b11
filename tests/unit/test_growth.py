"""Depth growth: layer maps against the papers' definitions, legality, and function preservation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth import Operators, grow, grow_weights
from stacking.growth.depth import layer_sources
from stacking.modeling import BertForPreTraining, init_weights

CONFIG = BertConfig(
    vocab_size=37,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=11,
    layer_norm="pre",
)


def model_of(layers: int, seed: int = 0) -> BertForPreTraining:
    model = BertForPreTraining(CONFIG.model_copy(update={"num_hidden_layers": layers}))
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


@given(st.integers(1, 9), st.integers(0, 20))
def test_stack_puts_old_layer_i_at_every_i_plus_multiple_of_old(old: int, extra: int) -> None:
    sources = layer_sources("stack", old, old + extra)
    assert sources == [i % old for i in range(old + extra)]


def test_stack_doubles_as_in_the_2019_paper() -> None:
    assert layer_sources("stack", 3, 6) == [0, 1, 2, 0, 1, 2]


def test_interleave_repeats_each_layer_in_place() -> None:
    assert layer_sources("interleave", 3, 6) == [0, 0, 1, 1, 2, 2]


def test_copy_top_copies_the_newest_block() -> None:
    assert layer_sources("copy_top", 6, 9) == [0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_random_keeps_old_layers_and_leaves_new_ones_fresh() -> None:
    assert layer_sources("random", 2, 4) == [0, 1, None, None]


@pytest.mark.parametrize(
    ("operator", "old", "new", "message"),
    [
        ("stack", 4, 2, "cannot shrink"),
        ("interleave", 2, 5, "multiple of 2"),
        ("copy_top", 2, 5, "at most 4"),
    ],
)
def test_an_illegal_change_of_depth_is_refused_with_the_reason(
    operator: str, old: int, new: int, message: str
) -> None:
    with pytest.raises(GrowthError, match=message):
        layer_sources(operator, old, new)  # type: ignore[arg-type]


def test_growth_copies_lower_half_upward_and_keeps_the_rest() -> None:
    small = model_of(2)
    large = grow(small, CONFIG.model_copy(update={"num_hidden_layers": 4}))
    old, new = small.state_dict(), large.state_dict()
    assert len([name for name in new if name.startswith("encoder.layers.3.")]) > 0
    for name, tensor in new.items():
        source = name.replace("layers.2.", "layers.0.").replace("layers.3.", "layers.1.")
        torch.testing.assert_close(tensor, old[source], rtol=0, atol=0)


def test_grown_tensors_are_copies_and_the_small_model_is_untouched() -> None:
    small = model_of(2)
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    large = grow(small, CONFIG.model_copy(update={"num_hidden_layers": 4}))
    with torch.no_grad():
        for parameter in large.parameters():
            parameter.add_(1.0)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_growth_to_the_same_depth_preserves_the_function() -> None:
    small = model_of(2).eval()
    same = grow(small, CONFIG).eval()
    ids = torch.randint(5, 37, (3, 7), generator=torch.Generator().manual_seed(1))
    expected = small(ids)["prediction_logits"]
    torch.testing.assert_close(same(ids)["prediction_logits"], expected, rtol=0, atol=0)


def test_random_growth_is_the_same_for_the_same_seed_only() -> None:
    weights = {n: p.detach() for n, p in model_of(2).named_parameters()}
    target = CONFIG.model_copy(update={"num_hidden_layers": 3})
    name = "encoder.layers.2.attention.qkv.weight"
    first, again, other = (
        grow_weights(weights, CONFIG, target, operators=Operators("random"), seed=seed)[name]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_no_operator_changes_is_refused_by_name() -> None:
    with pytest.raises(GrowthError, match="vocab_size: got 38 after 37; allowed: 37"):
        grow(model_of(2), CONFIG.model_copy(update={"vocab_size": 38}))


def test_a_missing_tensor_is_refused_by_name() -> None:
    weights = {n: p.detach() for n, p in model_of(2).named_parameters()}
    del weights["encoder.layers.1.attention.qkv.bias"]
    with pytest.raises(GrowthError, match=r"layers\.1\.attention\.qkv\.bias"):
        grow_weights(weights, CONFIG, CONFIG.model_copy(update={"num_hidden_layers": 4}))
