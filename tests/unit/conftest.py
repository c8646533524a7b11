"""Sequences, and their shards in the dialect of every public trainer, for tests of reading,
checking and converting.
"""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest

# ids with masks applied, segment ids, masked positions, what stood there, next_sentence_label
Sequence = tuple[list[int], list[int], list[int], list[int], int]
PAD, CLS, SEP, MASK = 0, 2, 3, 4
NUM_SPECIAL = 7  # [PAD] [UNK] [CLS] [SEP] [MASK] . ,
LENGTH, PREDICTIONS = 19, 5


@pytest.fixture(scope="session")
def foreign_vocabulary() -> list[str]:
    """A hundred word pieces, the last twenty of them continuations."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ","]
    return special + [f"w{i}" for i in range(73)] + [f"##c{i}" for i in range(20)]


@pytest.fixture(scope="session")
def make_sequences() -> Callable[[int, int], list[Sequence]]:
    """Return `(count, seed) -> sequences`: BERT's pairs of up to 19 tokens, masked 80/10/10."""

    def make(count: int, seed: int) -> list[Sequence]:
        generator = np.random.default_rng(seed)
        return [_sequence(generator, index) for index in range(count)]

    return make


@pytest.fixture(scope="session")
def write_foreign() -> Callable[[Path, str, list[Sequence]], Path]:
    """Return `(path, dialect, sequences) -> path`, which writes them as the dialect's own program
    does.
    """

    def write(path: Path, dialect: str, sequences: list[Sequence]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            if dialect == "mlperf-varlength":
                _write_variable(file, sequences)
            elif dialect == "mlperf-packed":
                _write_packed(file, sequences)
            else:
                _write_fixed(file, dialect, sequences)
        return path

    return write


def _sequence(generator: np.random.Generator, index: int) -> Sequence:
    first, second = generator.integers(2, 9, 2).tolist()
    words = generator.integers(NUM_SPECIAL, 80, first + second).tolist()
    ids = [CLS, *words[:first], SEP, *words[first:], SEP]
    segments = [0] * (first + 2) + [1] * (second + 1)
    candidates = [at for at, token in enumerate(ids) if token not in (CLS, SEP)]
    count = min(PREDICTIONS, max(1, round(len(ids) * 0.15)))
    positions = sorted(generator.choice(candidates, count, replace=False).tolist())
    originals = [ids[at] for at in positions]
    for at in positions:
        kind = generator.random()
        if kind < 0.8:
            ids[at] = MASK
        elif kind < 0.9:
            ids[at] = int(generator.integers(0, 100))
    return ids, segments, positions, originals, index % 2


def _padded(lists: list[list[int]], width: int, dtype: str) -> npt.NDArray[np.int64]:
    result: npt.NDArray[np.int64] = np.zeros((len(lists), width), dtype)
    for row, values in zip(result, lists, strict=True):
        row[: len(values)] = values
    return result


def _write_fixed(file: h5py.File, dialect: str, sequences: list[Sequence]) -> None:
    ids, segments, positions, originals, labels = map(list, zip(*sequences, strict=True))
    wide, compression = ("i2", None) if dialect == "mlperf" else ("i4", "gzip")
    arrays = {
        "input_ids": _padded(ids, LENGTH, wide),
        "input_mask": _padded([[1] * len(row) for row in ids], LENGTH, "i1"),
        "segment_ids": _padded(segments, LENGTH, "i1"),
        "masked_lm_positions": _padded(positions, PREDICTIONS, wide),
        "masked_lm_ids": _padded(originals, PREDICTIONS, wide),
        "next_sentence_labels": np.array(labels, "i1"),
    }
    if dialect == "academic-budget-bert":
        del arrays["next_sentence_labels"]
    for name, array in arrays.items():
        file.create_dataset(name, data=array, compression=compression)


def _write_variable(file: h5py.File, sequences: list[Sequence]) -> None:
    ids, segments, positions, originals, _ = map(list, zip(*sequences, strict=True))
    _create_variable(file, "input_ids", "int16", ids)
    _create_variable(file, "segment_ids", "int8", segments)
    _create_variable(file, "masked_lm_positions", "int16", positions)
    _create_variable(file, "masked_lm_ids", "int16", originals)
    file.create_dataset("next_sentence_labels", data=np.array([one[4] for one in sequences], "i1"))


def _write_packed(file: h5py.File, sequences: list[Sequence]) -> None:
    """Pack one, two, three, one, two, ... sequences a row; positions count from the row's start."""
    groups: list[list[Sequence]] = []
    rest = list(sequences)
    while rest:
        size = len(groups) % 3 + 1
        groups.append(rest[:size])
        rest = rest[size:]
    columns: dict[str, list[list[int]]] = {
        name: []
        for name in (
            "input_ids",
            "segment_ids",
            "masked_lm_positions",
            "masked_lm_ids",
            "next_sentence_labels",
            "packed_input_len",
            "packed_masked_lm_len",
        )
    }
    for group in groups:
        starts = np.cumsum([0, *(len(one[0]) for one in group)]).tolist()
        columns["input_ids"].append([token for one in group for token in one[0]])
        columns["segment_ids"].append([token for one in group for token in one[1]])
        columns["masked_lm_positions"].append(
            [start + at for start, one in zip(starts, group, strict=False) for at in one[2]]
        )
        columns["masked_lm_ids"].append([token for one in group for token in one[3]])
        columns["next_sentence_labels"].append([one[4] for one in group])
        columns["packed_input_len"].append([len(one[0]) for one in group])
        columns["packed_masked_lm_len"].append([len(one[2]) for one in group])
    for name, lists in columns.items():
        narrow = name in ("segment_ids", "next_sentence_labels")
        _create_variable(file, name, "int8" if narrow else "int16", lists)


def _create_variable(file: h5py.File, name: str, dtype: str, lists: list[list[int]]) -> None:
    dataset = file.create_dataset(name, (len(lists),), h5py.vlen_dtype(np.dtype(dtype)))
    for row, values in enumerate(lists):
        dataset[row] = np.array(values, dtype)
