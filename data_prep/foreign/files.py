"""Paths in, HDF5 shards of any lineage out, measured and dealt to training and validation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import DataError, ShardError
from data_prep.foreign.dialects import ShardHead, inspect_foreign, longest_row
from data_prep.isolated import Isolated, crash_message, patience
from data_prep.shard_format import Split, split_of

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class ForeignFolder:
    """The files to convert in order, and how rows are held out of them."""

    files: tuple[tuple[ShardHead, Split], ...]
    held_out_every: int
    """Every so many-th training row is a validation row; 0: validation has files of its own."""

    @property
    def heads(self) -> list[ShardHead]:
        """The measured files alone."""
        return [head for head, _ in self.files]


def open_folder(inputs: Sequence[Path], out: Path, validation_share: float) -> ForeignFolder:
    """Find and measure all files but those in `out`; a ShardError names the first that cannot be
    read.

    Files are told by their names, else by their folders' (`split_of`). Where no name says
    validation, the last files are held out: NVIDIA's files hold each document several times, so
    that held-out rows of a file would be trained on in other words. Only where files are too few
    for the share are rows held out.
    """
    found = find_files(inputs, out)
    splits: list[Split] = [split for _, split in found]
    held_out_every = 0
    if "training" not in splits:
        raise DataError(
            f"{_names(inputs)}: all {len(found)} files are named as test or validation files; give "
            "the training files too"
        )
    if "validation" not in splits:
        num_held_out = round(len(found) * validation_share)
        if num_held_out:
            splits[-num_held_out:] = ["validation"] * num_held_out
        else:
            held_out_every = round(1 / validation_share)
    heads = [inspect_foreign(path) for path, _ in found]
    _check_alike(heads)
    if held_out_every:  # one row at least
        held_out_every = max(2, min(held_out_every, sum(head.num_rows for head in heads)))
    return ForeignFolder(tuple(zip(heads, splits, strict=True)), held_out_every)


def longest_rows(heads: Sequence[ShardHead]) -> tuple[int, int]:
    """Return S and P that hold every row of all files.

    Variable rows are read through in another process first: damage may crash the HDF5 library.
    """
    longest = [0, 0]
    with Isolated(_measure) as isolated:
        for head in heads:
            is_fixed = head.max_seq_length > 0
            found = _measure(head) if is_fixed else isolated.run(head, patience(head.path))
            if found is None or isinstance(found, str):
                raise ShardError(found or crash_message(head.path))
            longest = [max(pair) for pair in zip(longest, found, strict=True)]
    return longest[0], longest[1]


def find_files(inputs: Sequence[Path], out: Path | None = None) -> list[tuple[Path, Split]]:
    """Return the HDF5 files among `inputs` and inside its folders but not in `out`, in the order of
    the numbers in their names, each with its split; none is a DataError.
    """
    found: list[tuple[Path, Split]] = []
    for path in inputs:
        if path.is_dir():
            inside = [one for one in path.rglob("*") if _is_shard(one, path)]
            if out is not None:
                ours = out.resolve()
                inside = [one for one in inside if ours not in one.resolve().parents]
            inside.sort(key=lambda one: _natural(one.relative_to(path).as_posix()))
            found += [(one, _split(one.relative_to(path))) for one in inside]
        elif path.is_file():
            found.append((path, _split(Path(path.name))))
        else:
            raise DataError(f"{path}: no such file or folder")
    if not found:
        raise DataError(f"{_names(inputs)}: no HDF5 file in it, at any depth")
    return found


def _measure(head: ShardHead) -> tuple[int, int] | str:
    """Return S and P of one file, or what is wrong with it."""
    try:
        return longest_row(head)
    except ShardError as error:
        return str(error)


def _is_shard(path: Path, root: Path) -> bool:
    """Say whether a file is HDF5, by name or, as MLPerf's `output_00000`, by its first bytes."""
    is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    if is_hidden or not path.is_file():
        return False
    if path.suffix.lower() in (".hdf5", ".h5"):
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(_HDF5_SIGNATURE)) == _HDF5_SIGNATURE
    except OSError:
        return False


def _split(path: Path) -> Split:
    """Tell the split by the file's name, then by its folders; `part_` says least."""
    names = [re.sub(r"^part[_-]", "", path.name.lower()), *path.parts[-2::-1]]
    stems = [name.removesuffix(".hdf5").removesuffix(".h5") for name in names]
    told = (split_of(f"{stem}.hdf5") for stem in stems)
    return next((split for split in told if split), "training")


def _check_alike(heads: Sequence[ShardHead]) -> None:
    """Refuse files of which only some have pairs or masks: one folder has one kind of row."""
    for what, values in (
        ("next_sentence_labels", [head.has_labels for head in heads]),
        ("static masks", [head.has_masks for head in heads]),
    ):
        if len(set(values)) > 1:
            there, missing = heads[values.index(True)].path, heads[values.index(False)].path
            raise ShardError(
                f"{missing}: has no {what}, but {there} has; convert them one kind at a time"
            )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort `a_2` before `a_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _names(inputs: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in inputs[:3])
