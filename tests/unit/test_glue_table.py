"""benchmarks/glue_table.py: models side by side, by result files as glue.py train leaves them."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from glue_sets import write_glue

ROOT = Path(__file__).resolve().parents[2]
NOTE = "train.tsv: has 4 rows, the official CoLA 8,551: not comparable"
Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command(*words)` runs the benchmark in this process; its exit code."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("glue_table")

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["glue_table.py", *map(str, words)])
        code: int = script.main()
        return code

    return run


def write_results(folder: Path, task: str, scores: list[dict[str, float]], rate: float) -> Path:
    for seed, own in enumerate(scores, start=1):
        path = folder / f"seed_{seed}" / f"{task}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        conditions = {"model": folder.name, "seed": seed, "setting": {"learning_rate": rate}}
        path.write_text(json.dumps({"scores": own, "notes": [NOTE], "conditions": conditions}))
    return folder


def models(folder: Path) -> tuple[Path, Path]:
    """Two, with CoLA in common."""
    one, other = folder / "scratch", folder / "grown"
    write_results(one, "CoLA", [{"matthews": score} for score in (1.0, 2.0, 3.0)], 5e-5)
    write_results(one, "MRPC", [{"f1": 80.0, "accuracy": 70.0}] * 3, 5e-5)
    write_results(other, "CoLA", [{"matthews": score} for score in (11.0, 12.0, 13.0)], 5e-5)
    return one, other


def test_a_line_has_means_intervals_and_differences(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = models(tmp_path)
    assert command(one, other) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "| task | scratch | grown |",
        "| --- | --- | --- |",
        "| CoLA | 2.0 +- 2.5 | 12.0 +- 2.5 (+10.0 +- 2.3)* |",
        "| mean of 1 | 2.0 +- 2.5 | 12.0 +- 2.5 (+10.0 +- 2.3)* |",
    ]
    assert lines[4] == f"- {NOTE}"
    assert json.loads(lines[-1])["CoLA"]["scores"]["grown"] == [11.0, 12.0, 13.0]


def test_what_may_be_chance_has_no_star_and_the_mean_is_taken_seed_by_seed(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = models(tmp_path)
    same = [{"f1": 80.0, "accuracy": accuracy} for accuracy in (68.0, 70.0, 74.0)]
    write_results(other, "MRPC", same, 5e-5)
    glue = write_glue(tmp_path / "glue")
    assert command(one, other, "--glue", glue) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("| MRPC | ")
    assert lines[3].endswith("| 75.0 +- 0.0 | 75.3 +- 3.8 (+0.3 +- 3.8) |")
    found = json.loads(lines[-1])
    assert found["mean of 2"]["scores"]["grown"] == [42.5, 43.5, 45.0]
    assert found["CoLA"]["most_frequent_label"] == 0.0


def test_other_settings_and_empty_folders_are_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = models(tmp_path)
    other = write_results(tmp_path / "other", "CoLA", [{"matthews": 1.0}] * 3, 3e-5)
    assert command(one, other) == 2
    assert "CoLA: other has other seeds, data or settings than scratch" in capsys.readouterr().err
    assert command(one, tmp_path / "none") == 2
    assert "no results; give the --out of" in capsys.readouterr().err
    write_results(one, "MRPC", [{"f1": 80.0, "accuracy": 70.0}] * 4, 5e-5)
    assert command(one) == 2
    assert "seeds by task: CoLA 3, MRPC 4; give all tasks as many" in capsys.readouterr().err
