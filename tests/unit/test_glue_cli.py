"""launch/glue.py score: what it prints, and each mistake as one message with exit code 2."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from glue_sets import write_glue

from stacking.glue_data import read_glue
from stacking.glue_predictions import write_submission
from stacking.glue_tasks import TASKS

SCRIPT = Path(__file__).resolve().parents[2] / "launch/glue.py"
Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The script's `main` in this process."""
    spec = importlib.util.spec_from_file_location("launch_glue", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["glue.py", *map(str, words)])
        code: int = script.main()
        return code

    return run


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    return write_glue(tmp_path / "glue")


@pytest.fixture
def perfect(gold: Path, tmp_path: Path) -> Path:
    """Submissions that say the dev sets' labels."""
    for task in TASKS:
        if task.dev is not None:
            rows = read_glue(gold, task, "dev").examples
            labels = np.array([one.label for one in rows], np.float64)
            write_submission(tmp_path / "said", task, rows, labels)
    return tmp_path / "said"


def test_every_task_is_scored(
    command: Command, gold: Path, perfect: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("score", gold, perfect, "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert list(found["task_scores"]) == [task.name for task in TASKS if task.name != "AX"]
    assert found["task_scores"] == pytest.approx(dict.fromkeys(found["task_scores"], 100.0))
    assert found["scores"]["STS-B"] == pytest.approx({"pearson": 100.0, "spearman": 100.0})
    assert found["average"] == {
        "eight_tasks": pytest.approx(100.0), "leaderboard": pytest.approx(100.0), "missing": [],
    }  # fmt: skip
    assert found["skipped"] == {"AX": "has no dev set with labels"}
    assert said.err.count("scores are not comparable with published ones") == 10


def test_absent_tasks_are_named(
    command: Command, gold: Path, perfect: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (gold / "QQP/dev.tsv").unlink()
    (perfect / "RTE.tsv").unlink()
    (perfect / "CoLA.tsv").write_text("index\tprediction\n0\t0\n1\t1\n2\t0\n3\t1\n")
    assert command("score", gold, perfect, "--tasks", "RTE", "CoLA", "QQP", "MRPC") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "CoLA      57.74   matthews  57.74",
        "MRPC     100.00   f1 100.00   accuracy 100.00",
        f"QQP           -   {gold}/QQP/dev.tsv is missing",
        f"RTE           -   {perfect}/RTE.tsv is missing",
        "average of all nine, as the leaderboard's: -  "
        "(missing: SST-2, STS-B, QQP, MNLI-m, MNLI-mm, QNLI, RTE, WNLI)",
        "average of the eight without WNLI: -  "
        "(missing: SST-2, STS-B, QQP, MNLI-m, MNLI-mm, QNLI, RTE)",
    ]


def test_each_mistake_is_one_message(
    command: Command, gold: Path, perfect: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("score", perfect, gold) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: no task can be scored:\n  - CoLA: ")
    assert said.out == ""
    (perfect / "CoLA.tsv").write_text("index\tprediction\n0\t0\n1\t1\n3\t1\n")
    assert command("score", gold, perfect, "--json") == 2
    message = json.loads(capsys.readouterr().err)["error"]
    assert message.startswith("CoLA: 1 of 4 rows")
    assert "the first is 2" in message
    (perfect / "CoLA.tsv").write_text("index\tprediction\n0\t0\n1\t1\n2\t1\n3\t1\n4\t1\n")
    assert command("score", gold, perfect) == 2
    assert "1 predictions are of no row" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command("score", gold, perfect, "--tasks", "SNLI")


def test_it_needs_neither_torch_nor_deepspeed() -> None:
    code = """
import runpy, sys
runpy.run_path(sys.argv[1])
print({"torch", "deepspeed", "transformers", "sklearn"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"
