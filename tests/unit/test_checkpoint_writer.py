"""Saving in a thread: training goes on meanwhile, order and faults are kept."""

import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

from stacking.checkpoint import CheckpointManager, TrainState
from stacking.checkpoint_writer import CheckpointWriter
from stacking.errors import CheckpointError
from stacking.snapshot import Snapshot


class SlowManager(CheckpointManager):
    """Waits at the door until the test opens it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.door = threading.Event()

    def save(self, tag: str, snapshot: Snapshot, state: TrainState) -> None:
        assert self.door.wait(30)
        super().save(tag, snapshot, state)


def state(step: int) -> TrainState:
    return TrainState(
        global_step=step, stage=0, num_hidden_layers=1, loader={}, recipe_sha256="x"
    )  # fmt: skip


def write_and_fail(manager: CheckpointManager) -> None:
    """A save under way when something else goes wrong."""
    with closing(CheckpointWriter(manager)) as writer:
        writer.write("step_1", SNAPSHOT, state(1))
        raise KeyError


SNAPSHOT = Snapshot({"w": torch.arange(6.0)})


def tags(manager: CheckpointManager) -> list[str]:
    return [checkpoint.tag for checkpoint in manager.committed()]


def test_write_returns_before_the_tag_exists_and_settle_when_it_does(tmp_path: Path) -> None:
    manager = SlowManager(tmp_path)
    with closing(CheckpointWriter(manager)) as writer:
        writer.write("step_1", SNAPSHOT, state(1))
        assert tags(manager) == []
        assert not writer.has_failed
        manager.door.set()
        writer.settle()
        assert tags(manager) == ["step_1"]


def test_leaving_finishes_what_was_begun_also_after_an_error(tmp_path: Path) -> None:
    manager = SlowManager(tmp_path)
    threading.Timer(0.2, manager.door.set).start()
    with pytest.raises(KeyError):
        write_and_fail(manager)
    assert tags(manager) == ["step_1"]


def test_a_fault_is_known_without_waiting_and_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with closing(CheckpointWriter(CheckpointManager(tmp_path / "file"))) as writer:
        writer.write("step_1", SNAPSHOT, state(1))
        for _ in range(300):
            if writer.has_failed:
                break
            threading.Event().wait(0.01)
        assert writer.has_failed
        with pytest.raises(CheckpointError, match="'step_1' could not be written"):
            writer.settle()
        writer.settle()
        assert not writer.has_failed


def test_after_another_error_the_fault_is_logged_and_the_error_stays(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    caught = pytest.warns(UserWarning, match="could not be written")
    with caught, pytest.raises(KeyError):
        write_and_fail(CheckpointManager(tmp_path / "file"))


def test_a_writer_without_snapshots_starts_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with closing(CheckpointWriter(CheckpointManager(tmp_path))) as writer:
        writer.settle()
        assert threading.active_count() == before


def test_a_disk_that_hangs_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    manager = SlowManager(tmp_path)
    writer = CheckpointWriter(manager)
    writer.write("step_1", SNAPSHOT, state(1))
    with pytest.warns(UserWarning, match="a save did not end"):
        writer.close(at_most=0.05)
    assert tags(manager) == []
    manager.door.set()  # or the thread would keep pytest from ending


def test_closing_waits_also_for_a_save_that_another_thread_settles(tmp_path: Path) -> None:
    """As the watch does when a rank is lost while the main thread waits for the disk."""
    manager = SlowManager(tmp_path)
    writer = CheckpointWriter(manager)
    writer.write("step_1", SNAPSHOT, state(1))
    settling = threading.Thread(target=writer.settle)
    settling.start()
    threading.Event().wait(0.1)  # until it waits
    threading.Timer(0.2, manager.door.set).start()
    writer.close(at_most=30)
    assert tags(manager) == ["step_1"]
    settling.join()
