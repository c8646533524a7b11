"""Checkpoints: what is saved comes back bit for bit; nothing half-written or changed is taken."""

import json
import os
from pathlib import Path

import pytest
import torch

from stacking.checkpoint import MARKER, WEIGHTS, CheckpointManager, TrainState
from stacking.errors import CheckpointError
from stacking.snapshot import Snapshot


def state(step: int, stage: int = 0, optimizer_steps: int = 3) -> TrainState:
    return TrainState(
        global_step=step,
        stage=stage,
        num_hidden_layers=2,
        optimizer_steps=optimizer_steps,
        loader={"samples_consumed": 5 * step},
        recipe_sha256="0" * 64,
    )


def snapshot() -> Snapshot:
    weights = {"a": torch.randn(3, 5), "b": torch.randn(7)}
    moments = {
        k: {n: torch.rand_like(w) for n, w in weights.items()} for k in ("exp_avg", "exp_avg_sq")
    }
    return Snapshot(weights, moments, optimizer_steps=3, loss_scale=None)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    manager, saved = CheckpointManager(tmp_path), snapshot()
    manager.save("step_00000007", saved, state(7))
    loaded = manager.load("step_00000007")
    assert loaded.state == state(7)
    back = loaded.snapshot()
    assert back.optimizer_steps == 3
    for name, tensor in saved.weights.items():
        assert torch.equal(back.weights[name], tensor)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(back.moments[key][name], saved.moments[key][name])


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
    manager.save("stage2_begin", Snapshot({"a": torch.ones(2)}), state(4, 1, optimizer_steps=0))
    assert manager.load("stage2_begin").snapshot().moments == {}


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
