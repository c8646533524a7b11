"""THE CONTRACT between data_prep and stacking: names, types, shapes and the manifest.

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
written last: a folder without one is unfinished, or somebody else's shards (`dialects` reads what
those may look like, `shard_check` looks for faults).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import h5py
import numpy as np
import numpy.typing as npt

from data_prep.errors import ShardError
from data_prep.plain_files import read_plain, require_plain

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN_COUNTS = "token_counts.npy"
VOCABULARY = "vocab.txt"
IN_PROGRESS = ".in_progress"  # stands in a folder while shards are made, and after a kill
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

# What h5py raises on a damaged file; which of them is a matter of the byte that was hit.
HDF5_ERRORS = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    IndexError,
    MemoryError,
)
TOKENIZER_ATTRIBUTE = "tokenizer_sha256"
_MOST_COMPRESSION = 1200  # gzip reaches 1032:1 on zeros

Dialect = Literal["unmasked", "nvidia"]
Split = Literal["training", "validation"]
SPLITS: tuple[Split, ...] = ("training", "validation")


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
    tokenizer_sha256: str | None = None
    """The vocabulary behind the ids, where the file says so."""


def inspect_shard(path: Path) -> ShardInfo:
    """Measure one HDF5 shard of either dialect; a ShardError names file, dataset and shape."""
    try:
        require_plain(path)
        with h5py.File(path, "r") as file:
            names = sorted(file.keys())
            _check_links(path, file, names)
            found = {name: file[name] for name in NVIDIA_DATASETS if name in names}
            _check_datasets(path, found, names)
            shape = found["input_ids"].shape
            positions = found.get("masked_lm_positions")
            digest = file.attrs.get(TOKENIZER_ATTRIBUTE)
            return ShardInfo(
                path,
                int(shape[0]),
                int(shape[1]),
                0 if positions is None else int(positions.shape[1]),
                {name: dataset.dtype for name, dataset in found.items()},
                {name: _offset(dataset) for name, dataset in found.items()},
                digest if isinstance(digest, str) else None,
            )
    except HDF5_ERRORS as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> ShardError:
    """Return the one-line error for what HDF5 said about a damaged file."""
    what = str(error).split("\n", 1)[0] or type(error).__name__
    return ShardError(f"{path}: not a readable HDF5 file (missing, truncated or corrupt): {what}")


def split_of(file_name: str) -> Split | None:
    """Tell a shard's split by its name in any lineage (training_, train_shard_, part_, test_,
    eval_); by whole words first, so that `latest_training_0.hdf5` is no test file.
    """
    name = file_name.lower()
    if not name.endswith((".hdf5", ".h5")):
        return None
    words = re.findall(r"[a-z]+", name)
    if any(word == "dev" or word.startswith(("valid", "test", "eval")) for word in words):
        return "validation"
    if any(word.startswith("train") for word in words) or name.startswith("part_"):
        return "training"
    if "valid" in name or "test" in name:
        return "validation"
    return "training" if "train" in name else None


def find_shards(data_dir: Path, split: Split) -> list[Path]:
    """Return the shard files of a folder without manifest, by name, in name order."""
    return sorted(path for path in data_dir.iterdir() if split_of(path.name) == split)


def read_manifest(data_dir: Path) -> Manifest | None:
    """Read DIR/manifest.json; None where there is none."""
    path = data_dir / MANIFEST
    try:
        content: object = json.loads(read_plain(path).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
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
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def vocabulary_sha256(
    tokens: Iterable[str], merges: Iterable[tuple[str, str]] | None = None
) -> str:
    """Hash a vocabulary in id order, a token a line: what `sha256sum vocab.txt` prints.

    The same for `vocab.txt` and `tokenizer.json` of one vocabulary; of BPE also over the `merges`,
    which decide the ids too.
    """
    lines = [] if merges is None else ["", *(f"{first} {second}" for first, second in merges)]
    digest = hashlib.sha256()
    for line in (*tokens, *lines):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def write_token_counts(
    data_dir: Path, counts: npt.NDArray[np.int64], special_token_ids: Mapping[str, int]
) -> None:
    """Write how often each id stands in the training rows, [V]; [UNK] is counted, since it is
    masked and predicted like a word, the other special ids are not.
    """
    counts = counts.copy()
    counts[[special_token_ids[name] for name in ("pad", "cls", "sep", "mask")]] = 0
    stream = BytesIO()
    np.save(stream, counts)
    write_atomically(data_dir / TOKEN_COUNTS, stream.getvalue())


def load_token_counts(data_dir: Path) -> npt.NDArray[np.int64] | None:
    """Return counts of ids over the training rows, [V], pad/cls/sep/mask zero; None: not ours."""
    path = data_dir / TOKEN_COUNTS
    if not path.exists():
        return None
    try:
        require_plain(path)
        # Mapped: a header that says more than the file has allocates nothing.
        counts = np.load(path, mmap_mode="r", allow_pickle=False)
    # The last two are numpy's on a header that is no Python literal.
    except (OSError, ValueError, EOFError, OverflowError, SyntaxError, TokenError) as error:
        raise ShardError(f"{path}: not a readable numpy array: {error}") from error
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ShardError(
            f"{path}: got {counts.dtype} {list(counts.shape)}; expected int64 [vocab_size], "
            "nowhere negative"
        )
    return np.array(counts, np.int64)


def load_vocabulary(data_dir: Path) -> list[str]:
    """Return the word pieces of DIR/vocab.txt in id order."""
    path = data_dir / VOCABULARY
    try:
        return read_plain(path).decode("utf-8").removesuffix("\n").split("\n")
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
        special = manifest.special_token_ids
        is_complete = sorted(special) == sorted(SPECIAL_NAMES)
        is_complete &= all(type(number) is int for number in special.values())
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ShardError(f"{path}: a field has not the right form: {error}") from error
    numbers = (manifest.vocab_size, manifest.max_seq_length, manifest.max_predictions_per_seq)
    is_complete &= all(type(number) is int and number >= 0 for number in numbers)
    is_complete &= isinstance(manifest.has_next_sentence_labels, bool)
    is_complete &= isinstance(manifest.tokenizer_sha256, str)
    is_complete &= isinstance(manifest.settings, dict) and isinstance(manifest.statistics, dict)
    is_complete &= all(_is_entry(one) for one in manifest.training + manifest.validation)
    if not is_complete or manifest.dialect not in ("unmasked", "nvidia"):
        raise ShardError(
            f"{path}: a field has not the right form; was the file edited? prepare the data again"
        )
    return manifest


def _is_entry(entry: ShardEntry) -> bool:
    """Say whether an entry names a file of its own folder, with rows and a hash."""
    return (
        isinstance(entry.file, str)
        and entry.file == Path(entry.file).name
        and type(entry.rows) is int
        and isinstance(entry.sha256, str)
    )


def _check_links(path: Path, file: h5py.File, names: list[str]) -> None:
    """Refuse what lies in another file, wherever that may be."""
    for name in NVIDIA_DATASETS:
        if name in names and not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise ShardError(f"{path}: {name} is a link; a shard holds its rows itself")


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
    for name, dataset in found.items():
        if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
            raise ShardError(f"{path}: {name} is no dataset with rows")
    shape = found["input_ids"].shape
    for name, dataset in found.items():
        got = f"{path}: dataset {name} is {dataset.dtype} {list(dataset.shape)}"
        if dataset.external or dataset.is_virtual:
            raise ShardError(f"{got} in other files; a shard holds its rows itself")
        if h5py.check_vlen_dtype(dataset.dtype) is not None:
            raise ShardError(
                f"{got} of variable length (MLPerf's dialect); make fixed rows of it with "
                "launch/prepare_data.py convert"
            )
        if dataset.dtype.kind not in "iu":
            raise ShardError(f"{got}; expected integers")
        if len(dataset.shape) != NVIDIA_DATASETS[name] or dataset.shape[0] != shape[0]:
            expected = [shape[0] if shape else "N", "P" if name in STATIC_MASKS else "S"]
            raise ShardError(
                f"{got}; expected {expected[: NVIDIA_DATASETS[name]]} from input_ids {list(shape)}"
            )
        if len(dataset.shape) == 2 and name not in STATIC_MASKS and dataset.shape[1] != shape[1]:
            raise ShardError(f"{got}; expected {list(shape)} from input_ids {list(shape)}")
        if name in STATIC_MASKS and dataset.shape[1] > shape[1]:
            raise ShardError(f"{got}; expected at most S = {shape[1]} masks a row")
        if dataset.nbytes > _MOST_COMPRESSION * (dataset.id.get_storage_size() + 4096):
            raise ShardError(f"{got}, but its values are not in the file; was it never finished?")
    if 0 in shape:
        raise ShardError(f"{path}: dataset input_ids has no rows, or rows without tokens")
    if len({found[name].shape for name in STATIC_MASKS if name in found}) > 1:
        shapes = " and ".join(f"{name} {list(found[name].shape)}" for name in STATIC_MASKS)
        raise ShardError(f"{path}: {shapes} must have one shape")


def _offset(dataset: h5py.Dataset) -> int | None:
    is_contiguous = dataset.chunks is None and dataset.compression is None
    return dataset.id.get_offset() if is_contiguous else None
