"""benchmarks/glue_parity.py without training: fewer rows for both sides, and what is done stays."""

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tuned import write_model
from glue_sets import write_glue

from stacking.errors import ConfigError, UserError
from stacking.glue_data import read_glue
from stacking.glue_tasks import BY_NAME
from stacking.glue_training import GlueJob, GlueRows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("glue_parity")


@pytest.fixture
def asked(tmp_path: Path) -> argparse.Namespace:
    glue = write_glue(tmp_path / "glue")
    return argparse.Namespace(
        model=write_model(tmp_path / "run"), glue=glue, out=tmp_path / "out", rows=3, epochs=None,
        learning_rate=5e-5, dropout=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["CoLA", "QNLI"])  # without a header, and with one
def test_fewer_rows_are_rows_of_the_file_and_dev_is_whole(
    parity: Any, asked: argparse.Namespace, name: str
) -> None:
    task = BY_NAME[name]
    folder = parity.with_fewer_rows(asked, task)
    whole, part = (read_glue(place, task, "train").examples for place in (asked.glue, folder))
    texts = [(one.first, one.label) for one in whole]
    kept = [(one.first, one.label) for one in part]
    assert kept == [texts[0], texts[len(texts) // 3], texts[-1]]
    assert read_glue(folder, task, "dev").examples == read_glue(asked.glue, task, "dev").examples
    asked.rows = 1_000
    with pytest.raises(UserError, match=rf"--rows: got 1000; allowed: 1 to {len(texts)}"):
        parity.with_fewer_rows(asked, task)


def test_transformers_side_is_done_once_and_belongs_to_its_setting(
    parity: Any, asked: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GlueJob] = []

    def stub(job: GlueJob, head: str) -> dict[str, float]:
        seen.append(job)
        return {"accuracy": 51.0}

    monkeypatch.setattr(parity, "fine_tune_transformers", stub)
    job = parity.job_of(asked, BY_NAME["SST-2"], seed=1)
    assert job.setting.num_epochs == 3
    assert job.glue == asked.out / "glue_3"
    first, again = (parity.transformers_result(job, "zero") for _ in range(2))
    assert first[0] == {"accuracy": 51.0}
    assert first == again
    assert seen == [job]
    parity.transformers_result(job, "drawn")
    assert seen == [job, job]
    asked.epochs = 1
    with pytest.raises(ConfigError, match="is of another setting; give another --out"):
        parity.transformers_result(parity.job_of(asked, BY_NAME["SST-2"], seed=1), "zero")


def test_both_sides_see_the_same_pairs_in_the_same_order(
    parity: Any, asked: argparse.Namespace
) -> None:
    """MRPC swaps half of its pairs: transformers' side must swap the same ones."""
    job = parity.job_of(asked, BY_NAME["MRPC"], seed=3)
    train, start = read_glue(asked.glue, BY_NAME["MRPC"], "train"), job.start.load()
    rows = GlueRows.of(train, start, job.max_seq_length)
    for number in range(4):
        theirs = parity.swapped(train, np.random.default_rng((job.seed, number, 1)))
        ours = rows.epoch(number, job.seed)
        expected = GlueRows.of(theirs, start, job.max_seq_length)
        everything = np.arange(len(rows))
        assert torch.equal(
            ours.labelled_batch(everything).input_ids, expected.labelled_batch(everything).input_ids
        )
    assert any(
        parity.swapped(train, np.random.default_rng((job.seed, number, 1))) != train
        for number in range(4)
    )
