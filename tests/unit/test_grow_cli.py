"""launch/grow.py: what it prints, and each mistake as a line of one message with exit code 2."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config

SCRIPT = Path(__file__).resolve().parents[2] / "launch/grow.py"
Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The script's `main` in this process: transformers takes seconds to import."""
    spec = importlib.util.spec_from_file_location("launch_grow", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["grow.py", *map(str, words)])
        code: int = script.main()
        return code

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of a random BertModel: 2 layers x 12, 3 heads of 4."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=19, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=9, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "old")
    return tmp_path / "old"


def test_it_says_the_plan_the_contract_and_the_measured_change(
    command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    code = command(
        "--model", model, "--to", "num_hidden_layers=4", "hidden_size=24",
        "--depth", "identity_exact", "--out", out,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0
    for line in (
        "model:    2 layers x 12, 3 heads of 4, inner 20, 9 positions (BertModel)",
        "grown:    4 layers x 24, 6 heads of 4, inner 20, 9 positions",
        "plan:     hidden duplicate + depth identity_exact",
        "note:     num_attention_heads grows along from 3 to 6: heads keep their size of 4",
        "note:     intermediate_size stays 20; to change it, give it as well",
        "contract: outputs stay within 2e-05 of the largest, or nothing is written",
        "measured: last_hidden_state ",
    ):
        assert line in said
    before, after = (sum(p.numel() for p in BertModel.from_pretrained(folder).parameters())
                     for folder in (model, out))  # fmt: skip
    assert f"{out}: BertModel, {before / 1e6:.1f} -> {after / 1e6:.1f} M parameters" in said


def test_json_is_one_line_for_scripts(
    command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    code = command("--model", model, "--to", "num_hidden_layers=4", "--out", out, "--json")
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert code == 0
    assert result["folder"] == str(out)
    assert result["plan"] == "depth stack"
    assert result["tolerance"] is None
    assert result["changes"]["last_hidden_state"] > 0.01
    model_numbers = sum(p.numel() for p in BertModel.from_pretrained(out).parameters())
    assert result["num_parameters"][1] == model_numbers


def test_all_mistakes_come_in_one_message(
    command: Command, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words, keys, sizes, operators and the folder: nothing hides anything else."""
    code = command(
        "--model", model, "--out", model, "--depth", "stak",
        "--to", "hidden_sise=24", "vocab_size=30", "num_hidden_layers=1", "hidden_size=14",
        "intermediate_size=big", "num_hidden_layers=3",
    )  # fmt: skip
    said = capsys.readouterr().err
    assert code == 2
    for fault in (
        "--to intermediate_size=big: no number; allowed: KEY=NUMBER",
        "--to num_hidden_layers=3: num_hidden_layers is given twice",
        "is the model itself; give a new folder",
        "hidden_sise: unknown key; did you mean hidden_size?",
        "vocab_size: cannot change",
        "depth: got 'stak'; allowed: stack, interleave",
        "hidden_size: got 14 with heads of 4; allowed: a multiple of the head size",
        "num_hidden_layers: got 1 after 2",
    ):
        assert said.count(fault) == 1, fault
    assert said.startswith("error: 8 faults")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("hidden_size=6", "hidden_size: got 6 after 12"),
        ("max_position_embeddings=5", "max_position_embeddings: got 5 after 9"),
        ("intermediate_size=19", "intermediate_size: got 19 after 20"),
        ("hidden_size=24 num_attention_heads=4", "changes the head size from 4 to 6"),
        ("hidden_size=24 num_attention_heads=5", "num_attention_heads: got 5 with hidden_size 24"),
        ("num_attention_heads=6", "changes the head size from 4 to 2"),
        ("hidden_size=20", "hidden_size: got 20 after 12 with hidden 'duplicate'"),
        ("num_hidden_layers=2", "nothing grows"),
        ("num_hidden_layers=0", "num_hidden_layers: got 0"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    words: str, fault: str, command: Command, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "new"
    assert command("--model", model, "--to", *words.split(), "--out", out) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 1 fault ")
    assert fault in said
    assert not out.exists()


def test_folders_that_are_no_bert_are_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Absent, empty, another architecture, none at all; with the other mistakes beside it."""
    (tmp_path / "empty").mkdir()
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    for name, text in (("blank", "{}"), ("torn", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for name, fault in (
        ("absent", "no such folder"),
        ("empty", "no config.json, this is not a Hugging Face folder"),
        ("gpt2", "model_type=gpt2, readable are bert, roformer"),
        ("blank", "transformers cannot read it, readable are models of type bert"),
        ("torn", "transformers cannot read it"),
    ):
        code = command("--model", tmp_path / name, "--to", "depth=3", "--out", SCRIPT)
        said = capsys.readouterr().err
        assert code == 2
        assert said.startswith("error: 3 faults")
        assert fault in said
        assert "is a file; give a folder" in said
        assert "depth: unknown key" in said


def test_a_folder_that_is_not_ours_stays(
    command: Command, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    for out, fault in (
        (tmp_path / "mine", "holds notes.txt, which no growth wrote"),
        (model / "inner", "lies inside the model's folder"),
    ):
        assert command("--model", model, "--to", "num_hidden_layers=4", "--out", out) == 2
        assert fault in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_stopping_leaves_no_folder_and_is_exit_code_3(
    command: Command,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stacking.hf_grow.largest_changes", stop)
    out = tmp_path / "new"
    assert command("--model", model, "--to", "num_hidden_layers=4", "--out", out) == 3
    assert "nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_the_script_itself_ends_with_its_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", str(tmp_path / "x"), "--to", "hidden_size=24",
         "--out", str(tmp_path / "new"), "--json"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no such folder" in json.loads(done.stderr)["error"]
