"""launch/attention_maps.py on checkpoints made without training: its files, and each mistake."""

import csv
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from fine_tuned import fresh_model, swap_two_tokens, write_model
from run_folders import write_run

from data_prep.tokens.tokenizer import SPECIAL_TOKENS, from_tokens
from stacking.attention_maps import Sentence
from stacking.attention_maps_models import find_models
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.errors import ConfigError
from stacking.hf import save_pretrained
from stacking.modeling import BertForPreTraining, init_weights
from stacking.run_folder import recipe_sha256
from stacking.schedule import stage_start
from stacking.snapshot import Snapshot
from stacking.stage_growth import StageGrowth

SCRIPT = Path(__file__).resolve().parents[2] / "launch/attention_maps.py"
WORDS = "the river had risen over night , and by noon lower road was under water ."
TOKENS = [*SPECIAL_TOKENS.values(), *WORDS.split()]
Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The script's `main` in this process: transformers takes seconds to import."""
    spec = importlib.util.spec_from_file_location("launch_attention_maps", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["attention_maps.py", *map(str, words)])
        code: int = script.main()
        return code

    return run


def save(run: Path, recipe: Recipe, tag: str, stage: int, step: int, weights: Snapshot) -> None:
    state = TrainState(
        global_step=step, stage=stage, recipe_sha256=recipe_sha256(recipe),
        num_hidden_layers=recipe.stages[stage].num_hidden_layers,
        loader={"samples_consumed": step * recipe.global_batch_size},
    )  # fmt: skip
    CheckpointManager(run / "checkpoints").save(tag, weights, state)


def random_weights(recipe: Recipe, stage: int) -> Snapshot:
    model = BertForPreTraining(recipe.stage_model(stage))
    init_weights(model, torch.Generator().manual_seed(stage))
    return Snapshot({name: tensor.detach() for name, tensor in model.state_dict().items()})


def make_run(folder: Path, changes: Mapping[str, object] | None = None) -> Path:
    """2, 2 and 4 layers; all sides of the switches, and a step after the last."""
    larger = {"model": {"hidden_size": 12, "num_attention_heads": 3, "initializer_range": 0.3,
                        "max_position_embeddings": 20},
              "data": {"max_seq_length": 20}, **(changes or {})}  # fmt: skip
    run = write_run(folder, [(2, 10), (2, 10), (4, 10)], changes=larger)
    recipe = load_recipe(run / "recipe.json")
    for stage in (0, 1, 2):
        trained = random_weights(recipe, stage)
        end = stage_start(stage + 1, recipe.stages)
        if stage == 2:
            save(run, recipe, "step_00000025", 2, 25, trained)
            break
        save(run, recipe, f"stage{stage + 1}_end", stage, end, trained)
        grown = StageGrowth(recipe, stage + 1).apply(trained)
        assert grown is not None
        save(run, recipe, f"stage{stage + 2}_begin", stage + 1, end, grown)
    from_tokens(TOKENS).save(run / "tokenizer")
    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("attention") / "run_1")


def test_a_run_is_shown_around_its_last_switch(
    command: Command, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run_dir, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    tags = ["stage2_end", "stage3_begin", "step_00000025"]
    names = [*(f"maps_{tag}" for tag in tags), "side_by_side", "shares"]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"{n}.{kind}" for n in names for kind in ("png", "svg")} | {"shares.csv"}
    for name in names:
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (tmp_path / "out" / f"{name}.svg").read_bytes()[:600]
    assert "shown: [CLS] the river had risen over night" in said
    assert [line.split(":")[0] for line in said.splitlines() if " layers" in line] == tags
    rows = list(csv.DictReader((tmp_path / "out/shares.csv").open()))
    assert len(rows) == (2 + 4 + 4) * (1 + 3)
    parts = ("neighbours", "start", "separator", "rest")
    assert all(abs(sum(float(row[part]) for part in parts) - 1) < 1e-6 for row in rows)
    assert not list((tmp_path / "out").glob(".*"))


def test_numbers_come_as_json_with_what_was_left_out(
    command: Command, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "held out.txt"
    text.write_text("river and sea .\n\nthe road , by night\n" + "noon " * 30 + "\n")
    words = ("--text", text, "--tags", "step_00000025", "--heads", 1, "--show", "4:3", "--json")
    assert command(run_dir, "--out", tmp_path / "out", *words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sentence"] == ["[CLS]", "river", "and", "[UNK]", ".", "[SEP]"]
    assert found["sentences"] == 2
    assert found["notes"] == [
        f"lines of {text} left out, without a token or with more than 20: 1 of 3",
        "tokens shown that the vocabulary lacks: 1 of 4",
        "heads drawn in maps_step_00000025: 1 of 3 (--heads)",
    ]
    assert [row["layer"] for row in found["shares"]] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted(found["files"])


TEXT = Sentence(("[CLS]", "the", "river", "was", "[SEP]"), (2, 5, 6, 16, 3))


def test_the_copies_right_after_stacking_are_those_of_before(run_dir: Path) -> None:
    before, after, trained = find_models(run_dir, []).attention(TEXT, [TEXT])
    assert [model.origins for model in (before, after)] == [(0, 1), (0, 1, 0, 1)]
    assert torch.allclose(after.maps[:2], before.maps, atol=1e-6)
    assert torch.allclose(after.shares[:2], before.shares, atol=1e-6)
    assert not torch.allclose(after.maps[2:], before.maps, atol=1e-3)
    assert not torch.allclose(trained.maps, after.maps, atol=1e-3)


@pytest.mark.parametrize(
    ("asked", "all_switches", "shown"),
    [
        ([], False, ["stage2_end", "stage3_begin", "step_00000025"]),
        ([], True, ["stage2_end", "stage3_begin", "step_00000025"]),  # the first grows nothing
        (["stage3_begin", "stage1_end", "stage3_begin"], False, ["stage1_end", "stage3_begin"]),
    ],
)
def test_tags_are_shown_in_the_order_of_training(
    run_dir: Path, asked: list[str], all_switches: bool, shown: list[str]
) -> None:
    source = find_models(run_dir, asked, all_switches=all_switches)
    assert [model.name for model in source.models] == shown
    assert source.longest == 20


def test_every_switch_that_grew_something_can_be_shown(tmp_path: Path) -> None:
    stages = [{"num_hidden_layers": layers, "steps": 10} for layers in (2, 3, 4)]
    run = make_run(tmp_path / "run_1", {"stages": stages})
    last = ["stage2_end", "stage3_begin", "step_00000025"]
    assert [model.name for model in find_models(run, []).models] == last
    every = find_models(run, [], all_switches=True)
    assert [model.name for model in every.models] == ["stage1_end", "stage2_begin", *last]
    assert [model.origins for model in every.models][2:4] == [(0, 1, 0), (0, 1, 0, 0)]


def test_a_run_without_a_saved_switch_shows_its_newest_tag(run_dir: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run_dir, tmp_path / "run_1")
    shutil.rmtree(run / "checkpoints" / "step_00000025")
    shutil.rmtree(run / "checkpoints" / "stage2_end")
    assert [model.name for model in find_models(run, []).models] == ["stage3_begin"]


def test_pooled_stages_are_left_out_unless_they_are_asked_for(tmp_path: Path) -> None:
    pooled = {"pooling": "mean", "pooling_size": 2, "num_hidden_layers": 2, "steps": 10}
    run = make_run(
        tmp_path / "run_1", {"stages": [pooled, pooled, {"num_hidden_layers": 4, "steps": 10}]}
    )
    source = find_models(run, [])
    assert [model.name for model in source.models] == ["stage3_begin", "step_00000025"]
    assert source.models[0].origins == (0, 1, 2, 3)
    assert "left out: stage2_end: trained with pooling" in source.notes[0]
    with pytest.raises(ConfigError, match="stage1_end: trained with pooling"):
        find_models(run, ["stage1_end", "stage3_begin"])


def test_a_hugging_face_folder_is_one_model(run_dir: Path, tmp_path: Path) -> None:
    config = load_recipe(run_dir / "recipe.json").stage_model(2)
    model = BertForPreTraining(config)
    model.load_state_dict(
        CheckpointManager(run_dir / "checkpoints").load("step_00000025").weights()
    )
    save_pretrained(model, config, tmp_path / "hf", run_dir / "tokenizer")
    exported = find_models(tmp_path / "hf", [])
    assert exported.tokenizer.is_file()
    (theirs,) = exported.attention(TEXT, [TEXT])
    (ours,) = find_models(run_dir, ["step_00000025"]).attention(TEXT, [TEXT])
    assert (theirs.name, theirs.caption, theirs.origins) == ("hf", "4 layers", (0, 1, 2, 3))
    assert torch.allclose(theirs.maps, ours.maps, atol=1e-6)
    with pytest.raises(ConfigError, match="one model without tags"):
        find_models(tmp_path / "hf", ["x"])


def test_another_tokenizer_than_that_of_pre_training_is_refused(
    tmp_path: Path,
) -> None:
    """A run and an export say which one it was."""
    run, model = write_model(tmp_path / "run"), fresh_model()
    save_pretrained(model, model.config, tmp_path / "hf", run / "tokenizer")
    for folder, path in ((run, run / "tokenizer"), (tmp_path / "hf", tmp_path / "hf")):
        assert find_models(folder, []).models
        swap_two_tokens(path / "tokenizer.json")
        with pytest.raises(ConfigError, match="json: is not the tokenizer that .* trained with"):
            find_models(folder, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tags", "stage9_end"], "no committed checkpoint 'stage9_end'"),
        (["--sentence", ""], "holds no token"),
        (["--sentence", "  \n"], "holds no token"),
        (["--sentence", "the \udcff river"], "is no UTF-8 text"),
        (["--sentence", "river " * 19], "has 21 tokens with the two special ones; allowed: at most "
                                        "20"),
        (["--show", "3:1"], "--show 3:1: allowed: LAYER:HEAD from 1:1 to 2:3"),
        (["--text", "missing.txt"], "--text missing.txt: cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message_and_nothing_is_written(
    command: Command, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    assert command(run_dir, "--out", tmp_path / "out", *words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_model_are_refused(
    command: Command, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(folder: Path, message: str, out: Path = tmp_path / "out") -> None:
        assert command(folder, "--out", out) == 2
        assert message in capsys.readouterr().err

    refused(tmp_path, "neither a run folder (no recipe.json) nor a Hugging Face folder")
    run = shutil.copytree(run_dir, tmp_path / "run_1")
    (tmp_path / "file").write_text("")
    refused(run, "the figures cannot be written there", tmp_path / "file")
    from_tokens([*TOKENS, *(f"w{i}" for i in range(50)), "##s"]).save(run / "tokenizer")
    text = tmp_path / "new.txt"
    for line, message in (("the w49", "the model has a vocabulary of 50"),
                          ("the " * 19, "has no line of 1 to 18 tokens")):  # fmt: skip
        text.write_text(f"\n{line}\n")
        assert command(run, "--out", tmp_path / "out", "--text", text) == 2
        assert message in capsys.readouterr().err
    shutil.rmtree(run / "tokenizer")
    (run / "tokenizer").mkdir()
    refused(run, "holds neither tokenizer.json nor vocab.txt")
    shutil.rmtree(run / "checkpoints")
    refused(run, "none is committed; train first")
