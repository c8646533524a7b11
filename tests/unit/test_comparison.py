"""Speed-ups of runs whose answer is known, and refusal of those that cannot be compared."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from run_folders import (
    BATCH,
    GROWN,
    LENGTH,
    SWITCH,
    reference_seconds,
    scratch_law,
    scratch_runs,
    twice_as_fast,
    write_run,
)

from stacking.comparison import Comparison, Speedup, compare
from stacking.comparison_budget import check_budget, within
from stacking.comparison_controls import worst
from stacking.comparison_costs import AXES
from stacking.comparison_groups import smaller_models
from stacking.comparison_page import curve_rows, run_rows, text
from stacking.comparison_runs import read_runs
from stacking.cost import training_flops
from stacking.errors import UserError


def found(comparison: Comparison, axis: str = "reference_seconds", name: str = "grown") -> Speedup:
    (group,) = (group for group in comparison.groups if group.name == name)
    return next(s for s in comparison.of(group) if s.axis == axis)


def known_noise(folder: Path) -> list[Path]:
    """Three seeds of a recipe without a role, which tell that the noise is small."""
    return [write_run(folder / f"noise_{seed}", [(3, 300)], 5 + 0.001 * seed, seed=seed)
            for seed in (1, 2, 3)]  # fmt: skip


def test_a_run_twice_as_fast_has_a_speed_up_of_two_in_both_conventions(tmp_path: Path) -> None:
    runs = read_runs([*scratch_runs(tmp_path), twice_as_fast(tmp_path)])
    result = found(compare(runs))
    assert result.ratio == pytest.approx(2.0)
    assert result.time_saved == pytest.approx(0.5)
    assert result.gain == pytest.approx(1.0)
    assert result.cost == pytest.approx(400 * 0.125 + 300 * 0.5 + SWITCH)
    assert result.scratch_cost == pytest.approx(2 * result.cost)
    assert result.nats_ahead == pytest.approx(0.7 * math.log(2))
    assert math.isnan(result.interval.low)  # one seed says nothing of noise


def test_every_axis_is_charged_for_small_stages_and_learned_maps(tmp_path: Path) -> None:
    learned = {"steps": 10, "batch_size": 2}
    stages = [{"num_hidden_layers": 2, "steps": 400},
              {"num_hidden_layers": 8, "steps": 300, "learned": learned}]  # fmt: skip
    grown = write_run(tmp_path / "grown_1", GROWN, 5.0, changes={"stages": stages})
    (_, run) = runs = read_runs([*scratch_runs(tmp_path, [100]), grown])
    costs = {axis: found(compare(runs), axis).cost for axis in AXES}
    small, large = (training_flops(run.recipe.stage_model(stage), 1, LENGTH, 3) for stage in (0, 1))
    assert costs["steps"] == 700
    assert costs["tokens"] == 700 * BATCH * LENGTH + 10 * 2 * LENGTH
    assert costs["flops"] == 400 * BATCH * small + 300 * BATCH * large + 20 * large
    assert costs["wall_seconds"] == pytest.approx(2 * (400 * 0.125 + 300 * 0.5))


def test_a_loss_inside_a_stage_costs_what_was_spent_so_far(tmp_path: Path) -> None:
    runs = read_runs([*scratch_runs(tmp_path), twice_as_fast(tmp_path)])
    rows = [row for row in curve_rows(compare(runs)) if row["recipe"] == "grown"]
    assert [row["steps"] for row in rows] == [400, 700]
    assert [row["reference_seconds"] for row in rows] == [50.0, 50.0 + 150.0 + SWITCH]


@pytest.mark.parametrize(("final", "word"), [(0.5, "longer"), (8.9, "shorter")])
def test_a_loss_outside_of_the_frontier_gets_no_speed_up_but_advice(
    tmp_path: Path, final: float, word: str
) -> None:
    grown = write_run(tmp_path / "grown_1", GROWN, final)
    result = found(compare(read_runs([*scratch_runs(tmp_path), grown])))
    assert math.isnan(result.ratio)
    assert f"add a {word} scratch run" in result.refusal


def test_one_scratch_run_is_no_frontier(tmp_path: Path) -> None:
    runs = read_runs([*scratch_runs(tmp_path, [400]), twice_as_fast(tmp_path)])
    comparison = compare(runs)
    assert "scratch runs of other lengths" in found(comparison).refusal
    assert comparison.headline() is None


def test_the_frontier_leaves_out_a_scratch_run_that_a_cheaper_one_beats(tmp_path: Path) -> None:
    badly_tuned = write_run(
        tmp_path / "bad_1", [(8, 800)], scratch_law(100), changes={"learning_rate": {"peak": 0.1}}
    )
    runs = read_runs([*scratch_runs(tmp_path), badly_tuned, twice_as_fast(tmp_path)])
    assert found(compare(runs)).ratio == pytest.approx(2.0)


def test_seeds_are_taken_together_and_the_interval_holds_the_truth(tmp_path: Path) -> None:
    errors = {1: 0.01, 2: -0.03, 3: 0.02}
    paths = [twice_as_fast(tmp_path, error, seed) for seed, error in errors.items()]
    result = found(compare(read_runs([*scratch_runs(tmp_path), *paths])))
    assert result.ratio == pytest.approx(2.0)
    assert 1.6 < result.interval.low < 1.9
    assert 2.1 < result.interval.high < 2.5
    again = found(compare(read_runs([*scratch_runs(tmp_path / "again"), *paths])))
    assert again.interval == result.interval


@pytest.mark.parametrize(
    ("steps", "loss", "verdict"),
    [(1640, 6.5, "loses"), (1640, 4.5, "wins"), (400, 6.5, "undecided"), (400, 4.5, "wins"),
     (9000, 6.5, "loses"), (9000, 4.5, "undecided")],
)  # fmt: skip
def test_the_control_is_recognised_and_judged_at_equal_time(
    tmp_path: Path, steps: int, loss: float, verdict: str
) -> None:
    """The grown run takes 205 s, as 1,640 steps of its first model do, and ends near 4.79."""
    control = write_run(tmp_path / "alone_1", [(2, steps)], loss)
    folders = [*scratch_runs(tmp_path), twice_as_fast(tmp_path), control]
    (judged,) = compare(read_runs([*folders, *known_noise(tmp_path)])).controls
    assert (judged.verdict, judged.control) == (verdict, "alone")
    (judged,) = compare(read_runs(folders)).controls
    assert judged.verdict == "undecided"
    assert verdict == "undecided" or "one seed of each recipe" in judged.reason


def test_a_run_whose_first_stage_nobody_timed_is_charged_nothing_it_does_not_know(
    tmp_path: Path,
) -> None:
    """As the folder of a run that was branched from another's checkpoint."""
    grown = twice_as_fast(tmp_path)
    lines = (grown / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"stage": 0' not in line]
    (grown / "metrics.jsonl").write_text("".join(kept))
    comparison = compare(read_runs([*scratch_runs(tmp_path), grown]))
    assert "that it was branched from" in found(comparison).refusal
    assert found(comparison, "steps").refusal == ""
    assert "not known" in comparison.controls[0].reason
    trunk = write_run(tmp_path / "trunk_1", [(2, 500)], 6.0, is_finished=False)
    comparison = compare(read_runs([*scratch_runs(tmp_path / "again"), grown, trunk]))
    assert found(comparison).ratio == pytest.approx(2.0)


def test_a_clock_that_stood_still_gives_no_speed_up(tmp_path: Path) -> None:
    grown = twice_as_fast(tmp_path)
    text = (grown / "metrics.jsonl").read_text()
    (grown / "metrics.jsonl").write_text(
        re.sub(r'"elapsed_seconds": [\d.]+', '"elapsed_seconds": 0', text)
    )
    comparison = compare(read_runs([*scratch_runs(tmp_path), grown]))
    assert "nobody measured" in found(comparison, "wall_seconds").refusal


def test_a_control_within_the_seeds_noise_is_undecided(tmp_path: Path) -> None:
    grown = [twice_as_fast(tmp_path, seed * 0.1, seed) for seed in (1, 2, 3)]
    level = scratch_law(2 * reference_seconds(GROWN)) + 0.21
    control = write_run(tmp_path / "alone_1", [(2, 1640)], level)
    (judged,) = compare(read_runs([*scratch_runs(tmp_path), *grown, control])).controls
    assert judged.verdict == "undecided"
    assert "noise" in judged.reason


def test_what_equal_seeds_have_in_common_does_not_count(tmp_path: Path) -> None:
    """Seeds move grown and control alike by 0.3 nats, and each for itself by 0.002."""
    level = scratch_law(2 * reference_seconds(GROWN))
    own = {1: 0.002, 2: -0.002, 3: 0.0}
    alone = {seed: level + 0.05 + seed * 0.3 for seed in own}
    pairs = [(twice_as_fast(tmp_path, seed * 0.3 + own[seed], seed),
              write_run(tmp_path / f"alone_{seed}", [(2, 1640)], alone[seed], seed=seed))
             for seed in own]  # fmt: skip
    comparison = compare(read_runs([*scratch_runs(tmp_path), *sum(pairs, ())]))
    (judged,) = comparison.controls
    assert judged.nats == pytest.approx(0.05)
    assert judged.verdict == "loses"
    assert 0.03 < judged.interval.low < 0.05 < judged.interval.high < 0.07
    (note,) = (note for note in comparison.notes if "to all recipes alike" in note)
    assert "seed 1 -0.29" in note
    rows = {row["folder"]: row for row in run_rows(comparison)}
    assert rows[str(tmp_path / "alone_3")]["val_mlm_loss"] == pytest.approx(level + 0.95)


def test_a_control_is_held_against_runs_that_grew_from_it_alone(tmp_path: Path) -> None:
    other = write_run(tmp_path / "other_1", [(4, 400), (8, 300)], 5.0)
    control = write_run(tmp_path / "alone_1", [(2, 2200)], 6.5)
    folders = [*scratch_runs(tmp_path), twice_as_fast(tmp_path), other, control]
    runs = read_runs([*folders, *known_noise(tmp_path)])
    verdicts = {judged.grown: judged.verdict for judged in compare(runs).controls}
    assert verdicts == {"grown": "loses", "other": "undecided"}


def test_every_smaller_model_on_the_way_is_a_control_of_its_own(tmp_path: Path) -> None:
    """4 layers alone take 100 and 300 s."""
    stages = [(2, 200), (4, 200), (8, 200)]
    hops = write_run(tmp_path / "hops_1", stages, 5.0)
    alone = [write_run(tmp_path / "one_1", [(2, 1600)], 6.5),
             write_run(tmp_path / "short_1", [(4, 400)], 5.2),
             write_run(tmp_path / "long_1", [(4, 1200)], 4.7)]  # fmt: skip
    comparison = compare(read_runs([*scratch_runs(tmp_path), hops, *alone, *known_noise(tmp_path)]))
    first, second = comparison.controls
    assert (first.control, first.verdict) == ("one", "loses")
    assert (second.control, second.verdict) == ("long and 1 more of its size", "wins")
    share = math.log(reference_seconds(stages) / 100) / math.log(300 / 100)
    assert second.nats == pytest.approx(5.2 - 0.5 * share - 5.0)
    assert worst(comparison.controls, "hops") == "wins"
    (group,) = (group for group in comparison.groups if group.name == "hops")
    assert smaller_models(group.first) == [group.first.recipe.stage_model(i) for i in (0, 1)]


def test_the_headline_is_of_a_recipe_whose_controls_lose(tmp_path: Path) -> None:
    """The other is faster to its own loss, which 4 layers alone reach sooner still."""
    stages = [(4, 200), (8, 100)]
    faster = write_run(tmp_path / "faster_1", stages, scratch_law(2.5 * reference_seconds(stages)))
    alone = [write_run(tmp_path / "four_1", [(4, 400)], 4.9),
             write_run(tmp_path / "two_1", [(2, 1640)], 6.5)]  # fmt: skip
    runs = [*scratch_runs(tmp_path), faster, twice_as_fast(tmp_path), *known_noise(tmp_path)]
    without, comparison = compare(read_runs(runs)), compare(read_runs([*runs, *alone]))
    assert found(comparison, name="faster").ratio > found(comparison).ratio
    for judged, name in ((without, "faster"), (comparison, "grown")):
        headline = judged.headline()
        assert headline is not None
        assert headline[0].name == name


def test_shorter_runs_of_a_named_controls_model_count_too(tmp_path: Path) -> None:
    """The best at equal time lies between them."""
    narrow = {"model": {"intermediate_size": 16}}
    alone = [write_run(tmp_path / f"of_{steps}_1", [(2, steps)], loss, changes=narrow)
             for steps, loss in ((820, 4.6), (3280, 4.2))]  # fmt: skip
    folders = [*scratch_runs(tmp_path), twice_as_fast(tmp_path), *alone, *known_noise(tmp_path)]
    (judged,) = compare(read_runs(folders), control=alone[1]).controls
    assert judged.verdict == "wins"
    assert judged.nats == pytest.approx(4.4 - scratch_law(2 * reference_seconds(GROWN)), abs=0.02)


def test_a_budget_ranks_what_ends_within_it(tmp_path: Path) -> None:
    folders = [*scratch_runs(tmp_path), twice_as_fast(tmp_path)]
    folders.append(write_run(tmp_path / "alone_1", [(2, 400)], 6.9))
    comparison = compare(read_runs(folders))
    grown = found(comparison)
    ranked = within(comparison, grown.cost)
    assert ranked[0].name == "grown"
    between = next(one for one in ranked if one.name.startswith("scratch, between"))
    assert between.loss == pytest.approx(ranked[0].loss + grown.nats_ahead)
    assert [one.loss for one in ranked] == sorted(one.loss for one in ranked)
    assert "alone" in [one.name for one in ranked]
    assert "grown" not in [one.name for one in within(comparison, grown.cost - 1)]
    assert within(comparison, 1.0) == []
    assert "  nothing" in text(comparison, 1.0)
    assert f"{ranked[0].loss:.4f}  grown (grown)" in text(comparison, grown.cost)
    with pytest.raises(UserError, match="--budget"):
        check_budget(math.nan)


def test_baseline_and_control_can_be_named(tmp_path: Path) -> None:
    scratch, grown = scratch_runs(tmp_path), twice_as_fast(tmp_path)
    strange = write_run(tmp_path / "strange_1", [(8, 50)], 2.0)
    control = write_run(
        tmp_path / "alone_1", [(2, 1640)], 6.5, changes={"model": {"intermediate_size": 16}}
    )
    runs = read_runs([*scratch, grown, strange, control, *known_noise(tmp_path)])
    (unnamed,) = compare(runs, baseline=scratch).controls
    assert unnamed.control == "none"
    assert "train its first model (2 layers" in unnamed.reason
    comparison = compare(runs, baseline=scratch, control=control)
    assert found(comparison).ratio == pytest.approx(2.0)
    assert comparison.controls[0].verdict == "loses"
    assert {g.name: g.role for g in comparison.groups}["strange"] == "other"


def test_a_role_that_a_run_cannot_play_is_refused(tmp_path: Path) -> None:
    scratch, grown = scratch_runs(tmp_path), twice_as_fast(tmp_path)
    runs = read_runs([*scratch, grown])
    with pytest.raises(UserError, match=r"--baseline .*grown_1: grows, in 2 stages; allowed: runs"):
        compare(runs, baseline=[*scratch, grown])
    with pytest.raises(UserError, match=r"--control .*grown_1: grows, in 2 stages; allowed: a run"):
        compare(runs, control=grown)
    with pytest.raises(UserError, match="allowed: a smaller model that never grew") as refused:
        compare(runs, baseline=[grown], control=scratch[0])
    assert f"--control {scratch[0]}: has " in str(refused.value)
    assert "--baseline" in str(refused.value)  # all at once


@pytest.mark.parametrize(
    ("changes", "start", "told"),
    [
        ({}, {"data_fingerprint": 99}, "training data: 71 in .*; 99 in"),
        ({}, {"validation_fingerprint": 99}, "evaluation data: 72 in .*; 99 in"),
        ({"data": {"masked_lm_prob": 0.2}}, {}, r"data.masked_lm_prob: 0.15 in .*; 0.2 in"),
        ({"data": {"whole_word": True}}, {}, "data.whole_word: False in .*; True in"),
        ({"evaluation": {"max_sequences": 9}}, {}, "evaluation.max_sequences: 2048 in .*; 9 in"),
        ({"global_batch_size": 8}, {}, "global_batch_size: 4 in .*; 8 in"),
        ({"model": {"vocab_size": 60}}, {}, "vocab_size: 50 in .*; 60 in"),
        ({}, {"device": "cuda:0"}, "device: cpu in .*; cuda:0 in"),
        ({}, {"start_sha256": "ab12"}, "first weights: random in .*; ab12 in"),
    ],
)
def test_runs_of_different_tasks_are_refused_with_the_values_of_each(
    tmp_path: Path, changes: Mapping[str, object], start: Mapping[str, object], told: str
) -> None:
    other = write_run(tmp_path / "other_1", [(8, 200)], changes=changes, start=start)
    with pytest.raises(UserError, match=told) as refused:
        read_runs([*scratch_runs(tmp_path), other])
    assert str(other) in str(refused.value)


def test_unknown_data_of_old_runs_is_told_and_not_refused(tmp_path: Path) -> None:
    old = write_run(tmp_path / "grown_1", GROWN, 5.0, start={"data_fingerprint": None})
    comparison = compare(read_runs([*scratch_runs(tmp_path), old]))
    assert any("unknown" in note and str(old) in note for note in comparison.notes)


def test_the_same_result_twice_is_refused(tmp_path: Path) -> None:
    scratch = scratch_runs(tmp_path)
    with pytest.raises(UserError, match="one result, not two"):
        read_runs([*scratch, scratch_runs(tmp_path / "copy")[1]])
    with pytest.raises(UserError, match="one result, not two"):
        read_runs([scratch[0], scratch[0]])


def notes_of(*runs: Path) -> str:
    return "\n".join(compare(read_runs(runs)).notes)


def test_notes_tell_what_makes_a_comparison_weak(tmp_path: Path) -> None:
    scratch, grown = scratch_runs(tmp_path), twice_as_fast(tmp_path)
    notes = notes_of(*scratch, grown)
    for told in ("same peak learning rate, 0.001", "One seed of each recipe"):
        assert told in notes
    for silent in ("same seeds", "engines", "one length", "not charged"):
        assert silent not in notes
    tuned = write_run(
        tmp_path / "tuned_1", [(8, 400)], 5.0, changes={"learning_rate": {"peak": 2e-3}}
    )
    notes = notes_of(*scratch, tuned, grown, twice_as_fast(tmp_path, 0.1, seed=2))
    assert "same seeds" in notes
    assert "same peak" not in notes
    assert "One seed" not in notes
    assert "one length" in notes_of(scratch[0], grown)


def test_another_engine_and_a_switch_that_nobody_timed_are_told(tmp_path: Path) -> None:
    scratch, grown = scratch_runs(tmp_path), twice_as_fast(tmp_path)
    engine = json.dumps({"stages": [{"fp16": {}}] * 2})
    (grown / "deepspeed.json").write_text(engine)
    metrics = (grown / "metrics.jsonl").read_text()
    (grown / "metrics.jsonl").write_text(metrics.replace(f'"seconds": {SWITCH}', '"seconds": null'))
    notes = notes_of(*scratch, grown)
    assert "differ in bf16, fp16:" in notes
    assert f"{grown}: 1 stage switches are not in its metrics" in notes


@pytest.mark.parametrize(
    ("rate", "fault"),
    [
        ({"end": 1e-4}, ""),
        ({"end": 2e-4}, "not decayed: it ends at 20%"),
        ({"total_steps": 1400}, "not decayed"),
        ({"scope": "stage", "decay_steps": 60}, ""),
        ({"schedule": "cosine", "decay_steps": 0}, ""),
        ({"schedule": "piecewise", "decay_steps": 0, "points": [[0, 1e-3], [700, 0.0]]}, ""),
    ],
)
def test_a_rate_has_come_down_at_a_tenth_of_its_peak(
    tmp_path: Path, rate: Mapping[str, object], fault: str
) -> None:
    (run,) = read_runs([write_run(tmp_path / "g_1", GROWN, 5.0, changes={"learning_rate": rate})])
    assert run.fault.startswith(fault)
    assert bool(run.fault) == bool(fault)


def as_constant(folder: Path) -> Path:
    rate = {"schedule": "constant", "decay_steps": 0}
    return write_run(folder / "grown_1", GROWN, 5.0, changes={"learning_rate": rate})


def as_unfinished(folder: Path) -> Path:
    return write_run(folder / "grown_1", GROWN, 5.0, is_finished=False)


@pytest.mark.parametrize(
    ("make", "fault"),
    [(as_constant, "not decayed: it ends at 100%"), (as_unfinished, "its end is not in")],
)
def test_a_run_that_does_not_count_is_drawn_and_says_why(
    tmp_path: Path, make: Callable[[Path], Path], fault: str
) -> None:
    comparison = compare(read_runs([*scratch_runs(tmp_path), make(tmp_path)]))
    assert comparison.speedups == {}
    assert any(fault in note for note in comparison.notes)
    assert [row for row in curve_rows(comparison) if row["recipe"] == "grown"]


def test_without_a_scratch_run_that_counts_nothing_is_compared(tmp_path: Path) -> None:
    unfinished = write_run(tmp_path / "scratch_1", [(8, 100)], is_finished=False)
    with pytest.raises(UserError, match="--baseline"):
        compare(read_runs([unfinished, twice_as_fast(tmp_path)]))


def test_grown_runs_of_two_targets_are_refused(tmp_path: Path) -> None:
    other = write_run(tmp_path / "wide_1", GROWN, 5.0, changes={"model": {"intermediate_size": 16}})
    with pytest.raises(UserError, match="end as different models"):
        compare(read_runs([*scratch_runs(tmp_path), twice_as_fast(tmp_path), other]))


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("recipe.json", "{", "no recipe of this version: "),
        ("recipe.json", '{"name": 3}', "name: got 3"),
        ("recipe.json", None, "has no recipe.json, which launch/pretrain.py writes beside"),
        ("deepspeed.json", None, "has no deepspeed.json, which launch/pretrain.py writes beside"),
        ("deepspeed.json", "[]", "one JSON object"),
        ("deepspeed.json", '{"stages": 3}', 'no list "stages"'),
        ("deepspeed.json", '{"stages": []}', "not of one run"),
        ("metrics.jsonl", '{"event": "run_start"}\n', "KeyError"),
        ("metrics.jsonl", "torn", "no run_start"),
    ],
)
def test_a_damaged_folder_is_named(
    tmp_path: Path, file: str, content: str | None, told: str
) -> None:
    folder = twice_as_fast(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=told) as refused:
        read_runs([folder])
    assert str(folder) in str(refused.value)
    assert "Errno" not in str(refused.value)
    assert "did you mean" not in str(refused.value)
