"""tests/run.sh with tools that only say what they were asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = """#!/bin/sh
echo "$(basename "$0") $*" | tee -a "$LOG"
case "$*" in *"$FAILING"*) exit 1;; esac
"""


def run(folder: Path, *words: str, failing: str = "nothing") -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the tools' calls."""
    for name in ("tests", "launch", "bin"):
        (folder / name).mkdir()
    shutil.copy(ROOT / "tests" / "run.sh", folder / "tests")
    (folder / "launch" / "setup_env.sh").touch()
    for tool in ("python", "ruff", "mypy"):
        (folder / "bin" / tool).write_text(TOOL)
        (folder / "bin" / tool).chmod(0o755)
    done = subprocess.run(
        ["bash", str(folder / "tests" / "run.sh"), *words],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "CI": "",
             "LOG": str(folder / "log"), "FAILING": failing},
    )  # fmt: skip
    return done.returncode, done.stdout, (folder / "log").read_text().splitlines()


def test_every_folder_with_tests_is_in_one_lane(tmp_path: Path) -> None:
    code, printed, calls = run(tmp_path)
    assert code == 0
    lanes = [call for call in calls if call.startswith("python -m pytest -m not slow ")]
    assert len(lanes) == 2
    assert all(lane in printed for lane in lanes)
    named = [word for lane in lanes for word in lane.split() if word.startswith("tests/")]
    assert sorted(named) == sorted(
        {str(path.parent.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    )


@pytest.mark.parametrize("failing", ["tests/unit", "tests/integration", "check ."])
def test_a_fault_anywhere_is_the_exit_code_and_all_the_rest_runs(
    tmp_path: Path, failing: str
) -> None:
    code, _, calls = run(tmp_path, failing=failing)
    assert code == 1
    assert len(calls) == 4


def test_with_words_it_is_pytest_alone(tmp_path: Path) -> None:
    code, _, calls = run(tmp_path, "-k", "one", failing="one")
    assert (code, calls) == (1, ["python -m pytest -k one"])
