"""The README keeps its word: files exist, commands and their flags exist, the tree is the tree."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.+?)```", README, re.S)).replace("\\\n", " ")
COMMANDS = [line.split() for line in BLOCKS.splitlines() if line.strip()]
# Which test or CI step runs each command for real.
RUN_BY = {
    "launch/demo.sh": "tests/integration/test_demo.py",
    "launch/multi_node/slurm.sh": "tests/multi_node/test_slurm_script.py",
    "tests/run.sh": ".ci/run",
    "launch/prepare_data.py": "tests/integration/conftest.py",
    "launch/pretrain.py": "tests/integration/launching.py",
    "launch/report.py": "tests/integration/test_training.py",
    "launch/export.py": "tests/integration/test_training.py",
    "launch/plan.py": "tests/unit/test_plan_cli.py",
    "launch/doctor.py": "tests/unit/test_doctor.py",
    "launch/compare.py": "tests/unit/test_compare_cli.py",
    "launch/grow.py": "tests/unit/test_grow_cli.py",
    "launch/glue.py": "tests/unit/test_glue_cli.py",
    "launch/squad.py": "tests/unit/test_squad_cli.py",
    "launch/attention_maps.py": "tests/unit/test_attention_maps_cli.py",
}


def script_of(command: list[str]) -> str:
    return next(word for word in command if word.endswith((".py", ".sh")))


def test_there_are_commands_to_check() -> None:
    assert {script_of(command) for command in COMMANDS} == set(RUN_BY)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_each_command_names_a_script_and_flags_that_exist(command: list[str]) -> None:
    script = script_of(command)
    assert (ROOT / script).is_file()
    runner = ROOT / RUN_BY[script]
    assert Path(script).name in runner.read_text().replace("run.sh", "tests/run.sh")
    if not script.endswith(".py"):
        return
    words = command[command.index(script) + 1 :]
    verbs = ("shards", "vocab", "check", "train", "score")
    subcommand = [word for word in words[:1] if word in verbs]
    help_text = subprocess.run(
        [sys.executable, str(ROOT / script), *subcommand, "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for flag in (word for word in words if word.startswith("--")):
        assert flag in help_text


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_each_link_and_picture_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_tree_names_every_module_and_nothing_else() -> None:
    tree = README.split("## The tree")[1]
    named = set(re.findall(r"\b([a-z_]+)(\*?)\.py\b", tree))
    modules = {path.stem for top in ("stacking", "data_prep") for path in (ROOT / top).glob("*.py")}
    modules -= {"__init__", "errors"}
    families = {name for name, star in named if star}
    exact = {name for name, star in named if not star}
    assert exact <= modules
    assert {m for m in modules if not any(m.startswith(f) for f in families)} <= exact
