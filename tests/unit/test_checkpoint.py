"""Checkpoints: what is saved comes back bit for bit; nothing half-written or changed is taken."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stacking import checkpoint
from stacking.checkpoint import (
    MARKER,
    WEIGHTS,
    Checkpoint,
    CheckpointManager,
    TrainState,
    _fingerprint,
    _fold,
    _unfold,
)
from stacking.config import BertConfig
from stacking.errors import CheckpointError
from stacking.modeling import BertForPreTraining
from stacking.snapshot import LossScaler, Snapshot


def state(step: int, stage: int = 0) -> TrainState:
    return TrainState(
        global_step=step,
        stage=stage,
        num_hidden_layers=2,
        loader={"samples_consumed": 5 * step},
        recipe_sha256="0" * 64,
    )


def snapshot() -> Snapshot:
    """Layers 0, 1, 2 and 5 are old, 3 is new and young, 4 has no history; the rest is new."""
    names = [f"layers.{i}.{part}.weight" for i in range(6) for part in ("in", "out")]
    weights = {name: torch.randn(3, 5) for name in [*names, "norm", "head.0"]}
    steps = {name: 7 if ".3." in name else 500 for name in names if ".4." not in name}
    moments = {
        k: {name: torch.rand_like(weights[name]) for name in steps}
        for k in ("exp_avg", "exp_avg_sq")
    }
    new = frozenset({"norm", "head.0", "layers.3.in.weight", "layers.3.out.weight"})
    return Snapshot(weights, moments, steps, new, loss_scaler=LossScaler(1024.0, 7, 3, 2, 1))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    manager, saved = CheckpointManager(tmp_path), snapshot()
    manager.save("step_00000007", saved, state(7))
    loaded = manager.load("step_00000007")
    assert loaded.state == state(7)
    back = loaded.snapshot()
    assert back.optimizer_steps == saved.optimizer_steps
    assert back.new_names == saved.new_names
    assert back.loss_scaler == LossScaler(1024.0, 7, 3, 2, 1)
    assert back.weights.keys() == saved.weights.keys()
    for name, tensor in saved.weights.items():
        assert torch.equal(back.weights[name], tensor)
    for key in ("exp_avg", "exp_avg_sq"):
        assert back.moments[key].keys() == saved.optimizer_steps.keys()
        for name, tensor in saved.moments[key].items():
            assert torch.equal(back.moments[key][name], tensor)


def test_all_bytes_are_on_the_disk_before_the_tag_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync, rename = list[str](), os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def named(path: Path, target: Path) -> Path:
        synced.append("the name")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", named)
    CheckpointManager(tmp_path).save("t", snapshot(), state(7))
    before, after = synced[: synced.index("the name")], synced[synced.index("the name") + 1 :]
    files = [path.name for path in (tmp_path / "t").iterdir()]
    assert sorted(before[:-1]) == sorted(files)
    assert before[-1].startswith(".t.")  # the folder's own entries
    assert after == [tmp_path.name]


def test_the_state_file_is_short_and_names_each_cohort(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save("t", snapshot(), state(7))
    cohorts = json.loads((tmp_path / "t" / "state.json").read_text())["cohorts"]
    assert [(one["optimizer_steps"], one["is_new"], one["names"]) for one in cohorts] == [
        (500, False, ["layers.0-2,5.in.weight", "layers.0-2,5.out.weight"]),
        (7, True, ["layers.3.in.weight", "layers.3.out.weight"]),
        (0, True, ["norm", "head.0"]),
    ]


def test_the_state_of_a_large_model_stays_a_page(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=7,
        hidden_size=2,
        num_hidden_layers=24,
        num_attention_heads=1,
        intermediate_size=2,
    )
    names = [name for name, _ in BertForPreTraining(config).named_parameters()]
    steps = {name: 200 if "layers.1" in name else 100 for name in names}
    moments = {k: {name: torch.ones(1) for name in names} for k in ("exp_avg", "exp_avg_sq")}
    saved = Snapshot({name: torch.ones(1) for name in names}, moments, steps)
    CheckpointManager(tmp_path).save("t", saved, state(7))
    assert len((tmp_path / "t" / "state.json").read_text().splitlines()) < 80
    assert CheckpointManager(tmp_path).load("t").snapshot().optimizer_steps == steps


@given(st.sets(st.from_regex(r"[a-c](\.([0-9]|1[0-9]|[a-c])){0,3}", fullmatch=True)))
def test_folded_names_unfold_to_the_same(names: set[str]) -> None:
    folded = _fold(sorted(names))
    assert len(folded) <= len(names)
    unfolded = [name for one in folded for name in _unfold(one)]
    assert len(unfolded) == len(names)
    assert set(unfolded) == names


def test_the_latest_is_the_furthest_and_a_begin_follows_its_stages_end(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("stage2_begin", snapshot(), state(10, stage=1))
    manager.save("stage1_end", snapshot(), state(10, stage=0))
    manager.save("step_00000009", snapshot(), state(9))
    latest = manager.latest()
    assert latest is not None
    assert latest.tag == "stage2_begin"


def test_a_folder_without_its_marker_does_not_exist(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("step_00000001", snapshot(), state(1))
    manager.save("step_00000002", snapshot(), state(2))
    (tmp_path / "step_00000002" / MARKER).unlink()
    latest = manager.latest()
    assert latest is not None
    assert latest.tag == "step_00000001"
    with pytest.raises(CheckpointError, match="there: step_00000001"):
        manager.load("step_00000002")


def test_a_changed_byte_is_noticed_and_the_one_before_is_taken(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("step_00000001", snapshot(), state(1))
    manager.save("step_00000002", snapshot(), state(2))
    path = tmp_path / "step_00000002" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    good, complaints = manager.latest_good()
    assert good is not None
    assert good.tag == "step_00000001"
    assert "step_00000002" in complaints[0]
    with pytest.raises(CheckpointError, match="changed since it was committed"):
        manager.load("step_00000002")


def test_only_the_last_periodic_tags_stay_and_every_stage_end(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2)
    manager.save("stage1_end", snapshot(), state(1))
    for step in range(2, 6):
        manager.save(f"step_{step:08d}", snapshot(), state(step))
    assert [c.tag for c in manager.committed()] == ["stage1_end", "step_00000004", "step_00000005"]


def test_a_killed_save_leaves_nothing_that_counts_and_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".step_00000001.999.tmp").mkdir()
    (tmp_path / ".step_00000001.999.tmp" / MARKER).write_text(json.dumps({"files": {}}))
    manager = CheckpointManager(tmp_path)
    assert manager.latest() is None
    manager.save("step_00000002", snapshot(), state(2))
    assert sorted(os.listdir(tmp_path)) == ["step_00000002"]


def test_a_tag_is_replaced_whole(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("stage1_end", snapshot(), state(1))
    manager.save("stage1_end", snapshot(), state(2))
    assert manager.load("stage1_end").state.global_step == 2
    assert os.listdir(tmp_path) == ["stage1_end"]


def test_an_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        CheckpointManager(tmp_path / "file" / "checkpoints").save("t", snapshot(), state(1))


def test_fresh_moments_are_saved_as_none(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("stage2_begin", Snapshot({"a": torch.ones(2)}), state(4, 1))
    assert manager.load("stage2_begin").snapshot().moments == {}


def spoil(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Checkpoint:
    """A checkpoint with a state.json that `change` has edited, committed as it is now."""
    CheckpointManager(tmp_path).save("t", snapshot(), state(1))
    path, marker = tmp_path / "t" / "state.json", tmp_path / "t" / MARKER
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    files = json.loads(marker.read_text())
    files["files"]["state.json"] = _fingerprint(path)
    marker.write_text(json.dumps(files))
    return CheckpointManager(tmp_path).load("t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(optimizer_steps=3),
            "of this format: state.json: optimizer_steps: Extra",
        ),
        (lambda d: d.pop("cohorts"), "of this format: state.json: cohorts: Field required"),
        (lambda d: d["cohorts"][0].update(names=["layers.5-2.in.weight"]), "got the range 5-2"),
        (lambda d: d["cohorts"][0].update(names=["layers.0-99999999.x"]), "got the range 0-9999"),
        (lambda d: d["cohorts"][0].update(names=["layers.0-,.x"]), "not a committed checkpoint"),
        (lambda d: d["cohorts"][0].update(optimizer_steps=-1), "not a committed checkpoint"),
        (lambda d: d["cohorts"][0].update(names=["other"]), "do not agree: other: 500 optimizer"),
        (lambda d: d["cohorts"].pop(1), "layers.3.in.weight: has either exp_avg or a step count"),
        (lambda d: d["cohorts"][2].update(names=["other"]), "do not agree: other: new, but no"),
        (lambda d: d["cohorts"].append(d["cohorts"][0]), "layers.0.in.weight: in two cohorts"),
    ],
)
def test_a_wrong_state_file_is_one_clear_error(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        spoil(tmp_path, change).snapshot()


def test_a_checkpoint_of_another_format_is_passed_over_with_its_name(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("step_00000002", snapshot(), state(2))
    old = {"global_step": 2, "stage": 0, "optimizer_steps": 2}
    (tmp_path / "step_00000002" / "state.json").write_text(json.dumps(old))
    found, complaints = manager.latest_good()
    assert found is None
    assert "step_00000002" in complaints[0]


def test_a_broken_state_file_hides_its_tag_and_nothing_else(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("step_00000001", snapshot(), state(1))
    manager.save("step_00000002", snapshot(), state(2))
    (tmp_path / "step_00000002" / "state.json").write_text("{")
    good, complaints = manager.latest_good()
    assert good is not None
    assert good.tag == "step_00000001"
    assert len(complaints) == 1


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("stage1_end", snapshot(), state(1))
    (tmp_path / "stage1_end").rename(tmp_path / ".stage1_end.old")
    manager.save("step_00000002", snapshot(), state(2))
    assert [c.tag for c in manager.committed()] == ["stage1_end", "step_00000002"]


def test_a_kill_while_an_old_tag_is_deleted_leaves_no_rubbish_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, keep_last=1)
    manager.save("step_00000001", snapshot(), state(1))

    def kill(path: Path, **_: object) -> None:
        if path.exists():
            (path / WEIGHTS).unlink()  # half-way
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            manager.save("step_00000002", snapshot(), state(2))
    assert [c.tag for c in manager.committed()] == ["step_00000002"]
    manager.mend()
    assert os.listdir(tmp_path) == ["step_00000002"]


def test_mending_brings_a_tag_back_that_was_being_replaced(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save("stage1_end", snapshot(), state(1))
    (tmp_path / "stage1_end").rename(tmp_path / ".stage1_end.old")
    manager.mend()
    assert manager.load("stage1_end").state == state(1)
    CheckpointManager(tmp_path / "none yet").mend()


def test_rewinding_sets_later_tags_aside_and_deletes_none(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        manager.save(f"step_{step:08d}", snapshot(), state(step))
    manager.save("stage1_end", snapshot(), state(3))
    manager.rewind("step_00000001")
    assert [c.tag for c in manager.committed()] == ["step_00000001"]
    assert (tmp_path / "superseded" / "stage1_end" / MARKER).exists()


def test_a_tag_is_a_name_and_no_path(tmp_path: Path) -> None:
    CheckpointManager(tmp_path / "a").save("stage1_end", snapshot(), state(1))
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        CheckpointManager(tmp_path / "b").load("../a/stage1_end")


def test_a_bad_sector_leads_to_the_tag_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        manager.save(f"step_{step}", snapshot(), state(step))
    whole = checkpoint._fingerprint

    def fingerprint(path: Path) -> dict[str, object]:
        if path.parent.name == "step_2" and path.suffix == ".safetensors":
            raise OSError(5, "Input/output error")
        return whole(path)

    monkeypatch.setattr(checkpoint, "_fingerprint", fingerprint)
    found, complaints = manager.latest_good()
    assert found is not None
    assert found.tag == "step_1"
    assert ["Input/output error" in line for line in complaints] == [True]


def test_all_files_of_a_tag_may_be_read_by_the_same_people(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save("t", snapshot(), state(1))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "t").iterdir()}
    assert set(modes.values()) == {modes["state.json"]}, modes
    assert len(modes) == 4


def test_a_rewind_that_is_cut_short_leaves_the_furthest_tags_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        manager.save(f"step_{step}", snapshot(), state(step))
    moved = []

    def rename(path: Path, target: Path) -> None:
        moved.append(path.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        manager.rewind("step_1")
    assert moved == ["step_3"]
