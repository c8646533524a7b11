"""stacking/hf.py: every home, both directions, judged by logits; refusals; launch/export.py."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertModel,
)

from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import BertConfig
from stacking.errors import CheckpointError, ConfigError
from stacking.hf import load_pretrained, save_pretrained, verify
from stacking.hf_homes import REMOTE, choose_home, nearest_homes, to_home
from stacking.hf_vocabulary import trim_vocabulary
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot

ROOT = Path(__file__).resolve().parents[2]
SIZE = BertConfig(
    vocab_size=57,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=31,
    max_position_embeddings=19,
    initializer_range=0.2,
)
PRE: dict[str, object] = {"layer_norm": "pre"}
ROTARY: dict[str, object] = {"position": "rotary", "num_nsp_labels": 0}
UNTIED: dict[str, object] = {"tie_word_embeddings": False}
HOMES: list[tuple[str, dict[str, object]]] = [
    ("BertForPreTraining", {}),
    ("BertForPreTraining", {"hidden_act": "gelu_new", "pad_token_id": 2}),
    ("BertForMaskedLM", {"num_nsp_labels": 0}),
    ("BertForMaskedLM", {"num_nsp_labels": 1, "pooler": False, "mlm_bias": False}),
    ("BertForMaskedLM", {"position": "sinusoidal", "type_vocab_size": 0, "num_nsp_labels": 0}),
    ("RoFormerForMaskedLM", ROTARY),
    ("RoFormerForMaskedLM", {**ROTARY, "layer_norm_affine": False, "hidden_act": "relu"}),
    ("MegatronBertForPreTraining", {**PRE, "embedding_layer_norm": False}),
    ("MegatronBertForMaskedLM", {**PRE, "embedding_layer_norm": False, "num_nsp_labels": 0}),
    ("RobertaPreLayerNormForMaskedLM", {**PRE, "pad_token_id": 3, "num_nsp_labels": 0}),
    ("RobertaPreLayerNormForMaskedLM", {**PRE, "position": "sinusoidal", "num_nsp_labels": 0}),
    ("EsmForMaskedLM", {**PRE, **ROTARY, "type_vocab_size": 0}),
    ("EsmForMaskedLM", {**PRE, **ROTARY, "type_vocab_size": 0, "embedding_layer_norm": False}),
    ("BertForPreTraining", UNTIED),
    ("BertForMaskedLM", {**UNTIED, "num_nsp_labels": 0, "mlm_bias": False}),
    ("RoFormerForMaskedLM", {**UNTIED, **ROTARY}),
    ("MegatronBertForPreTraining", {**UNTIED, **PRE, "embedding_layer_norm": False}),
    ("RobertaPreLayerNormForMaskedLM", {**UNTIED, **PRE, "num_nsp_labels": 0}),
    ("EsmForMaskedLM", {**UNTIED, **PRE, **ROTARY, "type_vocab_size": 0}),
]


def build(options: dict[str, object], seed: int = 3) -> BertForPreTraining:
    """A small model in evaluation mode whose biases and LayerNorms are random, too."""
    model = BertForPreTraining(SIZE.model_copy(update=options)).eval()
    generator = torch.Generator().manual_seed(seed)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A lower-casing WordPiece tokenizer of ten pieces without a post-processor."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "."]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(pieces[:5])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("architecture", "options"), HOMES)
def test_export_and_return_keep_the_logits(
    architecture: str, options: dict[str, object], tmp_path: Path
) -> None:
    """Ours -> transformers within 1e-5; transformers -> ours within 1e-5."""
    model = build(options)
    report = save_pretrained(model, model.config, tmp_path / "out")
    assert report.architecture == architecture
    assert report.max_logit_difference < 2e-5
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["architectures"] == [architecture]
    again, config = load_pretrained(tmp_path / "out")
    assert choose_home(config) is choose_home(model.config)
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert fields["tie_word_embeddings"] == model.config.tie_word_embeddings
    pad = model.config.pad_token_id
    ids = torch.randint(4, 57, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(13) < torch.tensor([[13], [8], [1]])
    ids[~mask] = pad
    with torch.no_grad():
        expected = model(ids, None, mask)["prediction_logits"]
        actual = again.eval()(ids, None, mask)["prediction_logits"]
    torch.testing.assert_close(actual[mask], expected[mask], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("architecture", "options"), HOMES)
def test_random_weights_of_transformers_come_back_unchanged(
    architecture: str, options: dict[str, object], tmp_path: Path
) -> None:
    """Theirs -> ours -> theirs gives back every tensor of their file."""
    model = build(options)
    save_pretrained(model, model.config, tmp_path / "first")
    auto = AutoModelForPreTraining if "PreTraining" in architecture else AutoModelForMaskedLM
    theirs = auto.from_pretrained(tmp_path / "first")
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "embed_positions" not in name and "contact_head" not in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path / "second")
    ours, config = load_pretrained(tmp_path / "second")
    assert verify(ours, config, tmp_path / "second") < 1e-3  # unit-size weights, logits of 100
    original = load_file(tmp_path / "second" / "model.safetensors")
    back = to_home(ours, choose_home(config))
    skipped = config.pad_token_id + 1 if "roberta" in choose_home(config).model_type else 0
    for name, tensor in original.items():
        if "decoder" in name and config.tie_word_embeddings:
            continue
        if name in ("cls.predictions.bias", "lm_head.bias") and "decoder.bias" in str(list(back)):
            continue  # Untied, transformers adds decoder.bias and never reads this one.
        start = skipped if "position_embeddings" in name else 0
        assert torch.equal(back[name][start:], tensor[start:]), name


@pytest.mark.parametrize(("architecture", "options"), HOMES)
def test_auto_tokenizer_gives_the_word_pieces(
    architecture: str, options: dict[str, object], tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Whatever the architecture (ESM's own tokenizer is for proteins), and ready for the model."""
    model = build({**options, "pad_token_id": 0})
    save_pretrained(model, model.config, tmp_path / "out", tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.is_fast
    batch = tokenizer(["The cats sat.", "cat"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 8, 9, 3], [2, 6, 3, 0, 0, 0, 0]]
    assert tokenizer("the", "cat")["input_ids"] == [2, 5, 3, 6, 3]
    assert tokenizer.mask_token_id == 4
    assert tokenizer.model_max_length == 19
    assert ("token_type_ids" in batch) == (architecture != "EsmForMaskedLM")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert loaded(**batch).logits.shape == (2, 7, 10)
    assert (tmp_path / "out" / "vocab.txt").read_text().splitlines()[4:7] == [
        "[MASK]",
        "the",
        "cat",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**PRE, "position": "rotary"}, r"esm cannot hold type_vocab_size=2 \(needs 0\)"),
        ({"embedding_scale": True}, r"bert cannot hold embedding_scale=True"),
        ({"embedding_layer_norm": False}, r"bert cannot hold embedding_layer_norm=False"),
        ({**PRE, "hidden_act": "relu"}, r"megatron-bert cannot hold embedding_layer_norm=True"),
    ],
)
def test_options_without_a_home_are_named(options: dict[str, object], message: str) -> None:
    """Each class of transformers that is one option away, and the option."""
    config = SIZE.model_copy(update=options)
    assert choose_home(config) is REMOTE
    assert re.search(message, "; ".join(nearest_homes(config)))


def test_pooled_embeddings_must_grow_before_export(tmp_path: Path) -> None:
    """The fault names the form to grow to, and nothing is written."""
    model = build({"pooling": "mean", "pooling_size": 2})
    with pytest.raises(ConfigError, match="model.pooling: got mean, .* allowed: none; grow"):
        save_pretrained(model, model.config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {**UNTIED, "num_nsp_labels": 0}, {"mlm_bias": False}])
def test_rows_without_an_id_are_left_out(
    options: dict[str, object], tmp_path: Path, tokenizer_dir: Path
) -> None:
    """57 rows, 10 ids: the logits of these are the same, and the folder says 10."""
    model = build(options)
    report = save_pretrained(model, model.config, tmp_path / "out", tokenizer_dir)
    assert "47 rows of the vocabulary left out: model.vocab_size is 57" in report.notes[0]
    assert report.config.vocab_size == 10
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 10
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert 57 not in tensor.shape, name
    again, config = load_pretrained(tmp_path / "out")
    assert config.vocab_size == 10
    ids = torch.tensor([[2, 5, 4, 7, 3], [9, 8, 1, 6, 5]])
    with torch.no_grad():
        expected = model(ids)["prediction_logits"][..., :10]
        actual = again.eval()(ids)["prediction_logits"]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert model.config.vocab_size == 57


def test_without_a_tokenizer_and_without_padding_nothing_is_trimmed(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    model, exact = build({}), build({"vocab_size": 10})
    report = save_pretrained(model, model.config, tmp_path / "out")
    assert (report.config.vocab_size, report.notes) == (57, ())
    report = save_pretrained(exact, exact.config, tmp_path / "exact", tokenizer_dir)
    assert (report.config.vocab_size, report.notes) == (10, ())


def test_other_rows_than_those_of_the_ids_are_noticed(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(model: BertForPreTraining, num_ids: int) -> BertForPreTraining:
        with torch.no_grad():
            model.embeddings.word_embeddings.weight.copy_(
                model.embeddings.word_embeddings.weight.roll(1, 0)
            )
        return trim_vocabulary(model, num_ids)

    monkeypatch.setattr(
        "stacking.hf.trim_vocabulary",
        lambda model, num_ids: shifted(copy.deepcopy(model), num_ids),
    )
    model = build({})
    with pytest.raises(CheckpointError, match="logits of .* differ by"):
        save_pretrained(model, model.config, tmp_path / "out", tokenizer_dir)


def test_equal_inner_sizes_are_one_inner_size(tmp_path: Path) -> None:
    """Stated layer by layer or once: the same model."""
    model = build({"intermediate_size": 8, "layer_intermediate_sizes": (31, 31, 31)})
    save_pretrained(model, model.config, tmp_path / "out")
    assert load_pretrained(tmp_path / "out")[1].intermediate_size == 31


def test_a_decoder_that_is_not_the_word_embedding_needs_its_own_weights(tmp_path: Path) -> None:
    """A tied folder that claims to be untied lacks the matrix: no random draw."""
    model = build({})
    save_pretrained(model, model.config, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | UNTIED))
    with pytest.raises(CheckpointError, match=r"lacks cls.predictions.decoder.weight"):
        load_pretrained(path.parent)


def test_the_bias_of_an_untied_decoder_under_its_old_name(tmp_path: Path) -> None:
    """Transformers before release 5 wrote cls.predictions.bias alone."""
    model = build({**UNTIED})
    save_pretrained(model, model.config, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    del weights["cls.predictions.decoder.bias"]
    save_file(weights, path, {"format": "pt"})
    loaded, _ = load_pretrained(path.parent)
    assert torch.equal(loaded.get_parameter("mlm_head.bias"), model.get_parameter("mlm_head.bias"))


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    """A next-sentence head that the home cannot hold is dropped with a note, not silently."""
    model = build({"position": "rotary", "num_nsp_labels": 2})
    report = save_pretrained(model, model.config, tmp_path / "out")
    assert any("next-sentence head dropped: roformer" in note for note in report.notes)


def test_wrong_logits_never_reach_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries and keys exchanged in the file: refused, and the earlier export stays."""
    model = build({})
    save_pretrained(model, model.config, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def save_wrongly(
        weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]
    ) -> None:
        name = "bert.encoder.layer.1.attention.self.query.weight"
        save_file(weights | {name: weights[name].flip(0).contiguous()}, path, metadata)

    monkeypatch.setattr("stacking.hf.save_file", save_wrongly)
    with pytest.raises(CheckpointError, match="logits of .* differ by"):
        save_pretrained(build({}, seed=4), model.config, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_missing_weight_is_an_error_not_a_random_draw(tmp_path: Path) -> None:
    """Transformers would draw it and go on."""
    model = build({})
    save_pretrained(model, model.config, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, path, {"format": "pt"})
    for read in (
        lambda: verify(model, model.config, path.parent),
        lambda: load_pretrained(path.parent),
    ):
        with pytest.raises(
            CheckpointError, match=r"lacks bert.encoder.layer.1.output.dense.weight"
        ):
            read()


@pytest.mark.parametrize("damage", ["absent", "truncated", "shape"])
def test_unreadable_weights_are_the_folders_fault(damage: str, tmp_path: Path) -> None:
    """A CheckpointError that names the folder, no traceback from inside transformers."""
    model = build({})
    save_pretrained(model, model.config, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        name = "bert.encoder.layer.0.output.dense.weight"
        save_file(weights | {name: weights[name][:, :-1].contiguous()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"out: transformers cannot load it"):
        load_pretrained(path.parent)


def test_earlier_export_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    """Exporting twice works; a folder with something else in it is refused untouched."""
    model, other = build({}), build({}, seed=4)
    save_pretrained(model, model.config, tmp_path / "out")
    save_pretrained(other, other.config, tmp_path / "out")
    assert verify(other, other.config, tmp_path / "out") < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds thesis.tex"):
        save_pretrained(model, model.config, tmp_path / "out")


def test_encoder_only_checkpoint_gets_a_fresh_head_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A BertModel folder: equal encoder, MLM head freshly drawn, no next-sentence head."""
    model = build({})
    save_pretrained(model, model.config, tmp_path / "out")
    encoder = BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    encoder.save_pretrained(tmp_path / "encoder")
    ours, config = load_pretrained(tmp_path / "encoder")
    assert "no MLM head" in caplog.text
    assert config.num_nsp_labels == 0
    ids = torch.tensor([[3, 8, 9, 20, 4]])
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
        actual = ours.eval()(ids)["last_hidden_state"]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (ours.mlm_head.dense.bias == 0).all()
    assert ours.mlm_head.dense.weight.std() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2, readable are bert, roformer"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"hidden_act": "silu"}, "hidden_act=silu, readable: gelu"),
    ],
)
def test_foreign_folders_are_refused_by_field(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    """What our model cannot compute is named."""
    model = build({})
    save_pretrained(model, model.config, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        load_pretrained(path.parent)


def test_byte_level_names_of_the_special_tokens_are_kept(tmp_path: Path) -> None:
    pieces = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "\u0120the", "\u0120cat", "s"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.add_special_tokens(pieces[:5])
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    model = build({"pad_token_id": 0})
    save_pretrained(model, model.config, tmp_path / "out", tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.cls_token, loaded.sep_token, loaded.mask_token_id) == ("<s>", "</s>", 4)
    assert loaded("s", "s")["input_ids"][0] == 2
    assert loaded("s", "s")["input_ids"].count(3) == 2


def test_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """More pieces than rows, or another padding id, would index the wrong vectors."""
    small = build({"vocab_size": 9})
    with pytest.raises(ConfigError, match=r"largest id 9, but model.vocab_size is 9"):
        save_pretrained(small, small.config, tmp_path / "out", tokenizer_dir)
    other_pad = build({"pad_token_id": 3})
    with pytest.raises(ConfigError, match=r"\[PAD\] is 0, but model.pad_token_id is 3"):
        save_pretrained(other_pad, other_pad.config, tmp_path / "out", tokenizer_dir)


def test_bf16_model_is_exported_in_fp32(tmp_path: Path) -> None:
    """The file holds exactly the rounded weights; the model itself is left as it was."""
    model = build({}).bfloat16()
    save_pretrained(model, model.config, tmp_path / "out")
    assert all(
        t.dtype == torch.float32 for t in load_file(tmp_path / "out/model.safetensors").values()
    )
    assert model.get_parameter("encoder.layers.0.attention.qkv.weight").dtype == torch.bfloat16


def run_export(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run launch/export.py."""
    command = [sys.executable, "launch/export.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def write_run(run_dir: Path, tokenizer_dir: Path) -> BertForPreTraining:
    """A run folder with two committed tags of a two-stage recipe; returns the later model."""
    stages = [{"num_hidden_layers": depth, "steps": 5} for depth in (1, 3)]
    recipe = {"name": "tiny", "model": SIZE.model_dump(), "stages": stages,
              "data": {"max_seq_length": 17, "max_predictions_per_seq": 4}}  # fmt: skip
    run_dir.mkdir()
    (run_dir / "recipe.json").write_text(json.dumps(recipe))
    shutil.copytree(tokenizer_dir, run_dir / "tokenizer")
    manager = CheckpointManager(run_dir / "checkpoints")
    model = build({})
    for stage, step in ((0, 5), (1, 10)):
        model = build({"num_hidden_layers": stages[stage]["num_hidden_layers"]})
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        state = TrainState(
            global_step=step,
            stage=stage,
            num_hidden_layers=model.config.num_hidden_layers,
            loader={"samples_consumed": step * 256},
            sample_hash="",
            tokens=0,
            real_tokens=0,
            elapsed_seconds=0.0,
            recipe_sha256="",
        )
        manager.save(f"stage{stage}_end", Snapshot(weights), state)
    return model


def test_export_command_writes_the_furthest_checkpoint(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Default: the last stage's model; --tag: a shallower one; the tokenizer comes along."""
    model = write_run(tmp_path / "run", tokenizer_dir)
    done = run_export(tmp_path / "run", "--out", tmp_path / "hf", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["tag"], result["architecture"]) == ("stage1_end", "BertForPreTraining")
    assert result["max_logit_difference"] < 1e-4
    assert verify(model, model.config, tmp_path / "hf") < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("cat")["input_ids"] == [2, 6, 3]
    assert "--data-license TEXT" in result["hints"][0]
    assert "Licence of the data: not stated." in (tmp_path / "hf/README.md").read_text()
    assert f"{result['max_logit_difference']:.1e}" in (tmp_path / "hf/README.md").read_text()
    done = run_export(tmp_path / "run", "--out", tmp_path / "shallow", "--tag", "stage0_end")
    assert "transformers gives the same logits" in done.stdout
    assert json.loads((tmp_path / "shallow/config.json").read_text())["num_hidden_layers"] == 1


def test_export_command_refuses_a_folder_that_is_no_run(tmp_path: Path) -> None:
    """Exit code 2, one line, no traceback."""
    done = run_export(tmp_path, "--out", tmp_path / "hf")
    assert done.returncode == 2
    assert "no recipe.json, this is not a run folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_export_command_below_a_file_is_one_message(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Exit code 2, one line, no traceback."""
    write_run(tmp_path / "run", tokenizer_dir)
    (tmp_path / "file").write_text("")
    done = run_export(tmp_path / "run", "--out", tmp_path / "file/hf")
    assert done.returncode == 2
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr
