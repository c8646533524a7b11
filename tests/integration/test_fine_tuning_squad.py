"""launch/squad.py train on the two small sets: learned by heart, resumed, scored."""

import json
from pathlib import Path

import pytest
from fine_tuned import main_of, write_model
from launching import ROOT, script
from squad_sets import VERSION_1, VERSION_2

FP32 = ROOT / "deepspeed_configs/cpu_fp32.json"
SQUAD = ["--deepspeed_config", FP32, "--learning-rate", 2e-3, "--batch-size", 16, "--epochs"]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 128 positions: contexts do not fit into a window."""
    return write_model(
        tmp_path_factory.mktemp("reader") / "run", hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, max_position_embeddings=128,
    )  # fmt: skip


@pytest.mark.slow
def test_version_1_is_learned_by_heart(reader: Path, tmp_path: Path) -> None:
    words = ["train", reader, VERSION_1, VERSION_1, "--out", tmp_path, *SQUAD, 60, "--json"]
    done = script("squad.py", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"exact_match": 100.0, "f1": 100.0}
    out = tmp_path / "seed_1"
    assert {path.name for path in out.iterdir()} == {
        "predictions.json", "nbest_predictions.json", "result.json"
    }  # fmt: skip
    conditions = json.loads((out / "result.json").read_text())["conditions"]
    windows = {name: conditions[name] for name in ("max_seq_length", "doc_stride")}
    assert windows == {"max_seq_length": 128, "doc_stride": 31}
    before = (out / "result.json").stat().st_mtime_ns
    again = script("squad.py", *words)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert (out / "result.json").stat().st_mtime_ns == before
    other = script("squad.py", *words, "--doc-stride", 30)
    assert other.returncode == 2
    assert "result.json: is of another doc_stride; give another --out" in other.stderr


@pytest.mark.slow
def test_version_2_is_learned_and_tells_what_has_no_answer(
    reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", reader, VERSION_2, VERSION_2, "--out", tmp_path, *SQUAD, 200]
    done = script("squad.py", *words)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "seed_1"
    odds = json.loads((out / "null_odds.json").read_text())
    said = json.loads((out / "predictions.json").read_text())
    assert {*odds} == {*said}
    assert all((odds[key] > 0) == (text == "") for key, text in said.items())
    assert main_of("squad.py", "score", VERSION_2, out / "predictions.json", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["exact"], scores["HasAns_exact"], scores["NoAns_exact"]) == (100.0,) * 3
    result = json.loads((out / "result.json").read_text())
    assert {name: result["scores"][name] for name in scores} == scores
    assert f"{'total':<18} {11:10}\n" in done.stdout
