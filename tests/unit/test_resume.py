"""A checkpoint of another recipe, or one whose hashes were made anew, does not get into a run."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import BertConfig, Recipe, Stage
from stacking.errors import CheckpointError
from stacking.growth.contract import parameter_shapes
from stacking.resume import snapshot_for, state_for
from stacking.snapshot import Snapshot

MODEL = BertConfig(
    vocab_size=37, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
)
RECIPE = Recipe(
    name="a",
    model=MODEL,
    global_batch_size=4,
    stages=(Stage(num_hidden_layers=1, steps=3), Stage(num_hidden_layers=2, steps=2)),
)


def saved(
    path: Path,
    changes: Mapping[str, object] = MappingProxyType({}),
    weights: dict[str, torch.Tensor] | None = None,
) -> str:
    given = {
        "global_step": 2, "stage": 0, "num_hidden_layers": 1, "loader": {"samples_consumed": 8},
        "recipe_sha256": "x", **changes,
    }  # fmt: skip
    if weights is None:
        weights = zeros()
    manager = CheckpointManager(path)
    manager.save("tag", Snapshot(weights), TrainState.model_validate(given))
    return "tag"


def zeros() -> dict[str, torch.Tensor]:
    shapes = parameter_shapes(RECIPE.stage_model(0))
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_what_was_saved_by_this_recipe_is_taken(tmp_path: Path) -> None:
    checkpoint = CheckpointManager(tmp_path).load(saved(tmp_path))
    assert state_for(checkpoint, RECIPE).global_step == 2
    assert snapshot_for(checkpoint, RECIPE).weights.keys() == zeros().keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 2}, "stage 2 of 2"),
        ({"stage": 1, "num_hidden_layers": 2}, "step 2 in stage 1 .* steps 3 to 5"),
        ({"global_step": 4, "loader": {"samples_consumed": 16}}, "step 4 in stage 0"),
        ({"num_hidden_layers": 2}, "2 layers in a stage of 1"),
        ({"loader": {"samples_consumed": 12}}, "12 samples read after 2 steps of 4"),
        ({"loader": {}}, "None samples read after 2 steps of 4"),
    ],
)
def test_a_state_to_which_the_recipe_never_comes_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    checkpoint = CheckpointManager(tmp_path).load(saved(tmp_path, changes))
    with pytest.raises(CheckpointError, match=message):
        state_for(checkpoint, RECIPE)


def test_tensors_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    weights = zeros()
    name = next(iter(weights))
    for change, message in (
        ({name: weights[name].T.contiguous()}, f"{name} is .*, not "),
        ({"stranger": torch.zeros(1)}, "stranger is nothing of the model's"),
    ):
        saved(tmp_path, weights={**weights, **change})
        with pytest.raises(CheckpointError, match=message):
            snapshot_for(CheckpointManager(tmp_path).load("tag"), RECIPE)
    del weights[name]
    saved(tmp_path, weights=weights)
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        snapshot_for(CheckpointManager(tmp_path).load("tag"), RECIPE)
