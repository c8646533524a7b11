"""Branches as recipes of their own: the same first steps, and every fault named."""

import json
import math
import time
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stacking.branches import (
    branch_faults,
    branch_runs,
    branch_steps,
    first_different_rate,
    history_faults,
)
from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.errors import ConfigError
from stacking.run_branch import Trunk
from stacking.run_folder import recipe_sha256
from stacking.schedule import stage_rates

MODEL = {
    "vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3,
    "intermediate_size": 48, "max_position_embeddings": 32,
}  # fmt: skip
DATA = {"max_seq_length": 32, "max_predictions_per_seq": 5}


def document(
    stages: list[tuple[int, int]], decay: int = 10, **changes: object
) -> dict[str, object]:
    """Stages of (layers, steps); WSD."""
    return {
        "name": "study",
        "model": {**MODEL, "num_hidden_layers": stages[-1][0]},
        "data": DATA,
        "learning_rate": {"schedule": "wsd", "peak": 0.01, "warmup_steps": 5, "decay_steps": decay},
        "stages": [{"num_hidden_layers": layers, "steps": steps} for layers, steps in stages],
        **changes,
    }


def recipe(stages: list[tuple[int, int]], decay: int = 10, **changes: object) -> Recipe:
    return Recipe.model_validate(document(stages, decay, **changes))


def faults(tmp_path: Path, given: dict[str, object]) -> str:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    return str(error.value)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(20, 400), min_size=1, max_size=3),
    decay_share=st.floats(0.01, 0.3), share=st.floats(0.3, 1.0),
)  # fmt: skip
def test_a_decay_branch_is_the_run_in_small_and_shares_its_steps(
    steps: list[int], decay_share: float, share: float
) -> None:
    total = sum(steps)
    trunk = recipe(list(zip((1, 2, 4), steps, strict=False)), max(1, int(decay_share * total)),
                   branches=[share, 1.0])  # fmt: skip
    assume(not branch_faults(trunk))
    branches = branch_runs(trunk)
    assert len(branches) == (share < 1)  # a share of 1 is the run itself
    for branch in branches:
        own = branch.recipe
        assert own.total_steps == round(share * total)
        decay = own.learning_rate.decay_steps
        assert decay == max(1, round(share * trunk.learning_rate.decay_steps))
        assert branch.at == own.total_steps - decay
        for step in range(branch.at):
            assert stage_rates(own, step) == stage_rates(trunk, step)
        assert stage_rates(own, own.total_steps - 1)[0] == pytest.approx(0.01 / decay)
        assert history_faults(trunk, own, branch.at) == []
        assert Recipe.model_validate(own.model_dump()) == own
        assert (own.branches, own.growth_branches) == ((), ())


def test_a_growth_branch_states_the_trunks_sizes_and_ends_at_its_own() -> None:
    grown = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 6,
             "intermediate_size": 96, "steps": 30, "depth": "interleave"}  # fmt: skip
    trunk = recipe([(2, 100)], growth_branches=[
        {"at": 40, "stages": [grown]},
        {"at": 100, "stages": [grown], "name": "late", "branches": [0.9]},
        {"at": 0, "stages": [grown], "name": "alone", "decay_steps": 6},
    ])  # fmt: skip
    early, late, alone = branch_runs(trunk)
    assert [run.name for run in (early, late, alone)] == ["at_40", "late", "alone"]
    assert [stage.steps for stage in early.recipe.stages] == [40, 30]
    assert early.recipe.stage_model(0) == trunk.stage_model(0)
    assert early.recipe.stage_model(1).hidden_size == early.recipe.model.hidden_size == 48
    assert early.recipe.stages[1].depth == "interleave"
    assert [run.at for run in branch_runs(late.recipe)] == [round(0.9 * 130) - 9]
    assert [stage.steps for stage in alone.recipe.stages] == [30]
    decays = [run.recipe.learning_rate.decay_steps for run in (early, late, alone)]
    assert decays == [10, 10, 6]
    assert branch_steps(trunk) == {40, 100}
    assert len({run.recipe.name for run in (early, late, alone)}) == 3


def test_a_run_is_the_same_whether_it_is_branched_or_not() -> None:
    """Branches may be added when the trunk is trained."""
    assert recipe_sha256(recipe([(4, 100)])) == recipe_sha256(recipe([(4, 100)], branches=[0.5]))


@st.composite
def rates(draw: st.DrawFn) -> tuple[dict[str, object], list[dict[str, object]]]:
    """A learning rate and stages, of few values, so that two have much in common."""
    steps = draw(st.lists(st.sampled_from([1, 7, 400]), min_size=1, max_size=3))
    ramps = st.fixed_dictionaries({
        "parameters": st.sampled_from(["all", "new"]), "steps": st.sampled_from([0, 3, 90]),
        "start": st.sampled_from([0.0, 1.0]), "factor": st.sampled_from([1.0, 1.5]),
    })  # fmt: skip
    stages = [
        {"num_hidden_layers": layers, "steps": count,
         **({"rewarm": draw(ramps)} if layers > 1 and draw(st.booleans()) else {})}
        for layers, count in zip((1, 2, 4), steps, strict=False)
    ]  # fmt: skip
    schedule = draw(st.sampled_from(["linear", "cosine", "constant", "wsd", "piecewise"]))
    rate: dict[str, object] = {"schedule": schedule, "peak": draw(st.sampled_from([0.01, 0.02]))}
    if schedule == "piecewise":
        last = draw(st.sampled_from([30, 60]))
        rate["points"] = [[4, rate["peak"]], [9, 0.01], [last, draw(st.sampled_from([0.0, 0.01]))]]
        return rate, stages
    rate["warmup_steps"] = draw(st.sampled_from([0, 4]))
    rate["scope"] = draw(st.sampled_from(["run", "run", "stage"]))
    if schedule == "wsd":
        rate["decay_steps"] = draw(st.sampled_from([1, 3, 100]))
    if schedule != "constant":
        rate["end"] = draw(st.sampled_from([0.0, 0.01]))
        if rate["scope"] == "run":
            rate["total_steps"] = draw(st.sampled_from([None, sum(steps), 900]))
    return rate, stages


@settings(max_examples=100, deadline=None)
@given(first=rates(), second=rates(), keep=st.sampled_from(["", "rate", "stages"]),
       share=st.floats(0, 1))  # fmt: skip
def test_rates_compared_at_corners_are_those_compared_at_each_step(
    first: tuple[dict[str, object], list[dict[str, object]]],
    second: tuple[dict[str, object], list[dict[str, object]]],
    keep: str,
    share: float,
) -> None:
    pair = [first, (first[0] if keep == "rate" else second[0],
                    first[1] if keep == "stages" else second[1])]  # fmt: skip
    try:
        ours, theirs = (
            Recipe.model_validate({"name": "a", "model": {**MODEL, "num_hidden_layers": len(stages)
                                   if len(stages) < 3 else 4}, "data": DATA,
                                   "learning_rate": rate, "stages": stages})
            for rate, stages in pair
        )  # fmt: skip
    except ValueError:  # a ramp that does not fit, or an end above the peak
        assume(False)
    end = round(share * min(ours.total_steps, theirs.total_steps))
    differing = [
        step for step in range(end)
        if not all(map(math.isclose, stage_rates(theirs, step), stage_rates(ours, step)))
    ]  # fmt: skip
    found = first_different_rate(theirs, ours, end)
    assert (found is None) == (not differing)
    if found is not None:
        assert found in differing
        assert found - 1 not in differing


def test_rates_that_differ_between_corners_of_one_recipe_only_are_told() -> None:
    """A notch of three steps, and a cosine whose chord is the other's line."""
    flat = {"schedule": "constant", "peak": 0.01}
    cosine = {"schedule": "cosine", "peak": 0.01, "end": 0.008}
    notch = {"schedule": "piecewise", "peak": 0.01,
             "points": [[501, 0.01], [503, 0.005], [505, 0.01]]}  # fmt: skip
    curved = recipe([(4, 1000)], learning_rate=cosine)
    chord = {"schedule": "piecewise", "peak": 0.01,
             "points": [[0, 0.01], [1998, 2 * stage_rates(curved, 999)[0] - 0.01]]}  # fmt: skip
    for first, second, at in ((flat, notch, 502), (notch, flat, 502), (cosine, chord, 1)):
        ours, theirs = (recipe([(4, 1000)], learning_rate=rate) for rate in (first, second))
        assert first_different_rate(theirs, ours, 1000) == at


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
def test_rates_of_a_million_steps_are_compared_at_once(schedule: str) -> None:
    rate = {"schedule": schedule, "peak": 0.01, "warmup_steps": 1000,
            **({"decay_steps": 10**5} if schedule == "wsd" else {})}  # fmt: skip
    trunk = recipe([(2, 10**6), (4, 10**6)], learning_rate=rate)
    longer = recipe([(2, 10**6), (4, 2 * 10**6)], learning_rate=rate)
    began = time.perf_counter()
    found = history_faults(trunk, longer, 2 * 10**6)
    assert time.perf_counter() - began < 0.5  # a walk takes several seconds
    first = {"wsd": 1900001, "linear": 1001}.get(schedule)
    assert f"at step {first}" in found[0] if first else "learning_rate" in found[0]
    assert history_faults(trunk, trunk, 2 * 10**6) == []


STAGE = {"num_hidden_layers": 4, "steps": 30}


@pytest.mark.parametrize(
    ("stages", "changes", "expected"),
    [
        ([(4, 100)], {"branches": [0.5], "learning_rate": {"schedule": "linear"}}, "with schedule"),
        ([(2, 60), (4, 40)], {"branches": [0.5]}, "shares that end after step 60"),
        ([(4, 100)], {"branches": [0.05]}, "after the warm-up of 5 steps"),
        ([(4, 100)], {"branches": [1.5]}, "branches.0: got 1.5"),
        ([(2, 100)], {"growth_branches": [{"at": 200, "stages": [STAGE]}]}, "allowed: 0 to 100"),
        (
            [(2, 100)],
            {"growth_branches": [{"at": 95, "stages": [STAGE]}]},
            "learning_rate: 0.009 at",
        ),
        ([(2, 100)], {"growth_branches": [{"at": 9, "stages": [STAGE]}] * 2}, "another branch"),
        ([(2, 100)], {"growth_branches": [{"at": 9, "stages": []}]}, "growth_branches.0.stages"),
        (
            [(2, 100)],
            {"growth_branches": [{"at": 9, "stages": [STAGE], "decay_steps": 38}]},
            "growth_branches.0: learning_rate.warmup_steps: got 5, and decay_steps 38",
        ),
        (
            [(2, 100)],
            {
                "growth_branches": [{"at": 9, "stages": [STAGE], "decay_steps": 5}],
                "learning_rate": {"schedule": "constant", "peak": 0.01},
            },
            "growth_branches.0: learning_rate.decay_steps: got 5 with schedule 'constant'",
        ),
        (
            [(2, 100)],
            {"growth_branches": [{"at": 9, "stages": [{"num_hidden_layers": 1, "steps": 30}]}]},
            "a model only grows",
        ),
        (
            [(2, 100)],
            {"growth_branches": [{"at": 9, "name": "../up", "stages": [STAGE]}]},
            "growth_branches.0.name: got '../up'; allowed: a string of at most 100 characters "
            "and that matches ^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        ),
        (
            [(2, 100)],
            {"growth_branches": [{"at": 9, "name": name, "stages": [STAGE]} for name in "Aa"]},
            "growth_branches.1.name: got 'a', the name of another branch",
        ),
        (
            [(2, 100)],
            {"growth_branches": [{"at": 9, "stages": [STAGE], "branches": [0.2]}]},
            "growth_branches.0: branches.0: got 0.2 of the run",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(
    tmp_path: Path, stages: list[tuple[int, int]], changes: dict[str, object], expected: str
) -> None:
    assert expected in faults(tmp_path, document(stages, 10, **changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": 9}, "seed: 1 in the trunk, 9 here"),
        ({"global_batch_size": 7}, "global_batch_size: 256 in the trunk, 7 here"),
        ({"model": {**MODEL, "hidden_size": 48}}, "stages.0.hidden_size: 24 in the trunk, 48 here"),
        ({"data": {**DATA, "masked_lm_prob": 0.2}}, "stages.0.masked_lm_prob: 0.15 in the trunk"),
        ({"optimizer": {"eps": 1e-8}}, "optimizer.eps: 1e-06 in the trunk, 1e-08 here"),
        ({"learning_rate": {"schedule": "constant", "peak": 0.02}}, "learning_rate: 0.002 at step"),
    ],
)
def test_histories_that_differ_are_told(changes: dict[str, object], expected: str) -> None:
    trunk, other = recipe([(4, 100)]), recipe([(4, 100)], 10, **changes)
    assert any(expected in fault for fault in history_faults(trunk, other, 50))
    assert history_faults(trunk, recipe([(4, 500)]), 91) == []  # a longer run began likewise
    assert history_faults(trunk, recipe([(4, 500)]), 92) != []  # from there the trunk decays


def test_histories_of_several_stages() -> None:
    trunk = recipe([(2, 60), (4, 40)])
    assert history_faults(trunk, recipe([(2, 60), (4, 400)]), 80) == []
    assert history_faults(trunk, recipe([(2, 50), (4, 400)]), 40) == []
    found = history_faults(trunk, recipe([(2, 50), (4, 400)]), 60)
    assert found[0] == "stages.0 ends at step: 60 in the trunk, 50 here"
    noisy = document([(2, 60), (4, 40)])
    noisy["stages"][1]["depth"] = "interleave"  # type: ignore[index]
    other = Recipe.model_validate(noisy)
    assert history_faults(trunk, other, 60) == []
    assert "stages.1.depth: stack in the trunk" in history_faults(trunk, other, 61)[0]
    assert history_faults(trunk, other, 101) == ["step 101: the trunk has 100 steps"]


@pytest.mark.parametrize("text", ["", "runs/a", "runs/a@", "@12", "runs/a@x", "runs/a@-1", "a@0"])
def test_a_place_to_branch_from_is_a_folder_and_a_step(text: str) -> None:
    with pytest.raises(ConfigError, match="RUN_DIR@STEP"):
        Trunk.parse(text)


def test_a_folder_may_hold_an_at_sign() -> None:
    assert Trunk.parse("runs/a@b@12") == Trunk(Path("runs/a@b"), 12)
