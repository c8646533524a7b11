"""What a run begins with when it is given a Hugging Face folder, and which folders it refuses."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from fine_tuned import VOCABULARY, fresh_model, swap_two_tokens
from squad_sets import tokenizer
from transformers import BertConfig, BertModel

from data_prep.tokens.tokenizer import count_characters, load_tokenizer, train_tokenizer
from stacking.checkpoint import CheckpointManager
from stacking.config import Recipe
from stacking.errors import ConfigError, UserError
from stacking.hf import home_config, save_pretrained
from stacking.hf_homes import BERT, to_home
from stacking.hf_start import first_weights
from stacking.modeling import BertForPreTraining, init_weights
from stacking.run_branch import Trunk
from stacking.run_data import RunData
from stacking.run_folder import RunFolder
from stacking.run_origin import Beginning
from stacking.run_start import FirstWeights, Start

STAGES = [{"num_hidden_layers": 1, "steps": 3}, {"num_hidden_layers": 2, "steps": 3}]


def recipe_of(*, stages: object = None, **changes: object) -> Recipe:
    """Its first stage is `fresh_model`, but for `changes` of the model."""
    model = {**fresh_model().config.model_dump(), "num_hidden_layers": 2, **changes}
    longest = model["max_position_embeddings"]
    return Recipe.model_validate({
        "name": "tiny", "model": model, "global_batch_size": 4, "seed": 5,
        "data": {"max_seq_length": longest, "max_predictions_per_seq": 3},
        "learning_rate": {"schedule": "constant"}, "stages": stages or STAGES,
    })  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> RunData:
    """Made with the export's tokenizer; what is read of it."""
    folder = tmp_path / "data"
    folder.mkdir()
    tokenizer().save(str(folder / "tokenizer.json"))
    made_with = load_tokenizer(folder)
    manifest = SimpleNamespace(tokenizer_sha256=made_with.sha256, vocab_size=made_with.vocab_size)
    return cast(RunData, SimpleNamespace(folder=folder, manifest=manifest))


@pytest.fixture
def export(data: RunData, tmp_path: Path) -> Path:
    model = fresh_model()
    save_pretrained(model, model.config, tmp_path / "hf", data.folder)
    return tmp_path / "hf"


def encoder(folder: Path) -> Path:
    """As sentence-transformers and others publish them: an encoder with its pooler, no more."""
    model = fresh_model()
    weights = {name.removeprefix("bert."): tensor for name, tensor in to_home(model, BERT).items()}
    theirs = BertModel(BertConfig.from_dict(home_config(model.config, BERT)))
    theirs.load_state_dict(weights, strict=False)
    theirs.save_pretrained(folder)
    return folder


def as_new(recipe: Recipe) -> dict[str, torch.Tensor]:
    """What a run of the recipe begins with when it is given nothing."""
    model = BertForPreTraining(recipe.stage_model(0))
    init_weights(model, torch.Generator().manual_seed(recipe.seed))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def faults(folder: Path, recipe: Recipe, data: RunData) -> str:
    with pytest.raises(ConfigError) as raised:
        first_weights(folder, recipe, data)
    return str(raised.value)


def test_an_export_gives_its_weights_and_a_new_runs_rows_for_its_padding(
    export: Path, data: RunData
) -> None:
    recipe = recipe_of(hidden_dropout_prob=0.3, initializer_range=0.05)  # the recipe's own
    found, model = first_weights(export, recipe, data), fresh_model()
    assert data.manifest is not None
    kept = data.manifest.vocab_size
    assert kept < VOCABULARY
    for name, expected in model.named_parameters():
        assert found.weights[name].shape == expected.shape
        rows = kept if len(expected) == VOCABULARY else len(expected)
        torch.testing.assert_close(found.weights[name][:rows], expected[:rows], atol=1e-6, rtol=0)
        assert torch.equal(found.weights[name][rows:], as_new(recipe)[name][rows:])
    assert found.notes == (
        f"the last {VOCABULARY - kept} of {VOCABULARY} rows of the vocabulary, which the folder "
        "lacks: BERT's initialisation",
    )
    other = recipe_of().model_copy(update={"seed": 6})
    assert first_weights(export, other, data).sha256 == found.sha256


def test_all_differences_are_told_at_once_with_what_to_do(export: Path, data: RunData) -> None:
    stages = [{"num_hidden_layers": 2, "steps": 3, "intermediate_size": 64},
              {"num_hidden_layers": 4, "steps": 3}]  # fmt: skip
    recipe = recipe_of(
        stages=stages, num_hidden_layers=4, hidden_size=64, num_attention_heads=4,
        layer_norm_eps=1e-5, hidden_act="relu", position="rotary", max_position_embeddings=32,
        num_nsp_labels=1, mlm_bias=False, vocab_size=40,
    )  # fmt: skip
    said = faults(export, recipe, data)
    for line in (
        "hidden_size: 64 in the recipe's first stage, 32 in the folder; --set model.hidden_size=32",
        "num_hidden_layers: 2 in the recipe's first stage, 1 in the folder; --set "
        "stages.0.num_hidden_layers=1\n",
        "intermediate_size: 64 in the recipe's first stage, 48 in the folder; --set "
        "stages.0.intermediate_size=48\n",
        "--set model.layer_norm_eps=1e-12", '--set model.hidden_act="gelu"',
        '--set model.position="learned"', "--set model.num_nsp_labels=2",
        "--set model.mlm_bias=true", "vocab_size: 40 in the recipe, 105 in the folder",
        f"launch/grow.py --model {export} --to num_hidden_layers=2 hidden_size=64 "
        "num_attention_heads=4 intermediate_size=64 --out NEW_DIR",
    ):  # fmt: skip
        assert line in said, line
    # No table of positions, and no more fields than differ.
    assert said.count("first stage,") == 9


def test_one_stage_is_changed_where_the_whole_model_is(export: Path, data: RunData) -> None:
    said = faults(export, recipe_of(stages=STAGES[1:]), data)
    assert "--set stages.0.num_hidden_layers=1 --set model.num_hidden_layers=1" in said


def test_positions_that_a_short_stage_lacks_are_told_by_the_stage(
    export: Path, data: RunData
) -> None:
    short = [{**STAGES[0], "max_seq_length": 16}, STAGES[1]]
    said = faults(export, recipe_of(stages=short), data)
    assert "16 in the recipe's first stage, 48 in the folder; --set stages.0.max_seq_len" in said


def test_inner_sizes_are_compared_in_whatever_form_they_are_stated(
    export: Path, data: RunData
) -> None:
    even = [{**STAGES[0], "layer_intermediate_sizes": [48]}, STAGES[1]]
    assert first_weights(export, recipe_of(stages=even), data)
    other = [{**STAGES[0], "layer_intermediate_sizes": [44]}, STAGES[1]]
    assert "intermediate_size: 44" in faults(export, recipe_of(stages=other), data)


def test_an_encoder_begins_with_new_heads_and_its_own_pooler(data: RunData, tmp_path: Path) -> None:
    recipe, model = recipe_of(), fresh_model()
    found = first_weights(encoder(tmp_path / "encoder"), recipe, data)
    assert found.notes == (
        "the folder has no MLM head, next-sentence classifier: BERT's initialisation",
        f"its tokenizer was not compared with that of the data: {tmp_path / 'encoder'} has none",
    )
    new, theirs = as_new(recipe), dict(model.named_parameters())
    for name, weight in found.weights.items():
        is_new = name.startswith(("mlm_head", "nsp_head.classifier"))
        assert torch.equal(weight, new[name] if is_new else theirs[name]), name


def test_heads_that_the_recipe_has_not_are_left_out_and_told(export: Path, data: RunData) -> None:
    found = first_weights(export, recipe_of(num_nsp_labels=0, pooler=False), data)
    assert "left out, as the recipe has none: pooler, next-sentence classifier" in found.notes
    assert not [name for name in found.weights if name.startswith("nsp_head")]


def test_the_vocabulary_must_be_that_of_the_data(
    export: Path, data: RunData, tmp_path: Path
) -> None:
    """A folder that names its tokenizer must have it; one that does not is compared, too."""
    swap_two_tokens(export / "tokenizer.json")
    message = f"tokenizer.json: is not the tokenizer that {export} was trained with"
    assert message in faults(export, recipe_of(), data)
    foreign = encoder(tmp_path / "foreign")
    (export / "tokenizer.json").rename(foreign / "tokenizer.json")
    said = faults(foreign, recipe_of(hidden_act="relu"), data)
    assert f"another vocabulary than the data in {data.folder}" in said
    assert "hidden_act" in said
    swap_two_tokens(foreign / "tokenizer.json")
    assert "tokenizer" not in " ".join(first_weights(foreign, recipe_of(), data).notes)
    words = load_tokenizer(foreign / "tokenizer.json").tokens
    (foreign / "tokenizer.json").unlink()
    (foreign / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    assert "tokenizer" not in " ".join(first_weights(foreign, recipe_of(), data).notes)
    (foreign / "vocab.txt").write_text("".join(f"{word}\n" for word in reversed(words)))
    assert "another vocabulary" in faults(foreign, recipe_of(), data)


def test_data_that_name_no_tokenizer_are_not_compared_and_that_is_told(
    export: Path, data: RunData, tmp_path: Path
) -> None:
    silent = cast(RunData, SimpleNamespace(folder=tmp_path, manifest=None))
    assert f"that of the data: {tmp_path} has none" in first_weights(
        export, recipe_of(), silent).notes[-1]  # fmt: skip
    beside = cast(RunData, SimpleNamespace(folder=data.folder, manifest=None))
    assert len(first_weights(export, recipe_of(), beside).notes) == 1


def test_a_bpe_vocabulary_is_compared_with_its_merges(data: RunData, tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "a cat and a hat"] * 3
    made = train_tokenizer(texts, count_characters(texts), 60, kind="bpe")
    foreign = encoder(tmp_path / "foreign")
    made.save(foreign)
    assert data.manifest is not None
    data.manifest.__dict__["tokenizer_sha256"] = made.sha256
    assert "tokenizer" not in " ".join(first_weights(foreign, recipe_of(), data).notes)
    content = json.loads((foreign / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (foreign / "tokenizer.json").write_text(json.dumps(content))
    assert "another vocabulary" in faults(foreign, recipe_of(), data)


def test_data_with_more_pieces_than_the_folder_are_refused(export: Path, data: RunData) -> None:
    assert data.manifest is not None
    data.manifest.__dict__["vocab_size"] = 120
    assert "the data in" in (said := faults(export, recipe_of(), data))
    assert "have 120 pieces" in said


def test_what_is_no_folder_of_weights_is_refused(data: RunData, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    said = faults(tmp_path, recipe_of(), data)
    assert "is a run folder" in said
    assert "launch/export.py" in said
    with pytest.raises(UserError, match="no such folder"):
        first_weights(tmp_path / "none", recipe_of(), data)


def test_weights_that_changed_since_another_run_began_with_them_are_refused(
    export: Path, data: RunData
) -> None:
    found = Start(export).read(recipe_of(), data)
    assert Start(export, found.sha256).read(recipe_of(), data).sha256 == found.sha256
    with pytest.raises(UserError, match="its weights have changed since the run"):
        Start(export, "ab" * 32).read(recipe_of(), data)


@pytest.mark.parametrize(
    ("began", "given", "message"),
    [
        ("models/a", "models/a", ""),
        ("models/a", "models/b/../a", ""),
        ("models/a", "models/b", "own began from models/a; leave --start-from away to continue it"),
        ("", "models/a", "own began from random weights; leave --start-from away"),
    ],
)
def test_a_run_goes_on_from_the_folder_with_which_it_began_alone(
    tmp_path: Path, began: str, given: str, message: str
) -> None:
    own = RunFolder(tmp_path / "own")
    own.path.mkdir()
    origin = Start(Path(began)).row(FirstWeights({}, "ab", ())) if began else {}
    own.metrics.write_text(json.dumps({"event": "run_start", **origin}) + "\n")
    assert Start.of_run(own.path) == (Start(Path(began), "ab") if began else None)
    if not message:
        Start(Path(given)).check_began_here(own)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        Start(Path(given)).check_began_here(own)


def test_a_run_has_one_beginning(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "own")
    manager, trunk = CheckpointManager(folder.checkpoints), Trunk(tmp_path / "trunk", 3)
    with pytest.raises(ConfigError, match=r"--start-from: got hf with --branch-from .*trunk@3"):
        Beginning(recipe_of(), folder, manager, resume="auto", trunk=trunk, start=Start.at("hf"))
