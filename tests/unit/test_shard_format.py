"""data_prep.shard_format: shards of both dialects are measured, manifests survive the disk."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.errors import ShardError
from data_prep.shard_format import (
    Manifest,
    ShardEntry,
    inspect_shard,
    load_token_counts,
    read_manifest,
    split_of,
    write_manifest,
)

Arrays = dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"]


def _arrays() -> Arrays:
    """Three rows of seven tokens with at most two static masks."""
    return {
        "input_ids": np.arange(21, dtype="i4").reshape(3, 7),
        "input_mask": np.ones((3, 7), "i1"),
        "segment_ids": np.zeros((3, 7), "i1"),
        "masked_lm_positions": np.array([[1, 2], [4, 0], [5, 6]], "i4"),
        "masked_lm_ids": np.array([[9, 8], [7, 0], [6, 5]], "i4"),
        "next_sentence_labels": np.array([0, 1, 1], "i1"),
    }


def _write(path: Path, arrays: Arrays, compression: str | None = "gzip") -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression=compression)
    return path


def _manifest(**changes: object) -> Manifest:
    values: dict[str, object] = {
        "format_version": 1,
        "dialect": "nvidia",
        "max_seq_length": 7,
        "max_predictions_per_seq": 2,
        "vocab_size": 30,
        "tokenizer_sha256": "ab",
        "special_token_ids": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
        "has_next_sentence_labels": True,
        "seed": 5,
        "num_documents": {"training": 2, "validation": 1},
        "training": (ShardEntry("training_00000.hdf5", 3, "cd"),),
    }
    return Manifest(**(values | changes))  # type: ignore[arg-type]


def test_inspect_measures_rows_length_and_predictions(tmp_path: Path) -> None:
    info = inspect_shard(_write(tmp_path / "a.hdf5", _arrays()))
    assert (info.num_rows, info.max_seq_length, info.max_predictions_per_seq) == (3, 7, 2)
    assert info.offsets["input_ids"] is None
    arrays = {name: _arrays()[name] for name in ("input_ids", "segment_ids")}
    plain = inspect_shard(_write(tmp_path / "b.hdf5", arrays, None))
    assert plain.max_predictions_per_seq == 0
    offset = plain.offsets["input_ids"]
    raw = np.frombuffer((tmp_path / "b.hdf5").read_bytes(), "i4", 21, offset or 0)
    np.testing.assert_array_equal(raw.reshape(3, 7), arrays["input_ids"])


def _drop(name: str) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.pop(name)


def _set(name: str, array: object) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({name: np.asarray(array)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _drop("segment_ids"),
            "dataset segment_ids is missing; the file holds: input_ids, input_m",
        ),
        (_drop("masked_lm_ids"), "belong together"),
        (
            _set("input_mask", np.ones((3, 8), "i1")),
            r"input_mask is int8 \[3, 8\]; expected \[3, 7",
        ),
        (_set("input_ids", np.ones((3, 7), "f4")), r"input_ids is float32 \[3, 7\]; expected int"),
        (_set("next_sentence_labels", np.ones((3, 1), "i1")), r"labels is int8 \[3, 1\]; expected"),
        (
            _set("masked_lm_ids", np.ones((3, 4), "i4")),
            r"positions \[3, 2\] and masked_lm_ids \[3, 4",
        ),
        (_set("segment_ids", np.ones((2, 7), "i1")), r"segment_ids is int8 \[2, 7\]; expected \[3"),
    ],
)
def test_wrong_shard_is_refused_with_dataset_and_shape(
    tmp_path: Path, change: Callable[[Arrays], object], message: str
) -> None:
    arrays = _arrays()
    change(arrays)
    path = _write(tmp_path / "bad.hdf5", arrays)
    with pytest.raises(ShardError, match=rf"bad\.hdf5: .*{message}"):
        inspect_shard(path)


def test_variable_length_rows_are_refused_by_name(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "part_0.hdf5", "w") as file:
        for name in ("input_ids", "segment_ids"):
            file.create_dataset(name, (3,), h5py.vlen_dtype(np.int16))
    with pytest.raises(ShardError, match="variable length .MLPerf"):
        inspect_shard(tmp_path / "part_0.hdf5")


def test_empty_rows_and_values_that_were_never_written_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name in ("input_ids", "segment_ids"):
            file.create_dataset(name, (3, 0), "i4")
    with pytest.raises(ShardError, match="no rows, or rows without tokens"):
        inspect_shard(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        for name in ("input_ids", "segment_ids"):
            file.create_dataset(name, (1 << 40, 8), "i4", chunks=(64, 8))
    with pytest.raises(ShardError, match="its values are not in the file"):
        inspect_shard(tmp_path / "b.hdf5")


def test_group_in_place_of_a_dataset_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.hdf5", _arrays())
    with h5py.File(path, "r+") as file:
        del file["segment_ids"]
        file.create_group("segment_ids")
    with pytest.raises(ShardError, match="segment_ids is no dataset with rows"):
        inspect_shard(path)


def test_more_masks_than_tokens_are_refused(tmp_path: Path) -> None:
    arrays = _arrays()
    arrays["masked_lm_positions"] = arrays["masked_lm_ids"] = np.zeros((3, 8), "i4")
    with pytest.raises(ShardError, match=r"positions is int32 \[3, 8\]; expected at most S = 7"):
        inspect_shard(_write(tmp_path / "a.hdf5", arrays))


def test_tokenizer_of_a_shard_is_read_from_its_attributes(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.hdf5", _arrays())
    assert inspect_shard(path).tokenizer_sha256 is None
    with h5py.File(path, "r+") as file:
        file.attrs["tokenizer_sha256"] = "ab12"
    assert inspect_shard(path).tokenizer_sha256 == "ab12"


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.hdf5", _arrays())
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ShardError, match="truncated or corrupt"):
        inspect_shard(path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("wiki_training_3.hdf5", "training"),
        ("train_shard_0.hdf5", "training"),
        ("part_00000_of_04320.hdf5", "training"),
        ("validation_00000.hdf5", "validation"),
        ("test_shard_1.hdf5", "validation"),
        ("training.txt", None),
        ("other.hdf5", None),
        ("eval_all.hdf5", "validation"),
        ("part_eval_10k.hdf5", "validation"),
        ("latest_training_0.hdf5", "training"),
        ("wikitest.hdf5", "validation"),
    ],
)
def test_split_is_told_by_the_names_of_every_lineage(name: str, split: str | None) -> None:
    assert split_of(name) == split


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    manifest = _manifest(settings={"pairs": "nsp"}, statistics={"padding": 0.25})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2, this program reads 1"),
        ({"colour": 1}, "colour is unknown"),
        ({"special_token_ids": {"pad": 0}}, "has not the right form"),
        ({"training": [{"file": "a"}]}, "has not the right form"),
        ({"dialect": "other"}, "has not the right form"),
        ({"vocab_size": "30"}, "has not the right form"),
        ({"max_predictions_per_seq": -1}, "has not the right form"),
        ({"special_token_ids": [1]}, "has not the right form"),
        ({"training": [{"file": 5, "rows": 1, "sha256": ""}]}, "has not the right form"),
        ({"training": [{"file": "../a.hdf5", "rows": 1, "sha256": ""}]}, "has not the right form"),
        ({"training": {"file": "a"}}, "has not the right form"),
    ],
)
def test_wrong_manifest_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_manifest(tmp_path, _manifest())
    content = json.loads((tmp_path / "manifest.json").read_text()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ShardError, match=message):
        read_manifest(tmp_path)


def test_token_counts_are_none_where_nobody_counted(tmp_path: Path) -> None:
    assert load_token_counts(tmp_path) is None
    np.save(tmp_path / "token_counts.npy", np.array([0, 3, 5]))
    counts = load_token_counts(tmp_path)
    assert counts is not None
    assert counts.tolist() == [0, 3, 5]
    np.save(tmp_path / "token_counts.npy", np.array([[0.5]]))
    with pytest.raises(ShardError, match=r"float64 \[1, 1\]; expected int64"):
        load_token_counts(tmp_path)


@pytest.mark.parametrize("damage", [(b"(3,)", b"(3()"), (b"(3,)", b"3,) "), (b"'<i8'", b"'<i8]")])
def test_token_counts_with_a_damaged_header_are_refused(
    tmp_path: Path, damage: tuple[bytes, bytes]
) -> None:
    path = tmp_path / "token_counts.npy"
    np.save(path, np.array([0, 3, 5]))
    path.write_bytes(path.read_bytes().replace(*damage))
    with pytest.raises(ShardError, match="not a readable numpy array"):
        load_token_counts(tmp_path)
