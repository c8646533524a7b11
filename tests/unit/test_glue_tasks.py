"""The table of tasks against the papers' numbers."""

import dataclasses

import pytest

from stacking.glue_tasks import BY_NAME, SPLITS, TASKS, GlueRecipe, GridPoint, grid

# reproduce_glue.sh: kind, epochs, batch, rate, symmetric.
RECIPES = {
    "CoLA": ("one_logit", 3, 16, 5e-5, False),
    "SST-2": ("classes", 3, 16, 5e-5, False),
    "MRPC": ("one_logit", 3, 16, 5e-5, True),
    "STS-B": ("regression", 4, 32, 5e-5, True),
    "QQP": ("one_logit", 4, 32, 5e-5, True),
    "MNLI-m": ("classes", 3, 16, 5e-5, False),
    "MNLI-mm": ("classes", 3, 16, 5e-5, False),
    "QNLI": ("classes", 3, 32, 5e-5, False),
    "RTE": ("classes", 4, 16, 3e-5, False),
}
LOGITS = {"CoLA": 1, "SST-2": 2, "MRPC": 1, "STS-B": 1, "QQP": 1, "MNLI-m": 3, "MNLI-mm": 3,
          "QNLI": 2, "RTE": 2, "WNLI": 2, "AX": 3}  # fmt: skip


def test_every_task_is_there() -> None:
    assert {task.name: task.num_logits for task in TASKS} == LOGITS
    assert {task.name for task in TASKS if not task.is_pair} == {"CoLA", "SST-2"}
    assert [task.name for task in TASKS if task.recipe is None] == ["WNLI", "AX"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_2019(name: str) -> None:
    kind, epochs, batch, rate, is_symmetric = RECIPES[name]
    task = BY_NAME[name]
    assert task.kind == kind
    assert task.recipe == GlueRecipe(epochs, batch, rate, is_symmetric, 0.1, 0.01, 384)


def test_wnli_and_the_diagnostics_are_not_trained() -> None:
    assert BY_NAME["WNLI"].constant == "0"
    assert BY_NAME["AX"].predicted_by == "MNLI-m"
    assert BY_NAME["AX"].labels == BY_NAME["MNLI-m"].labels


def test_only_pairs_are_swapped() -> None:
    assert all(task.is_pair for task in TASKS if task.recipe and task.recipe.is_symmetric)


def test_the_grid_is_the_papers() -> None:
    points = grid()
    assert len(points) == len(set(points)) == 12
    assert points[0] == GridPoint(16, 5e-5, 3)
    for field, values in (("batch_size", {16, 32}), ("learning_rate", {5e-5, 3e-5, 2e-5}),
                          ("num_epochs", {3, 4})):  # fmt: skip
        assert {getattr(point, field) for point in points} == values


def test_labels_are_secret_in_test_files_only() -> None:
    for task in TASKS:
        for split in SPLITS:
            file = task.file(split)
            if file is not None:
                assert (file.columns.label is None) == (split == "test"), (task.name, split)
                assert (file.columns.index is not None) == (split == "test"), (task.name, split)


def test_the_table_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS[0].name = "other"  # type: ignore[misc]
