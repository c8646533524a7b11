"""A node's own copies of shards, in a folder that is read like the shared one.

DIR/<sha256 of the manifest> is a data folder: its small files are copied, each of its shards is a
whole copy or a link to the shared one. A copy gets its name when it is whole, verified and on the
disk, so that nothing of a killed job is taken for one; later jobs with the same manifest use it.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.plain_files import read_plain, require_plain
from data_prep.shard_format import (
    MANIFEST,
    SPLITS,
    TOKEN_COUNTS,
    VOCABULARY,
    file_sha256,
    read_manifest,
    sync_folder,
    write_atomically,
)
from stacking.errors import ShardError, UserError

SMALL_FILES = (VOCABULARY, "tokenizer.json", TOKEN_COUNTS, MANIFEST)  # the manifest is the last
_BLOCK_BYTES = 2**20  # stays in a core's cache between reading, hashing and writing
_NAME_DIGITS = 16  # of the manifest's sha256
# Some network and FUSE file systems. Renames alone then keep copies whole; work may be done twice.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_MIB = 2**20


class NodeCopies:
    """Copies of the shards of `source`, in a folder below `stage_dir`."""

    def __init__(self, source: Path, stage_dir: Path) -> None:
        """Read the manifest; writes nothing.

        UserError where `source` has none, as then nothing tells a whole copy from a damaged one.
        """
        manifest = read_manifest(source)
        if manifest is None:
            raise UserError(
                f"--stage-data: {source} is no folder with a manifest.json, whose sha256 tell "
                "whole copies from damaged ones; make one with launch/prepare_data.py convert, or "
                "leave --stage-data out"
            )
        entries = (entry for split in SPLITS for entry in manifest.entries(split))
        self._sha256 = {entry.file: entry.sha256 for entry in entries}
        self._source = source.absolute()
        self._stage_dir = stage_dir
        self.folder = stage_dir.absolute() / file_sha256(source / MANIFEST)[:_NAME_DIGITS]

    def link(self) -> None:
        """Make the folder: small files as they are now, links where a shard has no copy yet.

        UserError where it cannot be written.
        """
        small = {name: self._small(name) for name in SMALL_FILES}
        with self._writing():
            self.folder.mkdir(exist_ok=True)
            with self._lock() as is_alone:
                if is_alone:
                    for left in self.folder.glob(".*.tmp"):  # of jobs that were killed
                        left.unlink()
                for name in self._sha256:
                    self._link(name)
                for name, content in small.items():
                    self._keep(name, content)

    def missing(self, names: Iterable[str]) -> dict[str, int]:
        """Those of the shards that have no copy yet, and their bytes.

        A copy is known by its name and its size. ShardError for one that is not to be had.
        """
        return {name: self._size(name) for name in names if not self._is_whole(name)}

    def check_room(self, num_bytes: int) -> None:
        """UserError where the disk has not so much free."""
        with self._writing():
            free = shutil.disk_usage(self.folder).free
        if num_bytes > free:
            raise UserError(
                f"--stage-data {self._stage_dir}: {size_text(num_bytes)} of shards are still to be "
                f"copied, {size_text(free)} are free; free some space, give a folder on a larger "
                "disk, or leave --stage-data out"
            )

    def copy(self, name: str) -> int:
        """Copy one shard, verified on the way; its bytes, or 0 if another job was faster.

        ShardError if it cannot be read or is not the manifest's, UserError if it cannot be written.
        """
        temporary = self._temporary(name)
        with self._writing(), self._lock():
            if self._is_whole(name):
                return 0
            try:
                self._copy_bytes(name, temporary)
                num_bytes = temporary.stat().st_size
                temporary.replace(self.folder / name)
                sync_folder(self.folder)
            finally:
                with suppress(OSError):  # it has been renamed, or the disk is gone altogether
                    temporary.unlink()
        return num_bytes

    def _copy_bytes(self, name: str, temporary: Path) -> None:
        digest = hashlib.sha256()
        with temporary.open("wb") as stream:
            for block in _blocks(self._source / name):
                digest.update(block)
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        if digest.hexdigest() != self._sha256[name]:
            raise ShardError(
                f"{self._source / name}: its sha256 is not the manifest's; the file was changed "
                "after it was made; copy it again, or prepare the data again"
            )

    def _is_whole(self, name: str) -> bool:
        try:
            found = (self.folder / name).lstat()
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode):
            return False
        try:
            return found.st_size == (self._source / name).stat().st_size
        except OSError:  # the shared folder is away: the name alone says that it was whole
            return True

    def _size(self, name: str) -> int:
        try:
            return require_plain(self._source / name)
        except OSError as error:
            raise _unreadable(self._source / name, error) from error

    def _link(self, name: str) -> None:
        path, target = self.folder / name, self._source / name
        is_linked = path.is_symlink() and path.readlink() == target
        if not is_linked and not self._is_whole(name):
            temporary = self._temporary(name)
            temporary.symlink_to(target)
            temporary.replace(path)

    def _small(self, name: str) -> bytes | None:
        """What the shared folder has; None: nothing."""
        try:
            return read_plain(self._source / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(self._source / name, error) from error

    def _keep(self, name: str, content: bytes | None) -> None:
        path = self.folder / name
        if content is None:
            path.unlink(missing_ok=True)
        elif not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)

    def _temporary(self, name: str) -> Path:
        return self.folder / f".{name}.{socket.gethostname()}.{os.getpid()}.tmp"

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        """Keep other jobs of this node out, for a shard's time; False where there are no locks."""
        with (self.folder / ".lock").open("a") as file:
            is_alone = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                is_alone = False
            yield is_alone

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--stage-data {self._stage_dir}: cannot be written: {error}; free some space, "
                "make it writable, give another folder, or leave --stage-data out"
            ) from error


def size_text(num_bytes: int) -> str:
    """ "1,234.5 MiB"."""
    return f"{num_bytes / _MIB:,.1f} MiB"


def _blocks(path: Path) -> Iterator[memoryview]:
    """Of a file, in order; each is overwritten by the next."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    try:
        require_plain(path)
        with path.open("rb", buffering=0) as stream:
            while num_bytes := stream.readinto(block):
                yield block[:num_bytes]
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ShardError:
    return ShardError(f"{path}: cannot be read: {error}")
