"""What several runs share was paid once: pilots, branches, rows of a trunk, starts of a process."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from run_folders import (
    GROWN,
    SECONDS,
    SWITCH,
    Row,
    Stages,
    scratch_runs,
    twice_as_fast,
    write_run,
)

from stacking.comparison import Comparison, Speedup, compare
from stacking.comparison_costs import TIME, curve, reference_step_seconds, spent
from stacking.comparison_runs import Run, each_once, read_pilots, read_runs
from stacking.comparison_trunks import by_folder, parts, root
from stacking.errors import UserError


def found(comparison: Comparison, axis: str = TIME, name: str = "grown") -> Speedup:
    (group,) = (group for group in comparison.groups if group.name == name)
    return next(s for s in comparison.of(group) if s.axis == axis)


def rewrite(folder: Path, change: Callable[[Row], Row | None]) -> Path:
    """Change every row of a run's metrics.jsonl; None leaves it away."""
    path = folder / "metrics.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None))
    return folder


def write_branch(folder: Path, trunk: Path, at: int, stages: Stages) -> Path:
    """A run that left `trunk` after `at` steps."""
    start = {"branch_from": f"{trunk}@{at}"}
    return write_run(folder, stages, 6.0, start=start, changes={"name": folder.name})


def study(folder: Path) -> Path:
    """A trunk of 400 steps of 2 layers, and two branches that grow and train 240 steps of 8."""
    trunk = write_run(folder / "trunk", [(2, 400)], 6.5)
    for at in (100, 200):
        write_branch(trunk / "branches" / f"at_{at}", trunk, at, [(2, at), (8, 240)])
    return trunk


OWN = 240 * SECONDS[8] + SWITCH  # what a branch of it adds, s


def test_pilots_are_charged_to_grown_recipes_alone(tmp_path: Path) -> None:
    """Finished or not, on every axis."""
    runs = read_runs([*scratch_runs(tmp_path), twice_as_fast(tmp_path)])
    whole = write_run(tmp_path / "pilot_1", [(2, 40)], 8.0)
    half = write_run(tmp_path / "pilot_2", GROWN, 8.0, is_finished=False)

    def until_growth(row: Row) -> Row | None:
        step = row.get("global_step", 0)
        return row if isinstance(step, int) and step <= 400 and "to_stage" not in row else None

    pilots = read_pilots([whole, rewrite(half, until_growth)])
    free, charged = compare(runs), compare(runs, pilots=pilots)
    seconds, steps = 440 * SECONDS[2], 440
    for axis, more in ((TIME, seconds), ("steps", steps), ("wall_seconds", 2 * seconds)):
        assert found(charged, axis).cost == pytest.approx(found(free, axis).cost + more)
    scratch = [(g.cost("steps"), h.cost("steps")) for g, h in zip(free.groups, charged.groups,
               strict=True) if g.role == "scratch"]  # fmt: skip
    assert all(before == after for before, after in scratch)
    assert found(charged).ratio == pytest.approx(
        found(free).ratio * found(free).cost / (found(free).cost + seconds)
    )
    assert "charged for 2 pilots, 55 s" in charged.notes[-1]


def test_pilots_are_read_once_with_their_branches(tmp_path: Path) -> None:
    trunk = study(tmp_path)
    inside = trunk / "branches" / "at_100"
    again = Path(os.path.relpath(trunk))
    folders = [run.folder for run in read_pilots([trunk, again, inside, trunk / ".." / "trunk"])]
    assert folders == [trunk, inside, trunk / "branches" / "at_200"]
    assert each_once([trunk, again]) == [trunk]


def test_a_branch_is_charged_from_where_it_left_a_trunk_that_is_charged_too(
    tmp_path: Path,
) -> None:
    runs = read_runs([*scratch_runs(tmp_path), twice_as_fast(tmp_path)])
    pilots = read_pilots([study(tmp_path)])
    free, charged = compare(runs), compare(runs, pilots=pilots)
    for axis, more in ((TIME, 400 * SECONDS[2] + 2 * OWN), ("steps", 400 + 2 * 240)):
        assert found(charged, axis).cost == pytest.approx(found(free, axis).cost + more)


def test_without_the_trunk_its_steps_are_charged_to_its_branches_once(tmp_path: Path) -> None:
    """The longer of the two goes 200 steps with it."""
    branches = study(tmp_path) / "branches"
    pilots = read_pilots([branches / "at_100", branches / "at_200"])
    total = spent(pilots, reference_step_seconds(pilots))
    assert total[TIME] == pytest.approx(200 * SECONDS[2] + 2 * OWN)
    assert total["steps"] == 200 + 2 * 240
    (alone,) = read_pilots([branches / "at_100"])
    assert spent([alone], reference_step_seconds(pilots))["steps"] == 100 + 240


def test_a_branch_of_a_branch_and_a_moved_study_are_charged_alike(tmp_path: Path) -> None:
    trunk = study(tmp_path / "before")
    grown = trunk / "branches" / "at_100"
    write_branch(grown / "branches" / "0.5", grown, 220, [(2, 100), (8, 180)])
    expected = 400 + 240 + 240 + 60
    for folder in (trunk, tmp_path / "moved"):
        if folder != trunk:
            trunk.rename(folder)
        pilots = read_pilots([folder])
        assert spent(pilots, reference_step_seconds(pilots))["steps"] == expected
        known = by_folder(pilots)
        assert {root(run, known) for run in pilots} == {folder.resolve()}
    (deepest,) = (run for run in pilots if run.folder.name == "0.5")
    assert [(part.begin, part.end) for part in parts(deepest, known)] == [
        (0, 100), (100, 220), (220, 280),
    ]  # fmt: skip


def test_what_a_recipe_shares_with_a_pilot_or_is_itself_costs_it_nothing_more(
    tmp_path: Path,
) -> None:
    """The grown run left the pilots' trunk after 100 steps: their 300 others are charged."""
    trunk = study(tmp_path)
    runs = read_runs([*scratch_runs(tmp_path), trunk / "branches" / "at_100"])
    pilots = read_pilots([trunk])
    free, charged = compare(runs), compare(runs, pilots=pilots)
    assert found(charged, "steps", "at_100").cost == found(free, "steps", "at_100").cost + 300 + 240
    alone = compare(runs, pilots=pilots[1:2])
    assert found(alone, "steps", "at_100").cost == found(free, "steps", "at_100").cost


def test_a_pilot_that_claims_to_have_left_itself_is_read(tmp_path: Path) -> None:
    """Damaged, or written by hand."""
    folder = tmp_path / "loop"
    write_run(folder, [(8, 100)], 5.0, start={"branch_from": f"{folder}@50"})
    pilots = read_pilots([folder])
    assert spent(pilots, reference_step_seconds(pilots))["steps"] == 100


@pytest.mark.parametrize(
    ("start", "changes", "told"),
    [
        ({"device": "cuda:0"}, {}, "device: cpu in .*; cuda:0 in"),
        ({"device_name": "NVIDIA H200"}, {}, "device's name: a processor in .*; NVIDIA H200 in"),
        ({"world_size": 8}, {}, "ranks: 2 in .*; 8 in"),
        ({"precision": "fp32"}, {}, "precision: bf16 in .*; fp32 in"),
        ({}, {"global_batch_size": 8}, "global_batch_size: 4 in .*; 8 in"),
    ],
)
def test_pilots_that_were_timed_elsewhere_are_refused(
    tmp_path: Path, start: Mapping[str, object], changes: Mapping[str, object], told: str
) -> None:
    runs = read_runs([*scratch_runs(tmp_path), twice_as_fast(tmp_path)])
    pilot = write_run(tmp_path / "pilot_1", [(2, 40)], 8.0, start=start, changes=changes)
    with pytest.raises(UserError, match=told) as refused:
        compare(runs, pilots=read_pilots([pilot]))
    assert str(pilot) in str(refused.value)


def test_a_pilot_of_other_data_is_charged_and_changes_nobodys_reference_time(
    tmp_path: Path,
) -> None:
    runs = read_runs([*scratch_runs(tmp_path), twice_as_fast(tmp_path)])
    pilot = write_run(tmp_path / "pilot_1", [(8, 60)], 8.0, start={"data_fingerprint": 5})

    def fast(row: Row) -> Row:
        return row | ({"step_seconds": 0.01} if row["event"] == "train" else {})

    free, charged = compare(runs), compare(runs, pilots=read_pilots([rewrite(pilot, fast)]))
    assert charged.step_seconds == free.step_seconds
    assert found(charged).scratch_cost == found(free).scratch_cost
    assert found(charged).cost == pytest.approx(found(free).cost + 60 * SECONDS[8])


def test_device_precision_and_ranks_belong_to_a_configuration(tmp_path: Path) -> None:
    starts: list[Row] = [{}, {"device": "cuda"}, {"precision": "fp32"}, {"world_size": 4}]
    runs = read_pilots([
        write_run(tmp_path / str(place), [(8, 60)], 8.0, start=start)
        for place, start in enumerate(starts)
    ])  # fmt: skip
    assert len({run.configuration(0) for run in runs}) == 4


def test_a_trunks_rows_count_once_in_the_reference_however_many_branches_copy_them(
    tmp_path: Path,
) -> None:
    """A trunk of slow rows with four branches, and two runs of as many rows that are fast."""
    trunk = rewrite(write_run(tmp_path / "trunk", [(2, 400)], 6.0), slow_rows)
    for name in "abcd":
        branch = write_branch(trunk / "branches" / name, trunk, 400, [(2, 400), (8, 100)])
        rewrite(branch, slow_rows)
    fast = [write_run(tmp_path / name, [(2, 400)], 6.0) for name in ("fast", "too")]
    runs = read_pilots([trunk, *fast])
    assert reference_step_seconds(runs)[runs[0].configuration(0)] == 0.125


def slow_rows(row: Row) -> Row:
    is_small = row["event"] == "train" and row["stage"] == 0
    return row | ({"step_seconds": 1.0} if is_small else {})


def walls(run: Path) -> list[float]:
    (read,) = read_runs([run])
    return [point.costs["wall_seconds"] for point in curve(read, reference_step_seconds([read]))]


def later(seconds: float, after: int) -> Callable[[Row], Row]:
    """Rows after so many steps come so much later."""

    def change(row: Row) -> Row:
        step, at = row.get("global_step", 0), row.get("elapsed_seconds")
        assert isinstance(step, int)
        return row | {"elapsed_seconds": at + seconds} if isinstance(at, float) and (
            step > after) else row  # fmt: skip

    return change


def test_the_start_of_a_process_is_no_wall_time(tmp_path: Path) -> None:
    """Of the first of a process' runs, of one that was resumed, and of a branch."""
    plain = walls(twice_as_fast(tmp_path / "plain"))
    first = rewrite(twice_as_fast(tmp_path / "first"), later(30.0, 0))
    assert walls(first) == pytest.approx(plain)
    lines = (first / "metrics.jsonl").read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if json.loads(line).get("global_step", 0) > 200)
    lines.insert(place, json.dumps({"event": "resume", "global_step": 200}) + "\n")
    (first / "metrics.jsonl").write_text("".join(lines))
    assert walls(rewrite(first, later(20.0, 200))) == pytest.approx(plain)
    branch = write_run(tmp_path / "b", GROWN, 5.0, start={"branch_from": f"{tmp_path}/x@400"})
    # The growth right after the step is no start: its seconds are those of the switch.
    rewrite(rewrite(branch, later(25.0, 0)), later(SWITCH + 15.0, 400))
    assert walls(branch) == pytest.approx([plain[0], plain[1] + SWITCH])


def test_slow_steps_and_evaluations_inside_a_stage_stay_wall_time(tmp_path: Path) -> None:
    plain = walls(twice_as_fast(tmp_path / "plain"))
    slow = rewrite(twice_as_fast(tmp_path / "slow"), later(30.0, 80))
    assert walls(slow) == pytest.approx([seconds + 30.0 for seconds in plain])


def test_devices_of_other_names_are_refused_and_unknown_ones_told(tmp_path: Path) -> None:
    scratch = scratch_runs(tmp_path)
    other = write_run(tmp_path / "h_1", GROWN, 5.0, start={"device_name": "NVIDIA H200"})
    with pytest.raises(UserError, match="device's name: a processor in .*; NVIDIA H200 in"):
        read_runs([*scratch, other])
    old = write_run(tmp_path / "old_1", GROWN, 5.0, start={"device_name": None})
    (note,) = [n for n in compare(read_runs([*scratch, old])).notes if "Unknown" in n]
    assert "device's name" in note
    assert str(old) in note


def test_matrix_products_that_were_much_slower_are_told(tmp_path: Path) -> None:
    def notes(rate: float, folder: Path) -> str:
        start = {"matmul_flops_per_second": rate}
        grown = write_run(folder / "grown_1", GROWN, 5.0, start=start)
        return "\n".join(compare(read_runs([*scratch_runs(folder), grown])).notes)

    assert "matrix products" not in notes(0.8e11, tmp_path / "a")
    assert re.search(r"1\.4 times as long in .*b/grown_1", notes(0.7e11, tmp_path / "b"))


def test_runs_of_one_trunk_are_one_family(tmp_path: Path) -> None:
    trunk = study(tmp_path)
    runs: list[Run] = read_runs([*scratch_runs(tmp_path), *[run.folder for run in
                                read_pilots([trunk])]])  # fmt: skip
    families = {group.name: group.family for group in compare(runs).groups}
    assert families["trunk"] == families["at_100"] == families["at_200"]
    assert len(set(families.values())) == 4
