"""stacking.node_copies and the plan of what is copied: whole shards or none, whoever is killed."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shard_format import Manifest, ShardEntry, file_sha256, write_manifest
from stacking import distributed, node_copies
from stacking.config import BertConfig, DataConfig, EvaluationConfig, LearningRateConfig, Recipe
from stacking.config_stage import Learned, Stage
from stacking.dataset import PREFETCHED_STEPS, open_shards
from stacking.errors import ShardError, UserError
from stacking.node_copies import NodeCopies
from stacking.run_data import RunData
from stacking.sample_order import BLOCK_ROWS, GROUP_BLOCKS, SampleOrder
from stacking.shard_reader import RowReader

LENGTH = 8
ROWS = (5, 4, 4)  # of each training shard
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
FIRST = "training_00000.hdf5"
KILLED_BY_SIZE = -signal.SIGXFSZ
END_OF_COPY = {
    "before its bytes are on the disk": (os, "fsync"),
    "before it gets its name": (Path, "replace"),
    "after that": (node_copies, "sync_folder"),
}
"""Where else a copy can be killed, and the call that is not made."""


@pytest.fixture(scope="module", autouse=True)
def in_several_blocks() -> Iterator[None]:
    """A shard here has a few thousand bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_copies, "_BLOCK_BYTES", 700)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("shared"), ROWS)


def make_source(folder: Path, rows: tuple[int, ...], validation: tuple[int, ...] = (3,)) -> Path:
    """A data folder whose second token tells the row."""
    manifest = Manifest(
        format_version=1, dialect="unmasked", max_seq_length=LENGTH, max_predictions_per_seq=0,
        vocab_size=65536, tokenizer_sha256="", special_token_ids=SPECIAL,
        has_next_sentence_labels=False, seed=1, num_documents={},
        training=write_shards(folder, "training", rows),
        validation=write_shards(folder, "validation", validation),
    )  # fmt: skip
    write_manifest(folder, manifest)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_shards(folder: Path, split: str, rows: tuple[int, ...]) -> tuple[ShardEntry, ...]:
    found, start = [], 0
    for index, size in enumerate(rows):
        path = folder / f"{split}_{index:05d}.hdf5"
        ids = np.full((size, LENGTH), 9, "u2")
        ids[:, 1] = np.arange(start, start + size) % 60000
        with h5py.File(path, "w") as file:
            file["input_ids"] = ids
            file["segment_ids"] = np.zeros((size, LENGTH), "i1")
        found.append(ShardEntry(path.name, size, file_sha256(path)))
        start += size
    return tuple(found)


def linked(source: Path, stage_dir: Path) -> NodeCopies:
    copies = NodeCopies(source, stage_dir)
    copies.link()
    return copies


def names_of(source: Path) -> list[str]:
    return sorted(path.name for path in source.glob("*.hdf5"))


def temporaries(copies: NodeCopies) -> list[Path]:
    return list(copies.folder.glob(".*.tmp"))


def second_tokens(folder: Path) -> list[int]:
    shards = open_shards(folder, "training")
    rows = RowReader(shards).read(np.arange(shards.num_rows))
    return [int(token) for token in rows["input_ids"][:, 1]]


def in_a_child(task: Callable[[], int | None]) -> int:
    """Exit code of a fork that does the task: what it returns; -N if signal N killed it."""
    child = os.fork()
    if child == 0:
        code = 100
        try:
            code = task() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- copies and links ------------------------------------------------------------------------------


def test_a_folder_of_links_and_copies_is_read_like_the_shared_one(
    source: Path, tmp_path: Path
) -> None:
    copies = linked(source, tmp_path)
    everything = names_of(source)
    assert set(copies.missing(everything)) == set(everything)
    copies.copy(FIRST)
    assert set(copies.missing(everything)) == set(everything) - {FIRST}
    assert not (copies.folder / FIRST).is_symlink()
    assert (copies.folder / FIRST).read_bytes() == (source / FIRST).read_bytes()
    assert second_tokens(copies.folder) == list(range(sum(ROWS)))
    theirs, ours = open_shards(source, "training"), open_shards(copies.folder, "training")
    assert ours.fingerprint == theirs.fingerprint
    assert (copies.folder / "tokenizer.json").read_text() == "{}"


def test_a_second_job_uses_the_copies_even_when_the_shared_shards_are_gone(
    tmp_path: Path,
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "node").mkdir()
    source = make_source(tmp_path / "shared", ROWS)
    copies = linked(source, tmp_path / "node")
    for name in names_of(source):
        copies.copy(name)
    inodes = {path.name: path.stat().st_ino for path in copies.folder.glob("*.hdf5")}
    names = names_of(source)
    for name in names:
        (source / name).unlink()
    again = linked(source, tmp_path / "node")
    assert again.missing(names) == {}
    assert {path.name: path.stat().st_ino for path in again.folder.glob("*.hdf5")} == inodes
    assert second_tokens(again.folder) == list(range(sum(ROWS)))


def test_other_data_get_a_folder_of_their_own(source: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    others = make_source(tmp_path / "others", (2, 2))
    assert linked(others, tmp_path).folder != linked(source, tmp_path).folder


def test_small_files_are_those_of_today(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    source = make_source(tmp_path / "shared", ROWS)
    linked(source, tmp_path)
    (source / "tokenizer.json").write_text('{"a": 1}')
    assert (linked(source, tmp_path).folder / "tokenizer.json").read_text() == '{"a": 1}'
    (source / "tokenizer.json").unlink()
    assert not (linked(source, tmp_path).folder / "tokenizer.json").exists()


def test_a_copy_of_another_size_is_made_again(source: Path, tmp_path: Path) -> None:
    copies = linked(source, tmp_path)
    copies.copy(FIRST)
    with (copies.folder / FIRST).open("r+b") as file:
        file.truncate(100)
    assert FIRST in linked(source, tmp_path).missing([FIRST])
    copies.copy(FIRST)
    assert (copies.folder / FIRST).read_bytes() == (source / FIRST).read_bytes()


def test_links_follow_a_shared_folder_that_was_moved(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    linked(make_source(tmp_path / "before", ROWS), tmp_path)
    moved = (tmp_path / "before").rename(tmp_path / "after")
    assert second_tokens(linked(moved, tmp_path).folder) == list(range(sum(ROWS)))


# -- kills -----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_copy_killed_at_any_byte_is_not_taken_for_whole(
    data: st.DataObject, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The kernel kills the child at the byte: no file may grow beyond it."""
    size = (source / FIRST).stat().st_size
    byte = data.draw(st.one_of(st.integers(1, size - 1), st.just(1), st.just(size - 1)))
    copies = linked(source, tmp_path_factory.mktemp("node"))

    def task() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
        copies.copy(FIRST)

    assert in_a_child(task) == KILLED_BY_SIZE
    assert [path.stat().st_size for path in temporaries(copies)] == [byte]
    assert_goes_on(source, copies)


@pytest.mark.parametrize("moment", END_OF_COPY)
def test_a_copy_killed_at_its_end_is_whole_or_none(
    moment: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = linked(source, tmp_path)

    def kill(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def task() -> None:
        monkeypatch.setattr(*END_OF_COPY[moment], kill)
        copies.copy(FIRST)

    assert in_a_child(task) == -signal.SIGKILL
    if moment == "after that":
        assert copies.missing([FIRST]) == {}
        assert (copies.folder / FIRST).read_bytes() == (source / FIRST).read_bytes()
    else:
        assert_goes_on(source, copies)


def assert_goes_on(source: Path, killed: NodeCopies) -> None:
    """The shard is still the shared one; the next job clears up and copies it."""
    assert FIRST in killed.missing([FIRST])
    assert second_tokens(killed.folder) == list(range(sum(ROWS)))
    again = linked(source, killed.folder.parent)
    assert not temporaries(again)
    again.copy(FIRST)
    assert again.missing([FIRST]) == {}
    assert (again.folder / FIRST).read_bytes() == (source / FIRST).read_bytes()


def test_two_jobs_at_once_copy_each_shard_once(source: Path, tmp_path: Path) -> None:
    """Each child tells by its exit code how many it copied."""
    names, both = names_of(source), multiprocessing.get_context("fork").Barrier(2)
    linked(source, tmp_path)

    def job() -> int:
        both.wait(30)
        copies = linked(source, tmp_path)
        return sum(copies.copy(name) > 0 for name in names)

    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(in_a_child, job) for _ in range(2)]
    assert sum(end.result() for end in ends) == len(names)
    copies = linked(source, tmp_path)
    assert copies.missing(names) == {}
    assert not temporaries(copies)
    for name in names:
        assert (copies.folder / name).read_bytes() == (source / name).read_bytes()


def test_without_locks_renames_keep_copies_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    copies = linked(source, tmp_path)
    others = copies.folder / f".{FIRST}.elsewhere.1.tmp"  # a job under way, for all that is known
    others.write_text("half")
    linked(source, tmp_path).copy(FIRST)
    assert copies.missing([FIRST]) == {}
    assert others.exists()


# -- faults ----------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_damaged_source_is_refused_by_name_and_leaves_nothing(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = make_source(tmp_path_factory.mktemp("shared"), ROWS)
    content = bytearray((source / FIRST).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    (source / FIRST).write_bytes(content)
    copies = linked(source, tmp_path_factory.mktemp("node"))
    with pytest.raises(ShardError, match=f"{FIRST}: its sha256 is not the manifest's"):
        copies.copy(FIRST)
    assert (copies.folder / FIRST).is_symlink()
    assert not temporaries(copies)


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    source = make_source(tmp_path / "shared", ROWS)
    copies = linked(source, tmp_path)
    (source / FIRST).unlink()
    for step in (copies.copy, lambda name: copies.missing([name])):
        with pytest.raises(ShardError, match=f"shared/{FIRST}: cannot be read"):
            step(FIRST)


def test_a_disk_that_fills_up_is_the_users_to_mend_and_leaves_nothing(
    source: Path, tmp_path: Path
) -> None:
    """A file that may grow no further, in a child: Python makes an error of the kernel's signal."""
    copies = linked(source, tmp_path)

    def task() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(UserError, match=r"--stage-data .*cannot be written.*free some space"):
            copies.copy(FIRST)

    assert in_a_child(task) == 0
    assert not temporaries(copies)
    assert FIRST in copies.missing([FIRST])


def test_room_is_asked_for_before(source: Path, tmp_path: Path) -> None:
    copies = linked(source, tmp_path)
    copies.check_room(1)
    with pytest.raises(UserError, match=r"1,048,576\.0 MiB of shards are still .* MiB are free"):
        copies.check_room(2**40)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder with a manifest\.json"):
        NodeCopies(tmp_path, tmp_path)


# -- what is copied --------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    num_blocks=st.integers(1, 40), short=st.integers(0, BLOCK_ROWS - 1), seed=st.integers(0, 99),
    start=st.floats(0, 2.5), length=st.floats(0, 1.5),
)  # fmt: skip
def test_the_blocks_of_a_stretch_are_those_of_its_groups(
    num_blocks: int, short: int, seed: int, start: float, length: float
) -> None:
    num_rows = num_blocks * BLOCK_ROWS - short
    first = int(start * num_rows)
    stop = first + 1 + int(length * num_rows)
    order = SampleOrder(num_rows, seed)
    blocks = order.blocks(first, stop).tolist()
    assert blocks == sorted(set(blocks))
    rows, _ = order.locate(np.arange(first, stop))
    read = set((rows // BLOCK_ROWS).tolist())
    assert read <= set(blocks)
    if stop - first <= BLOCK_ROWS:  # in at most two groups of an epoch, or of two epochs
        assert len(blocks) <= 2 * GROUP_BLOCKS


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 shards of 1024 rows: four in a block, 64 in a group of the order."""
    return make_source(tmp_path_factory.mktemp("many"), (1024,) * 200, validation=(30,) * 8)


BATCH = 16
GROUP_STEPS = GROUP_BLOCKS * BLOCK_ROWS // BATCH  # optimizer steps on one group
RECIPE = Recipe(
    name="a",
    seed=5,
    model=BertConfig(
        vocab_size=65536, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=LENGTH, num_nsp_labels=0, pooler=False,
    ),
    data=DataConfig(max_seq_length=LENGTH, max_predictions_per_seq=2),
    evaluation=EvaluationConfig(max_sequences=4, batch_size=2),
    global_batch_size=BATCH,
    learning_rate=LearningRateConfig(schedule="constant", warmup_steps=0),
    stages=(
        Stage(num_hidden_layers=1, steps=GROUP_STEPS - 5),
        Stage(num_hidden_layers=2, steps=100_000, learned=Learned(steps=3, batch_size=4)),
    ),
)  # fmt: skip


def of_training(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("training")}


def test_a_session_reads_what_it_needs_and_needs_not_all(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step is a group's: the loader, which reads ahead, goes on into the next one."""
    data, first = RunData(RECIPE, many), GROUP_STEPS - 3
    named = data.shards_read(first, GROUP_STEPS)
    assert len(of_training(named)) == 64 + 64
    assert len(named - of_training(named)) == 4  # rows 0, 60, 120 and 180 of 240
    read: set[str] = set()
    monkeypatch.setattr(
        "stacking.shard_reader.ShardSet.verify", lambda self, shard: read.add(shard.path.name)
    )
    with data.loader(1, BATCH) as loader:
        loader.load_state_dict({**loader.state_dict(), "samples_consumed": first * BATCH})
        for _ in range(3 + PREFETCHED_STEPS + 1):
            next(loader)
    list(data.validation(1))
    assert read <= named
    assert read - of_training(read) == named - of_training(named)


def test_an_epoch_needs_all(many: Path) -> None:
    last = 1024 * 200 // BATCH
    assert of_training(RunData(RECIPE, many).shards_read(0, last)) == of_training(
        set(names_of(many))
    )


def test_what_a_growth_map_is_learned_on_is_needed_where_it_is_learned(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = RunData(RECIPE, many)
    others_blocks = SampleOrder(1024 * 200, RECIPE.seed + 1).blocks(0, 3 * 4)
    learned_on = {
        f"training_{4 * b + i:05d}.hdf5" for b in others_blocks.tolist() for i in range(4)
    }
    last = GROUP_STEPS - 5  # of the first stage
    before = data.shards_read(0, last - 1)
    assert data.shards_read(0, last) == before | learned_on != before
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert data.shards_read(0, last) == before


def test_the_folders_name_tells_the_manifest(source: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((source / "manifest.json").read_bytes()).hexdigest()
    assert digest.startswith(NodeCopies(source, tmp_path).folder.name)
