"""What several integration tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import script
from mounts import OWN_NAMESPACE, can_mount
from warm_jobs import WarmJobs, warm


@pytest.fixture(scope="session")
def warm_jobs() -> Iterator[WarmJobs]:
    """Jobs that start in a second, with mounts of their own where this user may have them."""
    with warm(OWN_NAMESPACE if can_mount() else ()) as jobs:
        yield jobs


@pytest.fixture(scope="session")
def small_shards(tiny_data: Path) -> Path:
    """The same text in shards of 40 rows, so that runs go from one to the next."""
    out = tiny_data.with_name("small_shards")
    done = script(
        "prepare_data.py", "shards", tiny_data.with_name("train.jsonl"),
        "--validation", tiny_data.with_name("valid.jsonl"), "--out", out, "--vocab-size", 400,
        "--max-seq-length", 32, "--pairs", "nsp", "--workers", 1, "--rows-per-shard", 40,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out
