"""Shards of the shipped corpus, small enough for a test, made once by the real command."""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT, script
from mounts import OWN_NAMESPACE, can_mount
from warm_jobs import WarmJobs, warm

SAMPLE = ROOT / "data_prep" / "sample"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training and 40 validation documents, vocabulary 400, S = 32, sentence pairs."""
    folder = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 300), ("valid", 40)):
        with lzma.open(SAMPLE / f"wiki_intros_{split}.cc-by-sa-4.0.jsonl.xz", "rt") as lines:
            texts = [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    done = script(
        "prepare_data.py", "shards", folder / "train.jsonl", "--validation", folder / "valid.jsonl",
        "--out", folder / "shards", "--vocab-size", 400, "--max-seq-length", 32, "--pairs", "nsp",
        "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "shards"


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
