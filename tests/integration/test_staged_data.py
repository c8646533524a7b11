"""--stage-data: the same run from copies on the node, and one message where they cannot be made."""

import itertools
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import torch
from launching import rows
from mounts import Mounts, can_mount, fill
from ranks import run_on_ranks
from same_run import arguments, assert_the_same_run, engine_json, figures
from warm_jobs import Job, WarmJobs

from stacking import distributed, run_staging
from stacking.errors import UserError
from stacking.run_staging import DataPlace, Session

CHANGES = ("stages.0.steps=5", "stages.1.steps=2", "stages.2.steps=2")
STOPS_AT = 3
ALL_THERE = "all shards that are needed lie in "
DISK_BYTES = 4 << 20
needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="needs to mount a file system in a namespace of its own (root)"
)


@pytest.fixture
def shared(small_shards: Path, tmp_path: Path) -> Path:
    """A data folder that a test may damage."""
    return Path(shutil.copytree(small_shards, tmp_path / "shared"))


def start(jobs: WarmJobs, data: Path, folder: Path, *words: object, file_bytes: int = 0) -> Job:
    """Two ranks of one node; what they write lies in `folder`."""
    command = arguments(data, folder / "run", engine_json(folder, 0), CHANGES)
    return jobs.start([*command, *words], folder, 2, file_bytes=file_bytes or None)


def assert_refused(job: Job, *words: str) -> None:
    """Exit code 2 on all ranks, and one message that says all this."""
    assert job.wait(60) == [2, 2], job.output() + job.errors()
    said = job.errors()
    assert said.count("error: ") == 1, said
    assert said.startswith("error: on rank 0 (host "), said
    assert "Traceback" not in said
    for word in words:
        assert word in said


def test_a_run_from_copies_is_the_same_run_and_does_without_the_shared_shards(
    warm_jobs: WarmJobs, small_shards: Path, shared: Path, tmp_path: Path
) -> None:
    for name in ("plain", "staged", "node"):
        (tmp_path / name).mkdir()
    staged = ("--stage-data", tmp_path / "node")
    first = start(warm_jobs, shared, tmp_path / "staged", *staged, "--max-steps", STOPS_AT)
    assert first.wait() == [3, 3], first.output() + first.errors()
    num_shards = len(list(shared.glob("*.hdf5")))
    assert f"staging {num_shards} shards (" in first.output()
    for path in shared.glob("*.hdf5"):
        path.rename(path.with_suffix(".away"))
    second = start(warm_jobs, shared, tmp_path / "staged", *staged)
    assert second.wait() == [0, 0], second.output() + second.errors()
    assert ALL_THERE in second.output()
    plain = start(warm_jobs, small_shards, tmp_path / "plain")
    assert plain.wait() == [0, 0], plain.output() + plain.errors()
    assert_the_same_run(tmp_path / "staged" / "run", tmp_path / "plain" / "run")
    starts = [rows(tmp_path / name / "run", "run_start")[0] for name in ("staged", "plain")]
    for key in ("data_fingerprint", "validation_fingerprint", "unigram_loss"):
        assert starts[0][key] == starts[1][key]


@pytest.mark.slow
def test_a_run_that_was_begun_from_the_shared_folder_goes_on_from_copies(
    warm_jobs: WarmJobs, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "node").mkdir()
    first = start(warm_jobs, shared, tmp_path, "--max-steps", STOPS_AT)
    assert first.wait() == [3, 3], first.output() + first.errors()
    before = figures(tmp_path / "run", "train")
    second = start(warm_jobs, shared, tmp_path, "--stage-data", tmp_path / "node",
                   "--max-steps", STOPS_AT + 1)  # fmt: skip
    assert second.wait() == [3, 3], second.output() + second.errors()
    assert f"at step {STOPS_AT} of" in second.output()
    after = figures(tmp_path / "run", "train")
    assert {step: after[step] for step in before} == before
    assert STOPS_AT + 1 in after


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("nowhere", "no such folder; make a folder on every node"),
        ("a_file", "is not a folder; make a folder on every node"),
        ("data/inside", "lies in --data .*, which is to be copied"),
        ("", "names no folder"),
    ],
)
def test_a_folder_that_cannot_be_one_is_one_message(
    warm_jobs: WarmJobs, small_shards: Path, tmp_path: Path, given: str, fault: str
) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "data" / "inside").mkdir(parents=True)
    for shard in small_shards.iterdir():
        (tmp_path / "data" / shard.name).symlink_to(shard)
    folder = tmp_path / given if given else ""
    job = start(warm_jobs, tmp_path / "data", tmp_path, "--stage-data", folder)
    assert job.wait(60) == [2, 2], job.output() + job.errors()
    said = job.errors()
    assert said.count("error: ") == 1
    assert re.search(rf"--stage-data {re.escape(str(folder or Path()))}: {fault}", said), said


def test_a_damaged_shard_is_one_message(warm_jobs: WarmJobs, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    damaged = sorted(shared.glob("training*"))[3]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    job = start(warm_jobs, shared, tmp_path, "--stage-data", tmp_path / "node")
    assert_refused(job, f"{damaged}: its sha256 is not the manifest's", "copy it again")


# -- two nodes, each a process with folders of its own ---------------------------------------------

DAMAGED = "training_00003.hdf5"


class Case(NamedTuple):
    """What each node is given, and the round before which rank 1 wants to stop; -1: none."""

    shared: tuple[Path, Path]
    nodes: tuple[Path, Path]
    stops_at: int = -1


def two_nodes(cases: dict[str, Case]) -> dict[str, list[str]]:
    """Of each case what the user is told, then the result or the fault; a shard a round."""
    os.environ["LOCAL_RANK"] = "0"
    torch.distributed.init_process_group("gloo")
    run_staging.ROUND_SECONDS = 0.0
    told = {name: one_case(case, distributed.rank()) for name, case in cases.items()}
    distributed.shut_down()
    return told


def one_case(case: Case, rank: int) -> list[str]:
    rounds, lines = itertools.count(), list[str]()
    session = Session(
        mark=lambda: None,
        say=lines.append,
        is_stopping=lambda: rank == 1 and next(rounds) == case.stops_at,
    )
    place = DataPlace(case.shared[rank], case.nodes[rank])
    try:
        place.open()
        names = {path.name for path in place.folder.glob("*.hdf5")}
        is_full = place.fill(lambda: names, session)
        lines.append(f"full: {is_full}, copies: {len(copies_in(case.nodes[rank]))}")
    except UserError as error:
        lines.append(f"error: {error}")
    return lines


def copies_in(node: Path) -> set[str]:
    return {path.name for path in node.glob("*/*.hdf5") if not path.is_symlink()}


@pytest.fixture(scope="module")
def cases(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("nodes")
    damaged = Path(shutil.copytree(small_shards, folder / "damaged"))
    with (damaged / DAMAGED).open("r+b") as file:
        file.truncate(5000)
    other = Path(shutil.copytree(small_shards, folder / "other"))
    with (other / "manifest.json").open("a") as manifest:
        manifest.write("\n")

    def nodes(name: str) -> tuple[Path, Path]:
        made = (folder / name / "1", folder / name / "2")
        for node in made:
            node.mkdir(parents=True)
        return made

    stopped = nodes("stopped")
    good = small_shards
    return {
        "damaged": Case((good, damaged), nodes("damaged_nodes")),
        "stopped": Case((good, good), stopped, stops_at=2),
        "continued": Case((good, good), stopped),
        "other": Case((good, other), nodes("other_nodes")),
        "unmounted": Case((good, folder / "nowhere"), nodes("unmounted")),
    }


@pytest.fixture(scope="module")
def told(cases: dict[str, Case]) -> list[dict[str, list[str]]]:
    """By rank, then by case."""
    answers = run_on_ranks(two_nodes, 2, cases)
    return cast("list[dict[str, list[str]]]", answers)


def test_a_node_that_cannot_copy_ends_all_after_its_round_by_name(
    told: list[dict[str, list[str]]], cases: dict[str, Case]
) -> None:
    case = cases["damaged"]
    for rank in range(2):
        last = told[rank]["damaged"][-1]
        assert last.startswith("error: on rank 1 (host "), last
        assert f"{case.shared[1] / DAMAGED}: its sha256 is not the manifest's" in last
    before = {f"training_{number:05d}.hdf5" for number in range(3)}
    assert [copies_in(node) for node in case.nodes] == [before | {DAMAGED}, before]


def test_a_wish_to_stop_on_one_node_is_obeyed_on_all_and_copying_goes_on_later(
    told: list[dict[str, list[str]]], small_shards: Path
) -> None:
    whole = len(list(small_shards.glob("*.hdf5")))
    for rank in range(2):
        assert told[rank]["stopped"][-1] == "full: False, copies: 2"
        assert told[rank]["continued"][-1] == f"full: True, copies: {whole}"
    first, *progress, _, _ = told[0]["continued"]
    assert first.startswith(f"staging {2 * (whole - 2)} shards (")
    assert first.endswith(" of 2 nodes; all ranks wait")
    assert len(progress) == whole - 3
    assert progress[0].startswith(f"staging: {2 * (whole - 3)} shards (")


@pytest.mark.parametrize(
    ("name", "has"), [("other", "manifest [0-9a-f]{12}"), ("unmounted", "no such folder")]
)
def test_a_node_with_other_data_is_named_on_all(
    name: str, has: str, told: list[dict[str, list[str]]]
) -> None:
    for rank in range(2):
        assert len(told[rank][name]) == 1
        last = told[rank][name][0]
        assert last.startswith("error: the ranks do not agree; mount the same folder"), last
        assert re.search(rf"rank 1 \(host [^,]+, pid \d+\) has {has}", last)


# -- disks -----------------------------------------------------------------------------------------


@needs_mounts
def test_a_disk_that_is_too_small_or_fills_up_or_is_read_only_is_one_message(
    warm_jobs: WarmJobs, small_shards: Path, tmp_path: Path
) -> None:
    mounts, node = Mounts(warm_jobs), tmp_path / "node"
    node.mkdir()
    staged = ("--stage-data", node)
    fills_up = start(warm_jobs, small_shards, tmp_path, *staged, file_bytes=8000)
    assert_refused(fills_up, f"--stage-data {node}: cannot be written", "free some space")
    mounts.small_disk(node, DISK_BYTES)
    fill(mounts.seen(node))
    (mounts.seen(node) / "filler").open("r+b").truncate(DISK_BYTES // 2)
    (mounts.seen(node) / "more").write_bytes(bytes(DISK_BYTES // 2 - 250_000))
    too_small = start(warm_jobs, small_shards, tmp_path, *staged)
    assert_refused(too_small, f"--stage-data {node}: ", "MiB of shards are still to be copied")
    mounts.undo(node)
    mounts.make_read_only(node)
    read_only = start(warm_jobs, small_shards, tmp_path, *staged)
    assert_refused(read_only, f"--stage-data {node}: cannot be written", "Read-only file system")
    mounts.undo(node)
