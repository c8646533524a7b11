"""Recipes of one name are told apart, and none is reported for another."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import reference_seconds, scratch_law, scratch_runs, write_run

from stacking.comparison import Comparison, compare
from stacking.comparison_costs import TIME
from stacking.comparison_names import short_names, unique_names
from stacking.comparison_page import speedup_rows, text
from stacking.comparison_runs import read_runs, with_branches


def two_trunks(folder: Path) -> list[Path]:
    """A study of two peak rates: branches of equal names, one rate a factor 2, the other 1.2."""
    trunks = []
    for rate, ratio in ((1e-3, 2.0), (2e-3, 1.2)):
        trunk = write_run(folder / f"rate_{rate}", [(2, 400)], 5.0, changes=named("trunk", rate))
        trunks.append(trunk)
        for at in (100, 200):
            stages = [(2, at), (8, 240)]
            loss = scratch_law(ratio * reference_seconds(stages))
            write_run(trunk / "branches" / f"at_{at}", stages, loss,
                      changes=named(f"trunk at_{at}", rate))  # fmt: skip
    return trunks


def named(name: str, rate: float) -> dict[str, object]:
    return {"name": name, "learning_rate": {"peak": rate}}


def ratios(comparison: Comparison) -> dict[str, float]:
    return {group.name: round(found.ratio, 3) for group in comparison.groups
            for found in comparison.of(group) if found.axis == TIME
            and group.role == "grown"}  # fmt: skip


def test_branches_of_one_name_in_two_trunks_have_their_own_speed_ups(tmp_path: Path) -> None:
    folders = [path for trunk in two_trunks(tmp_path) for path in with_branches(trunk)]
    comparison = compare(read_runs([*scratch_runs(tmp_path), *folders]))
    assert ratios(comparison) == {
        f"trunk at_{at} (learning_rate.peak {rate})": ratio
        for rate, ratio in ((0.001, 2.0), (0.002, 1.2)) for at in (100, 200)
    }  # fmt: skip
    rows = {row["recipe"]: row["t0_over_t"] for row in speedup_rows(comparison)
            if row["axis"] == TIME}  # fmt: skip
    assert rows["trunk at_100 (learning_rate.peak 0.002)"] == pytest.approx(1.2)
    printed = text(comparison)
    assert all(printed.count(f"\n{name} ") == 1 for name in ratios(comparison))


def test_names_that_are_not_unique_are_refused_as_our_own_fault(tmp_path: Path) -> None:
    found = compare(read_runs(scratch_runs(tmp_path)))
    twice = tuple(replace(group, name="same") for group in found.groups)
    with pytest.raises(AssertionError, match="not unique"):
        replace(found, groups=twice)


def names_of(folder: Path, changes: Sequence[dict[str, object]]) -> list[str]:
    """Of runs of one stage, in folders a/x, b/x, ..."""
    folders = [write_run(folder / letter / "x", [(8, 100)], 5.0, changes=change)
               for letter, change in zip("abcd", changes, strict=False)]  # fmt: skip
    return unique_names([[run] for run in read_runs(folders)])


def test_a_few_differing_values_are_told_and_only_where_a_name_is_shared(tmp_path: Path) -> None:
    found = names_of(tmp_path, [
        named("same", 0.1), named("same", 0.2), named("other", 0.3),
    ])  # fmt: skip
    assert found == ["same (learning_rate.peak 0.1)", "same (learning_rate.peak 0.2)", "other"]


def test_where_many_values_differ_the_folder_is_told(tmp_path: Path) -> None:
    many = {"learning_rate": {"peak": 2e-3, "warmup_steps": 3, "decay_steps": 7, "end": 1e-5}}
    found = names_of(tmp_path, [{"name": "same"}, {"name": "same", **many}])
    assert found == ["same (a/x)", "same (b/x)"]


def test_a_trunk_and_its_branch_of_one_name_are_told_from_above(tmp_path: Path) -> None:
    trunk = write_run(tmp_path / "trunk", [(8, 400)], 5.0, changes={"name": "same"})
    many = {"warmup_steps": 3, "decay_steps": 7, "end": 1e-5, "peak": 2e-3}
    branch = write_run(trunk / "branches" / "b", [(8, 200)], 5.1,
                       changes={"name": "same", "learning_rate": many})  # fmt: skip
    runs = [[run] for run in read_runs([trunk, branch])]
    assert unique_names(runs) == ["same (trunk)", "same (trunk/branches/b)"]


def test_a_name_that_looks_like_a_made_one_still_leaves_all_different(tmp_path: Path) -> None:
    found = names_of(tmp_path, [
        named("same", 0.1), named("same", 0.2), named("same (learning_rate.peak 0.1)", 0.3),
    ])  # fmt: skip
    assert len(set(found)) == 3
    assert "same (learning_rate.peak 0.2)" in found


def test_long_names_are_cut_in_their_middle_and_stay_different() -> None:
    assert short_names(["short", "a" * 30 + "b" * 30], 23) == ["short", "a" * 10 + "..." + "b" * 10]
    alike = ["x" * 20 + letter + "y" * 20 for letter in "ab"]
    assert short_names(alike, 20) == alike
