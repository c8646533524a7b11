"""launch/prepare_data.py: exit codes, one-line errors and --json."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

ROOT = Path(__file__).parents[2]


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}


def _command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "launch/prepare_data.py"), *map(str, arguments)]


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(*arguments), capture_output=True, text=True, env=ENVIRONMENT, check=False
    )


def _corpus(folder: Path) -> Path:
    path = folder / "a.txt"
    path.write_text("\n\n".join(f"The cat number {i} sat. It ran away." for i in range(220)))
    return path


def test_shards_then_check_then_again(tmp_path: Path) -> None:
    sizes = ("--vocab-size", "90", "--max-seq-length", "16", "--workers", "1", "--no-page")
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
        "vocab",
        _corpus(tmp_path),
        "--out",
        tmp_path / "v",
        "--vocab-size",
        "80",
        "--json",
        "--workers",
        "1",
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


@pytest.mark.parametrize("command", ["shards", "vocab", "convert", "check"])
def test_help_shows_an_example(command: str) -> None:
    result = _run(command, "--help")
    assert result.returncode == 0
    assert f"python launch/prepare_data.py {command}" in " ".join(result.stdout.split())


def test_converted_shards_hold_what_ours_do(tmp_path: Path) -> None:
    sizes = ("--vocab-size", "90", "--max-seq-length", "16", "--workers", "1", "--no-page")
    shards = ("shards", _corpus(tmp_path), *sizes, "--pairs", "nsp")
    assert _run(*shards, "--out", tmp_path / "plain").returncode == 0
    assert _run(*shards, "--static-masks", "--out", tmp_path / "static").returncode == 0
    vocabulary = tmp_path / "plain/vocab.txt"
    convert = ("convert", tmp_path / "static", "--tokenizer", vocabulary, "--out", tmp_path / "new")
    assert _run(*convert).returncode == 0
    plain, new = (_ids(tmp_path / name) for name in ("plain", "new"))
    assert sorted(plain) == sorted(new)


def _ids(folder: Path) -> list[list[int]]:
    with h5py.File(folder / "training_00000.hdf5") as file:
        ids: list[list[int]] = file["input_ids"][:].tolist()
    return ids


def test_ctrl_c_ends_with_3_and_the_same_command_goes_on(tmp_path: Path) -> None:
    sizes = ("--vocab-size", "90", "--max-seq-length", "16", "--workers", "2", "--no-page")
    (tmp_path / "a.txt").write_text("\n\n".join(f"The cat {i} sat. It ran." for i in range(60_000)))
    arguments = ("shards", tmp_path / "a.txt", *sizes, "--out", tmp_path / "out")
    process = subprocess.Popen(
        _command(*arguments), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "out/.work").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the workers, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert errors == "stopped early; the same command goes on from here\n"
    assert _run(*arguments).returncode == 0


@pytest.mark.parametrize(
    "arguments", [("shards", "a.txt"), ("shards", "a.txt", "--out", "x", "--dedup", "non"), ("go",)]
)
def test_a_mistyped_command_is_one_json_object_too(arguments: tuple[str, ...]) -> None:
    result = _run(*arguments, "--json")
    assert result.returncode == 2
    assert list(json.loads(result.stderr)) == ["error"]
    assert result.stdout == ""
