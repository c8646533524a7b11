"""launch/squad.py score: what it prints, and each mistake as one message with exit code 2."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from squad_sets import VERSION_1, VERSION_2

from stacking.fine_tuning_jobs import Start
from stacking.squad_data import read_squad
from stacking.squad_features import WindowSettings
from stacking.squad_predictions import AnswerSettings
from stacking.squad_runs import training_json
from stacking.squad_training import SETTING_1, SquadJob, SquadResult

SCRIPT = Path(__file__).resolve().parents[2] / "launch/squad.py"
Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The script's `main` in this process."""
    spec = importlib.util.spec_from_file_location("launch_squad", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["squad.py", *map(str, words)])
        code: int = script.main()
        return code

    return run


@pytest.fixture
def perfect(tmp_path: Path) -> Callable[[Path], Path]:
    """Return `(gold) -> predictions.json` with the first answer of each question."""

    def write(gold: Path) -> Path:
        said = {
            one.id: (*(a.text for a in one.answers), "")[0] for one in read_squad(gold).examples
        }
        path = tmp_path / "predictions.json"
        path.write_text(json.dumps(said))
        return path

    return write


def test_version_1_is_scored(
    command: Command, perfect: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("score", VERSION_1, perfect(VERSION_1)) == 0
    assert capsys.readouterr().out == (
        "exact_match          100.0000\nf1                   100.0000\n"
    )


def test_unanswered_questions_are_told(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "predictions.json"
    path.write_text('{"mill-when": "1764", "of another file": "1765"}')
    out = tmp_path / "scored.json"
    assert command("score", VERSION_1, path, "--out", out, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(out.read_text()) == {"mill-when": "1764"}
    assert json.loads(said.out)["exact_match"] == pytest.approx(100 / 19)
    assert said.err == "18 of 19 questions have no prediction and count as 0\n"


def test_version_2_is_scored_with_null_odds(
    command: Command,
    perfect: Callable[[Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odds = tmp_path / "null_odds.json"
    odds.write_text(json.dumps({one.id: 2.0 for one in read_squad(VERSION_2).examples}))
    words = ("score", VERSION_2, perfect(VERSION_2), "--null-odds", odds, "--json")
    assert command(*words) == 0
    silent = json.loads(capsys.readouterr().out)
    assert (silent["HasAns_f1"], silent["NoAns_f1"], silent["best_f1"]) == (0.0, 100.0, 100.0)
    assert command(*words, "--null-threshold", 2) == 0
    assert json.loads(capsys.readouterr().out)["f1"] == 100.0


def test_answers_at_another_threshold_need_no_training(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = read_squad(VERSION_2).examples
    right = {one.id: (*(a.text for a in one.answers), "")[0] for one in examples}
    nbest = tmp_path / "nbest_predictions.json"
    nbest.write_text(json.dumps({
        key: [{"text": "", "probability": 0.7}, {"text": text or "wrong", "probability": 0.3}]
        for key, text in right.items()
    }))  # fmt: skip
    odds = tmp_path / "null_odds.json"  # above 0 for all: at 0 nothing was answered
    odds.write_text(json.dumps({key: 0.5 if text else 1.5 for key, text in right.items()}))
    out = tmp_path / "predictions.json"
    words = ("score", VERSION_2, nbest, "--null-odds", odds, "--out", out, "--json")
    assert command(*words, "--null-threshold", 0) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["HasAns_f1"], found["NoAns_f1"]) == (0.0, 100.0)
    assert (found["best_f1"], found["best_f1_thresh"]) == (100.0, 0.5)
    assert set(json.loads(out.read_text()).values()) == {""}
    assert command(*words, "--null-threshold", found["best_f1_thresh"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"] == 100.0
    assert json.loads(out.read_text()) == right
    assert command("score", VERSION_2, out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["exact"] == 100.0
    assert command(*words[:-3], "--out", tmp_path / "none/predictions.json") == 2
    assert "--out: " in (told := capsys.readouterr().err)
    assert "cannot be written: No such file" in told


def test_each_mistake_is_one_message(
    command: Command,
    perfect: Callable[[Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = perfect(VERSION_1)
    assert command("score", tmp_path / "none.json", said) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
    assert command("score", said, said) == 2
    assert "no SQuAD file of version 1.1 or 2.0" in capsys.readouterr().err
    assert command("score", VERSION_1, VERSION_1) == 2
    assert "Input should be a valid string" in capsys.readouterr().err
    assert command("score", VERSION_2, said) == 2
    assert "11 of 11 questions have no prediction" in capsys.readouterr().err
    assert command("score", VERSION_1, said, "--null-odds", said, "--json") == 2
    assert "a valid number" in json.loads(capsys.readouterr().err)["error"]
    for no_list in ('{"a": []}', '{"a": [{"text": 1}]}', '{"a": ["text"]}'):
        said.write_text(no_list)
        assert command("score", VERSION_1, said) == 2
        told = capsys.readouterr().err
        assert "a: Input should be a valid string; allowed: " in told
        assert "or an n-best list" in told
    said.write_text("{}")
    for flag, value in (("--null-odds", said), ("--null-threshold", 1)):
        assert command("score", VERSION_1, said, flag, value) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {flag}: ")
        assert "is of version 1.1, which has none" in told


def test_the_means_over_seeds_have_intervals() -> None:
    job = SquadJob(
        Start(Path("run")), VERSION_1, VERSION_2, Path("out"), 1, SETTING_1,
        WindowSettings(384, 128, 64), AnswerSettings(),
    )  # fmt: skip
    results = [SquadResult(replace(job, seed=seed), {"f1": f1, "total": 11}, 1.0)
               for seed, f1 in ((1, 80.0), (2, 84.0))]  # fmt: skip
    found = training_json(results)
    assert (found["f1"], found["total"]) == (82.0, 11)
    # Student's t of two: 12.706 times the standard error, which is half of the distance.
    assert found["half_widths"] == {"f1": pytest.approx(25.412, rel=1e-4), "total": 0.0}
    assert found["seeds"] == [
        {"seed": seed, "scores": {"f1": f1, "total": 11}, "seconds": 1.0}
        for seed, f1 in ((1, 80.0), (2, 84.0))
    ]
    assert training_json(results[:1])["half_widths"] == {"f1": None, "total": None}


def test_it_needs_neither_torch_nor_deepspeed() -> None:
    code = """
import runpy, sys
runpy.run_path(sys.argv[1])
print({"torch", "deepspeed", "transformers"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT)], capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"
