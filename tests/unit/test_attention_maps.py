"""Attention maps are those of the model's own forward, and the shares are what they say."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stacking.attention import SelfAttention, SharedAttention
from stacking.attention_maps import (
    ModelAttention,
    Sentence,
    attention_maps,
    attention_shares,
    measure,
)
from stacking.attention_maps_figures import Mosaic, mosaic_image
from stacking.attention_maps_files import (
    Limits,
    all_maps,
    chosen_heads,
    evenly,
    share_rows,
    side_by_side,
    table,
)
from stacking.attention_maps_models import layer_origins
from stacking.config import BertConfig, Recipe
from stacking.config_loading import merge
from stacking.errors import ConfigError
from stacking.growth import grow
from stacking.modeling import BertForPreTraining, init_weights

IDS = (2, 7, 8, 9, 7, 11, 12, 3)
FORMS: dict[str, dict[str, object]] = {
    "learned, post-LN": {},
    "sinusoidal, pre-LN": {"position": "sinusoidal", "layer_norm": "pre",
                           "layer_norm_affine": False, "embedding_layer_norm": False},
    "rotary, post-LN": {"position": "rotary"},
    "rotary, pre-LN": {"position": "rotary", "layer_norm": "pre", "type_vocab_size": 0},
    "shared attention": {"num_hidden_layers": 4, "shared_attention_layers": [1, 2]},
}  # fmt: skip


def build(**changes: object) -> BertForPreTraining:
    sizes: dict[str, object] = {
        "vocab_size": 30, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
        "intermediate_size": 20, "max_position_embeddings": 16, "initializer_range": 0.4,
    }  # fmt: skip
    model = BertForPreTraining(BertConfig.model_validate(sizes | changes))
    init_weights(model, torch.Generator().manual_seed(3))
    return model.eval()


def values_and_contexts(model: BertForPreTraining, ids: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """For each layer what a plain forward, which keeps no map, computes: [S,N,D] and [S,H]."""
    values: list[Tensor] = []
    contexts: list[Tensor] = []
    heads = model.config.num_attention_heads

    def read_value(_module: nn.Module, _given: object, output: Tensor) -> None:
        value = output[0].chunk(output.shape[2] // model.config.hidden_size, -1)[-1]
        values.append(value.view(len(value), heads, -1))

    hooks = []
    for layer in model.encoder.layers:
        attention = layer.attention
        assert isinstance(attention, SelfAttention | SharedAttention)
        source = attention.qkv if isinstance(attention, SelfAttention) else attention.value
        hooks.append(source.register_forward_hook(read_value))
        hooks.append(
            attention.output.register_forward_pre_hook(
                lambda _, given: contexts.append(given[0][0])
            )
        )
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return list(zip(values, contexts, strict=True))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_maps_times_values_are_what_each_layer_computes(form: dict[str, object]) -> None:
    model = build(**form)
    maps = attention_maps(model, IDS)
    layers = values_and_contexts(model, IDS)
    assert maps.shape == (len(layers), 3, len(IDS), len(IDS))
    assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-6)
    assert maps.std() > 0.05, "maps of equal numbers would prove nothing"
    for probabilities, (value, context) in zip(maps, layers, strict=True):
        ours = torch.einsum("nij,jnd->ind", probabilities, value).flatten(1)
        assert torch.allclose(ours, context, atol=1e-5)


def test_layers_that_share_attention_show_the_same_map() -> None:
    maps = attention_maps(build(num_hidden_layers=4, shared_attention_layers=[1, 2]), IDS)
    assert torch.equal(maps[1], maps[0])
    assert torch.equal(maps[2], maps[0])
    assert not torch.allclose(maps[3], maps[0], atol=1e-2)


def test_the_model_is_left_as_it_was_and_drops_nothing() -> None:
    model = build(num_hidden_layers=3, shared_attention_layers=[1]).train()
    maps = attention_maps(model, IDS)
    assert model.training
    assert torch.equal(maps, attention_maps(model.eval(), IDS))
    assert not any(layer._forward_hooks for layer in model.encoder.layers)
    attentions = [m for m in model.modules() if isinstance(m, SelfAttention)]
    kept = [attention.keeps_probabilities for attention in attentions]
    assert kept == [True, False]


def matrix(length: int, target: Sequence[int]) -> Tensor:
    """Row i gives all to `target[i]`."""
    return torch.eye(length)[list(target)]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ([0, 1, 2, 3, 4, 5], [1, 0, 0]),  # themselves
        ([0, 2, 3, 4, 3, 5], [1, 0, 0]),  # words beside them
        ([5, 0, 0, 0, 0, 5], [0, 1, 0]),  # the first word is beside the start token
        ([0, 5, 5, 5, 5, 0], [0, 0, 1]),  # so is the last word and the separator
        ([1, 3, 4, 1, 2, 1], [0, 0, 0]),  # two places off
        ([0, 1, 4, 0, 5, 5], [0.25, 0.25, 0.25]),
    ],
)
def test_shares_of_matrices_made_by_hand(target: list[int], expected: list[float]) -> None:
    assert attention_shares(matrix(6, target)).tolist() == expected


@pytest.mark.parametrize(("length", "near"), [(3, 1 / 3), (4, 2 / 4), (5, 7 / 15)])
def test_shares_of_equal_attention(length: int, near: float) -> None:
    shares = attention_shares(torch.full((length, length), 1 / length))
    assert shares.tolist() == pytest.approx([near, 1 / length, 1 / length])


def sentence(ids: Sequence[int]) -> Sentence:
    return Sentence(tuple(f"w{i}" for i in ids), tuple(ids))


def test_shares_are_a_mean_over_words_not_over_sentences() -> None:
    model = build()
    short, long = (2, 7, 3), IDS
    maps, shares, uniform = measure(model, sentence(short), [sentence(short), sentence(long)])
    words = torch.tensor([1.0, 6.0])
    parts = torch.stack([attention_shares(attention_maps(model, ids)) for ids in (short, long)])
    assert torch.equal(maps, attention_maps(model, short))
    assert torch.allclose(shares, torch.einsum("s,slnk->lnk", words, parts) / 7)
    assert float(uniform[1]) == pytest.approx((1 / 3 + 6 / 8) / 7)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    with pytest.raises(ConfigError, match="the id 30, the model has a vocabulary of 30"):
        measure(build(), sentence(IDS), [sentence((2, 30, 3))])


@pytest.mark.parametrize("layer_norm", ["pre", "post"])
def test_layers_that_keep_their_function_keep_their_maps(layer_norm: str) -> None:
    small = build(layer_norm=layer_norm)
    large = grow(small, small.config.model_copy(update={"num_hidden_layers": 4}),
                 depth="identity_exact")  # fmt: skip
    before, after = attention_maps(small, IDS), attention_maps(large, IDS)
    assert torch.allclose(after[:2], before, atol=1e-5)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_right_after_stacking_the_lowest_copies_have_the_maps_of_before(
    form: dict[str, object],
) -> None:
    small = build(**form)
    layers, shared = small.config.num_hidden_layers, small.config.shared_attention_layers
    copies = (*shared, *(layer + layers for layer in shared))
    target = {"num_hidden_layers": 2 * layers, "shared_attention_layers": copies}
    large = grow(small, small.config.model_copy(update=target), depth="stack")
    before, after = attention_maps(small, IDS), attention_maps(large, IDS)
    assert torch.allclose(after[:layers], before, atol=1e-6)
    assert not torch.allclose(after[layers:], before, atol=1e-2)


def recipe(*stages: dict[str, object]) -> Recipe:
    document: dict[str, object] = {
        "name": "tiny", "model": {"vocab_size": 30, "hidden_size": 8, "num_attention_heads": 2,
                                  "num_hidden_layers": 8},
        "data": {"max_seq_length": 16, "max_predictions_per_seq": 3},
        "learning_rate": {"schedule": "constant", "peak": 1e-3},
        "stages": [{"steps": 5, **stage} for stage in stages],
    }  # fmt: skip
    return Recipe.model_validate(merge(document, {}))


@pytest.mark.parametrize(
    ("depth", "from_first", "from_second"),
    [
        ("stack", (0, 1, 0, 1, 0, 1, 0, 1), (0, 1, 2, 3, 0, 1, 2, 3)),
        ("interleave", (0, 0, 1, 1, 0, 0, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3)),
        ("identity_exact", (0, 1, 0, 1, *[None] * 4), (0, 1, 2, 3, *[None] * 4)),
    ],
)
def test_layers_are_followed_through_the_stages(
    depth: str, from_first: tuple[int | None, ...], from_second: tuple[int | None, ...]
) -> None:
    grown = recipe({"num_hidden_layers": 2}, {"num_hidden_layers": 4},
                   {"num_hidden_layers": 8, "depth": depth})  # fmt: skip
    assert layer_origins(grown, 0, 0) == (0, 1)
    assert layer_origins(grown, 0, 1) == (0, 1, 0, 1)
    assert layer_origins(grown, 1, 2) == from_second
    assert layer_origins(grown, 0, 2) == from_first


def attention(name: str, origins: Sequence[int | None], heads: int = 2) -> ModelAttention:
    """Layer l, head n gives all attention of all rows to token (l + n) % 4."""
    layers = len(origins)
    maps = torch.stack([
        torch.stack([matrix(4, [(layer + head) % 4] * 4) for head in range(heads)])
        for layer in range(layers)
    ])  # fmt: skip
    uniform = attention_shares(torch.full((4, 4), 0.25))
    return ModelAttention(name, f"{layers} layers", maps, attention_shares(maps), uniform,
                          tuple(origins))  # fmt: skip


WORDS = sentence([2, 8, 9, 3])


def test_a_head_is_shown_beside_its_copies() -> None:
    models = [attention("before", [0, 1]), attention("after", [0, 1, 0, 1, 0, 1])]
    mosaic, notes = side_by_side(models, WORDS, [(0, 1), (1, 0)])
    names = [[cell and cell[0] for cell in row] for row in mosaic.cells]
    assert mosaic.columns == ["layer 1, head 2", "layer 2, head 1"]
    assert names == [["", ""], ["layer 1", "layer 2"], ["layer 5", "layer 6"]]
    assert [row.split("\n")[0] for row in mosaic.rows] == ["before", "after", "after"]
    top = mosaic.cells[2][0]
    assert top is not None
    assert torch.equal(torch.from_numpy(top[1]), models[1].maps[4, 1])
    assert notes == [
        "copies of a layer drawn in side_by_side: of 3 in after the lowest and the highest"
    ]


def test_a_layer_with_fewer_copies_leaves_its_place_empty() -> None:
    models = [attention("before", [0, 1]), attention("after", [0, 1, 1])]
    mosaic, notes = side_by_side(models, WORDS, [(0, 0), (1, 0)])
    names = [[cell and cell[0] for cell in row] for row in mosaic.cells]
    assert names == [["", ""], ["layer 1", "layer 2"], [None, "layer 3"]]
    assert not notes


def test_a_figure_of_many_layers_says_what_it_leaves_out() -> None:
    mosaic, notes = all_maps(attention("big", [None] * 24, heads=16), WORDS, Limits(12, 4))
    assert len(mosaic.rows) == 12
    assert (mosaic.rows[0], mosaic.rows[-1]) == ("layer 1", "layer 24")
    assert mosaic.columns == ["head 1", "head 6", "head 11", "head 16"]
    assert notes == ["layers drawn in maps_big: 12 of 24 (--layers)",
                     "heads drawn in maps_big: 4 of 16 (--heads)"]  # fmt: skip
    assert all_maps(attention("small", [0, 1]), WORDS, Limits(12, 4))[1] == []


def test_places_are_spread_from_the_first_to_the_last() -> None:
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(24, 4) == [0, 8, 15, 23]
    assert evenly(24, 1) == [0]


def test_chosen_heads_count_from_one_and_all_faults_are_told() -> None:
    model = attention("before", [0, 1, 2])
    assert chosen_heads(model, ["3:2", "1:1"]) == [(2, 1), (0, 0)]
    assert chosen_heads(model, []) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    with pytest.raises(ConfigError) as caught:
        chosen_heads(model, ["4:1", "1:3", "0:1", "1", "1:x", "2:2"])
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["--show 4", "--show 1",
                                                                      "--show 0", "--show 1",
                                                                      "--show 1"]  # fmt: skip
    assert "from 1:1 to 3:2, of before" in caught.value.faults[0]
    with pytest.raises(ConfigError, match="got 13 heads; allowed: at most 12"):
        chosen_heads(model, ["1:1"] * 13)


def test_rows_hold_each_head_and_the_layers_mean() -> None:
    rows = list(share_rows([attention("before", [0, 1])]))
    assert [(row["layer"], row["head"]) for row in rows] == [
        (1, "mean"), (1, "1"), (1, "2"), (2, "mean"), (2, "1"), (2, "2"),
    ]  # fmt: skip
    # Head 1 of layer 1 reads the start token alone, head 2 the first word: near both words.
    assert [row["start"] for row in rows[:3]] == [0.5, 1.0, 0.0]
    assert [row["neighbours"] for row in rows[:3]] == [0.5, 0.0, 1.0]
    assert [row["rest"] for row in rows] == [0.0] * 6


def test_the_table_gives_each_layer_and_the_mean_of_all() -> None:
    lines = table([attention("before", [0, 1])]).splitlines()
    assert lines[0] == "before: 2 layers"
    assert lines[2].split() == ["1", "50.0%", "50.0%", "0.0%", "0.0%"]
    assert lines[3].split() == ["2", "100.0%", "0.0%", "0.0%", "0.0%"]
    assert lines[4].split() == ["all", "75.0%", "25.0%", "0.0%", "0.0%"]
    assert lines[5].split() == ["equal", "50.0%", "25.0%", "25.0%", "0.0%"]


@pytest.mark.parametrize("tokens", [("[CLS]", "$", "\\frac", "$", "[SEP]"), ("a b", "x" * 300)])
def test_any_token_can_be_drawn(tokens: tuple[str, ...]) -> None:
    cell = "layer 1", np.full((len(tokens), len(tokens)), 0.2, np.float32)
    mosaic = Mosaic([[cell, None]], ["$", "$"][:1], ["a", "b"], tokens, "$x$")
    assert mosaic_image(mosaic, "png").startswith(b"\x89PNG")
    assert mosaic_image(mosaic, "svg") == mosaic_image(mosaic, "svg"), (
        "the same run, the same bytes"
    )
