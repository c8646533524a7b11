"""How far step times are known, and what that does to the interval of a speed-up."""

from pathlib import Path

import numpy as np
import pytest
from run_folders import GROWN, scratch_runs, twice_as_fast, write_run

from stacking.comparison import compare
from stacking.comparison_frontier import interval
from stacking.comparison_runs import read_runs
from stacking.comparison_timing import step_errors


def test_the_bootstrap_of_a_median_has_the_spread_of_medians() -> None:
    """Of 25 rows that are normal: sqrt(pi / 2 / n) deviations."""
    generator = np.random.default_rng(0)
    rows = 1 + 0.1 * generator.standard_normal((400, 25))
    spreads = [step_errors({"a": list(row)})["a"].std() for row in rows]
    assert np.median(spreads) == pytest.approx(0.1 * np.sqrt(np.pi / 2 / 25), rel=0.1)
    truth = [interval(np.exp(step_errors({"a": list(row)})["a"]) * np.median(row)) for row in rows]
    assert 0.9 <= np.mean([one.low <= 1 <= one.high for one in truth]) <= 0.98


def test_equal_rows_leave_no_doubt_and_other_sizes_draw_for_themselves() -> None:
    errors = step_errors({"a": [0.5] * 9, "b": [0.1, 0.2, 0.3], "c": [0.1, 0.2, 0.3]})
    assert not errors["a"].any()
    assert abs(np.corrcoef(errors["b"], errors["c"])[0, 1]) < 0.05


def scattered(folder: Path, layers: int) -> Path:
    """The rows of one size, 10 % up and down; their median stays."""
    path, rows = folder / "metrics.jsonl", []
    for number, line in enumerate(path.read_text().splitlines()):
        seconds = {2: "0.125", 8: "0.5"}[layers]
        other = float(seconds) * (1 + 0.1 * ((number % 3) - 1))
        rows.append(line.replace(f'"step_seconds": {seconds}', f'"step_seconds": {other}'))
    path.write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("layers", [2, 8])
def test_an_interval_in_reference_time_knows_of_the_rows_of_its_sizes(
    tmp_path: Path, layers: int
) -> None:
    """The grown run has 50 s of 205 in the small model, so 0.24 of its error, and of the large."""
    timed = [write_run(tmp_path / f"timed_{n}", [stage], 6.0) for n, stage in enumerate(GROWN)]
    noise = [0.0, 0.0005, -0.0005]
    grown = [twice_as_fast(tmp_path, error, seed) for seed, error in enumerate(noise)]
    runs = read_runs([*scratch_runs(tmp_path), *grown])
    sure = compare(runs, timed=read_runs(timed))
    unsure = compare(runs, timed=read_runs([scattered(folder, layers) for folder in timed]))
    width = {}
    for name, comparison in (("sure", sure), ("unsure", unsure)):
        best = comparison.headline()
        assert best is not None
        assert best[1].ratio == pytest.approx(2.0)
        width[name] = best[1].interval.high - best[1].interval.low
        steps = next(found for found in comparison.of(best[0]) if found.axis == "steps")
        width[f"{name} in steps"] = steps.interval.high - steps.interval.low
    assert width["unsure in steps"] == width["sure in steps"]
    errors = step_errors(unsure.step_rows).values()
    spread = max(np.quantile(error, 0.975) - np.quantile(error, 0.025) for error in errors)
    assert 2.0 * 0.2 * spread < width["unsure"] < 2.0 * 0.25 * spread + width["sure"]
    assert width["unsure"] > 2 * width["sure"]
