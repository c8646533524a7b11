"""The plan of a growth: its moves, its name, its promise; and every growth that there is not."""

import dataclasses

import pytest
import torch
from torch import Tensor

from stacking.config import BertConfig, Recipe, Stage
from stacking.errors import GrowthError
from stacking.growth import (
    GrowthPlan,
    Operators,
    grow,
    grow_weights,
    growth_faults,
    plan_growth,
    recipe_faults,
)
from stacking.growth.contract import inner_sizes, parameter_shapes
from stacking.growth.plan import before_learning
from stacking.modeling import BertForPreTraining, init_weights

SIZES: dict[str, object] = {
    "vocab_size": 37,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 11,
}


def config_of(**fields: object) -> BertConfig:
    return BertConfig.model_validate({**SIZES, **fields})


def weights_of(config: BertConfig, seed: int = 0) -> dict[str, Tensor]:
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(seed))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def with_noise(plan: GrowthPlan) -> list[float]:
    return [getattr(move.operator, "noise", 0.0) for move in plan.moves]


# ---- Moves ----

EVERYTHING = (
    config_of(
        num_hidden_layers=3,
        shared_attention_layers=[2],
        pooling="concat",
        pooling_size=2,
        layer_intermediate_sizes=[5, 20, 20],
    ),
    config_of(
        hidden_size=24,
        num_attention_heads=6,
        num_hidden_layers=6,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    ),
)


def test_moves_come_in_the_fixed_order_and_each_leaves_a_whole_model() -> None:
    plan = plan_growth(*EVERYTHING, Operators(hidden="uneven", heads="zero", positions="fresh"))
    assert plan.name == (
        "decoder untie + pooling change + positions fresh + attention unshare + "
        "hidden uneven with heads zero + ffn tile + depth stack"
    )
    here = plan.source
    for move in plan.moves:
        assert parameter_shapes(move.source) == parameter_shapes(here)
        assert move.operator.check(move.source, move.target) == []
        here = move.target
    assert here == plan.target
    assert [move.target.num_hidden_layers for move in plan.moves] == [3] * 6 + [6]
    assert inner_sizes(plan.moves[-1].source) == [20, 20, 20]
    grown = plan.grow(weights_of(plan.source))
    assert {name: t.shape for name, t in grown.items()} == parameter_shapes(plan.target)
    assert list(grown) == list(parameter_shapes(plan.target))


def test_a_dimension_that_stays_has_no_move() -> None:
    source = config_of()
    assert plan_growth(source, source).name == "nothing"
    assert plan_growth(source, source).tolerance() == 0.0
    assert plan_growth(source, config_of(num_hidden_layers=4)).name == "depth stack"
    assert plan_growth(source, config_of(intermediate_size=40)).name == "ffn tile"
    same = config_of(intermediate_size=99, layer_intermediate_sizes=[20, 20])
    assert plan_growth(source, same).moves == ()
    free = config_of(hidden_dropout_prob=0.3, initializer_range=0.5)
    assert plan_growth(source, free).moves == ()


def test_growing_nothing_gives_copies() -> None:
    weights = weights_of(config_of())
    grown = plan_growth(config_of(), config_of()).grow(weights)
    assert list(grown) == list(weights)
    for name, tensor in grown.items():
        assert torch.equal(tensor, weights[name])
        assert tensor.data_ptr() != weights[name].data_ptr()


@pytest.mark.parametrize("position", ["sinusoidal", "rotary"])
def test_positions_without_a_table_have_nothing_to_grow(position: str) -> None:
    source = config_of(position=position, num_attention_heads=3)
    target = config_of(position=position, num_attention_heads=3, max_position_embeddings=99)
    assert plan_growth(source, target).moves == ()
    shorter = config_of(position=position, max_position_embeddings=7, num_hidden_layers=4)
    assert plan_growth(source, shorter).name == "depth stack"


def test_depth_decides_which_form_a_layer_must_have_before_it() -> None:
    source = config_of(num_hidden_layers=3, layer_intermediate_sizes=[5, 10, 20])
    target = config_of(num_hidden_layers=6, layer_intermediate_sizes=[10, 10, 20, 10, 10, 20])
    plan = plan_growth(source, target, Operators("stack"))
    assert inner_sizes(plan.moves[-1].source) == [10, 10, 20]
    target = config_of(num_hidden_layers=6, layer_intermediate_sizes=[5, 5, 10, 10, 20, 20])
    assert plan_growth(source, target, Operators("interleave")).name == "depth interleave"
    target = config_of(num_hidden_layers=5, layer_intermediate_sizes=[5, 10, 20, 3, 77])
    assert plan_growth(source, target, Operators("identity_exact")).name == "depth identity_exact"


def test_the_promise_is_the_sum_of_the_moves_or_none() -> None:
    source = config_of()
    target = config_of(
        hidden_size=24, num_attention_heads=6, intermediate_size=40, num_hidden_layers=3
    )
    exact = plan_growth(source, target, Operators("identity_exact"))
    assert exact.tolerance() == pytest.approx(3e-5)
    assert exact.tolerance(torch.float64) == pytest.approx(3e-10)
    assert plan_growth(source, target, Operators("identity")).tolerance() is None
    assert plan_growth(source, target, Operators("stack")).tolerance() is None
    fpi = Operators("identity_exact", hidden="fpi")
    assert plan_growth(source, target, fpi).tolerance() is None
    longer = target.model_copy(update={"max_position_embeddings": 22})
    assert plan_growth(source, longer, Operators("identity_exact")).tolerance() is not None
    stretched = Operators("identity_exact", positions="interpolate")
    assert plan_growth(source, longer, stretched).tolerance() is None


def test_operators_of_a_stage_are_those_that_it_names() -> None:
    names = {
        "depth": "middle",
        "ffn": "aki",
        "hidden": "fpi",
        "heads": "zero",
        "positions": "fresh",
    }
    stage = Stage.model_validate({"num_hidden_layers": 2, "steps": 3, **names})
    assert dataclasses.asdict(Operators.of(stage)) == names
    default = Stage.model_validate({"num_hidden_layers": 2, "steps": 3})
    assert Operators.of(default) == Operators()


def test_grow_takes_every_operator_by_name() -> None:
    source = config_of(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    target = source.model_copy(
        update={
            "hidden_size": 24, "num_attention_heads": 6, "intermediate_size": 33,
            "num_hidden_layers": 3, "max_position_embeddings": 17,
        }
    )  # fmt: skip
    model = BertForPreTraining(source)
    init_weights(model, torch.Generator().manual_seed(3))
    names = {"ffn": "split", "heads": "zero", "hidden": "uneven", "positions": "fresh"}
    grown = grow(model, target, depth="identity_exact", **names, seed=5)
    operators = Operators("identity_exact", "split", "uneven", "zero", "fresh")
    expected = grow_weights(dict(model.named_parameters()), source, target, operators=operators,
                            seed=5)  # fmt: skip
    assert all(torch.equal(tensor, expected[name]) for name, tensor in grown.named_parameters())
    ids = torch.randint(5, 37, (3, 7), generator=torch.Generator().manual_seed(1))
    before = model.eval()(ids)["prediction_logits"]
    after = grown.eval()(ids)["prediction_logits"]
    assert (after - before).abs().max() <= 5e-5 * before.abs().max()


def test_noise_differs_from_move_to_move_and_depends_on_the_seed() -> None:
    source = config_of(hidden_size=24, num_attention_heads=3, intermediate_size=24)
    target = config_of(hidden_size=48, num_attention_heads=6, intermediate_size=48)
    plan, weights = plan_growth(source, target), weights_of(source)
    first, again, other = (plan.grow(weights, seed=seed) for seed in (1, 1, 2))
    name = "encoder.layers.0.feed_forward.output.weight"
    assert with_noise(plan) == [0.5, 0.5]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])


# ---- What there is not ----

FAULTS: list[tuple[dict[str, object], dict[str, object], Operators, str]] = [
    ({}, {"num_hidden_layers": 1}, Operators(), "num_hidden_layers: got 1 after 2; .*at least 2"),
    (
        {},
        {"hidden_size": 8, "num_attention_heads": 2},
        Operators(),
        "hidden_size: got 8 after 12; allowed: at least 12",
    ),
    ({}, {"intermediate_size": 19}, Operators(), "intermediate_size: got 19 after 20"),
    (
        {"layer_intermediate_sizes": [20, 10]},
        {"layer_intermediate_sizes": [40, 9]},
        Operators(),
        "layer_intermediate_sizes: got 9 after 10 in layer 1; allowed: at least 10",
    ),
    (
        {},
        {"max_position_embeddings": 10},
        Operators(),
        "max_position_embeddings: got 10 after 11; allowed: at least 11",
    ),
    (
        {},
        {"num_attention_heads": 6},
        Operators(),
        "num_attention_heads: got 6 after 3 .*head size from 4 to 2; .*give 24 hidden units",
    ),
    (
        {},
        {"hidden_size": 24},
        Operators(),
        "num_attention_heads: got 3 after 3 .*head size from 4 to 8",
    ),
    (
        {},
        {"hidden_size": 16, "num_attention_heads": 4},
        Operators(),
        "hidden_size: got 16 after 12 with hidden 'duplicate'; allowed: a multiple of 12",
    ),
    ({}, {"intermediate_size": 30}, Operators(), "ffn: got 'tile' from 20 to 30 .*multiple of 20"),
    (
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 6},
        Operators("interleave"),
        "depth: got 'interleave' from 4 to 6 layers; allowed: a multiple of 4",
    ),
    (
        {},
        {"num_hidden_layers": 6},
        Operators("copy_top"),
        "depth: got 'copy_top' from 2 to 6 layers; allowed: at most 4",
    ),
    (
        {},
        {"num_hidden_layers": 6},
        Operators("middle"),
        "depth: got 'middle' from 2 to 6 layers; allowed: at most 4",
    ),
    (
        {},
        {"pooling": "mean", "pooling_size": 2},
        Operators(),
        "pooling_size: got 'mean' of 2 after 'none' of 1; allowed: at most 1",
    ),
    (
        {"pooling": "mean", "pooling_size": 2},
        {"pooling": "max", "pooling_size": 3},
        Operators(),
        "pooling_size: got 'max' of 3 after 'mean' of 2; allowed: at most 2",
    ),
    (
        {"pooling": "mean", "pooling_size": 4},
        {"pooling": "concat", "pooling_size": 2},
        Operators(),
        "pooling: got 'concat' of 2 after 'mean' of 4; allowed: none, mean or max",
    ),
    (
        {"pooling": "concat", "pooling_size": 4},
        {"pooling": "concat", "pooling_size": 2},
        Operators(),
        "pooling: got 'concat' of 2 after 'concat' of 4",
    ),
    (
        {},
        {"shared_attention_layers": [1]},
        Operators(),
        r"shared_attention_layers: got \[1\] after \[\]; .*queries and keys of \[1\] would be lost",
    ),
    (
        {"tie_word_embeddings": False},
        {},
        Operators(),
        "tie_word_embeddings: got true after false; allowed: false",
    ),
    (
        {},
        {"num_hidden_layers": 4, "layer_intermediate_sizes": [20, 20, 40, 20]},
        Operators(),
        "layer_intermediate_sizes: got 40 in layer 2, which depth 'stack' fills with layer 0 of "
        "width 20",
    ),
    (
        {"num_hidden_layers": 3, "shared_attention_layers": [2]},
        {"num_hidden_layers": 6, "shared_attention_layers": [2]},
        Operators(),
        "shared_attention_layers: layer 5 has its own.* layer 2, .*'stack' puts there, shares",
    ),
    ({}, {"vocab_size": 38}, Operators(), "vocab_size: got 38 after 37; allowed: 37"),
    ({}, {"layer_norm": "pre"}, Operators(), "layer_norm: got 'pre' after 'post'"),
    ({}, {"position": "rotary"}, Operators(), "position: got 'rotary' after 'learned'"),
    ({}, {}, Operators(depth="zigzag"), "depth: got 'zigzag'; allowed: stack, interleave"),
    ({}, {}, Operators(ffn="zigzag"), "ffn: got 'zigzag'; allowed: tile, split, zero, aki"),
    ({}, {}, Operators(hidden="tile"), "hidden: got 'tile'; allowed: duplicate, uneven, fpi, aki"),
    ({}, {}, Operators(heads="tile"), "heads: got 'tile'; allowed: replicate, zero"),
    ({}, {}, Operators(positions="x"), "positions: got 'x'; allowed: tile, interpolate, fresh"),
]


@pytest.mark.parametrize(
    ("before", "after", "operators", "message"), FAULTS, ids=[fault[3][:50] for fault in FAULTS]
)
def test_an_illegal_growth_is_refused_by_field(
    before: dict[str, object], after: dict[str, object], operators: Operators, message: str
) -> None:
    source, target = config_of(**before), config_of(**after)
    faults = growth_faults(source, target, operators)
    assert len(faults) == 1, faults
    with pytest.raises(GrowthError, match=f"this growth is impossible: {message}"):
        plan_growth(source, target, operators)


def test_all_faults_come_at_once() -> None:
    source = config_of(num_hidden_layers=4, tie_word_embeddings=False)
    target = config_of(
        num_hidden_layers=6, vocab_size=38, hidden_size=20, num_attention_heads=5,
        intermediate_size=30, max_position_embeddings=9,
    )  # fmt: skip
    found = [fault.split(":")[0] for fault in growth_faults(source, target, Operators("copy_top"))]
    assert found == [
        "vocab_size", "tie_word_embeddings", "max_position_embeddings", "hidden_size", "ffn",
    ]  # fmt: skip
    (depth,) = [f for f in growth_faults(source, target, Operators("interleave")) if "depth" in f]
    assert depth.startswith("depth: got 'interleave' from 4 to 6")


# ---- Recipes ----


def recipe_of(*stages: dict[str, object], **model: object) -> Recipe:
    first: dict[str, object] = {"num_hidden_layers": 2, "steps": 3}
    return Recipe.model_validate(
        {
            "name": "odd",
            "model": {**SIZES, "num_hidden_layers": 6, "max_position_embeddings": 32, **model},
            "data": {"max_seq_length": 32, "max_predictions_per_seq": 5},
            "stages": [{**first, **stage} for stage in stages],
        }
    )


LEARNED = {"steps": 2, "learning_rate": 0.01, "batch_size": 3}
FULL: dict[str, object] = {"num_hidden_layers": 6}
RECIPE_FAULTS: list[tuple[list[dict[str, object]], str]] = [
    (
        [{}, {"num_hidden_layers": 4}, {**FULL, "depth": "interleave"}],
        r"stages\.2\.depth: got 'interleave' from 4 to 6 layers; allowed: a multiple of 4",
    ),
    ([{}, {**FULL, "depth": "copy_top"}], r"stages\.1\.depth: got 'copy_top' from 2 to 6.*most 4"),
    (
        [{}, {"max_seq_length": 16, "num_hidden_layers": 2}, FULL],
        r"stages\.1\.max_seq_length: got 16 after 32; allowed: at least 32, .*does not fall",
    ),
    (
        [{"pooling": "mean", "pooling_size": 32}, FULL],
        r"stages\.0\.pooling_size: got 32 with sequences of 32 tokens; allowed: 2 to 31",
    ),
    (
        [{"pooling": "max", "pooling_size": 16, "max_seq_length": 16}, FULL],
        r"stages\.0\.pooling_size: got 16 with sequences of 16 tokens; allowed: 2 to 15",
    ),
    (
        [{}, {"pooling": "mean", "pooling_size": 2}, FULL],
        r"stages\.1\.pooling_size: got 'mean' of 2 after 'none' of 1",
    ),
    (
        [{}, {"tie_word_embeddings": False}, FULL],
        r"stages\.2\.tie_word_embeddings: got true after false",
    ),
    (
        [{"intermediate_size": 10}, {"rewarm": {"parameters": "new", "factor": 1.3}}, FULL],
        r"stages\.1\.rewarm\.parameters: got 'new' .*\(growth: ffn tile\); allowed: 'all', or",
    ),
    (
        [{"learned": LEARNED}, FULL],
        r"stages\.0\.learned: got 2 steps in the first stage, where nothing grows",
    ),
    (
        [{}, {**FULL, "learned": LEARNED, "moments": "grow"}],
        r"stages\.1\.moments: got 'grow' with a learned map, .*allowed: 'reset'",
    ),
    (
        [{}, {**FULL, "learned": LEARNED, "rewarm": {"parameters": "new", "factor": 2.0}}],
        r"stages\.1\.rewarm\.parameters: got 'new' with a learned map",
    ),
    (
        [{}, {**FULL, "learned": {**LEARNED, "batch_size": 9999}}],
        r"stages\.1\.learned\.batch_size: got 9999; allowed: at most global_batch_size",
    ),
    (
        [{}, {**FULL, "depth": "random", "freeze": {"layers": 4}}, FULL],
        r"stages\.1\.freeze\.layers: got 4, but depth 'random' draws layer 2 .* allowed: 1 to 2",
    ),
    (
        [{}, {**FULL, "depth": "identity_exact", "freeze": {"layers": 3}}, FULL],
        r"stages\.1\.freeze\.layers: got 3, but depth 'identity_exact' draws layer 2",
    ),
    (
        [{"max_seq_length": 16}, {**FULL, "positions": "fresh", "freeze": {"layers": 1}}, FULL],
        r"stages\.1\.positions: got 'fresh' in a stage that freezes the embeddings",
    ),
    (
        [{"pooling": "mean", "pooling_size": 2}, {"learned": LEARNED}, FULL],
        r"stages\.1\.learned: got a stage in which neither layers nor hidden nor inner size grow",
    ),
]


@pytest.mark.parametrize(
    ("stages", "message"), RECIPE_FAULTS, ids=[fault[1][:60] for fault in RECIPE_FAULTS]
)
def test_a_recipe_with_an_illegal_growth_is_refused_by_path(
    stages: list[dict[str, object]], message: str
) -> None:
    faults = recipe_faults(recipe_of(*stages))
    assert len(faults) == 1, faults
    with pytest.raises(GrowthError, match=rf"^{message}"):
        raise GrowthError(faults[0])


def test_every_stage_of_a_recipe_is_checked() -> None:
    stages: list[dict[str, object]] = [
        {"num_hidden_layers": 1, "pooling": "mean", "pooling_size": 40},
        {"num_hidden_layers": 4, "depth": "middle"},
        {**FULL, "depth": "interleave"},
    ]
    found = [fault.split(":")[0] for fault in recipe_faults(recipe_of(*stages))]
    assert found == ["stages.0.pooling_size", "stages.1.depth", "stages.2.depth"]


GOOD: list[list[dict[str, object]]] = [
    [{}, {"num_hidden_layers": 4}, FULL],
    [{"pooling": "mean", "pooling_size": 31, "max_seq_length": 32}, FULL],
    [{}, {**FULL, "rewarm": {"parameters": "new", "factor": 1.3}}],
    [{}, {"num_hidden_layers": 4, "freeze": {"layers": 2}}, {**FULL, "moments": "keep"}],
    [{}, {"freeze": {"layers": 1}}, {**FULL, "moments": "grow"}, {**FULL, "moments": "seed_v"}],
    [{}, {**FULL, "learned": LEARNED}],
    [
        {"pooling": "max", "pooling_size": 3, "max_seq_length": 16, "hidden_size": 4,
         "num_attention_heads": 1},
        {**FULL, "learned": LEARNED, "positions": "interpolate"},
    ],
    [
        {"num_hidden_layers": 3, "shared_attention_layers": [1, 2]},
        {**FULL, "learned": LEARNED},
    ],
]  # fmt: skip


@pytest.mark.parametrize("stages", GOOD, ids=lambda stages: str(len(stages)))
def test_a_legal_recipe_has_no_faults(stages: list[dict[str, object]]) -> None:
    assert recipe_faults(recipe_of(*stages)) == []


def test_an_untied_decoder_is_wholly_new_so_its_rate_may_be_rewarmed() -> None:
    rewarm = {"parameters": "new", "factor": 1.3}
    stages = [{**FULL, "tie_word_embeddings": True}, {**FULL, "rewarm": rewarm}]
    assert recipe_faults(recipe_of(*stages, tie_word_embeddings=False)) == []


def test_before_learning_all_but_depth_and_width_has_grown() -> None:
    source = config_of(
        num_hidden_layers=4, shared_attention_layers=[2, 3], pooling="max", pooling_size=2
    )
    target = config_of(
        num_hidden_layers=8, shared_attention_layers=[3, 7], hidden_size=24, num_attention_heads=6,
        max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    middle = before_learning(source, target)
    assert middle == config_of(
        num_hidden_layers=4, shared_attention_layers=[3], max_position_embeddings=16,
        tie_word_embeddings=False,
    )  # fmt: skip
    assert plan_growth(source, middle).name == (
        "decoder untie + pooling change + positions tile + attention unshare"
    )
