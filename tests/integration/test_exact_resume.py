"""A run that was stopped and taken up again is the run that was not, bit for bit.

fp32, the same ranks and ZeRO stage: everything is equal. Other ranks or another ZeRO stage: the
same samples in the same order, losses within TOLERANCE, as sums are then taken in another order.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import rows
from same_run import (
    CHANGES,
    RECIPE,
    arguments,
    assert_the_same_run,
    engine_json,
    figures,
    tags,
    weights,
)  # fmt: skip
from warm_jobs import WarmJobs

from stacking.config_loading import load_recipe
from stacking.schedule import learning_rate

STEPS = (3, 3, 2)
STILL = ("model.hidden_dropout_prob=0.0", "model.attention_probs_dropout_prob=0.0")
SHORT = (
    *(f"stages.{stage}.steps={steps}" for stage, steps in enumerate(STEPS)),
    "checkpoint.every_steps=1000",  # all tags are those of stops and of stages
)
TOLERANCE = 2e-5
"""Nats; between ZeRO stages and numbers of ranks in fp32, without dropout, whose noise is each
rank's own."""

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(
    warm_jobs: WarmJobs, small_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Train:
    """Return `(run_dir | None, ..., zero, ranks, code, words, changes) -> run_dir`: one job."""
    place = tmp_path_factory.mktemp("exact")

    def run(
        run_dir: Path | None = None,
        *words: object,
        zero: int = 1,
        ranks: int = 2,
        code: int = 0,
        changes: tuple[str, ...] = (),
    ) -> Path:
        run_dir = run_dir or place / f"whole_{zero}_{ranks}_{len(changes)}"
        engine = engine_json(place, zero)
        command = arguments(small_shards, run_dir, engine, (*SHORT, *changes))
        codes, job = warm_jobs.run([*command, *words], place, ranks)
        assert codes == [code] * ranks, job.output() + job.errors()
        assert "Traceback" not in job.output() + job.errors()
        return run_dir

    return run


@pytest.fixture(scope="module")
def whole(train: Train) -> Callable[[int, int], Path]:
    """Return `(zero_stage, ranks) -> run_dir` of a run that nobody stopped, made once."""
    made: dict[tuple[int, int], Path] = {}

    def get(zero: int, ranks: int) -> Path:
        if (zero, ranks) not in made:
            made[zero, ranks] = train(zero=zero, ranks=ranks)
        return made[zero, ranks]

    return get


@pytest.mark.parametrize(
    ("zero", "ranks"),
    [
        (0, 1),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
        pytest.param(3, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_after_every_step_is_the_run_that_was_not(
    train: Train, whole: Callable[[int, int], Path], tmp_path: Path, zero: int, ranks: int
) -> None:
    """A process a step; the switches, too, each begin in a new process."""
    for step in range(1, sum(STEPS)):
        train(tmp_path / "run", "--max-steps", step, zero=zero, ranks=ranks, code=3)
        assert rows(tmp_path / "run", "train")[-1]["global_step"] == step
    train(tmp_path / "run", zero=zero, ranks=ranks)
    assert_the_same_run(tmp_path / "run", whole(zero, ranks))
    recipe = load_recipe(RECIPE, [*CHANGES, *SHORT])
    for row in rows(tmp_path / "run", "train"):
        before = int(str(row["global_step"])) - 1
        assert row["lr"] == learning_rate(before, recipe.learning_rate, recipe.total_steps)


LAST_IN_FIRST = STEPS[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("step", [LAST_IN_FIRST, STEPS[0], STEPS[0] + 1, sum(STEPS) - 1])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_run_stopped_once_goes_on_as_if_it_had_not(
    train: Train, whole: Callable[[int, int], Path], tmp_path: Path, zero: int, step: int
) -> None:
    """One step before a switch, at it, one after it, and before the very last."""
    train(tmp_path / "run", "--max-steps", step, zero=zero, code=3)
    train(tmp_path / "run", zero=zero)
    assert_the_same_run(tmp_path / "run", whole(zero, 2))


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_that_ended_inside_a_switch_makes_the_same_model_in_a_new_process(
    train: Train, whole: Callable[[int, int], Path], tmp_path: Path, zero: int
) -> None:
    """stage1_end is committed, stage2_begin is not: the switch is done anew, and all after it."""
    theirs, run_dir = whole(zero, 2), tmp_path / "run"
    shutil.copytree(theirs, run_dir)
    for tag in tags(run_dir) - {"stage1_end"}:
        shutil.rmtree(run_dir / "checkpoints" / tag)
    train(run_dir, "--max-steps", STEPS[0] + 1, zero=zero, code=3)
    assert rows(run_dir, "resume")[-1]["tag"] == "stage1_end"
    assert weights(run_dir, "stage2_begin") == weights(theirs, "stage2_begin")
    train(run_dir, zero=zero)
    assert_the_same_run(run_dir, theirs)


MOVES = [  # (ZeRO stage, ranks) before and after
    ((0, 2), (3, 2)), ((3, 2), (1, 2)), ((1, 2), (2, 2)), ((1, 2), (1, 1)), ((1, 1), (1, 2)),
    ((2, 2), (3, 1)), ((3, 1), (0, 2)), ((3, 2), (3, 4)), ((2, 4), (0, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "stop"),
    [
        ((3, 2), (1, 1), STEPS[0] + 1),
        *(
            pytest.param(before, after, stop, marks=pytest.mark.slow)
            for before, after in MOVES
            for stop in (STEPS[0] - 1, STEPS[0], STEPS[0] + 1)
        ),
    ],
)
def test_a_run_goes_on_under_another_zero_stage_and_on_other_ranks(
    train: Train,
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
    stop: int,
    still: Path,
) -> None:
    run_dir = tmp_path / "run"
    train(run_dir, "--max-steps", stop, zero=before[0], ranks=before[1], code=3, changes=STILL)
    train(run_dir, zero=after[0], ranks=after[1], changes=STILL)
    for event, key in (("train", "loss"), ("evaluation", "val_loss")):
        ours, theirs = figures(run_dir, event), figures(still, event)
        assert ours.keys() == theirs.keys()
        for step, row in theirs.items():
            assert ours[step][key] == pytest.approx(row[key], abs=TOLERANCE, rel=0), (event, step)
            assert ours[step].get("sample_hash") == row.get("sample_hash")
            assert ours[step].get("lr") == row.get("lr")


@pytest.fixture(scope="module")
def still(train: Train) -> Path:
    """A run without dropout, never stopped: one rank, ZeRO 0."""
    return train(zero=0, ranks=1, changes=STILL)
