"""launch/prepare_data.py: exit codes, one-line errors and --json."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch/prepare_data.py"), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _corpus(folder: Path) -> Path:
    path = folder / "a.txt"
    path.write_text("\n\n".join(f"The cat number {i} sat. It ran away." for i in range(220)))
    return path


def test_shards_then_check_then_again(tmp_path: Path) -> None:
    sizes = ("--vocab-size", "90", "--max-seq-length", "16", "--workers", "1")
    arguments = ("shards", _corpus(tmp_path), "--out", tmp_path / "out", *sizes)
    first = _run(*arguments, "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout)["manifest"]["num_documents"]["validation"] == 1
    assert _run("check", tmp_path / "out").stdout == f"{tmp_path / 'out'}: no fault\n"
    again = _run(*arguments)
    assert (again.returncode, "already done" in again.stdout) == (0, True)
    (tmp_path / "out/training_00000.hdf5").write_bytes(b"broken")
    broken = _run("check", tmp_path / "out", "--json")
    assert broken.returncode == 2
    assert "not a readable HDF5 file" in json.loads(broken.stdout)["faults"][0]


def test_vocab_writes_both_files(tmp_path: Path) -> None:
    result = _run(
        "vocab", _corpus(tmp_path), "--out", tmp_path / "v", "--vocab-size", "80", "--json"
    )
    assert result.returncode == 0, result.stderr
    tokens = (tmp_path / "v/vocab.txt").read_text().splitlines()
    assert len(tokens) == json.loads(result.stdout)["vocab_size"] <= 80
    assert (tmp_path / "v/tokenizer.json").exists()


def test_user_mistake_ends_with_2_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    result = _run("shards", tmp_path / "bad.jsonl", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'bad.jsonl'}:2: not a JSON object")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["shards", "vocab", "check"])
def test_help_shows_an_example(command: str) -> None:
    result = _run(command, "--help")
    assert result.returncode == 0
    assert f"python launch/prepare_data.py {command}" in " ".join(result.stdout.split())
