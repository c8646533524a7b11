"""launch/compare.py as a user runs it: text, page, CSV and PNG files, exit codes."""

import csv
import json
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from browser import measured, needs_browser
from matplotlib.figure import Figure
from run_folders import SECONDS, scratch_runs, twice_as_fast, write_run

from stacking.comparison import Comparison, compare
from stacking.comparison_costs import AXES
from stacking.comparison_figures import loss_over
from stacking.comparison_page import text, write_comparison
from stacking.comparison_runs import read_runs
from stacking.errors import UserError
from stacking.report_figures import image_bytes

COMPARE = Path(__file__).resolve().parents[2] / "launch" / "compare.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(COMPARE), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Scratch of three lengths, a grown recipe of two seeds, one that is worse, and a control."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        *scratch_runs(folder), twice_as_fast(folder, 0.01, 1), twice_as_fast(folder, -0.01, 2),
        write_run(folder / "worse <b>_1", [(2, 100), (8, 100)], 8.9),
        write_run(folder / "alone_1", [(2, 1640)], 6.5),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(compare(read_runs(folders)), tmp_path_factory.mktemp("out")).parent


def test_the_command_prints_the_speed_up_and_writes_all_files(
    folders: list[Path], tmp_path: Path
) -> None:
    scratch, grown = folders[:3], folders[3:5]
    done = run(*grown, "--baseline", *scratch, "--control", folders[-1], "--out", tmp_path / "a/b")
    assert done.returncode == 0, done.stderr
    assert re.search(r"grown +grown +2 .* 2\.00x +50\.0% +100\.0% +\d\.\d\d to \d", done.stdout)
    assert "never-grown control of grown (alone): loses" in done.stdout
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {
        "compare.html", "runs.csv", "speedups.csv", "curves.csv",
        *(f"loss_over_{axis}.png" for axis in AXES),
    }  # fmt: skip


def test_json_is_one_line_with_null_for_what_is_not_known(
    folders: list[Path], tmp_path: Path
) -> None:
    done = run(*folders, "--json", "--out", tmp_path)
    (line,) = done.stdout.splitlines()
    rows = {(row["recipe"], row["axis"]): row for row in json.loads(line)["speedups"]}
    assert rows["grown", "reference_seconds"]["t0_over_t"] == pytest.approx(2.0)
    assert rows["worse <b>", "reference_seconds"]["t0_over_t"] is None
    assert "shorter scratch run" in rows["worse <b>", "reference_seconds"]["refusal"]


def test_pilots_and_a_budget_are_told_in_text_json_and_page(
    folders: list[Path], tmp_path: Path
) -> None:
    words = (*folders, "--pilot", folders[-1], "--budget", 100, "--out", tmp_path)
    found = json.loads(run(*words, "--json").stdout)
    assert any("charged for 1 pilot, 205 s" in note for note in found["notes"])
    names = {one["name"] for one in found["within_budget"]}
    assert names == {"scratch, between its runs", "scratch100"}
    assert all(one["cost"] <= 100 for one in found["within_budget"])
    assert "<h2>Within 1" in (tmp_path / "compare.html").read_text()
    assert run(*folders, "--budget", 0, "--out", tmp_path).returncode == 2


def test_pilots_are_charged_once_with_their_branches(folders: list[Path], tmp_path: Path) -> None:
    trunk = write_run(tmp_path / "trunk", [(2, 400)], 6.5)
    write_run(trunk / "branches" / "b", [(2, 400), (8, 100)], 6.0,
              start={"branch_from": f"{trunk}@400"})  # fmt: skip
    pilots = [trunk, trunk / ".", trunk / "branches" / "b"]
    given = Namespace(runs=folders, baseline=[], control=None, pilot=pilots, timed=[])
    found = runpy.run_path(str(COMPARE))["compare_folders"](given)
    assert any("charged for 2 pilots, 105 s" in note for note in found.notes)


def test_timed_runs_alone_say_what_a_step_takes(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SECONDS, 2, 0.05)
    timed = write_run(tmp_path / "timed", [(2, 30), (8, 30)], 6.5)
    short = write_run(tmp_path / "short", [(8, 30)], 6.5)
    given = Namespace(runs=folders, baseline=[], control=None, pilot=[], timed=[timed])
    compare_folders = runpy.run_path(str(COMPARE))["compare_folders"]
    assert sorted(compare_folders(given).step_seconds.values()) == [0.05, 0.5]
    given.timed = [short]
    with pytest.raises(UserError, match=r"grown_1, stage 1; .*worse <b>_1, stage 1; .*alone_1"):
        compare_folders(given)


def test_a_role_that_cannot_be_is_exit_code_2(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*folders, "--control", folders[3], "--out", folders[0] / "never"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    assert runpy.run_path(str(COMPARE))["main"]() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: --control {folders[3]}: grows, in 2 stages")


LONG = "one_hop_copy_stack_moments_keep_new_rate_1.3_from_2_layers_at_"
NAMES = ("dollar$x^{$y", "_hidden", "<b>x</b>", "a" * 200, *(f"{LONG}{n}" for n in range(10)))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Recipes with names that pictures, pages or columns may not like."""
    folder = tmp_path_factory.mktemp("many")
    runs = [write_run(folder / str(place), [(2, 300 + 10 * place), (8, 300)], 5.2 - place / 50,
                      changes={"name": name}) for place, name in enumerate(NAMES)]  # fmt: skip
    return compare(read_runs([*scratch_runs(folder), *runs]))


def test_every_name_is_printed_whole_and_its_numbers_in_their_columns(many: Comparison) -> None:
    lines = text(many).splitlines()
    for name in NAMES:
        (place,) = (n for n, line in enumerate(lines) if f"{line} ".startswith(f"{name} "))
        row = lines[place] if len(name) <= 48 else lines[place + 1]
        assert row.index(" grown ") == lines[1].index(" role ")


def test_every_recipe_is_in_the_legend_below_the_figure_under_its_own_look(
    many: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []

    def keep(figure: Figure, file_format: str) -> bytes:
        drawn.append(figure)
        return image_bytes(figure, file_format)

    monkeypatch.setattr("stacking.comparison_figures.image_bytes", keep)
    assert loss_over(many, "reference_seconds", "png", is_wide=True).startswith(b"\x89PNG")
    (figure,) = drawn
    (legend,) = figure.legends
    axes = figure.axes[0].get_window_extent()
    assert legend.get_window_extent().y1 < axes.y0
    labels = [entry.get_text().strip() for entry in legend.get_texts()]
    assert len(labels) == len(set(labels)) == len(NAMES) + 2
    assert {r"dollar\$x^{\$y (grown)", "_hidden (grown)", "<b>x</b> (grown)"} <= set(labels)
    looks = {(line.get_color(), line.get_marker(), str(line.get_linestyle()))
             for line in legend.get_lines()}  # fmt: skip
    assert len(looks) == len(labels)
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert {"100", "200", "500"} <= set(ticks)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_long_names_within_the_page(
    many: Comparison, tmp_path: Path, width: int
) -> None:
    best = max(NAMES, key=len)
    groups = [replace(group, name=best if group.name == NAMES[-1] else group.name + " ")
              for group in many.groups]  # fmt: skip
    page = write_comparison(replace(many, groups=tuple(groups)), tmp_path / "out")
    shown = measured(page, tmp_path, width)
    assert (shown["broken"], shown["tooWide"]) == (0, False)


def test_small_runs_are_told_in_units_of_their_size(written: Path) -> None:
    page = (written / "compare.html").read_text("ascii")
    runs = page[page.index("<h2>The runs</h2>") :]
    assert "<td>6,400</td>" in runs  # tokens of 100 steps
    assert re.search(r"<td>\d\d\.\d&nbsp;G</td>", runs)  # FLOP
    assert "<td>0.0</td>" not in runs
    assert "<td>0.00</td>" not in runs


def test_runs_that_cannot_be_compared_are_one_message_and_exit_code_2(
    folders: list[Path], tmp_path: Path
) -> None:
    other = write_run(tmp_path / "other_1", [(8, 200)], changes={"global_batch_size": 8})
    done = run(*folders[:3], other, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: these runs cannot be compared")
    assert f"global_batch_size: 4 in {folders[0]}, " in done.stderr
    assert f"; 8 in {other}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_a_users_mistake(
    folders: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = run(*folders, "--out", tmp_path / "file")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_the_page_is_one_file_that_asks_for_no_other(written: Path) -> None:
    page = (written / "compare.html").read_text("ascii")
    links = re.findall(r'(?:src|href)="([^"]{1,30})', page)
    assert len(links) == len(AXES)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not re.search(r"<script|<link|@import|url\(|<b>_1", page)
    assert "worse &lt;b&gt;" in page
    for name in AXES:
        assert (written / f"loss_over_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_speed_ups_refusals_and_the_control(written: Path) -> None:
    page = (written / "compare.html").read_text("ascii")
    for shown in ("<b>2.00x</b>", "50.0%", "100.0%", "see below", "add a shorter scratch",
                  "<b>loses</b>", "2 to 8", "of 2; chosen by", "0.1250", "0.5000",
                  "same peak learning rate"):  # fmt: skip
        assert shown in page, shown


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_every_picture_and_nothing_too_wide(
    written: Path, tmp_path: Path, width: int
) -> None:
    shown = measured(written / "compare.html", tmp_path, width)
    assert shown == {"pictures": len(AXES), "broken": 0, "tooWide": False}


def test_the_csv_files_hold_what_the_page_says(written: Path) -> None:
    tables = {
        name: list(csv.DictReader((written / f"{name}.csv").open()))
        for name in ("runs", "speedups", "curves")
    }
    assert list(tables["runs"][0]) == [
        "recipe", "role", "seed", "folder", "layers", "peak_learning_rate", "fault", *AXES,
        "val_mlm_loss",
    ]  # fmt: skip
    assert list(tables["speedups"][0]) == [
        "recipe", "role", "seeds", "val_mlm_loss", "axis", "cost", "scratch_cost", "t0_over_t",
        "low", "high", "time_saved", "gain", "nats_ahead_at_equal_cost", "nats_low", "nats_high",
        "refusal",
    ]  # fmt: skip
    assert list(tables["curves"][0]) == ["recipe", "role", "seed", *AXES, "val_mlm_loss"]
    by_axis = {row["axis"]: row for row in tables["speedups"] if row["recipe"] == "grown"}
    assert list(by_axis) == list(AXES)
    best = by_axis["reference_seconds"]
    assert float(best["t0_over_t"]) == pytest.approx(2.0)
    assert float(best["low"]) < 2.0 < float(best["high"])
    assert [row["role"] for row in tables["runs"]] == ["grown"] * 3 + ["control"] + ["scratch"] * 3
    assert len(tables["curves"]) == 3 + 3 * 2 + 1


def test_a_run_without_an_evaluation_leaves_a_page(folders: list[Path], tmp_path: Path) -> None:
    young = write_run(tmp_path / "young_1", [(2, 300), (8, 300)], 5.0, is_finished=False)
    start = (young / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (young / "metrics.jsonl").write_text(start)
    comparison = compare(read_runs([*folders, young]))
    page = write_comparison(comparison, tmp_path / "out").read_text()
    assert "unfinished: step 0 of 600" in page
    assert "unfinished: step 0 of 600" in text(comparison)
