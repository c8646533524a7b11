"""StackingBERT, MSLT, CompoundGrow and two invented compounds, end to end: two ranks, real text,
every stage, export, transformers."""

import json
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from launching import LAUNCH, ROOT, rows
from ranks import run_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from stacking import distributed, engine
from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.growth.contract import parameter_shapes

RECIPES = ROOT / "launch" / "recipes"
FP32 = ROOT / "deepspeed_configs" / "cpu_fp32.json"
BF16 = ROOT / "deepspeed_configs" / "cpu_bf16.json"
CHANGES = ["model.vocab_size=400"]
# BERT's own form, with sentence pairs.
BERT = [
    *CHANGES, "model.type_vocab_size=2", "model.num_nsp_labels=2", "model.pooler=true",
    "model.position=learned", "model.layer_norm=post", "model.embedding_layer_norm=true",
]  # fmt: skip
EVERYTHING_AT_ONCE = [
    {
        "num_hidden_layers": 3, "steps": 4, "hidden_size": 8, "num_attention_heads": 1,
        "intermediate_size": 10, "shared_attention_layers": [2], "pooling": "concat",
        "pooling_size": 3, "max_seq_length": 20, "max_predictions_per_seq": 4,
    },
    {
        "num_hidden_layers": 3, "steps": 3, "hidden_size": 16, "num_attention_heads": 2,
        "layer_intermediate_sizes": [10, 20, 10], "shared_attention_layers": [2],
        "ffn": "split", "hidden": "uneven", "moments": "grow", "max_seq_length": 20,
        "max_predictions_per_seq": 4, "deepspeed": {"zero_optimization": {"stage": 2}},
    },
    {
        "num_hidden_layers": 4, "steps": 4, "depth": "random", "ffn": "zero", "hidden": "fpi",
        "positions": "interpolate", "moments": "seed_v",
        "rewarm": {"parameters": "new", "start": 1.0, "factor": 1.3, "steps": 3},
    },
]  # fmt: skip
LEARNED = [
    {
        "num_hidden_layers": 2, "steps": 4, "hidden_size": 16, "num_attention_heads": 2,
        "intermediate_size": 20,
    },
    {
        "num_hidden_layers": 4, "steps": 4, "learned": {"steps": 3, "batch_size": 4},
        "freeze": {"layers": 2, "decoder": "train"},
    },
    {"num_hidden_layers": 4, "steps": 2, "moments": "keep"},
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    recipe: str
    changes: tuple[str, ...]
    config: Path = FP32


CASES = {
    "stackingbert": Case("tiny_test.json", (*CHANGES, "stages.1.moments=keep")),
    "mslt": Case("mslt_tiny.json", tuple(BERT)),
    "mslt_bf16": Case("mslt_tiny.json", tuple(CHANGES), BF16),
    "compoundgrow": Case("compoundgrow_tiny.json", tuple(BERT)),
    "everything_at_once": Case(
        "tiny_test.json", (*BERT, f"stages={json.dumps(EVERYTHING_AT_ONCE)}")
    ),
    "learned": Case("tiny_test.json", (*CHANGES, f"stages={json.dumps(LEARNED)}")),
}


def train(commands: dict[str, list[str]]) -> None:
    """Each command line in turn, all in one process group: only the start is paid for once.

    test_training.py starts runs as a user does.
    """
    engine.start()
    main = runpy.run_path(str(LAUNCH / "pretrain.py"))["main"]
    with patch.object(distributed, "shut_down", lambda: None):  # which ends every run
        for name, words in commands.items():
            with patch.object(sys, "argv", ["pretrain.py", *words]):
                assert main() == 0, name
    distributed.shut_down()


@pytest.fixture(scope="module")
def run_dirs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every recipe, trained on two ranks."""
    folder = tmp_path_factory.mktemp("systems")
    commands = {}
    for name, case in CASES.items():
        places = ["--data", str(tiny_data), "--run-dir", str(folder / name)]
        settings = ["--deepspeed_config", str(case.config), "--recipe", str(RECIPES / case.recipe)]
        changes = [word for change in case.changes for word in ("--set", change)]
        commands[name] = [*places, *settings, *changes]
    run_on_ranks(train, 2, commands)
    return {name: folder / name for name in CASES}


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, run_dirs: dict[str, Path]) -> tuple[Recipe, Path]:
    """The recipe, and the folder of its run."""
    case = CASES[request.param]
    return load_recipe(RECIPES / case.recipe, case.changes), run_dirs[request.param]


def weights(run_dir: Path, tag: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / tag / "weights.safetensors")


def test_every_stage_ends_with_a_model_of_its_own_form(run: tuple[Recipe, Path]) -> None:
    recipe, run_dir = run
    for stage in range(len(recipe.stages)):
        shapes = {n: t.shape for n, t in weights(run_dir, f"stage{stage + 1}_end").items()}
        assert shapes == parameter_shapes(recipe.stage_model(stage))
    assert rows(run_dir, "run_end")[0]["global_step"] == recipe.total_steps


def test_what_is_frozen_does_not_move_and_the_rest_does(run: tuple[Recipe, Path]) -> None:
    recipe, run_dir = run
    for index, stage in enumerate(recipe.stages):
        if index == 0:
            continue
        before, after = (weights(run_dir, f"stage{index + 1}_{side}") for side in ("begin", "end"))
        freeze = stage.freeze
        for name in before:
            match = re.match(r"encoder\.layers\.(\d+)\.", name)
            is_frozen = False
            if freeze is not None and match:
                is_frozen = int(match[1]) < freeze.layers
            elif freeze is not None and name.startswith("embeddings."):
                is_frozen = freeze.decoder == "freeze" or "word_embeddings" not in name
            assert torch.equal(before[name], after[name]) == is_frozen, name


def test_moments_begin_as_the_stage_says(run: tuple[Recipe, Path]) -> None:
    recipe, run_dir = run
    for index, stage in enumerate(recipe.stages):
        if index == 0:
            continue
        file = run_dir / "checkpoints" / f"stage{index + 1}_begin" / "moments.safetensors"
        assert file.exists() == (stage.moments != "reset")
        if stage.moments != "reset":
            assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values())


def test_switches_are_logged_with_what_grew(run: tuple[Recipe, Path]) -> None:
    recipe, run_dir = run
    switches = rows(run_dir, "stage_switch")
    assert len(switches) == len(recipe.stages) - 1
    for index, row in enumerate(switches):
        source, target = recipe.stage_model(index), recipe.stage_model(index + 1)
        changes = row["changes"]
        assert isinstance(changes, dict)
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "pooling"):
            old, new = getattr(source, name), getattr(target, name)
            assert changes.get(name) == (None if old == new else [old, new])
        assert row["moments"] == recipe.stages[index + 1].moments
        if not changes:
            assert row["loss_after"] == row["loss_before"]


def test_the_final_model_loads_in_transformers(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    _, run_dir = run
    command = runpy.run_path(str(LAUNCH / "export.py"))
    checkpoint = command["find_checkpoint"](run_dir, None)
    assert command["export"](run_dir, checkpoint, tmp_path / "hf").max_logit_difference < 1e-4
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "hf")
    assert bool(torch.isfinite(model(input_ids=torch.tensor([[2, 7, 9, 3]])).logits).all())
