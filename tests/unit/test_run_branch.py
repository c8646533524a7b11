"""A branch begins only where its own first steps were made, and as they were made."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import BertConfig, LearningRateConfig, Recipe, Stage
from stacking.config_loading import resolved_json
from stacking.deepspeed_checks import check_document
from stacking.deepspeed_config import (
    Accelerator,
    ResolvedEngine,
    resolve_stages,
    resolved_precision,
)
from stacking.errors import CheckpointError, ConfigError, UserError
from stacking.growth.contract import parameter_shapes
from stacking.run_branch import Conditions, Trunk
from stacking.run_folder import RunFolder
from stacking.snapshot import Snapshot

MODEL = BertConfig(
    vocab_size=37, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
)
RECIPE = Recipe(
    name="a",
    model=MODEL,
    global_batch_size=4,
    learning_rate=LearningRateConfig(schedule="constant", warmup_steps=0),
    stages=(Stage(num_hidden_layers=1, steps=3), Stage(num_hidden_layers=2, steps=4)),
)
CPU = Accelerator("cpu", supports_fp16=True, supports_bf16=True, fused_adam=False)


def engines(
    recipe: Recipe = RECIPE, ranks: int = 2, **document: object
) -> tuple[ResolvedEngine, ...]:
    """As pretrain.py makes them of a DeepSpeed JSON."""
    config = check_document(
        {"zero_optimization": {"stage": 1}, **document}, source="a.json", prefix="a.json: "
    )
    stages = resolve_stages(
        config, recipe, world_size=ranks, accelerator=CPU, strict_precision=False
    )
    return tuple(stages)


def conditions(recipe: Recipe = RECIPE, ranks: int = 2, **document: object) -> Conditions:
    return Conditions(71, "cpu", ranks, engines(recipe, ranks, **document))


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    """A run of two ranks of a CPU in fp32, saved after steps 2 and 5."""
    folder = RunFolder(tmp_path / "trunk")
    folder.create(RECIPE, tmp_path)
    folder.write_deepspeed([engine.deepspeed for engine in engines()])
    manager = CheckpointManager(folder.checkpoints)
    for step, stage in ((2, 0), (5, 1)):
        shapes = parameter_shapes(RECIPE.stage_model(stage))
        state = TrainState(
            global_step=step, stage=stage, num_hidden_layers=stage + 1, recipe_sha256="x",
            loader={"samples_consumed": 4 * step},
        )  # fmt: skip
        weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
        manager.save(f"step_{step:08d}", Snapshot(weights), state)
    begin(folder)
    return folder.path


def begin(folder: RunFolder, **changes: object) -> None:
    """Write metrics.jsonl's first row."""
    plans = [{"num_hidden_layers": s.num_hidden_layers, "steps": s.steps, "num_parameters": 9,
              "num_trained": 9} for s in RECIPE.stages]  # fmt: skip
    row = {"event": "run_start", "name": "a", "total_steps": 7, "stages": plans, "world_size": 2,
           "device": "cpu", "precision": "fp32", "unigram_loss": None, "data_fingerprint": 71,
           **changes}  # fmt: skip
    folder.metrics.write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("step", [2, 5])
def test_a_branch_under_its_trunks_conditions_begins_there(trunk: Path, step: int) -> None:
    place, own = Trunk(trunk, step), RunFolder(trunk.parent / "own")
    place.check(own, RECIPE, conditions())
    assert place.state(RECIPE).global_step == step
    assert place.snapshot(RECIPE).weights
    assert not own.path.exists()


@pytest.mark.parametrize(
    ("start", "document", "ranks", "message"),
    [
        ({}, {"bf16": {"enabled": True}}, 2, "precision: got bf16; allowed: fp32"),
        ({"precision": "fp16"}, {}, 2, "precision: got fp32; allowed: fp16"),
        ({}, {}, 1, "number of ranks: got 1; allowed: 2"),
        ({"device": "cuda:0 (NVIDIA H200)"}, {}, 2, "device: got cpu; allowed: cuda"),
        ({"data_fingerprint": 5}, {}, 2, "was trained on other data (fingerprint 5"),
        ({}, {"optimizer": {"type": "Muon"}}, 2, "optimizer of stages.0: got Muon or apex's LAMB; "
         "allowed: AdamW"),
    ],
)  # fmt: skip
def test_other_conditions_than_the_trunks_are_refused(
    trunk: Path, start: Mapping[str, object], document: dict[str, object], ranks: int, message: str
) -> None:
    begin(RunFolder(trunk), **start)
    unclipped = RECIPE.optimizer.model_copy(update={"max_grad_norm": 0.0})
    recipe = RECIPE.model_copy(update={"optimizer": unclipped})
    RunFolder(trunk).recipe.write_text(resolved_json(recipe))
    with pytest.raises(ConfigError, match=re.escape(message)):
        Trunk(trunk, 2).check(
            RunFolder(trunk.parent / "own"), recipe, conditions(recipe, ranks, **document)
        )


def test_a_later_stages_precision_is_told_by_the_trunks_json(trunk: Path) -> None:
    stages = (
        RECIPE.stages[0],
        RECIPE.stages[1].model_copy(update={"deepspeed": {"bf16": {"enabled": True}}}),
    )
    other, own = RECIPE.model_copy(update={"stages": stages}), RunFolder(trunk.parent / "own")
    Trunk(trunk, 2).check(own, other, conditions(other))
    with pytest.raises(ConfigError, match=r"precision of stages.1: got bf16; allowed: fp32"):
        Trunk(trunk, 5).check(own, other, conditions(other))


@pytest.mark.parametrize(
    "document",
    [{}, {"fp16": {"enabled": True}}, {"bf16": {"enabled": True}},
     {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {"bf16": {"enabled": False}}],
)  # fmt: skip
def test_a_resolved_json_tells_its_precision(document: dict[str, object]) -> None:
    for engine in engines(RECIPE, 2, **document):
        assert resolved_precision(engine.deepspeed) == engine.precision


def test_a_damaged_checkpoint_is_told_before_anything_is_made(trunk: Path) -> None:
    weights = trunk / "checkpoints" / "step_00000002" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    own = RunFolder(trunk.parent / "own")
    with pytest.raises(CheckpointError):
        Trunk(trunk, 2).check(own, RECIPE, conditions())
    assert not own.path.exists()


def test_a_trunk_without_its_stages_json_is_refused(trunk: Path) -> None:
    RunFolder(trunk).write_deepspeed([])
    with pytest.raises(UserError, match="has no stage 0"):
        Trunk(trunk, 2).check(RunFolder(trunk.parent / "own"), RECIPE, conditions())


def begun(path: Path, branch_from: str) -> RunFolder:
    """A run that has saved, and began at RUN@STEP, or by itself."""
    folder = RunFolder(path)
    (folder.checkpoints / "step_00000003").mkdir(parents=True)
    (folder.checkpoints / "step_00000003" / "COMMITTED").write_text("{}")
    begin(folder, **({"branch_from": branch_from} if branch_from else {}))
    return folder


@pytest.mark.parametrize(
    ("began", "place", "message"),
    [
        ("runs/t@8", "runs/t@8", ""),
        ("runs/t@8", "runs/x/../t@8", ""),
        ("runs/t@8", "runs/t@16", "own began from runs/t@8; leave --branch-from away"),
        ("runs/t@8", "runs/u@8", "own began from runs/t@8"),
        ("", "runs/t@8", "own began by itself; leave --branch-from away"),
    ],
)
def test_a_run_goes_on_from_where_it_began_alone(
    tmp_path: Path, began: str, place: str, message: str
) -> None:
    own = begun(tmp_path / "own", began)
    if not message:
        Trunk.parse(place).check(own, RECIPE, conditions())
        return
    with pytest.raises(ConfigError, match=message):
        Trunk.parse(place).check(own, RECIPE, conditions())


def test_a_trunk_is_no_branch_of_its_own(trunk: Path) -> None:
    with pytest.raises(ConfigError, match="began by itself"):
        Trunk(trunk, 2).check(RunFolder(trunk), RECIPE, conditions())


def test_a_study_that_was_moved_goes_on(tmp_path: Path) -> None:
    own = begun(tmp_path / "here" / "branches" / "0.5", "/there/study@8")
    Trunk(tmp_path / "here", 8).check(own, RECIPE, conditions())
    with pytest.raises(ConfigError, match="began from /there/study@8"):
        Trunk(tmp_path / "here", 9).check(own, RECIPE, conditions())
