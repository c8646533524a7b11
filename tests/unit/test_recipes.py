"""Every shipped recipe and DeepSpeed JSON loads, fits together, and says what it should."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from stacking.config import Recipe
from stacking.config_loading import load_recipe, recipe_schema_text, resolved_json
from stacking.config_model import BertConfig
from stacking.cost import training_flops
from stacking.deepspeed_config import Accelerator, load_deepspeed_config, resolve_stages
from stacking.deepspeed_schema import OWNED_BY_RECIPE, REFUSED, REMOVED, EngineSettings
from stacking.errors import ConfigError
from stacking.growth.legality import recipe_faults
from stacking.schedule import learning_rate, stage_start
from stacking.study import Run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch" / "recipes"
SCHEMA = RECIPES / "recipe.schema.json"
RECIPE_FILES = sorted(path for path in RECIPES.glob("*.json") if path != SCHEMA)
ENGINE_FILES = sorted((ROOT / "deepspeed_configs").glob("*.json"))
ACCELERATORS = {
    "cpu": Accelerator("cpu", supports_fp16=False, supports_bf16=True, fused_adam=False),
    "cuda": Accelerator("cuda", supports_fp16=True, supports_bf16=True, fused_adam=True),
}
NEED_A_GPU = {("multi_node_zeropp_fp16", "cpu")}


def test_all_promised_files_are_there() -> None:
    systems = ("scratch", "stackingbert", "mslt", "compoundgrow")
    promised = {f"{system}_{size}" for system in systems for size in ("base", "large", "small")}
    promised |= {"demo", "bert_base", "bert_large", "modern_base", "modern_small"}
    promised |= {"best_base", "best_small", "best_12x64", "scratch_12x64", "switch_times_small"}
    promised |= {"tiny_test", "mslt_tiny", "compoundgrow_tiny"}
    assert {path.stem for path in RECIPE_FILES} == promised
    assert {
        "fp16_fused_adam",
        "bf16_fused_adam",
        "zero2_fp16",
        "zero3_fp16",
        "zero3_offload_fp16",
        "multi_node_fp16",
        "multi_node_zero3_fp16",
        "multi_node_zeropp_fp16",
        "cpu_bf16",
        "cpu_fp32",
    } <= {path.stem for path in ENGINE_FILES}


def test_switch_times_has_controls_for_as_long_as_its_grown_runs() -> None:
    """By matrix products; as seconds a small model takes a larger share, and so its control."""
    runs = [run.recipe for run in Run(load_recipe(RECIPES / "switch_times_small.json"), Path())
            .with_branches()]  # fmt: skip
    grown = [recipe for recipe in runs if len(recipe.stages) == 2]
    alone, scratch = (
        [flops(run) for run in runs if [s.num_hidden_layers for s in run.stages] == [layers]]
        for layers in (2, 8)
    )
    cheapest, dearest = min(map(flops, grown)), max(map(flops, grown))
    for others in (alone, scratch):
        assert min(others) < cheapest
        assert max(others) > 1.1 * dearest
    for recipe in runs:
        assert 0.15 < recipe.learning_rate.decay_steps / recipe.total_steps < 0.5


def flops(recipe: Recipe) -> int:
    """Of all stages."""
    return sum(
        stage.steps
        * training_flops(
            recipe.stage_model(index), recipe.global_batch_size, recipe.data.max_seq_length,
            recipe.data.max_predictions_per_seq,
        )
        for index, stage in enumerate(recipe.stages)
    )  # fmt: skip


@pytest.mark.parametrize("kind", ACCELERATORS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("engine_file", ENGINE_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe_file", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_recipe_resolves_with_every_json_on_every_device(
    recipe_file: Path, engine_file: Path, world_size: int, kind: str
) -> None:
    recipe, is_refused = load_recipe(recipe_file), (engine_file.stem, kind) in NEED_A_GPU
    with pytest.raises(ConfigError, match="CUDA kernels") if is_refused else nullcontext():
        engines = resolve_stages(
            load_deepspeed_config(engine_file),
            recipe,
            world_size=world_size,
            accelerator=ACCELERATORS[kind],
            strict_precision=kind == "cuda",
        )
    if is_refused:
        return
    assert len(engines) == len(recipe.stages)
    for engine in engines:
        total = engine.micro_batch_size * world_size * engine.gradient_accumulation_steps
        assert total == recipe.global_batch_size
        assert "auto" not in json.dumps(engine.deepspeed)
        assert "apex" not in engine.deepspeed
        assert engine.notices == () or kind == "cpu"


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_recipe_names_the_schema_and_itself(path: Path) -> None:
    assert json.loads(path.read_text())["$schema"] == SCHEMA.name
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description
    assert f"`{path.name}`" in (RECIPES / "README.md").read_text()


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_recipe_trains_every_step_at_a_rate_above_zero(path: Path) -> None:
    recipe = load_recipe(path)
    total, rate = recipe.total_steps, recipe.learning_rate
    steps = {0, 1, rate.warmup_steps, total // 2, total - 2, total - 1}
    assert all(0 < learning_rate(step, rate, total) <= rate.peak for step in steps)


def test_the_demo_has_the_shape_that_its_export_and_its_corpus_need() -> None:
    recipe = load_recipe(RECIPES / "demo.json")
    assert [stage.num_hidden_layers for stage in recipe.stages] == [2, 4, 8]
    assert (recipe.model.vocab_size, recipe.model.hidden_size) == (8192, 256)
    assert recipe.model.position == "rotary"
    assert recipe.data.max_seq_length == 128


def test_stackingbert_base_is_the_published_schedule() -> None:
    recipe = load_recipe(RECIPES / "stackingbert_base.json")
    stages = [(stage.num_hidden_layers, stage.steps, stage.depth) for stage in recipe.stages]
    assert stages == [(3, 50_000, "stack"), (6, 70_000, "stack"), (12, 280_000, "stack")]
    assert recipe.global_batch_size * recipe.data.max_seq_length == 122_880
    rates = [
        learning_rate(step, recipe.learning_rate, recipe.total_steps)
        for step in (10_000, 50_000, 120_000)
    ]
    assert rates == pytest.approx([8e-4, 5.5e-4, 3e-4])


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_recipe_grows_legally(path: Path) -> None:
    assert recipe_faults(load_recipe(path)) == []


BASELINES = {
    "stackingbert_base": "scratch_base",
    "stackingbert_large": "scratch_large",
    "mslt_base": "bert_base",
    "mslt_large": "bert_large",
    "compoundgrow_base": "bert_base",
    "compoundgrow_large": "bert_large",
    "stackingbert_small": "scratch_small",
    "mslt_small": "scratch_small",
    "compoundgrow_small": "scratch_small",
    "modern_small": "scratch_small",
    "best_small": "scratch_small",
}
OWN_RATE = ("mslt_base", "mslt_large", "compoundgrow_base", "compoundgrow_large",
            "best_small")  # fmt: skip


@pytest.mark.parametrize(("name", "baseline"), BASELINES.items())
def test_a_recipe_differs_from_its_baseline_in_stages_only(name: str, baseline: str) -> None:
    grown = load_recipe(RECIPES / f"{name}.json")
    scratch = load_recipe(RECIPES / f"{baseline}.json")
    own: dict[str, object] = {"name": "", "description": "", "stages": ()}
    own |= {"learning_rate": scratch.learning_rate} if name in OWN_RATE else {}
    assert scratch.model_copy(update=own) == grown.model_copy(update=own)
    assert scratch.total_steps == grown.total_steps
    assert scratch.learning_rate.peak == grown.learning_rate.peak
    (whole,) = scratch.stages
    assert whole.num_hidden_layers == scratch.model.num_hidden_layers


@pytest.mark.parametrize("system", ["stackingbert", "scratch", "mslt", "compoundgrow", "bert"])
def test_base_and_large_are_berts_two_sizes(system: str) -> None:
    def size(model: BertConfig) -> tuple[int, int, int, int]:
        widths = (model.hidden_size, model.num_attention_heads, model.intermediate_size)
        return (model.num_hidden_layers, *widths)

    assert size(load_recipe(RECIPES / f"{system}_base.json").model) == (12, 768, 12, 3072)
    assert size(load_recipe(RECIPES / f"{system}_large.json").model) == (24, 1024, 16, 4096)


def test_stackingbert_large_is_bases_schedule_on_twice_the_layers() -> None:
    base = load_recipe(RECIPES / "stackingbert_base.json")
    large = load_recipe(RECIPES / "stackingbert_large.json")
    assert [(2 * s.num_hidden_layers, s.steps) for s in base.stages] == [
        (s.num_hidden_layers, s.steps) for s in large.stages
    ]
    halves = [(step, rate / 2) for step, rate in base.learning_rate.points]
    assert large.learning_rate.points[1:] == tuple(halves[1:])
    assert large.model.initializer_range == pytest.approx(large.model.hidden_size**-0.5)


def test_the_small_stackingbert_switches_at_the_published_shares() -> None:
    recipe = load_recipe(RECIPES / "stackingbert_small.json")
    starts = [stage_start(index, recipe.stages) / recipe.total_steps for index in (1, 2)]
    assert starts == [0.125, 0.3]


@pytest.mark.parametrize("name", ["mslt_base", "mslt_large", "mslt_small", "mslt_tiny"])
def test_mslt_adds_a_quarter_on_top_and_freezes_all_below(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.json")
    group = recipe.model.num_hidden_layers // 4
    *parts, joint = recipe.stages
    assert [stage.num_hidden_layers for stage in parts] == [group, 2 * group, 3 * group, 4 * group]
    assert [stage.freeze.layers if stage.freeze else 0 for stage in parts] == [
        0, group, 2 * group, 3 * group,
    ]  # fmt: skip
    assert all(stage.depth == "copy_top" for stage in parts[1:])
    assert all(stage.freeze is None or stage.freeze.decoder == "freeze" for stage in parts)
    assert recipe.model.tie_word_embeddings
    assert (joint.num_hidden_layers, joint.freeze) == (4 * group, None)
    if not name.endswith("tiny"):
        assert {stage.steps * 5 for stage in recipe.stages} == {recipe.total_steps}
        assert recipe.learning_rate.decay_steps == joint.steps


@pytest.mark.parametrize(
    "name", [f"compoundgrow_{size}" for size in ("base", "large", "small", "tiny")]
)
def test_compoundgrow_grows_depth_then_width_and_length_then_depth(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.json")
    full, inner = recipe.model.num_hidden_layers, recipe.model.intermediate_size
    forms = [
        (model.num_hidden_layers, model.intermediate_size, model.pooling, model.pooling_size)
        for model in map(recipe.stage_model, range(4))
    ]
    assert forms == [
        (full // 4, inner // 4, "mean", 2),
        (full // 2, inner // 4, "mean", 2),
        (full // 2, inner, "none", 1),
        (full, inner, "none", 1),
    ]
    assert all(stage.rewarm and stage.rewarm.steps for stage in recipe.stages[1:])
    assert all(stage.moments == "reset" for stage in recipe.stages)


@pytest.mark.parametrize("name", ["modern_base", "modern_small"])
def test_the_modern_recipe_hops_once_at_half_time_while_the_rate_is_constant(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.json")
    total, rate = recipe.total_steps, recipe.learning_rate
    before, after = recipe.stages
    assert after.num_hidden_layers == 4 * before.num_hidden_layers
    assert before.steps * 2 == total
    assert (after.depth, after.moments, recipe.optimizer.betas) == ("stack", "keep", (0.9, 0.98))
    around = (total // 2 - 1, total // 2, total * 3 // 4)
    assert [learning_rate(step, rate, total) for step in around] == [rate.peak] * 3
    assert rate.decay_steps * 5 == total


@pytest.mark.parametrize("name", ["best_base", "best_small", "best_12x64"])
def test_the_best_recipe_grows_to_a_quarter_and_late_to_all_while_the_rate_is_constant(
    name: str,
) -> None:
    recipe = load_recipe(RECIPES / f"{name}.json")
    total, rate, depth = recipe.total_steps, recipe.learning_rate, recipe.model.num_hidden_layers
    assert [stage.num_hidden_layers for stage in recipe.stages] == [1, depth // 4, depth]
    last = recipe.stages[-1]
    assert (last.depth, last.moments) == ("stack", "keep")
    assert last.rewarm is not None
    assert (last.rewarm.parameters, last.rewarm.factor) == ("new", 2.0)
    assert total / 8 < last.steps <= total / 4
    assert rate.decay_steps < last.steps
    assert learning_rate(total - last.steps, rate, total) == rate.peak


def test_the_best_recipe_and_its_baseline_differ_in_how_they_are_trained_only() -> None:
    best, scratch = (
        load_recipe(RECIPES / f"{name}.json") for name in ("best_12x64", "scratch_12x64")
    )
    own = {"name": "", "description": "", "stages": (), "branches": (),
           "learning_rate": scratch.learning_rate}  # fmt: skip
    assert scratch.model_copy(update=own) == best.model_copy(update=own)
    assert scratch.learning_rate.peak == best.learning_rate.peak
    assert scratch.learning_rate.warmup_steps == best.learning_rate.warmup_steps


@pytest.mark.parametrize("name", [name for name in BASELINES if name.endswith("small")])
def test_small_recipes_train_on_the_demos_data(name: str) -> None:
    demo, small = load_recipe(RECIPES / "demo.json"), load_recipe(RECIPES / f"{name}.json")
    assert (small.model, small.data) == (demo.model, demo.data)
    assert (small.total_steps, small.global_batch_size) == (800, 32)


@pytest.mark.parametrize("name", ["mslt_tiny", "compoundgrow_tiny"])
def test_tiny_recipes_are_the_tests_own_model_in_a_dozen_steps(name: str) -> None:
    test, tiny = load_recipe(RECIPES / "tiny_test.json"), load_recipe(RECIPES / f"{name}.json")
    assert (tiny.model, tiny.data, tiny.total_steps) == (test.model, test.data, test.total_steps)


@pytest.mark.parametrize(
    "name", ["stackingbert_base", "stackingbert_large", "bert_base", "mslt_base", "mslt_large",
             "compoundgrow_base", "compoundgrow_large"],
)  # fmt: skip
def test_each_published_system_has_a_table_that_marks_every_row(name: str) -> None:
    text = (RECIPES / "README.md").read_text()
    headed = {part.split("\n")[0]: part for part in text.split("\n## ")[1:]}
    (section,) = (headed[head] for head in headed if re.search(rf"\b{name}\.json", head))
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 5
    for row in rows:
        assert any(mark in row for mark in ("published", "inferred", "chosen")), row


def test_the_editors_schema_is_current() -> None:
    command = (
        "python -c 'from stacking.config_loading import recipe_schema_text as t; "
        f'print(t(), end="")\' > {SCHEMA.relative_to(ROOT)}'
    )
    assert SCHEMA.read_text() == recipe_schema_text(), f"run: {command}"


def test_the_schema_knows_every_key_of_a_resolved_recipe() -> None:
    known = json.loads(SCHEMA.read_text())["properties"]
    resolved = json.loads(resolved_json(load_recipe(RECIPES / "tiny_test.json")))
    assert set(known) == {*resolved, "$schema", "extends"}


def test_the_readme_explains_every_key_that_is_taken_or_refused() -> None:
    text = (ROOT / "deepspeed_configs" / "README.md").read_text()
    keys = [*EngineSettings.model_fields, *OWNED_BY_RECIPE, *REMOVED, *REFUSED]
    missing = [key for key in keys if f"{key.rsplit('.', 1)[-1]}`" not in text]
    assert missing == []
    assert [path.name for path in ENGINE_FILES if f"`{path.name}`" not in text] == []
