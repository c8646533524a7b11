"""What users rely on: changing it must be a decision, made here and in the CHANGELOG."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import stacking

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
JSON = "--json"
TEXT = {
    JSON, "--out", "--validation", "--field", "--documents", "--skip-bad", "--clean", "--clean-set",
    "--dedup", "--near-dedup", "--vocab-size", "--tokenizer-kind", "--workers",
}  # fmt: skip

FINE_TUNING = {
    "--out", "--seeds", "--first-seed", "--epochs", "--batch-size", "--learning-rate",
    "--dropout", "--processes", "--tag", "--tokenizer", "--deepspeed_config", "--strict-precision",
    JSON,
}  # fmt: skip

FLAGS = {
    "prepare_data.py shards": {
        *TEXT, "--tokenizer", "--max-seq-length", "--sentences", "--merge-short", "--pairs",
        "--short-seq-prob", "--dupe-factor", "--static-masks", "--whole-word", "--masked-lm-prob",
        "--max-predictions-per-seq", "--rows-per-shard", "--seed", "--mpi", "--no-page",
    },
    "prepare_data.py vocab": TEXT,
    "prepare_data.py convert": {
        JSON, "--out", "--tokenizer", "--dialect", "--remask", "--labels", "--max-seq-length",
        "--truncate", "--validation-share", "--keep-order", "--masked-lm-prob",
        "--max-predictions-per-seq", "--rows-per-shard", "--seed",
    },
    "prepare_data.py check": {JSON, "--tokenizer"},
    "pretrain.py": {
        "--recipe", "--data", "--run-dir", "--deepspeed_config", "--set", "--resume",
        "--branch-from", "--start-from", "--strict-precision", "--time-limit", "--max-steps",
        "--hang-timeout", "--stage-data",
    },
    "doctor.py": {
        "--hostfile", "--recipe", "--set", "--deepspeed_config", "--data", "--run-dir",
        "--num-gpus", "--ssh-port", "--master-addr", "--master-port", JSON,
    },
    "export.py": {"--out", "--tag", "--data-license", "--language", JSON},
    "report.py": {JSON},
    "attention_maps.py": {
        "--out", "--sentence", "--text", "--tags", "--all-switches", "--layers", "--heads",
        "--show", JSON,
    },
    "compare.py": {"--out", "--baseline", "--control", "--pilot", "--timed", "--budget", JSON},
    "grow.py": {
        "--model", "--to", "--depth", "--ffn", "--heads", "--hidden", "--positions", "--seed",
        "--out", JSON,
    },
    "glue.py train": {*FINE_TUNING, "--tasks", "--grid", "--grid-from"},
    "glue.py score": {"--tasks", JSON},
    "squad.py train": {
        *FINE_TUNING, "--max-seq-length", "--doc-stride", "--max-query-length", "--n-best-size",
        "--max-answer-length", "--null-score-diff-threshold",
    },
    "squad.py score": {"--null-odds", "--null-threshold", "--out", JSON},
    "plan.py": {
        "--recipe", "--set", "--deepspeed_config", "--world-size", "--nodes", "--gpus-per-node",
        "--device", "--utilisation", "--network-gbits", "--suggest", "--budget", "--pilot",
        "--measure", "--tolerance", "--out", JSON,
    },
}  # fmt: skip


def help_of(command: str) -> str:
    script, *subcommand = command.split()
    done = subprocess.run(
        [sys.executable, str(LAUNCH / script), *subcommand, "--help"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_of_each_command_are_frozen_and_its_help_has_an_example(command: str) -> None:
    text = help_of(command)
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.split(r"\nexample", text)[0]))
    assert flags - {"--help"} == FLAGS[command]
    assert "example" in text
    assert f"launch/{command.split()[0]}" in text.split("example")[-1]


def test_every_command_is_frozen() -> None:
    frozen = {command.split()[0] for command in FLAGS}
    assert {path.name for path in LAUNCH.glob("*.py")} == frozen


def test_a_users_mistake_is_exit_code_2_with_one_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "report.py"), str(tmp_path), JSON],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "metrics.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_python_surface_is_frozen() -> None:
    assert sorted(stacking.__all__) == [
        "BertConfig", "BertForPreTraining", "Recipe", "Trainer", "grow",
    ]  # fmt: skip
    for name in stacking.__all__:
        assert getattr(stacking, name).__name__ == name


def test_growing_a_model_needs_neither_deepspeed_nor_transformers() -> None:
    """The signature is frozen, too; what a folder needs is imported when a folder is given."""
    assert str(inspect.signature(stacking.grow, eval_str=False)).startswith(
        "(model: 'BertForPreTraining | str | Path', target: 'BertConfig | Mapping[str, object]', *,"
        " depth: str = 'stack', ffn: str = 'tile', heads: str = 'replicate',"
        " hidden: str = 'duplicate', positions: str = 'tile', seed: int = 0,"
        " out: str | pathlib.Path | None = None)"
    )
    code = """
import sys
from stacking import BertConfig, BertForPreTraining, grow
config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
grown = grow(BertForPreTraining(config), {"num_hidden_layers": 2, "hidden_size": 8})
print(grown.config.num_attention_heads, {"deepspeed", "transformers"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "4 set()"


def test_importing_stacking_needs_neither_torch_nor_deepspeed() -> None:
    code = "import sys, stacking; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
