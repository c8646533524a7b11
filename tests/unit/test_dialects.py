"""dialects: every dialect gives the same sequences back, whatever types and chunks."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.errors import ShardError
from data_prep.foreign import dialects
from data_prep.foreign.dialects import inspect_foreign, longest_row, read_rows, sniff

Sequence = tuple[list[int], list[int], list[int], list[int], int]
Make = Callable[[int, int], list[Sequence]]
Write = Callable[[Path, str, list[Sequence]], Path]
DIALECTS = ["nvidia", "academic-budget-bert", "mlperf", "mlperf-varlength", "mlperf-packed"]


def _read(path: Path) -> list[Sequence]:
    """All sequences of a file, without padding."""
    found: list[Sequence] = []
    for block in read_rows(inspect_foreign(path)):
        lengths = block.lengths(0, block.restored())
        for row in range(len(block.rows)):
            length, masks = int(lengths[row]), int(block.num_masked[row])
            found.append(
                (
                    block.input_ids[row, :length].tolist(),
                    block.segment_ids[row, :length].tolist(),
                    block.positions[row, :masks].tolist(),
                    block.masked_ids[row, :masks].tolist(),
                    -1 if block.labels is None else int(block.labels[row]),
                )
            )
    return found


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("tokens_at_once", [1 << 20, 60])
def test_every_dialect_gives_the_sequences_back(
    tmp_path: Path,
    make_sequences: Make,
    write_foreign: Write,
    monkeypatch: pytest.MonkeyPatch,
    dialect: str,
    tokens_at_once: int,
) -> None:
    monkeypatch.setattr(dialects, "_TOKENS_AT_ONCE", tokens_at_once)
    monkeypatch.setattr(dialects, "_VARIABLE_ROWS_AT_ONCE", max(3, tokens_at_once // 1024))
    sequences = make_sequences(41, 3)
    path = write_foreign(tmp_path / "part_0.hdf5", dialect, sequences)
    assert sniff(path) == dialect
    if dialect == "academic-budget-bert":
        sequences = [(*one[:4], -1) for one in sequences]
    assert _read(path) == sequences


@pytest.mark.parametrize("dialect", DIALECTS)
def test_longest_row_is_measured(
    tmp_path: Path, make_sequences: Make, write_foreign: Write, dialect: str
) -> None:
    sequences = make_sequences(40, 1)
    path = write_foreign(tmp_path / "a.hdf5", dialect, sequences)
    longest = max(len(one[0]) for one in sequences), max(len(one[2]) for one in sequences)
    expected = longest if "-" in dialect and dialect.startswith("mlperf") else (19, 5)
    assert longest_row(inspect_foreign(path)) == expected


@pytest.mark.parametrize("compression", ["gzip", "lzf", None])
@pytest.mark.parametrize("dtype", ["u1", "i2", ">u4", "i8", "u8"])
def test_any_integer_type_and_compression_is_read(
    tmp_path: Path, make_sequences: Make, write_foreign: Write, dtype: str, compression: str | None
) -> None:
    sequences = make_sequences(12, 4)
    plain = write_foreign(tmp_path / "a.hdf5", "nvidia", sequences)
    with h5py.File(plain) as source, h5py.File(tmp_path / "b.hdf5", "w") as file:
        for name in source:
            values = source[name][:].astype(dtype)
            file.create_dataset(name, data=values, compression=compression)
    assert _read(tmp_path / "b.hdf5") == sequences


def test_missing_input_mask_is_made_from_the_padding(
    tmp_path: Path, make_sequences: Make, write_foreign: Write
) -> None:
    sequences = make_sequences(12, 5)
    ids, segments, positions, originals, label = sequences[0]
    last = len(ids) - 2
    # A random replacement of a row's last word by [PAD] is a token, not padding.
    sequences[0] = ([*ids[:last], 0, ids[-1]], segments, [last], [9], label)
    path = write_foreign(tmp_path / "a.hdf5", "nvidia", sequences)
    with h5py.File(path, "r+") as file:
        del file["input_mask"]
    assert sniff(path) == "academic-budget-bert"
    assert _read(path) == sequences


def test_packed_positions_count_within_the_sequence(tmp_path: Path, write_foreign: Write) -> None:
    first: Sequence = ([2, 4, 9, 3], [0] * 4, [1], [8], 0)
    second: Sequence = ([2, 7, 4, 4, 3], [0, 0, 0, 1, 1], [2, 3], [11, 12], 1)
    path = write_foreign(tmp_path / "a.hdf5", "mlperf-packed", [first, first, second])
    block = next(read_rows(inspect_foreign(path)))
    assert block.rows.tolist() == [0, 1, 1]
    assert block.positions.tolist() == [[1, 0], [1, 0], [2, 3]]
    assert block.restored()[2].tolist() == [2, 7, 11, 12, 3]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("packed_input_len", [[4], [4, 6]], r"row 1: the sum of packed_input_len has 10 values"),
        (
            "packed_masked_lm_len",
            [[1], [1, 1]],
            "the sum of packed_masked_lm_len has 2 values; exp",
        ),
        (
            "next_sentence_labels",
            [[0], [0]],
            "row 1: next_sentence_labels has 1 values; expected 2",
        ),
        ("segment_ids", [[0] * 4, [0] * 8], "row 1: segment_ids has 8 values; expected 9"),
        ("packed_input_len", [[4], [-1, 10]], "negative length"),
    ],
)
def test_packed_rows_that_do_not_add_up_are_refused(
    tmp_path: Path, write_foreign: Write, name: str, values: list[list[int]], message: str
) -> None:
    first: Sequence = ([2, 4, 9, 3], [0] * 4, [1], [8], 0)
    second: Sequence = ([2, 7, 4, 4, 3], [0, 0, 0, 1, 1], [2, 3], [11, 12], 1)
    path = write_foreign(tmp_path / "a.hdf5", "mlperf-packed", [first, first, second])
    with h5py.File(path, "r+") as file:
        for row, numbers in enumerate(values):
            file[name][row] = np.array(numbers, np.int16)
    with pytest.raises(ShardError, match=rf"a\.hdf5: .*{message}"):
        _read(path)


def test_variable_rows_without_their_datasets_are_refused(
    tmp_path: Path, make_sequences: Make, write_foreign: Write
) -> None:
    path = write_foreign(tmp_path / "a.hdf5", "mlperf-varlength", make_sequences(3, 1))
    with h5py.File(path, "r+") as file:
        del file["masked_lm_ids"]
    with pytest.raises(ShardError, match="dataset masked_lm_ids is missing"):
        sniff(path)
    with h5py.File(path, "r+") as file:
        file["masked_lm_ids"] = np.zeros((3, 2), np.int16)
    with pytest.raises(ShardError, match=r"masked_lm_ids is int16 \[3, 2\]; expected \[3\] vari"):
        sniff(path)


def test_unreadable_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.hdf5").write_bytes(b"not HDF5 at all" * 40)
    with pytest.raises(ShardError, match="not a readable HDF5 file") as error:
        sniff(tmp_path / "a.hdf5")
    assert "\n" not in str(error.value)
