"""Metrics by hand and by closed forms, the papers' averages, intervals and the selection rule."""

import importlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking.glue_metrics import (
    glue_average,
    select,
    task_metrics,
    task_score,
)
from stacking.glue_tasks import BY_NAME, GridPoint, grid
from stacking.score_statistics import Difference, MissingPackageError, difference, over_seeds

LABELS = np.array([1, 1, 1, 0, 0, 1, 0, 1.0])
SAID = np.array([1, 0, 1, 1, 0, 1, 0, 1.0])  # 4 right of 5, 2 right of 3


def test_binary_metrics_by_hand() -> None:
    assert task_metrics(BY_NAME["MRPC"], LABELS, SAID) == pytest.approx(
        {"accuracy": 75.0, "f1": 80.0}
    )
    matthews = (4 * 2 - 1 * 1) / math.sqrt(5 * 5 * 3 * 3)
    assert task_metrics(BY_NAME["CoLA"], LABELS, SAID) == pytest.approx(
        {"matthews": 100 * matthews}
    )
    assert task_metrics(BY_NAME["SST-2"], LABELS, SAID) == {"accuracy": 75.0}


def test_f1_is_that_of_class_1() -> None:
    rare = np.array([0, 0, 0, 1.0])
    assert task_metrics(BY_NAME["QQP"], rare, np.zeros(4)) == {"accuracy": 75.0, "f1": 0.0}


def test_correlations_by_hand() -> None:
    gold, said = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.0, 1.0, 4.0, 3.0])
    expected = {"pearson": 100 * 8 / math.sqrt(14 * 10), "spearman": 100 * (1 - 6 * 2 / (4 * 15))}
    assert task_metrics(BY_NAME["STS-B"], gold, said) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["STS-B", "CoLA"])
def test_a_constant_has_no_correlation(name: str) -> None:
    found = task_metrics(BY_NAME[name], np.array([0, 1, 1.0]), np.ones(3))
    assert set(found.values()) == {0.0}


def test_the_diagnostics_are_scored_over_three_classes() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2.0])
    assert task_metrics(BY_NAME["AX"], labels, labels) == {"matthews": pytest.approx(100.0)}
    assert task_metrics(BY_NAME["AX"], labels, (labels + 1) % 3)["matthews"] == pytest.approx(-50.0)


def test_a_tasks_score_is_the_mean_of_its_metrics() -> None:
    assert task_score(BY_NAME["MRPC"], {"f1": 88.9, "accuracy": 84.8}) == pytest.approx(86.85)


# Two lines of the StackingBERT paper's table 2 (test server) and their last column. WNLI is not
# in the table: 65.1 is the most frequent label's accuracy there.
COLUMNS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE")
PAPER: dict[str, tuple[list[list[float]], float]] = {
    "BERT-Base": ([[52.1], [93.5], [88.9, 84.8], [87.1, 85.8], [71.2, 89.2], [84.6], [83.4], [90.5],
                   [66.4]], 78.3),
    "stacking": ([[56.2], [93.9], [88.2, 83.9], [84.2, 82.5], [70.4, 88.7], [84.4], [84.2], [90.1],
                  [67.0]], 78.4),
}  # fmt: skip


@pytest.mark.parametrize("line", PAPER)
def test_the_average_is_the_leaderboards(line: str) -> None:
    values, average = PAPER[line]
    scores = {
        name: task_score(BY_NAME[name], dict(zip(BY_NAME[name].metrics, own, strict=True)))
        for name, own in zip(COLUMNS, values, strict=True)
    }
    found = glue_average(scores | {"WNLI": 65.1, "AX": 34.0})
    assert found.leaderboard is not None
    assert round(found.leaderboard, 1) == average
    assert found.missing == ()
    without = glue_average(scores)
    assert without.eight_tasks == found.eight_tasks
    assert (without.leaderboard, without.missing) == (None, ("WNLI",))


def test_mnli_counts_once_and_a_missing_half_is_missing() -> None:
    scores = dict.fromkeys(COLUMNS, 50.0) | {"MNLI-m": 90.0, "MNLI-mm": 70.0}
    assert glue_average(scores).eight_tasks == pytest.approx((7 * 50 + 80) / 8)
    del scores["MNLI-mm"]
    found = glue_average(scores | {"WNLI": 50.0})
    assert (found.eight_tasks, found.leaderboard, found.missing) == (None, None, ("MNLI-mm",))


def test_the_interval_over_seeds_is_students() -> None:
    found = over_seeds([80.0, 82.0, 84.0])
    assert found.mean == 82.0
    assert found.half_width == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert over_seeds([1.0, 3.0]).half_width == pytest.approx(12.706205, rel=1e-6)
    assert over_seeds([80.0]).half_width is None
    assert over_seeds([80.0, 80.0]).half_width == 0.0


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9), st.floats(-50, 50))
def test_a_shift_of_all_scores_shifts_the_mean_only(scores: list[float], shift: float) -> None:
    one, other = over_seeds(scores), over_seeds([score + shift for score in scores])
    assert other.mean == pytest.approx(one.mean + shift, abs=1e-9)
    assert other.half_width == pytest.approx(one.half_width, abs=1e-6)


def test_a_difference_has_welchs_interval() -> None:
    found = difference([80.0, 82.0, 84.0], [70.0, 71.0, 72.0])
    # Variances of the means 4/3 and 1/3: 25/9 over (16/9 + 1/9) / 2 are 50/17 degrees of freedom.
    assert found.mean == pytest.approx(11.0)
    assert found.half_width == pytest.approx(3.218759 * math.sqrt(5 / 3), rel=1e-6)
    assert found.is_sure
    # One side without spread: the other's own interval.
    constant = difference([80.0, 82.0, 84.0], [70.0] * 3)
    assert constant.half_width == pytest.approx(4.302653 * 2 / math.sqrt(3), rel=1e-6)
    assert not difference([80.0, 82.0, 84.0], [79.0, 80.0, 81.0]).is_sure
    assert difference([70.0, 71.0], [80.0, 82.0]).mean == pytest.approx(-10.5)
    assert difference([80.0, 80.0], [80.0, 80.0]) == Difference(0.0, 0.0)
    assert difference([80.0], [70.0, 71.0]) == Difference(9.5, None)
    assert not difference([80.0], [70.0, 71.0]).is_sure


def test_the_best_setting_on_dev_is_selected_and_the_first_of_equal_ones() -> None:
    scores = dict.fromkeys(grid(), 60.0)
    assert select(scores) == GridPoint(16, 5e-5, 3)
    scores[GridPoint(32, 3e-5, 4)] = scores[GridPoint(32, 2e-5, 3)] = 61.0
    assert select(scores) == GridPoint(32, 3e-5, 4)
    scores[GridPoint(16, 5e-5, 3)] = math.nan  # a run that went astray
    assert select(scores) == GridPoint(32, 3e-5, 4)


def test_a_missing_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingPackageError, match=r"No module named 'sklearn\.metrics'.*\[glue\]"):
        task_metrics(BY_NAME["CoLA"], LABELS, SAID)
