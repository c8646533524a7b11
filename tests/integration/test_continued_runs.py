"""A run that begins with the weights of a Hugging Face folder: what is there first, and then."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import rows
from same_run import CHANGES, RECIPE, arguments, assert_the_same_run, engine_json, tags, weights
from warm_jobs import WarmJobs

from stacking.checkpoint import CheckpointManager
from stacking.config_loading import load_recipe
from stacking.hf import save_pretrained
from stacking.pretrained import checkpoint_model

ONE_STAGE = (
    "model.num_hidden_layers=2", 'stages=[{"num_hidden_layers": 2, "steps": 6}]',
    "learning_rate.decay_steps=2", "evaluation.every_steps=1", "checkpoint.keep_last=9",
)  # fmt: skip
# The first step changes nothing, so that the first evaluation is of what the run began with.
GROWING = (
    "evaluation.every_steps=1", "checkpoint.keep_last=9", "learning_rate.schedule=piecewise",
    "learning_rate.warmup_steps=0", "learning_rate.decay_steps=0",
    "learning_rate.points=[[0, 0.0], [1, 0.0], [2, 0.01], [7, 0.001]]",
    'stages=[{"num_hidden_layers": 2, "steps": 4}, {"num_hidden_layers": 4, "steps": 3}]',
)  # fmt: skip
Train = Callable[..., str]


@pytest.fixture
def train(warm_jobs: WarmJobs, small_shards: Path, tmp_path: Path) -> Train:
    """Return `(run_dir, ..., changes, zero, ranks, code) -> what it said`: one job."""

    def run(
        run_dir: Path, *words: object, changes: tuple[str, ...], zero: int = 0, ranks: int = 1,
        code: int = 0,
    ) -> str:  # fmt: skip
        command = arguments(small_shards, run_dir, engine_json(tmp_path, zero), changes)
        codes, job = warm_jobs.run([*command, *words], tmp_path, ranks)
        assert codes == [code] * ranks, job.output() + job.errors()
        return job.output() + job.errors()

    return run


@pytest.fixture
def export(train: Train, tmp_path: Path) -> Path:
    """Of a run of ONE_STAGE, as launch/export.py writes it; the run lies beside."""
    run_dir = tmp_path / "first"
    train(run_dir, changes=ONE_STAGE)
    checkpoint = CheckpointManager(run_dir / "checkpoints").load("stage1_end")
    model = checkpoint_model(checkpoint, load_recipe(RECIPE, [*CHANGES, *ONE_STAGE]))
    save_pretrained(model, model.config, tmp_path / "hf", run_dir / "tokenizer")
    return tmp_path / "hf"


def losses(run_dir: Path) -> list[float]:
    return [float(str(row["val_loss"])) for row in rows(run_dir, "evaluation")]


def test_a_run_begins_where_the_exported_one_ended_and_resumes_exactly(
    train: Train, export: Path, tmp_path: Path
) -> None:
    run_dir, again = tmp_path / "second", tmp_path / "again"
    said = train(run_dir, "--start-from", export, changes=GROWING)
    assert f"beginning with the weights of {export}" in said
    assert losses(run_dir)[0] == pytest.approx(losses(tmp_path / "first")[-1], abs=1e-5)
    assert losses(run_dir)[-1] != pytest.approx(losses(run_dir)[0], abs=1e-3)
    assert rows(run_dir, "run_start")[0]["start_from"] == str(export)
    # Without the folder: a checkpoint is all that a run needs.
    shutil.copytree(run_dir, again)
    shutil.rmtree(export)
    said = train(again, "--start-from", export, "--resume", "step_00000002", changes=GROWING)
    assert "resuming from step_00000002" in said
    assert_the_same_run(again, run_dir)
    said = train(tmp_path / "first", "--start-from", export, changes=ONE_STAGE, code=2)
    assert "began from random weights; leave --start-from away" in said


@pytest.mark.slow
def test_a_grown_continuation_on_two_ranks_is_the_same_after_a_stop(
    train: Train, export: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    start = ("--start-from", export)
    train(whole, *start, changes=GROWING, zero=3, ranks=2)
    train(stopped, *start, "--max-steps", 3, changes=GROWING, zero=3, ranks=2, code=3)
    train(stopped, changes=GROWING, zero=3, ranks=2)
    assert_the_same_run(stopped, whole)
    assert losses(whole)[0] == pytest.approx(losses(tmp_path / "first")[-1], abs=1e-5)


@pytest.mark.slow
def test_branches_begin_with_the_weights_of_their_run(
    train: Train, export: Path, tmp_path: Path
) -> None:
    """Those at step 0 too, also where the session that trains them was not told of the folder."""
    branches = (
        'growth_branches=[{"at": 0, "stages": [{"num_hidden_layers": 2, "steps": 5}], "name": "b"},'
        ' {"at": 3, "stages": [{"num_hidden_layers": 2, "steps": 4}], "name": "c"}]'
    )
    study, shorter = tmp_path / "study", tuple(c for c in ONE_STAGE if not c.startswith("stages"))
    shorter += ('stages=[{"num_hidden_layers": 2, "steps": 5}]',)
    train(study, "--start-from", export, "--max-steps", 4, changes=(*ONE_STAGE, branches), code=3)
    train(study, changes=(*ONE_STAGE, branches))
    train(tmp_path / "alone", "--start-from", export, changes=shorter)
    assert weights(study / "branches/b", "stage1_end") == weights(tmp_path / "alone", "stage1_end")
    trunk = rows(study, "run_start")[0]
    for name in "bc":
        start = rows(study / "branches" / name, "run_start")[0]
        assert [start[key] for key in ("start_from", "start_sha256")] == [
            trunk[key] for key in ("start_from", "start_sha256")
        ]
    assert "branch_from" not in rows(study / "branches/b", "run_start")[0]
    assert tags(study / "branches/c")
    # Weights that changed since are not what the trunk began with.
    shutil.rmtree(study / "branches/b")
    first = CheckpointManager(tmp_path / "first/checkpoints").load("step_00000002")
    model = checkpoint_model(first, load_recipe(RECIPE, [*CHANGES, *ONE_STAGE]))
    save_pretrained(model, model.config, export, tmp_path / "first/tokenizer")
    said = train(study, changes=(*ONE_STAGE, branches), code=2)
    assert "its weights have changed since" in said
