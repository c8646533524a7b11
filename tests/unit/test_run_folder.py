"""A run folder is never overwritten, never shared, and never mixed with another recipe's."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stacking.config import BertConfig, Recipe, Stage
from stacking.errors import CheckpointError, ConfigError
from stacking.run_folder import RunFolder, recipe_sha256

MODEL = BertConfig(
    vocab_size=37, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
)
RECIPE = Recipe(name="a", model=MODEL, stages=(Stage(num_hidden_layers=2, steps=3),))


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.create(RECIPE, path)
    (folder.checkpoints / "stage1_begin").mkdir(parents=True)
    (folder.checkpoints / "stage1_begin" / "COMMITTED").write_text("{}")
    return folder


def test_the_same_recipe_may_continue(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    RunFolder(tmp_path / "run").check(RECIPE, "auto")


def test_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(ConfigError, match='"seed": 5'):
        RunFolder(tmp_path / "run").check(RECIPE.model_copy(update={"seed": 5}), "auto")


def test_names_and_saving_do_not_make_another_recipe() -> None:
    renamed = RECIPE.model_copy(update={"name": "b", "description": "c"})
    assert recipe_sha256(renamed) == recipe_sha256(RECIPE)


def test_before_the_first_checkpoint_the_recipe_may_still_be_mended(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(RECIPE, tmp_path)
    mended = RECIPE.model_copy(update={"seed": 5})
    RunFolder(tmp_path / "run").check(mended, "never")
    folder.create(mended, tmp_path)
    assert Recipe.model_validate_json(folder.recipe.read_text()) == mended


def test_resume_never_refuses_a_folder_with_a_run(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(ConfigError, match="never overwritten"):
        RunFolder(tmp_path / "run").check(RECIPE, "never")


def test_a_tag_in_a_new_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run yet"):
        RunFolder(tmp_path / "run").check(RECIPE, "stage1_end")


def test_a_strangers_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="no run of this trainer"):
        RunFolder(tmp_path).check(RECIPE, "auto")


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "run").check(RECIPE, "auto")


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path\n"
        "from stacking.config import Recipe\n"
        "from stacking.run_folder import RunFolder\n"
        "run = Path(sys.argv[1])\n"
        "recipe = Recipe.model_validate_json((run / 'recipe.json').read_text())\n"
        "RunFolder(run).create(recipe, run)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stderr=subprocess.PIPE, text=True
    )
    _, complaint = other.communicate(timeout=60)
    # `begun` dropped its folder object: keep a live one to hold the lock.
    assert other.returncode == 0, complaint
    holder = RunFolder(tmp_path / "run")
    holder.create(RECIPE, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "another process is training there" in done.stderr


def test_data_of_another_tokenizer_is_refused_and_the_runs_own_is_kept(tmp_path: Path) -> None:
    for name, words in (("first", "a\nb\n"), ("second", "a\nc\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text(words)
    RunFolder(tmp_path / "run").create(RECIPE, tmp_path / "first")
    folder = RunFolder(tmp_path / "run")
    (folder.checkpoints / "stage1_begin").mkdir(parents=True)
    (folder.checkpoints / "stage1_begin" / "COMMITTED").write_text("{}")
    with pytest.raises(ConfigError, match=r"vocab\.txt is not the one"):
        RunFolder(tmp_path / "run").create(RECIPE, tmp_path / "second")
    assert (folder.tokenizer / "vocab.txt").read_text() == "a\nb\n"


def test_only_the_last_rewind_is_remembered(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    assert not folder.was_rewound_to("stage1_end")
    folder.note_rewind("stage1_end")
    assert folder.was_rewound_to("stage1_end")
    folder.note_rewind("step_00000004")
    assert not RunFolder(tmp_path / "run").was_rewound_to("stage1_end")


def test_a_half_written_tag_is_no_beginning(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(RECIPE, tmp_path)
    hidden = folder.checkpoints / ".stage1_begin.7.tmp"
    hidden.mkdir(parents=True)
    (hidden / "COMMITTED").write_text("{}")
    RunFolder(tmp_path / "run").check(RECIPE.model_copy(update={"seed": 5}), "never")


def test_a_shared_folder_without_locks_is_trained_in_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, flags: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"):
        RunFolder(tmp_path / "run").create(RECIPE, tmp_path)
    assert (tmp_path / "run" / "recipe.json").exists()


def test_what_the_data_say_of_themselves_is_kept_from_the_beginning(tmp_path: Path) -> None:
    for name, content in (("first", "1"), ("second", "2"), ("third", None)):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "manifest.json").write_text(content)
    folder = RunFolder(tmp_path / "run")
    for name in ("second", "third", "first"):  # nothing is committed yet: each is a new beginning
        folder.create(RECIPE, tmp_path / name)
        assert folder.manifest.exists() == (name != "third")
    (folder.checkpoints / "stage1_begin").mkdir(parents=True)
    (folder.checkpoints / "stage1_begin" / "COMMITTED").write_text("{}")
    folder.create(RECIPE, tmp_path / "second")
    assert folder.manifest.read_text() == "1"
