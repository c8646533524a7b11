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


def with_a_tokenless_answer(path: Path) -> Path:
    """Version 1.1 with one more question, whose only answer is a character that has no token."""
    content = json.loads(VERSION_1.read_text())
    content["data"][0]["paragraphs"].append({"context": "The mill \u200b stands.", "qas": [
        {"id": "odd", "question": "When?", "answers": [{"text": "\u200b", "answer_start": 9}]}
    ]})  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_what_is_odd_is_told_and_lost_answers_are_given_again(tmp_path: Path) -> None:
    train = with_a_tokenless_answer(tmp_path / "train.json")
    words = ["train", write_model(tmp_path / "run"), train, VERSION_2, "--out", tmp_path / "out",
             "--epochs", 1, "--seeds", 2]  # fmt: skip
    done = script("squad.py", *words, "--json")
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    for line in (
        f"{train} is of version 1.1, {VERSION_2} of 2.0: the model never sees a question without "
        "an answer",
        f"{train}: 1 questions left out: their answer, or their whole context, has no token: odd",
        "fp16 asked, which is for GPUs: running bf16; --strict-precision refuses instead",
    ):
        assert told.count(line) == 1, told
    found = json.loads(done.stdout)
    scores = [one["scores"] for one in found["seeds"]]
    assert [one["seed"] for one in found["seeds"]] == [1, 2]
    assert found["f1"] == pytest.approx((scores[0]["f1"] + scores[1]["f1"]) / 2)
    assert found["total"] == 11
    lost = tmp_path / "out/seed_2/null_odds.json"
    again_said = tmp_path / "said.json"
    rescored = script(
        "squad.py", "score", VERSION_2, lost.with_name("nbest_predictions.json"), "--null-odds",
        lost, "--null-threshold", 0, "--out", again_said, "--json",
    )  # fmt: skip
    assert json.loads(rescored.stdout)["f1"] == scores[1]["f1"]
    assert again_said.read_bytes() == lost.with_name("predictions.json").read_bytes()
    before, kept = lost.read_bytes(), (tmp_path / "out/seed_1/result.json").stat().st_mtime_ns
    lost.unlink()
    again = script("squad.py", *words)
    assert again.returncode == 0, again.stderr
    assert f"SQuAD seed 2: {lost} has gone, so it is done again" in again.stderr
    assert lost.read_bytes() == before
    assert (tmp_path / "out/seed_1/result.json").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_version_1_is_learned_by_heart(reader: Path, tmp_path: Path) -> None:
    words = ["train", reader, VERSION_1, VERSION_1, "--out", tmp_path, *SQUAD, 60, "--json"]
    done = script("squad.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["exact_match"], found["f1"]) == (100.0, 100.0)
    assert found["half_widths"] == {"exact_match": None, "f1": None}
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
