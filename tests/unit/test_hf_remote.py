"""What no class of transformers holds: the shipped class computes it, and it comes back."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import CheckpointError, ConfigError
from stacking.growth.plan import Operators
from stacking.hf import load_pretrained, save_pretrained
from stacking.hf_grow import plan_folder
from stacking.hf_homes import HOMES, REMOTE, from_home, to_home
from stacking.hf_remote import CODE_FILES, remote_fields
from stacking.modeling import BertForPreTraining, init_weights
from stacking.remote_code.configuration_progressive_bert import ProgressiveBertConfig
from stacking.remote_code.modeling_progressive_bert import (
    ProgressiveBertForPreTraining,
    ProgressiveBertForSequenceClassification,
    ProgressiveBertModel,
)

STACKINGBERT: dict[str, object] = {
    "layer_norm": "pre", "layer_norm_affine": False, "position": "sinusoidal",
    "embedding_layer_norm": False, "embedding_scale": True, "mlm_bias": False,
    "num_nsp_labels": 1, "pooler": False,
}  # fmt: skip
SHARED: dict[str, object] = {"shared_attention_layers": [1, 2], "position": "rotary"}
NARROW: dict[str, object] = {
    "layer_intermediate_sizes": [8, 31, 9], "tie_word_embeddings": False, "type_vocab_size": 0,
    "num_nsp_labels": 0,
}  # fmt: skip


@st.composite
def any_config(draw: st.DrawFn) -> BertConfig:
    """Every option but pooling."""
    layers = draw(st.integers(1, 4))
    narrow = st.lists(st.integers(3, 9), min_size=layers, max_size=layers)
    flags = ("layer_norm_affine", "embedding_layer_norm", "embedding_scale", "mlm_bias", "pooler",
             "tie_word_embeddings")  # fmt: skip
    fields: dict[str, object] = {
        "vocab_size": 23,
        "hidden_size": 12,
        "num_hidden_layers": layers,
        "num_attention_heads": draw(st.sampled_from([1, 3])),
        "intermediate_size": 7,
        "max_position_embeddings": 11,
        "initializer_range": 0.2,
        "layer_intermediate_sizes": draw(narrow) if draw(st.booleans()) else [],
        "shared_attention_layers": sorted(
            draw(st.sets(st.integers(1, layers - 1))) if layers > 1 else []
        ),
        "hidden_act": draw(st.sampled_from(["gelu", "gelu_new", "relu"])),
        "type_vocab_size": draw(st.sampled_from([0, 2, 3])),
        "pad_token_id": draw(st.sampled_from([0, 5])),
        "position": draw(st.sampled_from(["learned", "sinusoidal", "rotary"])),
        "layer_norm": draw(st.sampled_from(["post", "pre"])),
        "num_nsp_labels": draw(st.sampled_from([0, 1, 2])),
    }
    return BertConfig.model_validate(fields | {name: draw(st.booleans()) for name in flags})


def model_of(config: BertConfig, seed: int = 3) -> BertForPreTraining:
    """Its biases and LayerNorms are random, too."""
    model = BertForPreTraining(config).eval()
    generator = torch.Generator().manual_seed(seed)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def small(options: dict[str, object]) -> BertForPreTraining:
    sizes = {"vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3,
             "intermediate_size": 7, "max_position_embeddings": 11}  # fmt: skip
    return model_of(BertConfig.model_validate(sizes | options))


def their_config(config: BertConfig, **more: object) -> ProgressiveBertConfig:
    return ProgressiveBertConfig(**remote_fields(config), **more)  # type: ignore[arg-type]


def batch_of(config: BertConfig) -> tuple[Tensor, Tensor, Tensor]:
    """ids, segments and mask, [3,9]; the last row is one token."""
    ids = torch.randint(6, 23, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([[9], [5], [1]])
    segments = (torch.arange(9) >= 4).long().expand(3, 9) * (config.type_vocab_size > 1)
    return ids.masked_fill(~mask, config.pad_token_id), segments, mask


@settings(max_examples=12, deadline=None, derandomize=True)
@given(any_config())
def test_the_class_gives_our_logits_for_every_option(config: BertConfig) -> None:
    """It takes all of the weights and no others, and they come back as they were."""
    model = model_of(config)
    weights = to_home(model, REMOTE)
    theirs = ProgressiveBertForPreTraining(their_config(config))
    theirs.train(False)
    own = {name: t for name, t in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        assert own.pop("mlm_head.decoder.weight") is not None
        theirs.get_parameter("bert.embeddings.word_embeddings.weight")
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in own.items()}
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    ids, segments, mask = batch_of(config)
    with torch.no_grad():
        ours = model(ids, segments if config.type_vocab_size else None, mask)
        found = theirs(ids, mask.long(), segments)
    torch.testing.assert_close(
        found.logits[mask], ours["prediction_logits"][mask], atol=2e-5, rtol=0
    )
    if config.num_nsp_labels:
        torch.testing.assert_close(
            found.seq_relationship_logits, ours["seq_relationship_logits"], atol=2e-5, rtol=0
        )
    back = from_home(weights, config, REMOTE)
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(any_config())
def test_every_option_has_a_home_and_keeps_its_logits(
    tmp_path_factory: pytest.TempPathFactory, config: BertConfig
) -> None:
    """By files and Auto classes; a class of transformers wherever one fits."""
    model, folder = model_of(config), tmp_path_factory.mktemp("any") / "out"
    report = save_pretrained(model, config, folder)
    assert report.max_logit_difference < 2e-5
    assert report.needs_code == all(home.objections(config) for home in HOMES)
    again, found = load_pretrained(folder)
    ids, _, mask = batch_of(config)
    with torch.no_grad():
        expected, actual = (
            m.eval()(ids, None, mask)["prediction_logits"][mask] for m in (model, again)
        )
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    if report.needs_code:
        assert found == config
        assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


def test_defaults_are_those_of_our_config() -> None:
    """A file that a later transformers writes without them is read the same."""
    names = set(BertConfig.model_fields) - {"pooling", "pooling_size"}
    assert set(remote_fields(BertConfig(vocab_size=9))) >= names
    theirs = ProgressiveBertConfig()
    for name in names - {"vocab_size"}:
        assert getattr(theirs, name) == BertConfig.model_fields[name].default, name


@pytest.mark.parametrize("options", [STACKINGBERT, SHARED])
def test_a_folder_with_its_class_goes_there_and_back(
    options: dict[str, object], tmp_path: Path
) -> None:
    """Auto classes load it with trust; the note says why, and what to say to them."""
    model = small(options)
    report = save_pretrained(model, model.config, tmp_path / "out")
    assert report.max_logit_difference < 2e-5
    assert report.needs_code
    assert "load it with trust_remote_code=True" in report.notes[-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", *CODE_FILES
    }  # fmt: skip
    again, config = load_pretrained(tmp_path / "out")
    assert config == model.config
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


def test_reading_back_runs_nothing_of_the_folder(tmp_path: Path) -> None:
    """Code that would stop the process is not noticed."""
    model = small(NARROW)
    save_pretrained(model, model.config, tmp_path / "out")
    for name in CODE_FILES:
        (tmp_path / "out" / name).write_text("import os\nos._exit(7)\n")
    assert load_pretrained(tmp_path / "out")[1] == model.config


def test_code_of_others_neither_runs_nor_asks(tmp_path: Path) -> None:
    """Without an answer on a terminal, transformers would wait for one."""
    fields = {"model_type": "others", "auto_map": {"AutoConfig": "theirs.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "theirs.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(ConfigError, match="transformers cannot read it, readable are .*bert"):
        load_pretrained(tmp_path)


def damage(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    if name == "missing":
        del weights["bert.layers.1.inner.weight"]
    elif name == "size":
        weights["bert.layers.1.inner.weight"] = torch.zeros(2, 2)
    if name == "absent":
        (folder / "model.safetensors").unlink()
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if name == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-9])


def write_remote(folder: Path, model: BertForPreTraining) -> Path:
    """What save_pretrained writes, without transformers' look at it."""
    folder.mkdir()
    save_file(to_home(model, REMOTE), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(remote_fields(model.config)))
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "lacks bert.layers.1.inner.weight"),
        ("size", r"inner.weight is \[2, 2\], not \[31, 12\]"),
        ("absent", "no model.safetensors"),
        ("truncated", "its weights cannot be read"),
    ],
)
def test_damaged_weights_are_named(kind: str, message: str, tmp_path: Path) -> None:
    folder = write_remote(tmp_path / "out", small(NARROW))
    damage(folder, kind)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "silu"}, "config.json: hidden_act: got 'silu'; allowed: "),
        ({"num_attention_heads": 5}, "num_attention_heads: got 5 with hidden_size 12"),
    ],
)
def test_fields_that_no_bert_has_are_named(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = write_remote(tmp_path / "out", small(NARROW))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | change))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_pretrained(folder)


def test_it_cannot_be_grown_as_a_folder(tmp_path: Path) -> None:
    folder = write_remote(tmp_path / "out", small(SHARED))
    with pytest.raises(ConfigError, match="progressive_bert, whose class .* growable are bert,"):
        plan_folder(folder, {"num_hidden_layers": 6}, Operators(), tmp_path / "new")


def test_a_classifier_of_it_gives_back_the_encoder_and_the_pooler(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As fine-tuning wants it: the heads that are missing are drawn, and the log says so."""
    model = small({"embedding_scale": True})
    theirs = ProgressiveBertForSequenceClassification(their_config(model.config, num_labels=3))
    theirs.load_state_dict(to_home(model, REMOTE), strict=False)
    theirs.save_pretrained(tmp_path / "out")
    again, config = load_pretrained(tmp_path / "out", keeps_pooler=True)
    assert config.num_nsp_labels == 2
    assert "no MLM head" in caplog.text
    name = "nsp_head.pooler.weight"
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))
    assert again.mlm_head.dense.weight.std() > 0.01
    assert load_pretrained(tmp_path / "out")[1].num_nsp_labels == 0  # no head reads the pooler


def test_it_learns_with_labels_of_every_kind() -> None:
    """Each loss reaches each weight but those of heads that it does not read."""
    config = small(SHARED).config
    ids, segments, mask = batch_of(config)
    model = ProgressiveBertForPreTraining(their_config(config)).train()
    labels = ids.masked_fill(~mask, -100)
    model(ids, mask, segments, labels).loss.backward()
    lacking = {name for name, p in model.named_parameters() if p.grad is None}
    assert {name.split(".")[0] for name in lacking} == {"bert", "seq_relationship"}
    assert {name for name in lacking if name.startswith("bert.")} == {
        "bert.pooler.weight", "bert.pooler.bias"
    }  # fmt: skip
    for num_labels, targets in (
        (3, torch.tensor([0, 2, 1])), (3, torch.eye(3)), (1, torch.tensor([0.5, 1, 2])),
    ):  # fmt: skip
        tuned = ProgressiveBertForSequenceClassification(
            their_config(config, num_labels=num_labels)
        )
        found = tuned(ids, mask, segments, targets)
        assert found.logits.shape == (3, num_labels)
        found.loss.backward()
        assert all(p.grad is not None for p in tuned.parameters())


def test_sinusoids_stay_and_a_vocabulary_may_grow() -> None:
    config = small(STACKINGBERT).config
    model = ProgressiveBertForPreTraining(their_config(config))
    assert not model.get_parameter("bert.embeddings.position_embeddings.weight").requires_grad
    model.resize_token_embeddings(31)
    assert model(torch.tensor([[30, 1]])).logits.shape == (1, 2, 31)
    assert model.bert(torch.tensor([[3, 1]])).pooler_output is None
    table = ProgressiveBertModel(their_config(config)).get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding)
    assert table.num_embeddings == 23


OUTSIDE = """
import sys
for name in ("stacking", "data_prep", "deepspeed"):
    sys.modules[name] = None  # whatever is installed here: an import of it fails
import torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining,
                          AutoModelForSequenceClassification)
inputs = load_file("inputs.safetensors")
auto = {"masked": AutoModelForMaskedLM, "pre": AutoModelForPreTraining, "base": AutoModel,
        "class": AutoModelForSequenceClassification}
found = {}
with torch.no_grad():
    for name, cls in auto.items():
        model = cls.from_pretrained("out", trust_remote_code=True).eval()
        outputs = model(**inputs)
        found |= {f"{name}.{key}": value.contiguous() for key, value in outputs.items()}
model.save_pretrained("saved")
again = AutoModelForSequenceClassification.from_pretrained("saved", trust_remote_code=True).eval()
found["again.logits"] = again(**inputs).logits.detach()
save_file(found, "outputs.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [STACKINGBERT, SHARED, NARROW])
def test_it_works_where_this_project_is_not_installed(
    options: dict[str, object], tmp_path: Path
) -> None:
    """All Auto classes that config.json names, in a process that cannot import us."""
    model = small(options)
    save_pretrained(model, model.config, tmp_path / "out")
    ids, segments, mask = batch_of(model.config)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": segments}
    save_file(inputs, tmp_path / "inputs.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", OUTSIDE], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        ours = model(ids, segments if model.config.type_vocab_size else None, mask)
    for name in ("masked.logits", "pre.logits"):
        torch.testing.assert_close(
            found[name][mask], ours["prediction_logits"][mask], atol=2e-5, rtol=0
        )
    torch.testing.assert_close(
        found["base.last_hidden_state"][mask], ours["last_hidden_state"][mask], atol=2e-5, rtol=0
    )
    if model.config.num_nsp_labels:
        torch.testing.assert_close(
            found["pre.seq_relationship_logits"], ours["seq_relationship_logits"],
            atol=2e-5, rtol=0,
        )  # fmt: skip
    assert found["class.logits"].shape == (3, 2)
    assert torch.equal(found["class.logits"], found["again.logits"])
