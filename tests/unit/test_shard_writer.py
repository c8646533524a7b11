"""data_prep.shard_writer: whole files of either dialect, and a folder of one run."""

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError, ShardError
from data_prep.instances import row_type
from data_prep.masking import MaskingPolicy, mask_tokens, restore_originals
from data_prep.shard_format import IN_PROGRESS, NVIDIA_DATASETS, ShardEntry, file_sha256
from data_prep.shard_writer import (
    ROWS_AT_ONCE,
    WORK,
    ShardLayout,
    exclusive_folder,
    shard_sizes,
    write_shard,
)

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
NUM_ROWS, LENGTH = 23, 9


def _rows() -> npt.NDArray[np.void]:
    rows = np.zeros(NUM_ROWS, row_type(LENGTH, 100, has_pairs=True))
    rows["input_ids"][:, :7] = np.arange(5, 5 + 7) + np.arange(NUM_ROWS)[:, None]
    rows["input_ids"][:, 0], rows["input_ids"][:, 6] = 2, 3
    rows["segment_ids"][:, 4:7] = 1
    rows["next_sentence_labels"] = np.arange(NUM_ROWS) % 2
    return rows


def _layout(masking: MaskingPolicy | None = None) -> ShardLayout:
    return ShardLayout(
        rows_per_shard=6, seed=1, pad_id=0, attributes={"format_version": 1}, masking=masking
    )


def _make(out: Path, layout: ShardLayout) -> tuple[ShardEntry, ...]:
    out.mkdir(exist_ok=True)
    sizes = shard_sizes(NUM_ROWS, layout.rows_per_shard)
    firsts = np.cumsum([0, *sizes])
    return tuple(
        write_shard(out / f"training_{i:05d}.hdf5", _rows()[first : first + size], first, layout)
        for i, (first, size) in enumerate(zip(firsts[:-1].tolist(), sizes, strict=True))
    )


def _read(out: Path, name: str) -> npt.NDArray[np.int64]:
    parts = []
    for path in sorted(out.glob("*.hdf5")):
        with h5py.File(path, "r") as file:
            parts.append(np.asarray(file[name], np.int64))
    return np.concatenate(parts)


@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_sizes_are_equal_to_within_one_row(num_rows: int, most: int) -> None:
    sizes = shard_sizes(num_rows, max(most, num_rows // 1000))
    assert sum(sizes) == num_rows
    assert max(sizes) <= max(most, num_rows // 1000)
    assert max(sizes) - min(sizes) <= 1


def test_shards_hold_the_rows_and_their_hash(tmp_path: Path) -> None:
    entries = _make(tmp_path, _layout())
    assert [entry.rows for entry in entries] == [6, 6, 6, 5]
    assert all(entry.sha256 == file_sha256(tmp_path / entry.file) for entry in entries)
    for name in ("input_ids", "segment_ids", "next_sentence_labels"):
        np.testing.assert_array_equal(_read(tmp_path, name), _rows()[name])


def test_unmasked_datasets_are_contiguous_with_the_contract_types(tmp_path: Path) -> None:
    _make(tmp_path, _layout())
    with h5py.File(tmp_path / "training_00000.hdf5") as file:
        types = {name: file[name].dtype.str for name in file}
        assert types == {"input_ids": "<u2", "segment_ids": "|i1", "next_sentence_labels": "|i1"}
        assert all(file[name].chunks is None and file[name].id.get_offset() for name in file)


def test_gzip_chunks_read_back_where_the_last_one_is_not_full(tmp_path: Path) -> None:
    policy = MaskingPolicy(vocab_size=100, special_token_ids=SPECIAL, max_predictions_per_seq=3)
    rows = np.concatenate([_rows()] * 100)[: 2 * ROWS_AT_ONCE + 7]
    write_shard(tmp_path / "a.hdf5", rows, 0, _layout(policy))
    with h5py.File(tmp_path / "a.hdf5") as file:
        masked, positions, ids = (
            np.asarray(file[name], np.int64)
            for name in ("input_ids", "masked_lm_positions", "masked_lm_ids")
        )
        assert file["input_ids"].chunks == (ROWS_AT_ONCE, LENGTH)
        np.testing.assert_array_equal(file["next_sentence_labels"], rows["next_sentence_labels"])
    np.testing.assert_array_equal(restore_originals(masked, positions, ids), rows["input_ids"])


def test_nvidia_dialect_has_its_types_and_restores_to_the_originals(tmp_path: Path) -> None:
    policy = MaskingPolicy(vocab_size=100, special_token_ids=SPECIAL, max_predictions_per_seq=3)
    _make(tmp_path / "plain", _layout())
    _make(tmp_path / "masked", _layout(policy))
    with h5py.File(tmp_path / "masked/training_00000.hdf5") as file:
        assert set(file) == set(NVIDIA_DATASETS)
        assert [file[name].dtype.str for name in NVIDIA_DATASETS] == [
            "<i4", "|i1", "|i1", "<i4", "<i4", "|i1",
        ]  # fmt: skip
        assert {file[name].compression for name in file} == {"gzip"}
    originals = _read(tmp_path / "plain", "input_ids")
    masked, positions, ids = (
        _read(tmp_path / "masked", name)
        for name in ("input_ids", "masked_lm_positions", "masked_lm_ids")
    )
    assert not np.array_equal(masked, originals)
    np.testing.assert_array_equal(restore_originals(masked, positions, ids), originals)
    np.testing.assert_array_equal(_read(tmp_path / "masked", "input_mask"), originals != 0)
    assert ((ids == 0) == (positions == 0)).all()


def test_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ShardError, match=r"not empty \(thesis\.txt\)"), exclusive_folder(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (IN_PROGRESS, "training_00000.hdf5", ".x.tmp", "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / WORK / "rows").mkdir(parents=True)
    (tmp_path / WORK / "rows/x").touch()
    with exclusive_folder(tmp_path) as is_continued:
        assert not is_continued
        assert {path.name for path in tmp_path.iterdir()} == {IN_PROGRESS, "notes.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_the_same_run_finds_its_work_and_another_does_not(tmp_path: Path) -> None:
    def fail(fingerprint: str) -> bool:
        with exclusive_folder(tmp_path, fingerprint) as is_continued:
            (tmp_path / WORK).mkdir(exist_ok=True)
            (tmp_path / WORK / "text").touch()
            raise RuntimeError(str(is_continued))

    for fingerprint, found in (("a", "False"), ("a", "True"), ("b", "False"), ("b", "True")):
        with pytest.raises(RuntimeError, match=found):
            fail(fingerprint)
    with exclusive_folder(tmp_path, "b") as is_continued:
        assert is_continued
    assert list(tmp_path.iterdir()) == []


def test_second_run_cannot_enter(tmp_path: Path) -> None:
    with (
        exclusive_folder(tmp_path / "out"),
        pytest.raises(ShardError, match="another run is writing"),
        exclusive_folder(tmp_path / "out"),
    ):
        pass


def test_failed_run_leaves_no_shard_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with exclusive_folder(tmp_path):
            _make(tmp_path, _layout())
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"), exclusive_folder(tmp_path / "file/x"):
        pass


def test_static_masks_go_by_the_global_row_number(tmp_path: Path) -> None:
    """NVIDIA's own files draw one stream of masks in every shard; here no two shards share one."""
    policy = MaskingPolicy(vocab_size=100, special_token_ids=SPECIAL, max_predictions_per_seq=3)
    _make(tmp_path / "plain", _layout())
    _make(tmp_path / "masked", _layout(policy))
    originals = _read(tmp_path / "plain", "input_ids")
    rows = np.arange(NUM_ROWS)
    expected = mask_tokens(originals, policy, seed=1, epoch=0, sample_indices=rows)
    np.testing.assert_array_equal(_read(tmp_path / "masked", "input_ids"), expected.input_ids)
