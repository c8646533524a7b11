"""Every shipped recipe and DeepSpeed JSON loads, fits together, and says what it should."""

import json
from pathlib import Path

import pytest

from stacking.config_loading import load_recipe, recipe_schema_text, resolved_json
from stacking.deepspeed_config import Accelerator, load_deepspeed_config, resolve_stages
from stacking.deepspeed_schema import OWNED_BY_RECIPE, REFUSED, REMOVED, EngineSettings
from stacking.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch" / "recipes"
SCHEMA = RECIPES / "recipe.schema.json"
RECIPE_FILES = sorted(path for path in RECIPES.glob("*.json") if path != SCHEMA)
ENGINE_FILES = sorted((ROOT / "deepspeed_configs").glob("*.json"))
ACCELERATORS = {
    "cpu": Accelerator("cpu", supports_fp16=False, supports_bf16=True, fused_adam=False),
    "cuda": Accelerator("cuda", supports_fp16=True, supports_bf16=True, fused_adam=True),
}


def test_all_promised_files_are_there() -> None:
    assert {"demo", "scratch_base", "stackingbert_base", "tiny_test"} <= {
        path.stem for path in RECIPE_FILES
    }
    assert {
        "fp16_fused_adam",
        "bf16_fused_adam",
        "zero2_fp16",
        "zero3_fp16",
        "zero3_offload_fp16",
        "multi_node_fp16",
        "cpu_bf16",
        "cpu_fp32",
    } <= {path.stem for path in ENGINE_FILES}


@pytest.mark.parametrize("kind", ACCELERATORS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("engine_file", ENGINE_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe_file", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_recipe_resolves_with_every_json_on_every_device(
    recipe_file: Path, engine_file: Path, world_size: int, kind: str
) -> None:
    recipe = load_recipe(recipe_file)
    engines = resolve_stages(
        load_deepspeed_config(engine_file),
        recipe,
        world_size=world_size,
        accelerator=ACCELERATORS[kind],
        strict_precision=kind == "cuda",
    )
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


def test_the_baseline_differs_from_stackingbert_in_its_stages_only() -> None:
    stacked = load_recipe(RECIPES / "stackingbert_base.json")
    scratch = load_recipe(RECIPES / "scratch_base.json")
    named = {"name": "", "description": "", "stages": ()}
    assert scratch.model_copy(update=named) == stacked.model_copy(update=named)
    assert scratch.total_steps == stacked.total_steps
    assert [stage.num_hidden_layers for stage in scratch.stages] == [12]


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
