"""The intermediate files of an unfinished run: each is written whole or not at all, and a damaged
one is made again.

    OUT/.work/clean/000000.npz ...        clean text of each block of input, and what it was
    OUT/.work/clean/complete.json         the number of blocks: inputs need no second reading
    OUT/.work/drop/000000.npy ...         paragraphs of a block that are duplicates
    OUT/.work/rows/training_000000.* ...  rows of each chunk, in the order of their shuffling keys
    OUT/.work/shards/training_00000.json  what the manifest says of each finished shard
"""

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.shard_format import Split
from data_prep.shard_writer import WORK

_BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Workspace:
    """Names in OUT/.work."""

    out: Path

    @property
    def folder(self) -> Path:
        """OUT/.work."""
        return self.out / WORK

    @property
    def complete(self) -> Path:
        """The file that says that all blocks are clean."""
        return self.folder / "clean/complete.json"

    def make_folders(self) -> None:
        """Make what is missing."""
        for name in ("clean", "drop", "rows", "shards"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def block(self, index: int) -> Path:
        """Clean text of one block of input."""
        return self.folder / f"clean/{index:06d}.npz"

    def drop(self, index: int) -> Path:
        """Its duplicate paragraphs."""
        return self.folder / f"drop/{index:06d}.npy"

    def rows(self, split: Split, index: int) -> Path:
        """Rows of one chunk, records of `instances.row_type`; `.keys`, `.npz` stand beside it."""
        return self.folder / f"rows/{split}_{index:06d}.rows"

    def shard(self, split: Split, index: int) -> Path:
        """What is known of a finished shard."""
        return self.folder / f"shards/{split}_{index:05d}.json"


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], facts: object) -> None:
    """Write arrays and a JSON value as one .npz; its CRCs tell a damaged file when it is read."""
    content = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    with temporary_name(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **{**arrays, "facts": content})


def load_arrays(path: Path, *names: str) -> tuple[dict[str, npt.NDArray[Any]], Any] | None:
    """Return some arrays (all, if none is named) and the facts; None: missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = names or [name for name in file.files if name != "facts"]
            arrays = {name: file[name] for name in wanted}
            return arrays, json.loads(file["facts"].tobytes())
    except _BROKEN:
        return None


def save_json(path: Path, value: object) -> None:
    """Write a small JSON file atomically."""
    with temporary_name(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def load_json(path: Path) -> Any:
    """Return the value; None: missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except _BROKEN:
        return None


def hash_of(path: Path) -> str:
    """Return xxh3 of a file's bytes; "" where it is missing."""
    digest = xxhash.xxh3_64()
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    except OSError:
        return ""
    return digest.hexdigest()


class temporary_name:  # noqa: N801 - reads like a function
    """A name of this process beside `path`, renamed to it when all went well."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        """Return the name to write to."""
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Rename, or remove."""
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)
