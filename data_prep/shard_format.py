"""THE CONTRACT between data_prep and stacking: names, types, shapes, the manifest, and the check.

Two dialects of HDF5. N rows, S tokens, P masked positions, V vocabulary:

| dataset               | "unmasked" (ours)              | "nvidia" (DeepLearningExamples, gzip) |
|-----------------------|--------------------------------|---------------------------------------|
| input_ids             | u2 [N, S]; u4 above 65,535 ids | i4 [N, S], masks applied              |
| input_mask            | is input_ids != pad            | i1 [N, S]                             |
| segment_ids           | i1 [N, S]                      | i1 [N, S]                             |
| masked_lm_positions   | -                              | i4 [N, P], ascending, 0-padded        |
| masked_lm_ids         | -                              | i4 [N, P], originals, 0-padded        |
| next_sentence_labels  | i1 [N], only with pairs        | i1 [N], 1 = random next               |

Ours are contiguous and uncompressed, so that a loader maps rows into memory. The manifest is
written last: a folder without one is unfinished, or somebody else's shards.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import numpy.typing as npt

from data_prep.errors import ShardError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN_COUNTS = "token_counts.npy"
VOCABULARY = "vocab.txt"
SPECIAL_NAMES = ("pad", "unk", "cls", "sep", "mask")
# Name -> number of dimensions, in the order in which they are written.
NVIDIA_DATASETS = {
    "input_ids": 2,
    "input_mask": 2,
    "segment_ids": 2,
    "masked_lm_positions": 2,
    "masked_lm_ids": 2,
    "next_sentence_labels": 1,
}
REQUIRED = ("input_ids", "segment_ids")
STATIC_MASKS = ("masked_lm_positions", "masked_lm_ids")

_ROWS_AT_ONCE = 8192
_MOST_FAULTS = 20

Dialect = Literal["unmasked", "nvidia"]
Split = Literal["training", "validation"]


@dataclass(frozen=True)
class ShardEntry:
    """One shard as the manifest lists it."""

    file: str
    rows: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished data folder holds; `settings` and `seed` made it."""

    format_version: int
    dialect: Dialect
    max_seq_length: int
    max_predictions_per_seq: int
    vocab_size: int
    tokenizer_sha256: str
    special_token_ids: dict[str, int]
    has_next_sentence_labels: bool
    seed: int
    num_documents: dict[str, int]
    settings: dict[str, object] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)
    training: tuple[ShardEntry, ...] = ()
    validation: tuple[ShardEntry, ...] = ()

    def entries(self, split: Split) -> tuple[ShardEntry, ...]:
        """Return the shards of one split in order."""
        return self.training if split == "training" else self.validation


@dataclass(frozen=True)
class ShardInfo:
    """One shard file, measured: N, S, P (0: no static masks) and each dataset's type."""

    path: Path
    num_rows: int
    max_seq_length: int
    max_predictions_per_seq: int
    dtypes: Mapping[str, np.dtype[np.generic]]
    offsets: Mapping[str, int | None]
    """Byte at which a contiguous dataset begins in the file; None: chunked or compressed."""


def inspect_shard(path: Path) -> ShardInfo:
    """Measure one HDF5 shard of either dialect; a ShardError names file, dataset and shape."""
    try:
        with h5py.File(path, "r") as file:
            found = {name: file[name] for name in NVIDIA_DATASETS if name in file}
            _check_datasets(path, found, sorted(file.keys()))
            shape = found["input_ids"].shape
            positions = found.get("masked_lm_positions")
            return ShardInfo(
                path,
                int(shape[0]),
                int(shape[1]),
                0 if positions is None else int(positions.shape[1]),
                {name: dataset.dtype for name, dataset in found.items()},
                {name: _offset(dataset) for name, dataset in found.items()},
            )
    except OSError as error:
        raise ShardError(
            f"{path}: not a readable HDF5 file (missing, truncated or corrupt): {error}"
        ) from error


def split_of(file_name: str) -> Split | None:
    """Tell a shard's split by its name in any lineage (training_, train_shard_, part_, test_)."""
    name = file_name.lower()
    if not name.endswith((".hdf5", ".h5")):
        return None
    if "valid" in name or "test" in name:
        return "validation"
    return "training" if "train" in name or name.startswith("part_") else None


def find_shards(data_dir: Path, split: Split) -> list[Path]:
    """Return the shard files of a folder without manifest, by name, in name order."""
    return sorted(path for path in data_dir.iterdir() if split_of(path.name) == split)


def read_manifest(data_dir: Path) -> Manifest | None:
    """Read DIR/manifest.json; None where there is none."""
    path = data_dir / MANIFEST
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: not a readable manifest: {error}") from error
    return _manifest_from(content, path)


def write_manifest(data_dir: Path, manifest: Manifest) -> None:
    """Write the manifest atomically: with it the folder counts as finished."""
    write_atomically(data_dir / MANIFEST, (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to disk, rename: a reader sees all or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_token_counts(data_dir: Path) -> npt.NDArray[np.int64] | None:
    """Return counts of ids over the training rows, [V], pad/cls/sep/mask zero; None: not ours."""
    path = data_dir / TOKEN_COUNTS
    if not path.exists():
        return None
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(f"{path}: not a readable numpy array: {error}") from error
    if counts.ndim != 1 or counts.dtype.kind not in "iu":
        raise ShardError(
            f"{path}: got {counts.dtype} {list(counts.shape)}; expected int64 [vocab_size]"
        )
    return np.asarray(counts, np.int64)


def load_vocabulary(data_dir: Path) -> list[str]:
    """Return the word pieces of DIR/vocab.txt in id order."""
    path = data_dir / VOCABULARY
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ShardError(f"{path}: not a readable vocabulary: {error}") from error


def _manifest_from(content: object, path: Path) -> Manifest:
    if not isinstance(content, dict):
        raise ShardError(f"{path}: not a manifest: got {type(content).__name__}, not an object")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}; "
            "prepare the data again"
        )
    names = {one.name for one in fields(Manifest)}
    faults = [f"{name} is missing" for name in sorted(names - content.keys())]
    faults += [f"{name} is unknown" for name in sorted(content.keys() - names)]
    if faults:
        raise ShardError(f"{path}: not a manifest of this program: {', '.join(faults)}")
    try:
        entries = {
            split: tuple(ShardEntry(**one) for one in content[split])
            for split in ("training", "validation")
        }
        manifest = Manifest(**{**content, **entries})
        is_complete = all(
            isinstance(manifest.special_token_ids[name], int) for name in SPECIAL_NAMES
        )
        is_complete &= isinstance(manifest.vocab_size, int) and isinstance(
            manifest.max_seq_length, int
        )
        is_complete &= all(isinstance(one.rows, int) for split in entries.values() for one in split)
    except (TypeError, KeyError) as error:
        raise ShardError(f"{path}: a field has not the right form: {error}") from error
    if not is_complete or manifest.dialect not in ("unmasked", "nvidia"):
        raise ShardError(
            f"{path}: a field has not the right form; was the file edited? prepare the data again"
        )
    return manifest


def _check_datasets(path: Path, found: Mapping[str, h5py.Dataset], names: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise ShardError(
            f"{path}: dataset {missing[0]} is missing; the file holds: "
            f"{', '.join(names) or 'nothing'}"
        )
    if sum(name in found for name in STATIC_MASKS) == 1:
        raise ShardError(
            f"{path}: {' and '.join(STATIC_MASKS)} belong together; the file holds only one of them"
        )
    shape = found["input_ids"].shape
    for name, dataset in found.items():
        got = f"{path}: dataset {name} is {dataset.dtype} {list(dataset.shape)}"
        if h5py.check_vlen_dtype(dataset.dtype) is not None:
            raise ShardError(
                f"{got} of variable length (MLPerf's dialect); only fixed shapes are read today"
            )
        if dataset.dtype.kind not in "iu":
            raise ShardError(f"{got}; expected integers")
        width = {"masked_lm_positions": None, "masked_lm_ids": None}.get(name, shape[-1])
        is_wrong = len(dataset.shape) != NVIDIA_DATASETS[name] or dataset.shape[0] != shape[0]
        if is_wrong or (len(dataset.shape) == 2 and width not in (None, dataset.shape[1])):
            expected = [shape[0], width or "P"][: NVIDIA_DATASETS[name]]
            raise ShardError(f"{got}; expected {expected} from input_ids {list(shape)}")
    if shape[0] == 0:
        raise ShardError(f"{path}: dataset input_ids has no rows")
    if len({found[name].shape for name in STATIC_MASKS if name in found}) > 1:
        shapes = " and ".join(f"{name} {list(found[name].shape)}" for name in STATIC_MASKS)
        raise ShardError(f"{path}: {shapes} must have one shape")


def _offset(dataset: h5py.Dataset) -> int | None:
    is_contiguous = dataset.chunks is None and dataset.compression is None
    return dataset.id.get_offset() if is_contiguous else None


def check_folder(data_dir: Path) -> list[str]:
    """Return every fault of a data folder, one line each; without manifest the shards alone are
    checked.
    """
    if not data_dir.is_dir():
        return [f"{data_dir}: no such folder"]
    try:
        manifest = read_manifest(data_dir)
    except ShardError as error:
        return [str(error)]
    faults = [] if manifest is None else _check_against_manifest(data_dir, manifest)
    paths = [path for split in ("training", "validation") for path in find_shards(data_dir, split)]
    if not paths:
        faults.append(
            f"{data_dir}: holds no shard (a .hdf5 file with train, part_, valid or test in its "
            "name)"
        )
    for path in paths:
        faults += check_shard(path, None if manifest is None else manifest.vocab_size)
    return faults


def check_shard(path: Path, vocab_size: int | None = None) -> list[str]:
    """Return every fault of one file's content, read block by block; `vocab_size` None: ids have no
    upper bound.
    """
    try:
        info = inspect_shard(path)
        with h5py.File(path, "r") as file:
            faults: list[str] = []
            for start in range(0, info.num_rows, _ROWS_AT_ONCE):
                block = {
                    name: np.asarray(file[name][start : start + _ROWS_AT_ONCE], np.int64)
                    for name in info.dtypes
                }
                faults += [
                    f"{path}: rows from {start}: {fault}"
                    for fault in _block_faults(block, vocab_size)
                ]
            return faults[:_MOST_FAULTS]
    except ShardError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: truncated or corrupt: {error}"]


def _block_faults(block: Mapping[str, npt.NDArray[np.int64]], vocab_size: int | None) -> list[str]:
    """Return what is wrong in some rows."""
    limits = {
        "input_ids": vocab_size,
        "masked_lm_ids": vocab_size,
        "segment_ids": 2,
        "input_mask": 2,
        "next_sentence_labels": 2,
        "masked_lm_positions": block["input_ids"].shape[1],
    }
    faults = []
    for name, values in block.items():
        low, high, limit = int(values.min()), int(values.max()), limits[name]
        if low < 0 or (limit is not None and high >= limit):
            faults.append(
                f"dataset {name} holds {low} to {high}; allowed are 0 to "
                f"{'V - 1' if limit is None else limit - 1}"
            )
    positions = block.get("masked_lm_positions")
    if positions is not None:
        is_real = np.logical_and.accumulate(positions != 0, axis=1)
        is_falling = (np.diff(positions, axis=1) <= 0) & is_real[:, 1:]
        if is_falling.any() or (positions[~is_real] != 0).any():
            faults.append(
                "dataset masked_lm_positions does not ascend, or goes on after its first 0"
            )
    return faults


def _check_against_manifest(data_dir: Path, manifest: Manifest) -> list[str]:
    """Return where files and manifest disagree."""
    faults = []
    listed = {entry.file for entry in manifest.training + manifest.validation}
    present = {path.name for path in data_dir.iterdir() if split_of(path.name)}
    faults += [f"{data_dir / name}: not in the manifest" for name in sorted(present - listed)]
    for split in ("training", "validation"):
        rows = [entry.rows for entry in manifest.entries(split)]
        if not rows or max(rows) - min(rows) > 1:
            faults.append(f"{data_dir}: {split} shards are not equal to within one row: {rows[:8]}")
        for entry in manifest.entries(split):
            faults += _check_entry(data_dir / entry.file, entry, manifest)
    try:
        text = "".join(f"{token}\n" for token in load_vocabulary(data_dir))
        if hashlib.sha256(text.encode()).hexdigest() != manifest.tokenizer_sha256:
            faults.append(
                f"{data_dir / VOCABULARY}: not the vocabulary of the manifest; the shards have "
                "other ids"
            )
        counts = load_token_counts(data_dir)
        if counts is None or len(counts) != manifest.vocab_size:
            faults.append(f"{data_dir / TOKEN_COUNTS}: missing, or not one count a word piece")
    except ShardError as error:
        faults.append(str(error))
    return faults


def _check_entry(path: Path, entry: ShardEntry, manifest: Manifest) -> list[str]:
    try:
        info = inspect_shard(path)
    except ShardError:
        # A file that is there but unreadable is reported by check_shard.
        return [] if path.exists() else [f"{path}: listed in the manifest, but missing"]
    faults = []
    expected = (entry.rows, manifest.max_seq_length, manifest.max_predictions_per_seq)
    got = (info.num_rows, info.max_seq_length, info.max_predictions_per_seq)
    if got != expected:
        faults.append(f"{path}: rows, S, P are {got}; the manifest says {expected}")
    if manifest.has_next_sentence_labels and "next_sentence_labels" not in info.dtypes:
        faults.append(f"{path}: dataset next_sentence_labels is missing; the manifest promises it")
    if file_sha256(path) != entry.sha256:
        faults.append(
            f"{path}: its sha256 is not the manifest's; the file was changed after it was made"
        )
    return faults
