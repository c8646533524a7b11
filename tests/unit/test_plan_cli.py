"""launch/plan.py as a user runs it: exit codes, width, JSON, and what it does without."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "launch" / "plan.py"
RECIPES = ROOT / "launch" / "recipes"
ZERO3 = ROOT / "deepspeed_configs" / "zero3_fp16.json"


def run(*arguments: object, columns: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"COLUMNS": str(columns)} if columns else {}
    return subprocess.run(
        [sys.executable, str(PLAN), *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.parametrize("columns", [None, 80])
def test_a_plan_is_printed_100_wide_or_as_wide_as_the_terminal(columns: int | None) -> None:
    done = run("--recipe", RECIPES / "compoundgrow_large.json", columns=columns)
    assert done.returncode == 0, done.stderr
    widest = max(map(len, done.stdout.splitlines()))
    assert (80 if columns is None else 60) < widest <= (columns or 100)
    for word in ("Stages", "Cost of", "Ceiling", "Memory of", "mean", "200,000"):
        assert word in done.stdout


def test_the_readmes_excerpt_is_what_the_command_prints() -> None:
    readme = (ROOT / "README.md").read_text()
    command, excerpt = re.findall(
        r"```bash\n(python launch/plan.py .+?)\n```\n+```\n(.+?)\n```", readme, re.S
    )[0]
    done = run(*command.split()[2:], columns=100)
    printed = {line.rstrip() for line in done.stdout.splitlines()}
    lines = [line for line in excerpt.splitlines() if line not in ("", "...")]
    assert len(lines) > 15
    assert [line for line in lines if line not in printed] == []


def test_json_is_one_line_and_overrides_and_ranks_count() -> None:
    done = run(
        "--recipe", RECIPES / "modern_small.json", "--json", "--world-size", 4,
        "--deepspeed_config", ZERO3, "--set", "stages.0.steps=300", "--set", "stages.1.steps=500",
        "--nodes", 4, 1, "--device", "v100", "--gpus-per-node", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    values = json.loads(line)
    assert [stage["steps"] for stage in values["stages"]] == [300, 500]
    memory = values["memory"]
    assert (memory["world_size"], memory["zero_stage"]) == (4, 3)
    assert memory["deepspeed_config"] == "zero3_fp16.json"
    assert memory["micro_batch_size"] * memory["gradient_accumulation_steps"] * 4 == 32
    cluster = values["cluster"]
    assert cluster["cluster"]["name"] == "v100, assumed"
    assert [run["ranks"] for run in cluster["same_batch"]] == [2, 8]


def test_illegal_growth_is_refused_with_every_reason_and_exit_code_2() -> None:
    done = run(
        "--recipe", RECIPES / "stackingbert_base.json", "--set", "stages.1.depth=interleave",
        "--set", "stages.0.num_hidden_layers=4", "--set", "stages.2.depth=interleave",
        "--set", "stages.1.num_hidden_layers=7",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "stages.1.depth: got 'interleave' from 4 to 7" in done.stderr
    assert "stages.2.depth: got 'interleave' from 7 to 12" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "no_such.json"), "no_such.json: no such file"),
        (("--recipe", RECIPES / "demo.json", "--world-size", 0), "--world-size: got 0"),
        (("--recipe", RECIPES / "demo.json", "--world-size", 7), "a world of 7 ranks"),
        (("--recipe", RECIPES / "demo.json", "--set", "stages.9.steps=1"), "allowed: an index"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_message_and_exit_code_2(
    arguments: tuple[object, ...], message: str
) -> None:
    plain, as_json = run(*arguments), run(*arguments, "--json")
    assert plain.returncode == as_json.returncode == 2
    assert message in plain.stderr
    assert message in json.loads(as_json.stderr)["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nodes 0", "--nodes: got 0; allowed: numbers of 1 or more"),
        ("--nodes 1 --device b300", "--device: got 'b300'; allowed: v100, a100, h100"),
        ("--nodes 1 --gpus-per-node 0", "--gpus-per-node: got 0"),
        ("--nodes 1 --device no_such.json", "no_such.json: no such file"),
        ("--device a100", "need --nodes"),
    ],
)
def test_what_is_no_cluster_is_refused(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(RECIPES / "demo.json")
    monkeypatch.setattr(sys, "argv", ["plan.py", "--recipe", recipe, *words.split()])
    assert runpy.run_path(str(PLAN))["main"]() == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_it_needs_neither_deepspeed_nor_a_process_group() -> None:
    code = f"""
import runpy, sys
sys.modules["deepspeed"] = None  # an import of it fails
sys.argv = ["plan.py", "--recipe", {str(RECIPES / "mslt_small.json")!r}]
try:
    runpy.run_path({str(PLAN)!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
import torch
assert not torch.distributed.is_initialized()
assert "stacking.engine" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "copy_top" in done.stdout
