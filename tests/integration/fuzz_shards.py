"""Damage that HDF5 itself writes: other types, shapes, layouts and values in a valid file."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from hypothesis import strategies as st

from data_prep.shard_format import HDF5_ERRORS


@dataclass(frozen=True)
class ShardEdit:
    """One change of a valid shard; `where` picks the dataset and the place in it."""

    op: str
    where: int
    value: int = 0


KINDS = ("i8", "u8", "f4", "f8", "?", "S3", "i1", "u1", ">i4", "c8", "O", "V4")
VALUES = (-1, 0, 1, 2, 5, 28, 29, 127, 200, -128, 2**15, 2**16 - 1, 2**31 - 1, -(2**31))


def edit_shard(path: Path, edit: ShardEdit) -> None:
    """Do one edit."""
    # Not every edit is possible after an earlier one.
    with suppress(*HDF5_ERRORS), h5py.File(path, "a") as file:
        names = sorted(name for name in file if isinstance(file.get(name), h5py.Dataset))
        if names:
            _OPS[edit.op](file, names[edit.where % len(names)], edit)


def _rewrite(file: h5py.File, name: str, array: object, **options: object) -> None:
    del file[name]
    file.create_dataset(name, data=array, **options)


def _kind(file: h5py.File, name: str, edit: ShardEdit) -> None:
    kind = KINDS[edit.value % len(KINDS)]
    array = file[name][()]
    if kind == "O":
        del file[name]
        rows = file.create_dataset(name, (len(array),), dtype=h5py.vlen_dtype(np.int32))
        for index in range(len(array)):
            rows[index] = np.atleast_1d(array[index]).astype(np.int32)
        return
    _rewrite(file, name, array.astype(kind) if kind != "V4" else np.zeros(array.shape, "V4"))


def _shape(file: h5py.File, name: str, edit: ShardEdit) -> None:
    array = np.asarray(file[name][()])
    shapes: tuple[Callable[[], object], ...] = (
        lambda: array[:-1], lambda: np.concatenate([array, array[:1]]), lambda: array[..., None],
        lambda: array.ravel(), lambda: array[:0], lambda: array.T, lambda: array[..., :-1],
        lambda: np.concatenate([array, array], axis=-1), lambda: array.ravel()[0],
        lambda: h5py.Empty("i4"), lambda: array[None], lambda: array[:, :0].copy()
        if array.ndim > 1 else array[:0],
    )  # fmt: skip
    _rewrite(file, name, shapes[edit.value % len(shapes)]())


def _missing(file: h5py.File, name: str, edit: ShardEdit) -> None:
    del file[name]


def _group(file: h5py.File, name: str, edit: ShardEdit) -> None:
    del file[name]
    file.create_group(name)


def _link(file: h5py.File, name: str, edit: ShardEdit) -> None:
    links = (
        h5py.SoftLink("/nowhere"), h5py.SoftLink(f"/{name}"), h5py.ExternalLink("no.hdf5", "/x"),
        h5py.ExternalLink("validation_00000.hdf5", f"/{name}"), h5py.SoftLink("/"),
        h5py.ExternalLink("/dev/zero", "/x"), h5py.ExternalLink("../../x", "/x"),
    )  # fmt: skip
    del file[name]
    file[name] = links[edit.value % len(links)]


def _layout(file: h5py.File, name: str, edit: ShardEdit) -> None:
    array = np.asarray(file[name][()])
    options: tuple[dict[str, object], ...] = (
        {"chunks": True}, {"compression": "gzip"}, {"compression": "lzf"}, {"shuffle": True},
        {"fletcher32": True}, {"chunks": True, "maxshape": (None,) * array.ndim}, {},
    )  # fmt: skip
    _rewrite(file, name, array, **options[edit.value % len(options)])


def _huge(file: h5py.File, name: str, edit: ShardEdit) -> None:
    """A dataset that says far more rows than the file has bytes."""
    array = file[name]
    kind, tail = array.dtype, array.shape[1:]
    del file[name]
    rows = 10 ** (3 + edit.value % 10)
    file.create_dataset(name, (rows, *tail), kind, chunks=(10, *tail), fillvalue=1)


def _far(file: h5py.File, name: str, edit: ShardEdit) -> None:
    """All datasets huge alike, contiguous and never written."""
    rows = 10 ** (3 + edit.value % 12)
    for other in list(file):
        kind, tail = file[other].dtype, file[other].shape[1:]
        del file[other]
        file.create_dataset(other, (rows, *tail), kind)


def _outside(file: h5py.File, name: str, edit: ShardEdit) -> None:
    """Values in another file: one that later edits may write to."""
    array = file[name]
    kind, shape, size = array.dtype, array.shape, array.nbytes
    del file[name]
    file.create_dataset(name, shape, kind, external=[("/dev/zero", 0, size)])


def _value(file: h5py.File, name: str, edit: ShardEdit) -> None:
    array = np.asarray(file[name][()])
    limits = np.iinfo(array.dtype)
    value = min(max(VALUES[edit.value % len(VALUES)], int(limits.min)), int(limits.max))
    array.reshape(-1)[edit.where // 7 % array.size] = value
    file[name][()] = array


def _constant(file: h5py.File, name: str, edit: ShardEdit) -> None:
    array = np.asarray(file[name][()])
    limits = np.iinfo(array.dtype)
    value = min(max(VALUES[edit.value % len(VALUES)], int(limits.min)), int(limits.max))
    file[name][()] = np.full_like(array, value)


def _extra(file: h5py.File, name: str, edit: ShardEdit) -> None:
    file[f"extra_{edit.value}"] = np.arange(3)
    file.attrs["tokenizer_sha256"] = "0" * edit.value


_OPS: dict[str, Callable[[h5py.File, str, ShardEdit], None]] = {
    "kind": _kind, "shape": _shape, "missing": _missing, "group": _group, "link": _link,
    "layout": _layout, "huge": _huge, "far": _far, "outside": _outside, "value": _value,
    "constant": _constant, "extra": _extra,
}  # fmt: skip

shard_edits = st.builds(
    ShardEdit, st.sampled_from(sorted(_OPS)), st.integers(0, 2**12), st.integers(0, 200)
)
