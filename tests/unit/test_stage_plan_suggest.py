"""Stages for a budget where the best answer is known, by hand or by construction of the pilots."""

import json
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pilot_folders import (
    PLAN_STEPS,
    grown_loss,
    scratch_loss,
    small_law,
    small_loss,
    target_law,
    write_pilot,
    write_pilots,
)
from rich.console import Console
from run_folders import SWITCH

from stacking.comparison_runs import read_runs
from stacking.config import Recipe, Stage
from stacking.config_loading import JsonObject, merge, read_json_object
from stacking.cost import training_flops
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import ConfigError, UserError
from stacking.growth.legality import recipe_faults
from stacking.stage_plan import LOWEST_CEILING, plan_recipe
from stacking.stage_plan_advice import advice, show_suggestion, suggestion_json
from stacking.stage_plan_curves import Control, Flattening, Mixing
from stacking.stage_plan_pilots import Candidate, Evidence, StepTime, gather
from stacking.stage_plan_suggest import RateShape, Suggestion, suggest

NATS = 0.02


def recipe_of(folder: Path, changes: Mapping[str, object] | None = None) -> Recipe:
    """A pilot's own recipe, changed."""
    document = read_json_object(folder / "recipe.json")
    return Recipe.model_validate(merge(document, changes or {}))


def suggested(
    pilots: Sequence[Path], budget: float = 1000.0, measured: Mapping[int, float] | None = None
) -> Suggestion:
    """For the recipe of the first pilot."""
    recipe = recipe_of(pilots[0])
    return suggest(recipe, gather(recipe, read_runs(pilots), measured or {}, NATS), budget)


def told(found: Suggestion) -> str:
    """All that is printed, on one line."""
    console = Console(file=StringIO(), width=200, highlight=False)
    show_suggestion(found, console)
    assert isinstance(console.file, StringIO)
    return " ".join(console.file.getvalue().split())


def steps_of(recipe: Recipe) -> list[tuple[int, int]]:
    return [(stage.num_hidden_layers, stage.steps) for stage in recipe.stages]


def test_the_latest_switch_that_mixes_before_the_decay_and_fills_the_budget(
    tmp_path: Path,
) -> None:
    """tau = 0.8 T - 200; 0.125 tau + 5 + 0.5 (T - tau) = 1,000 s: T = 4,600 by hand."""
    found = suggested(write_pilots(tmp_path))
    assert steps_of(found.recipe) == [(2, 3480), (8, 1120)]
    rate = found.recipe.learning_rate
    assert (rate.warmup_steps, rate.decay_steps) == (230, 920)
    assert found.scratch_steps == 2000
    assert found.chosen is not None
    assert found.chosen.schedule is not None
    assert found.chosen.schedule.seconds == pytest.approx(1000.0)
    assert found.chosen.ceiling == pytest.approx(2.3)
    spent = 1000 * 0.5 + 1000 * 0.125 + 300 * 0.125 + 700 * 0.5 + SWITCH
    assert found.evidence.pilot_seconds == pytest.approx(spent)
    assert found.pilots_ceiling == pytest.approx(2.3 / (1 + spent / 1000))
    assert "at most 2.30x faster" in told(found)


@pytest.mark.parametrize(
    ("t_mix", "steps", "is_known"),
    [(50, 50, True), (120, 150, True), (200, 200, True), (499, 500, True),
     (501, 500, False), (600, 500, False), (700, 500, False)],
)  # fmt: skip
def test_t_mix_is_found_up_to_an_evaluation_and_only_before_the_pilots_decay(
    tmp_path: Path, t_mix: int, steps: int, is_known: bool
) -> None:
    found = suggested(write_pilots(tmp_path, t_mix=t_mix), budget=1e5)
    mixing = found.options[0].candidate.mixing
    assert (mixing.steps, mixing.is_known) == (steps, is_known)
    assert bool(found.chosen) == is_known
    if not is_known:
        text = told(found)
        assert "not mixed in the pilot" in text
        assert "2 layers over 500 " in text
        assert (
            "No growth is promised: the best would be from 2 layers, but its t_mix is not" in text
        )
        assert "if it mixed right after the 500 steps of its pilot, the ceiling would be" in text
        assert steps_of(found.recipe) == [(8, found.scratch_steps)]


def test_unfinished_pilots_of_long_recipes_say_the_same(tmp_path: Path) -> None:
    stages = {"scratch": [(8, 9000)], "small": [(2, 9000)], "grown": [(2, 500), (8, 8500)]}
    laws = {"scratch": target_law, "small": small_law, "grown": grown_loss(500)}
    found = suggested(
        [write_pilot(tmp_path / name, stages[name], laws[name], until=800) for name in stages]
    )
    assert found.options[0].candidate.mixing.steps == 200
    assert steps_of(found.recipe) == [(2, 3480), (8, 1120)]


def test_of_several_growths_the_slowest_to_mix_counts_and_one_stopped_early_does_not(
    tmp_path: Path,
) -> None:
    pilots = write_pilots(tmp_path)
    pilots.append(write_pilot(tmp_path / "b", [(2, 400), (8, 600)], grown_loss(400, 350)))
    pilots.append(write_pilot(tmp_path / "c", [(2, 600), (8, 400)], grown_loss(600, 90), until=620))
    (option,) = suggested(pilots).options
    assert (option.candidate.mixing.steps, option.candidate.mixing.is_known) == (350, True)
    assert option.candidate.mixing.switch_step == 400


def test_a_growth_that_has_not_mixed_for_longer_than_others_took_is_not_known_to(
    tmp_path: Path,
) -> None:
    pilots = write_pilots(tmp_path)
    slow = write_pilot(tmp_path / "slow", [(2, 400), (8, 600)], grown_loss(400, 600), until=700)
    (option,) = suggested([*pilots, slow]).options
    assert (option.candidate.mixing.steps, option.candidate.mixing.is_known) == (300, False)


def test_the_scratch_pilot_of_the_same_seed_is_compared(tmp_path: Path) -> None:
    """It has other evaluation masks than the longer one."""
    pilots = write_pilots(tmp_path)
    other = write_pilot(tmp_path / "b", [(8, 2000)], lambda _, s: scratch_loss(s) - 1, seed=2)
    (option,) = suggested([*pilots, other]).options
    assert option.candidate.mixing.steps == 200
    assert str(pilots[0]) in option.candidate.mixing.reason
    assert "another seed" not in option.candidate.mixing.reason
    (option,) = suggested([other, *pilots[1:]]).options
    assert "another seed" in option.candidate.mixing.reason


def test_a_small_model_that_does_not_lag_at_the_switch_shows_no_mixing(tmp_path: Path) -> None:
    """Then depth does not matter yet, and no growth is worth anything."""
    pilots = [
        write_pilot(tmp_path / "scratch", [(8, 1000)], lambda _, s: small_loss(s) + 0.1),
        write_pilot(tmp_path / "grown", [(2, 300), (8, 700)], lambda _, s: small_loss(s)),
        write_pilot(tmp_path / "small", [(2, 3140)], lambda _, s: small_loss(s) - 1),
    ]
    found = suggested(pilots)
    assert found.chosen is None
    assert "was 0.100 nats ahead of scratch" in told(found)
    assert "No growth claim holds at the pilots' length: 2 layers, never grown, was" in told(found)


def test_frozen_steps_are_no_steps_of_the_model(tmp_path: Path) -> None:
    pilots = write_pilots(tmp_path)
    stages = [{"num_hidden_layers": 4, "steps": 500},
              {"num_hidden_layers": 8, "steps": 5000, "freeze": {"layers": 4}}]  # fmt: skip
    seconds = {4: 0.25, 8: 0.1}
    frozen = write_pilot(tmp_path / "frozen", [(4, 500), (8, 5000)], target_law,
                         seconds=seconds, changes={"stages": stages})  # fmt: skip
    found = suggested([*pilots, frozen])
    assert found.evidence.target_time.seconds == 0.5
    assert [option.candidate.name for option in found.options] == ["2 layers"]


def test_another_way_to_grow_is_another_candidate_and_the_faster_to_mix_is_proposed(
    tmp_path: Path,
) -> None:
    entry = {"depth": "interleave", "moments": "grow"}
    stages = [
        {"num_hidden_layers": 2, "steps": 300},
        {"num_hidden_layers": 8, "steps": 700} | entry,
    ]
    pilots = write_pilots(tmp_path)
    other = [(2, 300), (8, 700)]
    pilots.append(
        write_pilot(tmp_path / "other", other, grown_loss(300, 100), changes={"stages": stages})
    )
    found = suggested(pilots)
    names = [option.candidate.name for option in found.options]
    assert names == ["2 layers", "2 layers, depth interleave, moments grow"]
    assert found.chosen is found.options[1]
    assert (found.recipe.stages[1].depth, found.recipe.stages[1].moments) == ("interleave", "grow")


def test_a_ceiling_below_1_1_is_refused_and_scratch_proposed(tmp_path: Path) -> None:
    seconds = {2: 0.46, 8: 0.5}
    found = suggested([
        write_pilot(tmp_path / "scratch", [(8, 1000)], target_law, seconds=seconds),
        write_pilot(tmp_path / "grown", [(2, 300), (8, 700)], grown_loss(300), seconds=seconds),
    ])  # fmt: skip
    (option,) = found.options
    assert 1.0 < option.ceiling < LOWEST_CEILING
    assert found.chosen is None
    assert steps_of(found.recipe) == [(8, 2000)]
    assert "No growth is promised: the best would be from 2 layers, but its ceiling, 1.0" in told(
        found
    )
    values = suggestion_json(found)
    assert (values["verdict"], values["ceiling"]) == ("scratch", None)
    assert values["runs_to_pay"] is None


def test_pilots_that_take_longer_than_one_run_saves_pay_only_when_repeated(tmp_path: Path) -> None:
    """0.2 T + 80 = 400 s: T = 1,600 by hand, which saves 400 s; the pilots took 1,017.5 s."""
    found = suggested(write_pilots(tmp_path), budget=400.0)
    assert found.chosen is not None
    assert found.chosen.ceiling == pytest.approx(2.0)
    assert (found.runs_to_pay, found.pilots_ceiling < 1) == (3, True)
    first = advice(found)[0]
    assert "this pays only when repeated, in 3 such runs or more" in first
    assert "at most 0.56x" in first
    values = suggestion_json(found)
    assert (values["verdict"], values["runs_to_pay"]) == ("grow_if_repeated", 3)
    once = suggested(write_pilots(tmp_path / "once"))
    assert "repeated" not in told(once)
    values = suggestion_json(once)
    assert (values["verdict"], values["runs_to_pay"]) == ("grow", 1)


def test_steps_that_a_branch_shares_with_its_trunk_are_charged_and_counted_once(
    tmp_path: Path,
) -> None:
    """The grown pilot left the small one after 300 steps, and has copies of its rows."""
    pilots = write_pilots(tmp_path)
    metrics = pilots[2] / "metrics.jsonl"
    first, rest = metrics.read_text().split("\n", 1)
    start = json.loads(first) | {"branch_from": f"{pilots[1]}@300"}
    metrics.write_text(json.dumps(start) + "\n" + rest)
    found = suggested(pilots)
    spent = 1000 * 0.5 + 1000 * 0.125 + 700 * 0.5 + SWITCH
    assert found.evidence.pilot_seconds == pytest.approx(spent)
    assert found.pilots_ceiling == pytest.approx(2.3 / (1 + spent / 1000))
    assert found.options[0].candidate.time == StepTime(0.125, "100 rows of the pilots")


def test_without_a_grown_run_there_are_bounds_and_no_promise(tmp_path: Path) -> None:
    found = suggested(write_pilots(tmp_path)[:2])
    (option,) = found.options
    assert (option.candidate.mixing.steps, option.candidate.mixing.is_known) == (0, False)
    assert found.chosen is None
    assert option.schedule is not None
    assert option.schedule.switch_step == option.schedule.steps * 4 // 5  # where the decay begins
    assert "no pilot grows from 2 layers" in told(found)
    assert "if it mixed at once" in told(found)
    assert "2 layers ? " in told(found)
    assert option.candidate.control.verdict == "unknown"


def test_a_smaller_model_that_took_longer_is_told(tmp_path: Path) -> None:
    """Its pilot ran on a busy machine."""
    pilots = [write_pilot(tmp_path / "scratch", [(8, PLAN_STEPS)], target_law)]
    pilots += [write_pilot(tmp_path / f"of_{depth}", [(depth, PLAN_STEPS)], small_law,
                           seconds={2: 0.3, 4: 0.25}) for depth in (2, 4)]  # fmt: skip
    (note,) = suggested(pilots).evidence.notes
    assert "2 layers took longer than 4 layers, 0.3 against 0.25 s a step" in note
    assert suggested([pilots[0], pilots[2]]).evidence.notes == ()


def test_without_a_scratch_run_nothing_is_known_to_mix(tmp_path: Path) -> None:
    scratch, small, grown = write_pilots(tmp_path)
    found = suggested([grown, small])
    assert found.chosen is None
    assert "no pilot trains the target from scratch" in told(found)


def test_a_budget_with_no_room_for_growth_is_scratchs(tmp_path: Path) -> None:
    pilots = write_pilots(tmp_path)
    found = suggested(pilots, budget=60.0)
    assert found.options[0].schedule is None
    assert steps_of(found.recipe) == [(8, 120)]
    assert "no room for warm-up, 200 steps of t_mix and decay" in told(found)
    with pytest.raises(ConfigError, match="less than one step of 8 layers, 0.5 s"):
        suggested(pilots, budget=0.4)


def alone(folder: Path, steps: int, end: float) -> Path:
    """The small model, never grown, with a last loss of `end`."""
    return write_pilot(folder, [(2, steps)], lambda _, s: end if s == steps else small_loss(s))


@pytest.mark.parametrize(
    ("steps", "lag", "verdict", "claim"),
    [(3140, 0.1, "behind", ""), (3140, -0.1, "ahead", "was ahead at equal time"),
     (1000, 0.1, "unknown", "may be as good"), (1000, -0.1, "ahead", "was ahead at equal time")],
)  # fmt: skip
def test_the_model_that_never_grew_is_held_against_the_grown_pilot(
    tmp_path: Path, steps: int, lag: float, verdict: str, claim: str
) -> None:
    """The grown pilot takes 392.5 s, as 3,140 steps of its first model do."""
    scratch, _, grown = write_pilots(tmp_path)
    small = alone(tmp_path / "alone", steps, scratch_loss(PLAN_STEPS) + lag)
    found = suggested([scratch, small, grown])
    assert found.chosen is not None
    assert found.chosen.candidate.control.verdict == verdict
    assert found.chosen.candidate.control.nats == pytest.approx(lag)
    text = told(found)
    assert ("No growth claim holds at the pilots' length" in text) == bool(claim)
    assert claim in text
    assert "never grown, it is" in text


def test_unfinished_pilots_are_held_against_each_other_at_the_constant_rate(
    tmp_path: Path,
) -> None:
    """At 400 + 400 steps the grown one has taken 255 s, as 2,040 steps of the small one."""
    scratch = write_pilot(tmp_path / "scratch", [(8, 9000)], target_law, until=800)
    small = write_pilot(tmp_path / "small", [(2, 9000)], small_law, until=2500)
    grown = write_pilot(tmp_path / "grown", [(2, 400), (8, 8600)], grown_loss(400), until=800)
    found = suggested([scratch, small, grown])
    control = found.options[0].candidate.control
    early = write_pilot(tmp_path / "early", [(2, 800), (8, 8200)], grown_loss(800), until=800)
    assert "no loss at the constant" in told(suggested([scratch, small, early]))
    assert control.verdict == "behind"
    assert control.nats == pytest.approx(small_loss(2040) - scratch_loss(800), abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 8}, "global_batch_size: 8 in the recipe; 4 in"),
        ({"data": {"masked_lm_prob": 0.2}}, "data.masked_lm_prob: 0.2 in the recipe; 0.15 in"),
        ({"model": {"hidden_size": 16}}, "model.hidden_size: 16 in the recipe; 8 in"),
        ({"model": {"intermediate_size": 64}}, "model.intermediate_size: 64 in the recipe; 3072"),
        ({"learning_rate": {"peak": 0.01}}, "learning_rate.peak: 0.01 in the recipe; 0.001 in"),
        ({"optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay: 0.1 in the recipe; 0.01"),
    ],
)
def test_pilots_of_another_recipe_are_refused_with_what_differs(
    tmp_path: Path, changes: JsonObject, message: str
) -> None:
    pilots = write_pilots(tmp_path)
    recipe = recipe_of(pilots[0], changes)
    with pytest.raises(UserError, match=message) as refused:
        gather(recipe, read_runs(pilots), {}, NATS)
    assert all(str(pilot) in str(refused.value) for pilot in pilots)
    assert str(refused.value).count("\n") == 2  # what it is, the fault, what to do


def test_pilots_of_other_depths_and_lengths_are_of_the_recipe(tmp_path: Path) -> None:
    pilots = write_pilots(tmp_path)
    pilots.append(write_pilot(tmp_path / "four", [(4, 400)], target_law))
    pilots.append(write_pilot(tmp_path / "three", [(2, 200), (4, 200), (8, 200)], target_law))
    pilots.append(write_pilot(tmp_path / "odd", [(3, 400)], target_law))  # 8 is no multiple
    found = suggested(pilots)
    assert [option.candidate.name for option in found.options] == ["2 layers", "4 layers"]
    assert found.options[1].candidate.time.seconds == 0.25
    assert "no pilot grows from 4 layers" in told(found)


def test_a_first_model_that_is_smaller_in_other_ways_may_have_a_control(tmp_path: Path) -> None:
    first = {"num_hidden_layers": 2, "steps": 300, "intermediate_size": 64}
    stages = [first, {"num_hidden_layers": 8, "steps": 700, "ffn": "split"}]
    scratch, small, grown = write_pilots(tmp_path)
    both = write_pilot(
        tmp_path / "both", [(2, 300), (8, 700)], grown_loss(300), changes={"stages": stages}
    )
    control = write_pilot(
        tmp_path / "control", [(2, 3140)], small_law, changes={"model": {"intermediate_size": 64}}
    )
    found = suggested([scratch, both, control])
    (option,) = found.options
    assert option.candidate.name == "2 layers, intermediate_size 64, ffn split"
    assert option.candidate.control.verdict == "behind"
    assert found.recipe.stages[0].intermediate_size == 64
    with pytest.raises(UserError, match="model.intermediate_size"):
        suggested([scratch, grown, control])


def test_depths_timed_here_are_taken_in_ratio_to_the_target_of_the_pilots(tmp_path: Path) -> None:
    scratch, _, grown = write_pilots(tmp_path)
    found = suggested([scratch, grown], measured={1: 0.3, 2: 9.0, 8: 2.0})
    one, two = found.options
    assert (one.candidate.name, one.candidate.time.seconds) == ("1 layer", 0.3 * 0.5 / 2.0)
    assert "in ratio" in one.candidate.time.source
    assert two.candidate.time.seconds == 0.125  # the pilots know better
    assert found.chosen is two
    assert "1 layer: if it mixed at once, the ceiling would be" in " ".join(advice(found))
    slow = suggested([scratch, grown], measured={1: 0.9, 4: 1.9, 8: 2.0})
    assert [math.isnan(option.ceiling) for option in slow.options] == [False] * 3
    assert "mixed at once" not in " ".join(advice(slow))  # neither is better than 2 layers


def test_a_bound_below_1_1_is_not_worth_a_pilot(tmp_path: Path) -> None:
    recipe = recipe_of(write_pilots(tmp_path)[0])
    found = suggest(recipe, gather(recipe, [], {4: 0.48, 8: 0.5}, NATS), 1000.0)
    assert found.options[0].ceiling < LOWEST_CEILING
    assert "mixed at once" not in " ".join(advice(found))


@pytest.mark.parametrize(("budget", "has_room"), [(300.0, False), (1000.0, True)])
def test_a_growth_that_re_warms_for_longer_than_is_left_is_not_proposed(
    tmp_path: Path, budget: float, has_room: bool
) -> None:
    rewarm = {"steps": 500}
    stages = [{"num_hidden_layers": 2, "steps": 300},
              {"num_hidden_layers": 8, "steps": 700, "rewarm": rewarm}]  # fmt: skip
    scratch = write_pilot(tmp_path / "scratch", [(8, 1000)], target_law)
    grown = write_pilot(
        tmp_path / "grown", [(2, 300), (8, 700)], grown_loss(300), changes={"stages": stages}
    )
    found = suggested([scratch, grown], budget)
    assert bool(found.chosen) == has_room
    assert ("it re-warms for 500 steps, and" in told(found)) == (not has_room)


def test_branches_of_the_recipe_are_not_the_proposals(tmp_path: Path) -> None:
    """Their steps are those of a run of another length."""
    pilots = write_pilots(tmp_path)
    stages = [{"num_hidden_layers": 8, "steps": 10}]
    branches: JsonObject = {"branches": [0.5], "growth_branches": [{"at": 900, "stages": stages}]}
    recipe = recipe_of(pilots[0], branches)
    found = suggest(recipe, gather(recipe, read_runs(pilots), {}, NATS), 1000.0)
    assert (found.recipe.branches, found.recipe.growth_branches) == ((), ())


def test_the_engine_of_the_last_stage_is_scratchs(tmp_path: Path) -> None:
    engine = {"train_micro_batch_size_per_gpu": 2}
    stages = [{"num_hidden_layers": 8, "steps": 1000, "deepspeed": engine}]
    recipe = recipe_of(write_pilots(tmp_path)[0], {"stages": stages})
    found = suggest(recipe, gather(recipe, [], {2: 0.49, 8: 0.5}, NATS), 1000.0)
    assert found.recipe.stages[0].deepspeed == engine


@pytest.mark.parametrize(("budget", "has_room"), [(250.0, False), (300.0, True)])
def test_the_switch_comes_after_the_warm_up(budget: float, has_room: bool) -> None:
    """Warm-up 60/130, decay 31/130: tau = 0.762 T - 100, which is 0.462 T at T = 333."""
    rate: JsonObject = {"learning_rate": {"warmup_steps": 60}}
    recipe = Recipe.model_validate(merge(RECIPE, rate))
    found = suggest(recipe, evidence_of(0.5, 1.0, 0.0, 100), budget)
    assert bool(found.chosen) == has_room


def test_depths_timed_here_alone_give_bounds(tmp_path: Path) -> None:
    recipe = recipe_of(write_pilots(tmp_path)[0])
    found = suggest(recipe, gather(recipe, [], {2: 0.125, 8: 0.5}, NATS), 1000.0)
    assert found.chosen is None
    assert found.options[0].candidate.time == StepTime(0.125, "timed here")
    assert found.options[0].ceiling == pytest.approx(0.5 / (0.8 * 0.125 + 0.2 * 0.5), rel=0.01)
    with pytest.raises(ConfigError, match="none of these runs trained 8 layers"):
        suggest(recipe, gather(recipe, [], {}, NATS), 1000.0)


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ({"schedule": "linear", "decay_steps": 0}, "learning_rate.schedule: got 'linear'; allowed"),
        ({"schedule": "constant", "decay_steps": 0}, "learning_rate.schedule: got 'constant'"),
        ({"scope": "stage"}, "learning_rate.scope: got 'stage'"),
        ({"total_steps": 2000}, "learning_rate.total_steps: got 2000"),
    ],
)
def test_a_rate_without_a_constant_phase_before_one_decay_is_refused(
    tmp_path: Path, rate: JsonObject, message: str
) -> None:
    recipe = recipe_of(write_pilots(tmp_path)[0], {"learning_rate": rate})
    with pytest.raises(ConfigError, match=message):
        RateShape.of(recipe)


def evidence_of(small: float, large: float, switching: float, t_mix: int) -> Evidence:
    """One candidate of 2 layers."""
    candidate = Candidate(
        "2 layers", "2 layers",
        Stage(num_hidden_layers=2, steps=1), Stage(num_hidden_layers=8, steps=1),
        StepTime(small, ""), Mixing(t_mix, True, 10, ""), Flattening(None, ""),
        Control("behind", 1.0, ""),
    )  # fmt: skip
    return Evidence("8 layers", StepTime(large, ""), switching, 7.0, (candidate,), ())


RECIPE: JsonObject = {
    "name": "r", "global_batch_size": 4,
    "model": {"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2,
              "num_hidden_layers": 8, "max_position_embeddings": 16},
    "data": {"max_seq_length": 16, "max_predictions_per_seq": 3},
    "learning_rate": {"schedule": "wsd", "peak": 1e-3, "warmup_steps": 7, "decay_steps": 31},
    "stages": [{"num_hidden_layers": 8, "steps": 130}],
}  # fmt: skip
SECONDS = st.floats(0.001, 10.0)


@settings(deadline=None, max_examples=150)
@given(
    small=SECONDS, large=SECONDS, switching=st.floats(0, 100), t_mix=st.integers(1, 5000),
    budget=st.floats(20, 1e6), more=st.floats(1.0, 10.0),
)  # fmt: skip
def test_a_proposal_fills_the_budget_keeps_the_rule_and_never_shrinks_with_more_of_it(
    small: float, large: float, switching: float, t_mix: int, budget: float, more: float
) -> None:
    recipe = Recipe.model_validate(RECIPE)
    evidence = evidence_of(small, large, switching, t_mix)
    found = suggest(recipe, evidence, budget)
    assert recipe_faults(found.recipe) == []
    assert Recipe.model_validate_json(found.recipe.model_dump_json()) == found.recipe
    steps = found.recipe.total_steps
    decay = found.recipe.learning_rate.decay_steps
    assert abs(decay - steps * 31 / 130) < 1
    if found.chosen:
        before, after = (stage.steps for stage in found.recipe.stages)
        assert after == t_mix + decay
        spent = before * small + switching + after * large
        assert spent <= budget * (1 + 1e-9)
        assert spent + max(small, large) > budget * (1 - 1e-9)  # one more step does not fit
        assert found.chosen.ceiling == pytest.approx(steps * large / spent)
        assert found.chosen.ceiling >= LOWEST_CEILING
        assert found.recipe.learning_rate.warmup_steps <= before
    else:
        assert steps == found.scratch_steps
    larger = suggest(recipe, evidence, more * budget)
    assert larger.scratch_steps >= found.scratch_steps
    if bool(larger.chosen) == bool(found.chosen):
        assert larger.recipe.total_steps >= steps
    if more > 1.5:
        assert larger.recipe.total_steps >= steps


def test_the_ceiling_is_the_plans_where_time_goes_by_flops() -> None:
    recipe = Recipe.model_validate(RECIPE)
    small, large = (
        1e-9 * training_flops(recipe.model.model_copy(update={"num_hidden_layers": n}), 4, 16, 3)
        for n in (2, 8)
    )
    found = suggest(recipe, evidence_of(small, large, 0.0, 300), 5000 * large)
    assert found.chosen is not None
    plan = plan_recipe(found.recipe, load_deepspeed_config(), world_size=1)
    assert plan.ceiling == pytest.approx(found.chosen.ceiling)
    assert plan.warnings == ()  # the rate does not decay at the switch


def test_an_unknown_switch_costs_nothing_and_numbers_nobody_knows_are_null() -> None:
    recipe = Recipe.model_validate(RECIPE)
    found = suggest(recipe, evidence_of(0.1, 0.5, math.nan, 100), 1000.0)
    assert found.chosen is not None
    values = suggestion_json(found)
    assert values["switch_seconds"] is None
    assert isinstance(values["recipe"], dict)
    assert Recipe.model_validate(values["recipe"]) == found.recipe
