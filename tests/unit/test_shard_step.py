"""data_prep.shard_step: the shards are all rows in the order of their keys, cut equally."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.instances import row_type
from data_prep.row_step import ChunkRows
from data_prep.shard_step import shard_job, shard_jobs
from data_prep.shard_writer import ShardLayout
from data_prep.workspace import Workspace


@pytest.mark.parametrize(("sizes", "per_shard"), [((40, 1, 33, 27), 20), ((5,), 100), ((9, 9), 1)])
def test_rows_come_in_the_order_of_their_keys(
    tmp_path: Path, sizes: tuple[int, ...], per_shard: int
) -> None:
    workspace = Workspace(tmp_path)
    workspace.make_folders()
    dtype = row_type(8, 60_000, has_pairs=False)
    generator = np.random.default_rng(1)
    total = sum(sizes)
    keys = generator.integers(0, 1 << 63, total, np.uint64)
    rows = np.zeros(total, dtype)
    rows["input_ids"][:, 0] = np.arange(total)
    chunks, first = [], 0
    for index, size in enumerate(sizes):
        order = first + np.argsort(keys[first : first + size])
        path = workspace.rows("training", index)
        rows[order].tofile(path)
        keys[order].tofile(path.with_suffix(".keys"))
        counts = dict.fromkeys(("num_documents", "num_bytes", "num_tokens"), 1)
        chunks.append(
            ChunkRows(
                split="training", index=index, num_rows=size, merged={}, seconds={}, hashes=[],
                **counts,
            )
        )  # fmt: skip
        first += size
    layout = ShardLayout(rows_per_shard=per_shard, seed=1, pad_id=0, attributes={})
    jobs = list(shard_jobs(tmp_path, "training", chunks, dtype, layout))
    entries = [shard_job(job).entry for job in jobs]
    assert sum(entry.rows for entry in entries) == total
    assert max(e.rows for e in entries) - min(e.rows for e in entries) <= 1
    assert max(entry.rows for entry in entries) <= per_shard
    found = []
    for entry in entries:
        with h5py.File(tmp_path / entry.file) as file:
            found += file["input_ids"][:, 0].tolist()
    assert found == np.argsort(keys).tolist()
    assert [job.first for job in jobs] == np.cumsum([0, *(e.rows for e in entries[:-1])]).tolist()
