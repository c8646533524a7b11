"""Curves over the step of the growth: one way of growing each, a threshold beyond the noise."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from run_folders import reference_seconds, scratch_law, scratch_runs, write_run

from stacking.comparison import compare
from stacking.comparison_page import text, write_comparison
from stacking.comparison_runs import read_runs
from stacking.comparison_switch import SwitchCurve, switch_curves

AFTER = 300  # steps
SEEDS = (1, 2, 3)
NOISE = (0.01, -0.02, 0.01)  # nats; of other seeds from growth to growth: none adds to all alike


def switched(
    folder: Path,
    gains: Mapping[int, float],
    *,
    seeds: Sequence[int] = (),
    changes: Mapping[str, object] | None = None,
    after: int = AFTER,
) -> list[Path]:
    """Runs that grow once, by step of the growth, and end so much lower than scratch."""

    def loss(place: int, step: int, seed: int) -> float:
        scratch = scratch_law(reference_seconds([(2, step), (8, after)]))
        noise = NOISE[(place + SEEDS.index(seed)) % len(NOISE)] if seeds else 0.0
        return scratch - gains[step] + noise

    return [
        write_run(folder / f"at_{step}_{seed}", [(2, step), (8, after)], loss(place, step, seed),
                  changes={"name": f"{folder.name} at {step}", **(changes or {})}, seed=seed)
        for place, step in enumerate(gains) for seed in seeds or (1,)
    ]  # fmt: skip


def curves(folder: Path, runs: list[Path]) -> list[SwitchCurve]:
    return switch_curves(compare(read_runs([*scratch_runs(folder), *runs])))


GAINS = {200: 0.1, 400: 0.3, 800: 0.2}


def test_a_curve_of_switch_times_stands_beside_scratch_at_equal_time(tmp_path: Path) -> None:
    (curve,) = curves(tmp_path, switched(tmp_path / "a", GAINS, seeds=SEEDS))
    assert [point.step for point in curve.points] == list(GAINS)
    for point in curve.points:
        expected = scratch_law(reference_seconds([(2, point.step), (8, AFTER)]))
        assert point.scratch_loss == pytest.approx(expected)
        assert point.gain == pytest.approx(GAINS[point.step])
        assert max(point.losses) - min(point.losses) == pytest.approx(0.03)
    assert curve.family == (
        "hidden layers 2 to 8, depth stack, moments reset, peak rate 0.001; each 300 steps after "
        "the growth"
    )


@pytest.mark.parametrize(
    ("gains", "threshold"),
    [
        (GAINS, 400),
        ({200: 0.3, 400: 0.31, 800: 0.305}, 200),  # the largest is later, within the noise
        ({200: 0.1, 400: 0.3, 800: 0.31}, 400),
        ({200: 0.1, 400: 0.2, 800: 0.4}, None),
        ({200: 0.1, 400: 0.05, 800: 0.4, 1000: 0.39}, 800),
    ],
)
def test_the_threshold_is_the_first_step_that_no_later_one_surely_beats(
    tmp_path: Path, gains: Mapping[int, float], threshold: int | None
) -> None:
    (curve,) = curves(tmp_path, switched(tmp_path / "a", gains, seeds=SEEDS))
    assert curve.threshold == threshold
    told = f"threshold, step {threshold}: no later" if threshold else "a later one is surely better"
    assert told in curve.told


def test_a_threshold_is_not_told_without_noise_or_without_scratch(tmp_path: Path) -> None:
    (curve,) = curves(tmp_path, switched(tmp_path / "a", GAINS))
    assert (curve.threshold, "nobody knows the noise" in curve.told) == (None, True)
    far = {**GAINS, 9000: 0.1}
    (curve,) = curves(tmp_path / "far", switched(tmp_path / "b", far, seeds=SEEDS))
    assert curve.threshold is None
    assert "scratch's loss is not known at 1 of these 4 times" in curve.told
    assert [math.isnan(point.gain) for point in curve.points] == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": {"peak": 2e-3}}, "peak rate 0.002"),
        ({"optimizer": {"weight_decay": 0.2}}, "optimizer.weight_decay 0.2"),
        ({"stages": {"moments": "keep"}}, "moments keep"),
    ],
)
def test_studies_of_other_rates_optimizers_and_growths_are_curves_of_their_own(
    tmp_path: Path, changes: Mapping[str, Mapping[str, object]], told: str
) -> None:
    runs = switched(tmp_path / "a", GAINS)
    for step, gain in {200: 0.2, 400: 0.4, 800: 0.3}.items():
        entry = {"num_hidden_layers": 8, "steps": AFTER, **changes.get("stages", {})}
        stages = [{"num_hidden_layers": 2, "steps": step}, entry]
        runs += switched(tmp_path / "b", {step: gain}, changes={**changes, "stages": stages})
    one, two = curves(tmp_path, runs)
    assert [point.gain for point in one.points] == pytest.approx([0.1, 0.3, 0.2])
    assert [point.gain for point in two.points] == pytest.approx([0.2, 0.4, 0.3])
    assert told in two.family
    assert told not in one.family


def test_other_lengths_after_the_growth_are_curves_of_their_own(tmp_path: Path) -> None:
    runs = switched(tmp_path / "a", GAINS) + switched(tmp_path / "b", GAINS, after=500)
    found = curves(tmp_path, runs)
    assert ["each 300 steps after" in curve.family for curve in found] == [True, False]
    assert "each 500 steps after" in found[1].family


def test_equal_lengths_in_all_are_a_curve_too(tmp_path: Path) -> None:
    runs = [path for at in (200, 400, 600)
            for path in switched(tmp_path / str(at), {at: 0.1}, after=1000 - at)]  # fmt: skip
    (curve,) = curves(tmp_path, runs)
    assert [point.step for point in curve.points] == [200, 400, 600]
    assert curve.family.endswith("each 1,000 steps in all")


def test_no_two_points_lie_at_one_step(tmp_path: Path) -> None:
    runs = switched(tmp_path / "a", GAINS, changes={"learning_rate": {"decay_steps": 50}})
    runs += switched(tmp_path / "b", GAINS, changes={"learning_rate": {"decay_steps": 90}})
    found = curves(tmp_path, runs)
    assert [[point.step for point in curve.points] for curve in found] == [list(GAINS)] * 2
    assert "decay_steps 50" in found[0].family
    assert "decay_steps 90" in found[1].family


def test_a_growth_branch_that_states_its_sizes_belongs_to_the_same_family(tmp_path: Path) -> None:
    """As the branches of a recipe do, where the recipe itself leaves them away."""
    runs = switched(tmp_path / "a", {200: 0.1, 400: 0.3})
    stages = [{"num_hidden_layers": 2, "steps": 800, "hidden_size": 8},
              {"num_hidden_layers": 8, "steps": AFTER}]  # fmt: skip
    runs += switched(tmp_path / "b", {800: 0.2}, changes={"stages": stages})
    (curve,) = curves(tmp_path, runs)
    assert [point.step for point in curve.points] == [200, 400, 800]


def test_two_switch_times_are_no_curve(tmp_path: Path) -> None:
    assert curves(tmp_path, switched(tmp_path / "a", {200: 0.1, 400: 0.2})) == []


def test_page_text_and_pictures_name_the_family_and_the_threshold(tmp_path: Path) -> None:
    runs = switched(tmp_path / "a", GAINS, seeds=SEEDS)
    comparison = compare(read_runs([*scratch_runs(tmp_path), *runs]))
    page = write_comparison(comparison, tmp_path / "page").read_text()
    for told in ("each 300 steps after the growth", "threshold, step 400: no later growth"):
        assert told in page
        assert told in text(comparison)
    assert (tmp_path / "page" / "loss_by_switch_1.png").stat().st_size > 1000
