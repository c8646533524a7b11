"""A run that branches from another is, bit for bit, the run that its recipe describes."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import rows, script
from same_run import CHANGES, RECIPE, arguments, engine_json, figures, tags, weights
from warm_jobs import WarmJobs

from stacking.branches import branch_runs
from stacking.config_loading import load_recipe, resolved_json

SHALLOW = (
    *CHANGES, "model.num_hidden_layers=2", "checkpoint.every_steps=4", "checkpoint.keep_last=1",
    "learning_rate.decay_steps=2", 'stages=[{"num_hidden_layers": 2, "steps": 12}]',
)  # fmt: skip
GROWN = '{"num_hidden_layers": 4, "steps": 6}'
BRANCHES = (
    "branches=[0.5, 1.0]",
    f'growth_branches=[{{"at": 5, "stages": [{GROWN}], "branches": [0.9]}}, '
    f'{{"at": 0, "stages": [{GROWN}], "name": "alone"}}]',
)
PLACES = {"0.5": 5, "at_5": 5, "at_5/branches/0.9": 8, "alone": 0}
"""Folder in RUN/branches -> the step at which it leaves."""


@pytest.fixture
def train(warm_jobs: WarmJobs, small_shards: Path, tmp_path: Path) -> Callable[..., str]:
    """Return `(run_dir, ..., changes, recipe, zero, ranks, code) -> what it said`: one job."""

    def run(
        run_dir: Path, *words: object, changes: tuple[str, ...] = (), recipe: Path | None = None,
        zero: int = 0, ranks: int = 1, code: int = 0, data: Path = small_shards,
    ) -> str:  # fmt: skip
        command = arguments(data, run_dir, engine_json(tmp_path, zero), changes)
        if recipe is not None:
            command = [recipe if word == RECIPE else word for word in command]
            command = command[: command.index("--set")]
        codes, job = warm_jobs.run([*command, *words], tmp_path, ranks)
        assert codes == [code] * ranks, job.output() + job.errors()
        return job.output() + job.errors()

    return run


@pytest.mark.parametrize(
    ("zero", "ranks"), [(0, 1), *(pytest.param(z, 2, marks=pytest.mark.slow) for z in (1, 3))]
)
def test_each_branch_of_a_recipe_is_the_run_trained_alone(
    train: Callable[..., str], tmp_path: Path, zero: int, ranks: int
) -> None:
    """One command trains all; nothing is saved twice."""
    trunk = tmp_path / "trunk"
    train(trunk, changes=(*SHALLOW, *BRANCHES), zero=zero, ranks=ranks)
    recipe = load_recipe(RECIPE, [*SHALLOW, *BRANCHES])
    half, grown, alone = branch_runs(recipe)
    recipes = {"0.5": half, "at_5": grown, "alone": alone,
               "at_5/branches/0.9": branch_runs(grown.recipe)[0]}  # fmt: skip
    for place, at in PLACES.items():
        ours, theirs = trunk / "branches" / place, tmp_path / "alone" / place
        path = tmp_path / f"{Path(place).name}.json"
        path.write_text(resolved_json(recipes[place].recipe.model_copy(update={"branches": ()})))
        train(theirs, recipe=path, zero=zero, ranks=ranks)
        for event in ("train", "stage_switch", "run_end"):
            assert figures(ours, event) == figures(theirs, event), (place, event)
        # The trunk is evaluated wherever a branch leaves it.
        assert figures(ours, "evaluation").items() >= figures(theirs, "evaluation").items()
        last = f"stage{len(recipes[place].recipe.stages)}_end"
        assert weights(ours, last) == weights(theirs, last)
        assert all(int(tag[-8:]) > at for tag in tags(ours) if tag.startswith("step_"))
        if at:
            start = rows(ours, "run_start")[0]
            assert str(start["branch_from"]).endswith(f"@{at}")
            assert rows(ours, "train")[-1]["elapsed_seconds"] > rows(ours, "train")[0][
                "elapsed_seconds"]  # type: ignore[operator]  # fmt: skip
    assert "branch_00000005" in tags(trunk)


@pytest.mark.slow
def test_a_study_that_is_killed_in_each_run_goes_on_where_it_was(
    train: Callable[..., str], warm_jobs: WarmJobs, small_shards: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = (*SHALLOW, *BRANCHES, "checkpoint.every_steps=1", "checkpoint.keep_last=2")
    train(whole, changes=changes)
    command = arguments(small_shards, killed, engine_json(tmp_path, 0), changes)
    for place, at in {"": 2, **PLACES}.items():
        job = warm_jobs.start(command, tmp_path, 1)
        while job.is_running and f"step_{at + 2:08d}" not in tags(killed / place_of(place)):
            time.sleep(0.005)
        job.kill()
        job.wait()
    said = train(killed, changes=changes)
    assert said.count("done:") == 1 + len(PLACES)
    for place in ("", *PLACES):
        for event in ("train", "evaluation", "run_end"):
            found, expected = (figures(run / place_of(place), event) for run in (killed, whole))
            assert found == expected, (place, event)


def place_of(place: str) -> str:
    """In the study's folder."""
    return f"branches/{place}" if place else ""


def test_another_recipe_leaves_a_committed_step_of_a_run(
    train: Callable[..., str], tmp_path: Path
) -> None:
    trunk = tmp_path / "trunk"
    keeping = (*SHALLOW, "checkpoint.keep_last=9")
    train(trunk, changes=keeping)
    longer = tuple(c for c in keeping if "stages" not in c)
    longer += ('stages=[{"num_hidden_layers": 2, "steps": 14}]',)
    train(tmp_path / "longer", "--branch-from", f"{trunk}@8", changes=longer)
    train(tmp_path / "alone", changes=longer)
    assert figures(tmp_path / "longer", "train") == figures(tmp_path / "alone", "train")
    assert tags(tmp_path / "longer") == {"step_00000012", "stage1_end"}
    again = train(tmp_path / "longer", "--branch-from", f"{trunk}@8", changes=longer)
    assert "done:" in again

    def refused(place: str, *changes: str, data: Path | None = None) -> str:
        more = {} if data is None else {"data": data}
        said = train(tmp_path / "refused", "--branch-from", place, changes=(*longer, *changes),
                     code=2, **more)  # fmt: skip
        assert "Traceback" not in said
        assert not (tmp_path / "refused").exists()
        return said

    assert "saved steps: 4, 8, 12" in refused(f"{trunk}@5")
    assert "seed: 7 in the trunk, 8 here" in refused(f"{trunk}@8", "seed=8")
    assert "learning_rate: 0.005 at step 11 in the trunk" in refused(f"{trunk}@12")
    assert "is no run of this trainer" in refused(f"{tmp_path}@8")
    assert "RUN_DIR@STEP" in refused(f"{trunk}")


@pytest.mark.slow
def test_a_branch_that_its_trunk_did_not_begin_is_refused_on_all_ranks(
    train: Callable[..., str], tmp_path: Path
) -> None:
    """Neither under other conditions, nor into the folder of another run."""
    trunk, own = tmp_path / "trunk", tmp_path / "own"
    keeping = (*SHALLOW, "checkpoint.keep_last=9")
    train(trunk, changes=keeping)
    place = ("--branch-from", f"{trunk}@8")
    bf16 = engine_json(tmp_path, 1, is_bf16=True)
    said = train(own, *place, "--deepspeed_config", bf16, changes=keeping, code=2)
    assert "precision: got bf16; allowed: fp32" in said
    said = train(own, *place, changes=keeping, ranks=2, code=2)
    assert said.count("number of ranks: got 2; allowed: 1") == 1
    assert not own.exists()
    assert "began by itself" in train(trunk, *place, changes=keeping, code=2)
    stopped = ("--max-steps", "10")
    train(own, *place, *stopped, changes=keeping, code=3)
    said = train(own, "--branch-from", f"{trunk}@4", changes=keeping, code=2)
    assert f"began from {trunk}@8" in said
    assert "done:" in train(own, *place, changes=keeping)


@pytest.mark.slow
def test_a_branch_at_a_growth_of_its_trunk_has_none_of_that_growth(
    train: Callable[..., str], tmp_path: Path
) -> None:
    """At one step lie the trunk's stage end, which is shared, and its growth, which is not."""
    stages = '[{"num_hidden_layers": 2, "steps": 6}, {"num_hidden_layers": 4, "steps": 6%s}]'
    common = tuple(change for change in SHALLOW if "stages" not in change and "num_h" not in change)
    ours = (*common, "stages=" + stages % ', "depth": "interleave"')
    train(tmp_path / "trunk", changes=(*common, "stages=" + stages % ""))
    train(tmp_path / "branch", "--branch-from", f"{tmp_path / 'trunk'}@6", changes=ours)
    train(tmp_path / "alone", changes=ours)
    lines = (tmp_path / "branch" / "metrics.jsonl").read_text()  # rows() keeps a step's last
    assert lines.count('"event": "stage_switch"') == 1
    for event in ("train", "evaluation", "stage_switch", "run_end"):
        assert figures(tmp_path / "branch", event) == figures(tmp_path / "alone", event), event
    states = [json.loads((tmp_path / name / "checkpoints/stage2_begin/state.json").read_text())
              for name in ("branch", "alone")]  # fmt: skip
    assert states[0]["train"]["recipe_sha256"] == states[1]["train"]["recipe_sha256"]


def test_other_data_are_refused(train: Callable[..., str], tmp_path: Path, tiny_data: Path) -> None:
    trunk = tmp_path / "trunk"
    train(trunk, changes=(*SHALLOW, "checkpoint.keep_last=9"))
    said = train(tmp_path / "other", "--branch-from", f"{trunk}@8", changes=SHALLOW,
                 data=tiny_data, code=2)  # fmt: skip
    assert "was trained on other data" in said


@pytest.mark.slow
def test_a_study_is_compared_by_its_trunks_folder(
    train: Callable[..., str], tmp_path: Path
) -> None:
    """Trunk and branches, each with all that it cost."""
    trunk = tmp_path / "trunk"
    train(trunk, changes=(*SHALLOW, *BRANCHES))
    done = script("compare.py", trunk, "--out", tmp_path / "page", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {row["recipe"] for row in found["speedups"]} >= {"tiny_test at_5"}
