"""benchmarks/evidence_cpu.sh without training: its recipes load, can grow and be compared."""

import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from stacking.branches import branch_faults
from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.cost import training_flops
from stacking.growth.legality import recipe_faults
from stacking.schedule import learning_rate
from stacking.study import Run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 1000


def script(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "evidence_cpu.sh"), *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PATH": path, "DRY_RUN": "1", "STEPS": str(STEPS), **variables},
    )  # fmt: skip


@cache
def recipes(**variables: str) -> dict[str, Recipe]:
    """All runs, by place."""
    done = script("DATA", "OUT", **variables)
    assert done.returncode == 0, done.stderr
    found: dict[str, Recipe] = {}
    for words in map(shlex.split, done.stdout.splitlines()[:-1]):
        changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        recipe = load_recipe(words[words.index("--recipe") + 1], changes)
        assert branch_faults(recipe) == []
        folder = Path(words[words.index("--run-dir") + 1])
        found |= {str(run.folder): run.recipe for run in Run(recipe, folder).with_branches()}
    return found


@pytest.mark.parametrize(("layers", "small"), [(12, 3), (12, 1), (8, 2), (12, 6)])
def test_every_run_can_grow_and_ends_decayed_over_its_last_fifth(layers: int, small: int) -> None:
    for place, recipe in recipes(LAYERS=str(layers), SMALL=str(small)).items():
        assert recipe_faults(recipe) == [], place
        total, rate = recipe.total_steps, recipe.learning_rate
        assert rate.decay_steps == pytest.approx(total / 5, abs=1), place
        assert learning_rate(total - 1, rate, total) < 0.02 * rate.peak, place


def test_all_ways_of_growing_have_as_many_steps_and_one_target() -> None:
    found = recipes()
    grown = {place: r for place, r in found.items() if len(r.stages) > 1}
    assert len(grown) == 14
    targets = {r.stage_model(len(r.stages) - 1).model_dump_json() for r in grown.values()}
    assert targets == {found["OUT/scratch"].stage_model(0).model_dump_json()}
    for place, recipe in grown.items():
        assert recipe.total_steps == STEPS, place
        first = recipe.stage_model(0)
        assert first.num_hidden_layers == 3
        assert (first == found["OUT/trunk"].stage_model(0)) == ("compound" not in place)


def test_the_stages_of_the_published_systems_are_there() -> None:
    found = recipes()
    stacked = found["OUT/trunk/branches/stackingbert"]
    assert [(s.num_hidden_layers, s.steps) for s in stacked.stages] == [
        (3, 120), (6, 180), (12, 700)]  # fmt: skip
    mslt = found["OUT/trunk/branches/mslt"]
    assert [s.freeze.layers if s.freeze else 0 for s in mslt.stages] == [0, 3, 6, 9, 0]
    compound = found["OUT/compound_60"]
    assert (compound.stage_model(0).inner_size(0), compound.stage_model(1).inner_size(0)) == (
        64, 256)  # fmt: skip
    own = found["OUT/compoundgrow"]
    models = [own.stage_model(place) for place in range(4)]
    assert [(m.num_hidden_layers, m.inner_size(0), m.pooling) for m in models] == [
        (3, 64, "mean"), (6, 64, "mean"), (6, 256, "none"), (12, 256, "none")]  # fmt: skip
    assert [stage.steps for stage in own.stages] == [200, 250, 100, 450]


def test_two_hops_go_over_a_quarter_before_the_rate_decays() -> None:
    hops = recipes(SMALL="1")["OUT/trunk/branches/hops"]
    assert [(stage.num_hidden_layers, stage.steps) for stage in hops.stages] == [
        (1, 300), (3, 450), (12, 250)]  # fmt: skip
    assert [stage.moments for stage in hops.stages[1:]] == ["reset", "reset"]
    assert learning_rate(750, hops.learning_rate, STEPS) == hops.learning_rate.peak
    assert "OUT/trunk/branches/hops" not in recipes()


@pytest.mark.parametrize(
    ("layers", "small", "expected"),
    [(12, 1, [(1, 50), (3, 70), (6, 180), (12, 700)]), (8, 2, [(2, 120), (4, 180), (8, 700)]),
     (8, 1, [(1, 50), (2, 70), (4, 180), (8, 700)]), (12, 6, [(6, 300), (12, 700)]),
     (12, 2, [(2, 120), (6, 180), (12, 700)])],
)  # fmt: skip
def test_stackingberts_chain_begins_at_the_small_model(
    layers: int, small: int, expected: list[tuple[int, int]]
) -> None:
    found = recipes(LAYERS=str(layers), SMALL=str(small))
    stages = found["OUT/trunk/branches/stackingbert"].stages
    assert [(stage.num_hidden_layers, stage.steps) for stage in stages] == expected


def test_mslt_begins_at_a_quarter_whatever_the_small_model() -> None:
    branch, own = (recipes()["OUT/trunk/branches/mslt"], recipes(SMALL="1")["OUT/mslt"])
    for recipe in (branch, own):
        depths = [(stage.num_hidden_layers, stage.steps) for stage in recipe.stages]
        assert depths == [(3, 200), (6, 200), (9, 200), (12, 200), (12, 200)]
    trained = [[stage.freeze for stage in recipe.stages] for recipe in (branch, own)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(("layers", "small"), [(12, 3), (12, 1), (8, 2)])
def test_small_models_alone_cost_from_less_to_more_than_each_grown_run(
    layers: int, small: int
) -> None:
    found = recipes(LAYERS=str(layers), SMALL=str(small))
    grown = [flops(recipe) for recipe in found.values() if len(recipe.stages) > 1]
    for depth in {small, layers // 4, layers // 2}:
        name = f"OUT/alone_{depth}"
        places = [*(f"{name}/branches/{share}" for share in (0.35, 0.5, 0.7)), name]
        alone = [found[place] for place in places]
        assert {recipe.model.num_hidden_layers for recipe in alone} == {depth}
        assert flops(alone[0]) < min(grown)
        assert flops(alone[-1]) > 0.99 * max(grown)
    assert sum("branches" not in place and "alone" in place for place in found) == len(
        {small, layers // 4, layers // 2})  # fmt: skip


def flops(recipe: Recipe) -> int:
    """Of all stages."""
    data = recipe.data
    return sum(
        stage.steps * training_flops(
            recipe.stage_model(index), 1, data.max_seq_length, data.max_predictions_per_seq,
            freeze=stage.freeze,
        )
        for index, stage in enumerate(recipe.stages)
    )  # fmt: skip


def test_only_trains_what_it_names_and_nothing_is_compared() -> None:
    done = script("DATA", "OUT", ONLY=" alone_3  scratch ")
    folders = [words[words.index("--run-dir") + 1]
               for words in map(shlex.split, done.stdout.splitlines())]  # fmt: skip
    assert folders == ["OUT/scratch", "OUT/alone_3"]


def test_numbers_with_leading_zeros_are_decimal() -> None:
    found = recipes(STEPS="0900", PIECE_MINUTES="08", LAYERS="012", SEED="010")
    assert sum(stage.steps for stage in found["OUT/compound_60"].stages) == 900
    assert found["OUT/scratch"].seed == 10
    assert "--time-limit" in script("DATA", "OUT", PIECE_MINUTES="08").stdout


def test_variables_change_the_runs() -> None:
    found = recipes(LAYERS="8", SMALL="2", HIDDEN="128", HEADS="4", PEAK="1e-3", SEED="5")
    target = found["OUT/scratch"]
    assert (target.model.num_hidden_layers, target.model.hidden_size) == (8, 128)
    assert (target.learning_rate.peak, target.seed) == (1e-3, 5)


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"LAYERS": "8"}, "LAYERS: got 8"), ({"LAYERS": "3"}, "LAYERS: got 3"),
     ({"LAYERS": "4", "SMALL": "4"}, "LAYERS: got 4"), ({"STEPS": "x"}, "STEPS: got 'x'"),
     ({"STEPS": "099"}, "STEPS: got 99; allowed: 100"), ({"LAYERS": "a[0]"}, "LAYERS: got 'a[0]'"),
     ({"SMALL": "0"}, "SMALL: got 0; allowed: 1"),
     ({"HEADS": "3"}, "HEADS: got 3; allowed: a divisor of HIDDEN, 64"),
     ({"STEPS": "9" * 30}, "at most 9 digits"), ({"PEAK": "abc"}, "PEAK: got 'abc'"),
     ({"PEAK": "0.0e-3"}, "PEAK: got '0.0e-3'"), ({"PEAK": "01"}, "PEAK: got '01'"),
     ({"ONLY": "scrtch"}, "ONLY: got 'scrtch'; allowed: scratch trunk compound_60 compoundgrow al"),
     ({"ONLY": "scratch *"}, "ONLY: got '*'"), ({"DRY_RUN": ""}, "there is no folder DATA")],
)  # fmt: skip
def test_mistakes_are_told(variables: dict[str, str], message: str) -> None:
    done = script("DATA", "OUT", **variables)
    assert done.returncode == 2
    assert message in done.stderr
