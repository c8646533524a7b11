"""row_spool: a sort on disk is a sort, whatever the buckets."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.foreign import row_spool
from data_prep.foreign.row_spool import RowSpool, in_groups

DTYPE = np.dtype([("input_ids", "<u2", (3,)), ("label", "i1")])


def _records(count: int) -> "np.ndarray[tuple[int], np.dtype[np.void]]":
    records = np.zeros(count, DTYPE)
    records["input_ids"] = np.arange(count)[:, None] + [0, 1000, 2000]
    records["label"] = np.arange(count) % 2
    return records


@pytest.mark.parametrize("bucket_bytes", [32 << 20, 200])
def test_records_come_in_the_order_of_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    monkeypatch.setattr(row_spool, "_BUCKET_BYTES", bucket_bytes)
    keys = np.random.default_rng(1).integers(0, 1 << 64, 97, np.uint64)
    keys[5] = keys[90]
    keys[:2] = [0, (1 << 64) - 1]
    records = _records(97)
    with RowSpool(tmp_path / "s", DTYPE, expected_rows=97, is_sorted=True) as spool:
        spool.add(records[:40], keys[:40])
        spool.add(records[40:], keys[40:])
        blocks = list(spool.read())
    assert (len(blocks) > 5) == (bucket_bytes == 200)
    order = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(np.concatenate(blocks), records[order])
    assert list((tmp_path / "s").iterdir()) == []


def test_order_is_kept_in_bounded_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_spool, "_BUCKET_BYTES", 300)
    with RowSpool(tmp_path, DTYPE, expected_rows=50, is_sorted=False) as spool:
        spool.add(_records(50))
        blocks = list(spool.read())
    assert max(map(len, blocks)) <= 20
    np.testing.assert_array_equal(np.concatenate(blocks), _records(50))


def test_buckets_are_removed_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        with RowSpool(tmp_path, DTYPE, expected_rows=9, is_sorted=False) as spool:
            spool.add(_records(9))
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_groups_have_their_sizes_and_lose_nothing() -> None:
    records = _records(30)
    blocks = iter([records[:4], records[4:5], records[5:30]])
    groups = [group.copy() for group in in_groups(blocks, [3, 7, 20])]
    assert [len(group) for group in groups] == [3, 7, 20]
    np.testing.assert_array_equal(np.concatenate(groups), records)
