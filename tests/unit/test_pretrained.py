"""What fine-tuning begins with: the model of a folder, and the very tokenizer of its training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fine_tuned import VOCABULARY, fresh_model, main_of, swap_two_tokens, write_model
from transformers import AutoModelForPreTraining, AutoTokenizer, BertConfig, BertModel

from data_prep.shard_format import file_sha256
from stacking.errors import CheckpointError, ConfigError, UserError
from stacking.hf import home_config, save_pretrained
from stacking.hf_homes import BERT, to_home
from stacking.pretrained import load


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_model(tmp_path / "run")


@pytest.fixture
def export(run: Path, tmp_path: Path) -> Path:
    model = fresh_model()
    save_pretrained(model, model.config, tmp_path / "export", run / "tokenizer")
    return tmp_path / "export"


def test_a_run_gives_its_checkpoint_and_its_tokenizer(run: Path) -> None:
    found = load(run)
    model = fresh_model()
    assert found.config == model.config
    assert {*found.weights} == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(found.weights[name], parameter)
    assert found.tokenizer_sha256 == file_sha256(run / "tokenizer/tokenizer.json")
    assert found.is_tokenizer_checked
    assert found.notes() == []
    assert found.origin == f"{run}, end (step 5)"


def test_an_export_gives_the_same_model(run: Path, export: Path) -> None:
    of_run, found = load(run), load(export)
    assert found.is_tokenizer_checked
    kept = found.config.vocab_size  # the export leaves out rows that no token has
    assert found.config == of_run.config.model_copy(update={"vocab_size": kept})
    assert kept == of_run.tokenizer.get_vocab_size()
    for name, weight in of_run.weights.items():
        rows = slice(kept if len(weight) == of_run.config.vocab_size else None)
        torch.testing.assert_close(found.weights[name], weight[rows], atol=1e-6, rtol=0)
    assert found.tokenizer.get_vocab() == of_run.tokenizer.get_vocab()


def test_an_encoder_keeps_its_pooler_and_is_not_checked(run: Path, tmp_path: Path) -> None:
    """As sentence-transformers and many others publish them: no head, no digest."""
    model = fresh_model()
    weights = {name.removeprefix("bert."): tensor for name, tensor in to_home(model, BERT).items()}
    theirs = BertModel(BertConfig.from_dict(home_config(model.config, BERT)))
    missing, _ = theirs.load_state_dict(weights, strict=False)
    assert not missing
    theirs.save_pretrained(tmp_path / "encoder")
    shutil.copy(run / "tokenizer/tokenizer.json", tmp_path / "encoder")
    torch.manual_seed(1)
    found = load(tmp_path / "encoder")
    torch.manual_seed(2)  # as in another process, whose results are of the same model
    assert load(tmp_path / "encoder").digest == found.digest
    for part in ("nsp_head.pooler.weight", "nsp_head.pooler.bias"):
        assert torch.equal(found.weights[part], dict(model.named_parameters())[part])
    assert found.notes() == [
        f"{tmp_path / 'encoder'}: does not say which tokenizer it was trained with: that this one "
        "is it was not checked"
    ]


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_changed_tokenizer_is_refused(kind: str, run: Path, export: Path) -> None:
    folder, path = {"run": (run, run / "tokenizer/tokenizer.json"),
                    "export": (export, export / "tokenizer.json")}[kind]  # fmt: skip
    good = shutil.copy(path, path.with_name("good.json"))
    swap_two_tokens(path)
    with pytest.raises(ConfigError, match=f"is not the tokenizer that {folder} was trained with"):
        load(folder)
    assert load(folder, tokenizer=Path(good)).is_tokenizer_checked
    path.unlink()
    with pytest.raises(ConfigError, match="give the tokenizer.json of the pre-training with --tok"):
        load(folder)
    assert load(folder, tokenizer=Path(good)).is_tokenizer_checked


def test_an_export_that_transformers_saved_again_is_still_checked(
    export: Path, tmp_path: Path
) -> None:
    """As after continuing it elsewhere: the same tokenizer in another layout, cut and padded."""
    tokenizer = AutoTokenizer.from_pretrained(export)
    tokenizer(["ab", "abab"], padding=True, truncation=True, max_length=4)
    again = tmp_path / "again"
    tokenizer.save_pretrained(again)
    AutoModelForPreTraining.from_pretrained(export).save_pretrained(again)
    assert (again / "tokenizer.json").read_bytes() != (export / "tokenizer.json").read_bytes()
    assert load(again).is_tokenizer_checked
    content = json.loads((again / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (again / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"is not the tokenizer that {again} was trained with"):
        load(again)


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"[" * 100_000, b""])
def test_what_is_no_tokenizer_at_all_is_another_one(export: Path, content: bytes) -> None:
    (export / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"is not the tokenizer that {export} was trained with"):
        load(export)


def test_an_export_of_a_run_with_a_changed_tokenizer_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would vouch for the wrong one."""
    swap_two_tokens(run / "tokenizer/tokenizer.json")
    assert main_of("export.py", run, "--out", tmp_path / "out") == 2
    assert "is not the tokenizer that" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_older_version_is_told_as_not_checked(tmp_path: Path) -> None:
    run = write_model(tmp_path / "old", names_tokenizer=False)
    state = json.loads((run / "checkpoints/end/state.json").read_text())
    assert state["train"]["tokenizer_sha256"] == ""
    swap_two_tokens(run / "tokenizer/tokenizer.json")
    (note,) = load(run).notes()
    assert "was not checked" in note


def test_the_digest_is_of_weights_and_tokenizer(tmp_path: Path) -> None:
    digests = [load(write_model(tmp_path / "a")).digest, load(write_model(tmp_path / "b")).digest,
               load(write_model(tmp_path / "c", seed=2)).digest]  # fmt: skip
    old = write_model(tmp_path / "d", names_tokenizer=False)
    digests.append(load(old).digest)
    swap_two_tokens(old / "tokenizer/tokenizer.json")
    digests.append(load(old).digest)
    assert len({digests[0], digests[2], digests[4]}) == 3
    assert digests[0] == digests[1] == digests[3]


TOKENIZERS = {
    "nothing in it": b"{}",
    "no JSON": b"[",
    "no UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_what_is_no_tokenizer_is_one_message(case: str, tmp_path: Path) -> None:
    run = write_model(tmp_path / "run", names_tokenizer=False)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TOKENIZERS[case])
    with pytest.raises(ConfigError, match="not a tokenizer.json"):
        load(run, tokenizer=path)


def test_a_vocabulary_that_is_too_large_is_refused_and_an_empty_one_survives(
    tmp_path: Path,
) -> None:
    run = write_model(tmp_path / "run", names_tokenizer=False)
    path = run / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zebra"] = VOCABULARY
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"has ids up to {VOCABULARY}, but the model's vocabul"):
        load(run)
    content["model"]["vocab"], content["added_tokens"] = {}, []
    content["post_processor"] = None
    path.write_text(json.dumps(content))
    assert load(run).tokenizer.get_vocab() == {}


def test_what_is_no_model_is_one_message(run: Path, export: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, str | None, str]] = [
        (tmp_path / "none", None, "none: no such folder"),
        (tmp_path / "empty", None, "no config.json, this is not a Hugging Face folder"),
        (export, "end", "--tag: got end, but .* is no run folder, which has tags"),
        (run, "stage1_end", "no committed checkpoint 'stage1_end' in .*; there: end"),
    ]
    for folder, tag, message in cases:
        with pytest.raises(UserError, match=message):
            load(folder, tag)
    shutil.rmtree(run / "checkpoints/end")
    with pytest.raises(CheckpointError, match="no committed checkpoint yet; train first"):
        load(run)
    (run / "recipe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"recipe\.json"):
        load(run)
