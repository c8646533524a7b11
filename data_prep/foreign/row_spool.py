"""Records in, in any order; out again in the order of their keys, or as they came.

The sort is on disk, so that a shuffle of any number of rows needs little memory.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

# One bucket is sorted in memory; open files are few enough for any limit.
_BUCKET_BYTES = 32 << 20
_MOST_BUCKETS = 256


class RowSpool:
    """Buckets on disk, each with the keys of one range; the folder is the caller's."""

    def __init__(
        self, folder: Path, dtype: np.dtype[np.void], *, expected_rows: int, is_sorted: bool
    ) -> None:
        """Open the buckets; `expected_rows` decides their number, and nothing else. `is_sorted`
        False: keys are none, and one bucket keeps the order.
        """
        fields = [(name, dtype[name].base, dtype[name].shape) for name in dtype.names or ()]
        self._dtype = dtype
        self._keyed = np.dtype([("key", "<u8", ()), *fields])
        self._is_sorted = is_sorted
        wanted = expected_rows * self._keyed.itemsize // _BUCKET_BYTES if is_sorted else 1
        self._num_buckets = min(max(1, wanted), _MOST_BUCKETS)
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = [folder / f"bucket_{index:03d}" for index in range(self._num_buckets)]
        self._streams: list[IO[bytes]] = [path.open("wb") for path in self._paths]
        self.num_rows = 0

    def __enter__(self) -> "RowSpool":
        """Return the open spool."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close and remove the buckets."""
        for stream, path in zip(self._streams, self._paths, strict=True):
            stream.close()
            path.unlink(missing_ok=True)

    def add(
        self, records: npt.NDArray[np.void], keys: npt.NDArray[np.uint64] | None = None
    ) -> None:
        """Add records [n] with their keys [n], spread over all of 64 bits."""
        assert self._is_sorted == (keys is not None), "keys are what a spool is sorted by"
        self.num_rows += len(records)
        keyed = np.zeros(len(records), self._keyed)
        for name in self._dtype.names or ():
            keyed[name] = records[name]
        if keys is None:
            self._streams[0].write(keyed.tobytes())
            return
        keyed["key"] = keys
        # The upper half of the key times the buckets, shifted: a range of keys a bucket.
        bucket = ((keys >> np.uint64(32)) * np.uint64(self._num_buckets)) >> np.uint64(32)
        order = np.argsort(bucket, kind="stable")
        counts = np.bincount(bucket.astype(np.int64), minlength=self._num_buckets)
        start = 0
        for stream, count in zip(self._streams, counts.tolist(), strict=True):
            stream.write(keyed[order[start : start + count]].tobytes())
            start += count

    def read(self) -> Iterator[npt.NDArray[np.void]]:
        """Yield all records once, in blocks; equal keys as they came."""
        for stream, path in zip(self._streams, self._paths, strict=True):
            stream.close()
            # An unsorted bucket is read in pieces, a sorted one as a whole.
            num_rows = -1 if self._is_sorted else max(1, _BUCKET_BYTES // self._keyed.itemsize)
            with path.open("rb") as bucket:
                while len(keyed := np.fromfile(bucket, self._keyed, num_rows)):
                    yield self._in_order(keyed)
            path.unlink()

    def _in_order(self, keyed: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        order = np.argsort(keyed["key"], kind="stable")
        records = np.empty(len(keyed), self._dtype)
        for name in self._dtype.names or ():
            records[name] = keyed[name][order]
        return records


def in_groups(
    blocks: Iterator[npt.NDArray[np.void]], sizes: list[int]
) -> Iterator[npt.NDArray[np.void]]:
    """Cut a stream of records into groups of the given sizes."""
    held: list[npt.NDArray[np.void]] = []
    for size in sizes:
        while sum(map(len, held)) < size:
            held.append(next(blocks))
        records = held[0] if len(held) == 1 else np.concatenate(held)
        yield records[:size]
        held = [records[size:]]
