"""stacking/stage_plan.py: figures by hand, the arithmetic of three papers, refusals, warnings."""

import json
from collections.abc import Sequence
from fractions import Fraction
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from stacking.config_loading import load_recipe
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import ConfigError
from stacking.stage_plan import RecipePlan, plan_recipe
from stacking.stage_plan_table import plan_json, show_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch" / "recipes"
ENGINES = ROOT / "deepspeed_configs"
BERT_LAYER = 7_087_872  # 12 H^2 + 13 H at H = 768, F = 4 H
# Dense, LayerNorm and bias of the MLM head; pooler and 2 logits of the next-sentence head.
BERT_HEADS = (768**2 + 768) + 2 * 768 + 30_522 + (768**2 + 768) + (2 * 768 + 2)


def planned(
    name: str,
    *changes: str,
    engine: str = "fp16_fused_adam",
    world_size: int = 1,
) -> RecipePlan:
    recipe = load_recipe(RECIPES / f"{name}.json", changes)
    config = load_deepspeed_config(ENGINES / f"{engine}.json")
    return plan_recipe(recipe, config, world_size=world_size)


def text_of(plan: RecipePlan, width: int) -> str:
    console = Console(file=StringIO(), width=width, highlight=False)
    show_plan(plan, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_arithmetic_of_the_2019_recipe() -> None:
    plan = planned("stackingbert_base")
    assert [stage.model.num_hidden_layers for stage in plan.stages] == [3, 6, 12]
    assert [stage.steps for stage in plan.stages] == [50_000, 70_000, 280_000]
    total = plan.recipe.total_steps
    assert [Fraction(s.first_step, total) for s in plan.stages] == [
        0,
        Fraction(1, 8),
        Fraction(3, 10),
    ]
    starts = [stage.rates[0] for stage in plan.stages]
    assert starts == pytest.approx([1e-7, 5.5e-4, 3e-4])
    # Layers alone: (50 x 3 + 70 x 6 + 280 x 12) / (400 x 12) = 81.9 % of scratch, 18.1 % saved.
    assert plan.layers_ceiling == pytest.approx(4800 / 3930, rel=1e-12)
    assert f"{100 / plan.layers_ceiling:.1f}" == "81.9"
    # By FLOPs about the same: heads do not grow, but each model's last layer is cut short.
    assert plan.ceiling == pytest.approx(plan.layers_ceiling, rel=0.01)


@pytest.mark.parametrize("size", ["base", "large", "small"])
def test_mslt_is_twice_as_cheap_by_layers_exactly(size: str) -> None:
    plan = planned(f"mslt_{size}")
    group = plan.recipe.model.num_hidden_layers // 4
    per_step = [stage.layer_units // stage.steps for stage in plan.stages]
    assert per_step == [3 * group, 4 * group, 5 * group, 6 * group, 12 * group]
    assert plan.layers_ceiling == 2.0


@pytest.mark.parametrize(("size", "speed_up"), [("base", 1.736), ("large", 1.822)])
def test_compoundgrow_has_the_papers_speed_up_as_its_ceiling(size: str, speed_up: float) -> None:
    assert planned(f"compoundgrow_{size}").ceiling == pytest.approx(speed_up, rel=2e-3)


def test_parameters_and_flops_of_bert_base_by_hand() -> None:
    plan = planned("bert_base")
    stage, batch, length, masked, hidden, words = plan.stages[0], 256, 128, 20, 768, 30_522
    embeddings = (words + 2 + length) * hidden + 2 * hidden
    assert stage.num_parameters == embeddings + 12 * BERT_LAYER + BERT_HEADS == 109_811_516
    rows = masked + 1  # of the last layer: masked positions and [CLS]
    wide = 2 * length * 3 * hidden**2
    per_row = 4 * length * hidden + 2 * hidden**2 + 4 * hidden * 4 * hidden
    forward = 12 * wide + (11 * length + rows) * per_row
    forward += masked * (2 * hidden**2 + 2 * hidden * words) + 2 * hidden**2 + 4 * hidden
    assert stage.step_flops == 3 * batch * forward
    assert stage.flops == 1_000_000 * stage.step_flops == plan.scratch.flops
    assert plan.ceiling == plan.layers_ceiling == 1.0
    assert plan.warnings == ()


def test_a_frozen_stage_trains_its_new_layers_and_the_heads_and_costs_less() -> None:
    plan = planned("mslt_base")
    assert [stage.num_trained for stage in plan.stages[1:4]] == [3 * BERT_LAYER + BERT_HEADS] * 3
    assert [s.num_trained == s.num_parameters for s in plan.stages] == [
        True,
        False,
        False,
        False,
        True,
    ]
    # Of 12 layers 9 have no backward: 18 of 36 units, and the decoder has no weight gradient.
    assert 0.45 < plan.stages[3].step_flops / plan.stages[4].step_flops < 0.5


def test_what_comes_in_at_each_switch() -> None:
    entries = [stage.entry for stage in planned("compoundgrow_base").stages]
    assert entries[0] is None
    names = [entry.operators for entry in entries if entry]
    assert names[0] == names[2] == "depth stack"
    assert "pooling" in names[1]
    assert "ffn tile" in names[1]
    assert all(entry.tolerance is None for entry in entries if entry)
    joint = planned("mslt_tiny").stages[-1].entry
    assert joint
    assert (joint.operators, joint.tolerance, joint.grows) == ("nothing grows", 0.0, False)


def test_an_operator_that_keeps_the_function_says_to_what_tolerance() -> None:
    plan = planned("modern_small", "stages.1.depth=identity")
    entry = plan.stages[1].entry
    assert entry
    assert (entry.operators, entry.tolerance) == ("depth identity", 1e-5)
    assert "kept to 1e-05" in text_of(plan, 100)


def test_longer_sequences_alone_are_no_growth_of_the_model() -> None:
    stages = (
        '[{"num_hidden_layers": 8, "steps": 9, "max_seq_length": 32}, '
        '{"num_hidden_layers": 8, "steps": 1000}]'
    )
    plan = planned("scratch_small", f"stages={stages}")
    entry = plan.stages[1].entry
    assert entry
    assert (entry.operators, entry.grows) == ("nothing but sequences", False)
    assert plan.stages[0].step_flops < 0.4 * plan.stages[1].step_flops
    assert "S=32" in text_of(plan, 100)


def test_learning_a_map_is_paid_for_and_asks_no_operator() -> None:
    learned = 'stages.1.learned={"steps": 30, "batch_size": 16}'
    changes = (learned, "stages.1.moments=reset", "stages.1.depth=copy_top")
    plan = planned("modern_small", *changes)
    stage = plan.stages[1]
    assert stage.entry
    assert stage.entry.operators == "learned map (30 steps)"
    assert stage.entry.tolerance is None
    assert stage.entry_flops * 32 == 30 * 16 * stage.step_flops
    assert stage.flops == 400 * stage.step_flops + stage.entry_flops
    with pytest.raises(ConfigError, match=r"stages\.1\.depth: got 'copy_top'"):
        planned("modern_small", "stages.1.depth=copy_top")


def test_every_illegal_growth_and_what_the_json_cannot_run_come_in_one_error() -> None:
    changes = (
        "stages.0.num_hidden_layers=5",
        "stages.0.intermediate_size=700",
        "stages.1.depth=interleave",
    )
    with pytest.raises(ConfigError) as error:
        planned("compoundgrow_base", *changes, world_size=7)
    starts = [fault.split(":")[0] for fault in error.value.faults]
    assert starts == ["stages.1.depth", "stages.1.ffn", "fp16_fused_adam.json"]


def test_a_switch_while_the_rate_decays_is_warned_of() -> None:
    (warning,) = planned("stackingbert_base").warnings
    assert "stage 2 (step 50,000, 0.00055), stage 3 (step 120,000, 0.0003)" in warning
    assert planned("modern_base").warnings == ()
    assert (
        planned("mslt_base").warnings == ()
    )  # what decays is the joint stage, which grows nothing


@pytest.mark.parametrize(("decay_steps", "is_late"), [(100_000, True), (99_999, False)])
def test_a_switch_at_the_very_step_where_the_decay_begins_is_too_late(
    decay_steps: int, is_late: bool
) -> None:
    plan = planned("modern_base", f"learning_rate.decay_steps={decay_steps}")
    assert len(plan.warnings) == is_late


def test_a_switch_at_the_very_step_where_a_decay_ends_is_too_early() -> None:
    points = "[[0, 1e-3], [300, 1e-3], [400, 5e-4], [800, 5e-4]]"
    rate = f'learning_rate={{"schedule": "piecewise", "peak": 1e-3, "points": {points}}}'
    assert len(planned("modern_small", rate).warnings) == 1
    later = ("stages.0.steps=401", "stages.1.steps=399")
    assert planned("modern_small", rate, *later).warnings == ()


def test_a_low_ceiling_is_warned_of() -> None:
    steps = ("stages.0.steps=20000", "stages.1.steps=180000")
    (warning,) = planned("modern_base", *steps).warnings
    assert warning.startswith("the ceiling is 1.08x, below 1.1x")


def test_memory_is_sixteen_bytes_a_parameter_shared_by_zero() -> None:
    plan = planned("bert_large", world_size=8)
    numbers = plan.stages[0].num_parameters
    held = plan.memory()
    # fp16 weights and gradients 2 + 2, fp32 master 4, two moments 8.
    assert held[0].total == 16 * numbers
    assert held[3].total == pytest.approx(2 * numbers, rel=1e-6)
    assert [held[zero].weights // numbers for zero in (0, 1, 2)] == [2, 2, 2]
    assert held[1].total == pytest.approx((4 + 12 / 8) * numbers, rel=1e-6)
    assert held[2].total == pytest.approx((2 + 14 / 8) * numbers, rel=1e-6)


def test_branches_are_counted_without_what_they_share() -> None:
    """Six grown ones of 240 steps each, scratch of 560, three decays of it, two of the trunk."""
    plan = planned("switch_times_small")
    step = planned("scratch_small").stages[0].step_flops
    decays = [round(share * 160) for share in (0.4, 0.55, 0.75)]
    of_trunk = [round(share * 400) for share in (0.4, 0.7)]
    flops = step * (6 * 240 + 560 + sum(decays)) + plan.stages[0].step_flops * sum(of_trunk)
    assert plan.branches == (12, flops)
    assert plan.stages[0].step_flops < step
    assert "12 branches are trained besides" in text_of(plan, 120)
    assert planned("scratch_small").branches == (0, 0)


def test_gradients_that_are_added_up_in_fp32_are_held_twice() -> None:
    plan = planned("bert_large", engine="cpu_bf16", world_size=2)
    numbers = plan.stages[0].num_parameters
    assert plan.memory()[1].gradients == (2 + 4) * numbers
    assert plan.memory()[2].gradients == pytest.approx(2 * numbers / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("engine", "precision", "bytes_a_weight"),
    [("cpu_fp32", "fp32", 4), ("bf16_fused_adam", "bf16", 2), ("zero2_fp16", "fp16", 2)],
)
def test_memory_is_of_the_jsons_own_precision(
    engine: str, precision: str, bytes_a_weight: int
) -> None:
    plan = planned("mslt_small", engine=engine, world_size=2)
    assert plan.largest == 4
    assert plan.memory()[0].weights == bytes_a_weight * plan.stages[4].num_parameters
    text = text_of(plan, 120)
    assert f"each of 2 ranks, stage 5 in {precision}" in text
    assert f"{engine}.json: ZeRO {plan.engines[4].zero_stage}, " in text
    assert "micro batch 16 x accumulation 1 x 2 ranks = 32" in text


def test_a_stages_own_micro_batch_and_offload_are_shown() -> None:
    plan = planned("tiny_test", engine="zero3_offload_fp16", world_size=2)
    text = " ".join(text_of(plan, 100).split())
    assert "micro batch 3 x accumulation 2 x 2 ranks = 12" in text
    assert "optimizer in host memory, weights in host memory" in text


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", ["stackingbert_base", "mslt_large", "compoundgrow_large"])
def test_the_page_fits_its_width_and_shows_every_stage(name: str, width: int) -> None:
    plan = planned(name, world_size=8)
    lines = text_of(plan, width).splitlines()
    assert max(map(len, lines)) <= width
    words = [line.split() for line in lines]
    for number, stage in enumerate(plan.stages, 1):
        row = [str(number), f"{stage.steps:,}", str(stage.model.num_hidden_layers), "x"]
        assert any(line[:4] == row for line in words), row
        assert any(
            line[:2] == [str(number), f"{stage.num_parameters / 1e6:,.2f}"] for line in words
        )
    assert sum(line[:1] == ["warning:"] for line in words) == len(plan.warnings)


def row_of(text: str, first: Sequence[str]) -> list[str]:
    found = [line.split() for line in text.splitlines() if line.split()[: len(first)] == [*first]]
    assert len(found) == 1, found
    return found[0]


def test_both_conventions_of_speed_up_are_printed() -> None:
    text = text_of(planned("stackingbert_base"), 100)
    assert row_of(text, ["layers", "alone"])[2:] == ["1.22x", "18.1", "%", "22.1", "%"]
    assert "time saved, 1 - t/t0" in text
    assert "speed-up, t0/t - 1" in text


def test_shares_are_of_the_recipes_own_flops() -> None:
    plan = planned("stackingbert_base")
    shares = [100 * stage.flops / plan.flops for stage in plan.stages]
    text = text_of(plan, 100)
    sizes = ("47.01", "68.27", "110.78")
    rows = [row_of(text, [str(number), size]) for number, size in enumerate(sizes, 1)]
    assert [row[-2] for row in rows] == [f"{share:.1f}" for share in shares]
    assert sum(shares) == pytest.approx(100)


def test_different_inner_widths_and_shared_attention_are_shown() -> None:
    changes = (
        "stages.0.layer_intermediate_sizes=[256, 1024]",
        "stages.0.shared_attention_layers=[1]",
        "stages.0.tie_word_embeddings=true",
    )
    text = text_of(planned("modern_small", *changes), 120)
    row = " ".join(row_of(text, ["1", "400"]))
    assert "256-1,024" in row
    assert "attention shared in 1" in row


def test_the_json_has_the_same_figures() -> None:
    plan = planned("mslt_base", world_size=4)
    values = json.loads(json.dumps(plan_json(plan)))
    assert values["ceiling"] == {
        "ratio": plan.ceiling, "time_saved": 1 - 1 / plan.ceiling, "speed_up": plan.ceiling - 1,
    }  # fmt: skip
    assert [stage["flops"] for stage in values["stages"]] == [s.flops for s in plan.stages]
    assert sum(stage["share"] for stage in values["stages"]) == pytest.approx(1)
    assert [stage["frozen_layers"] for stage in values["stages"]] == [0, 3, 6, 9, 0]
    assert values["stages"][1]["growth"]["operators"] == "depth copy_top"
    assert values["stages"][0]["growth"] is None
    memory = values["memory"]
    assert (memory["stage"], memory["world_size"], memory["zero_stage"]) == (4, 4, 1)
    assert memory["bytes_per_rank_by_zero_stage"]["0"]["total"] == plan.memory()[0].total


def test_choices_without_effect_are_told() -> None:
    changes = (
        "stages.0.moments=keep", "stages.0.ffn=split", "stages.1.hidden=aki",
        "stages.1.depth=interleave", "stages.1.moments=grow",
    )  # fmt: skip
    warnings = [line for line in planned("modern_small", *changes).warnings if "no effect" in line]
    assert warnings == [
        "stages.0.ffn: 'split' has no effect: nothing grows into the first stage",
        "stages.0.moments: 'keep' has no effect: nothing grows into the first stage",
        "stages.1.hidden: 'aki' has no effect: no hidden size grows there",
    ]
