"""Disks that are full or read-only, seen by warm jobs alone: mounts in their own namespace.

root writes into a folder whatever its mode, so chmod is no obstacle for the tests' usual user.
"""

import subprocess
from pathlib import Path

from warm_jobs import WarmJobs

OWN_NAMESPACE = ("unshare", "--mount")


def can_mount() -> bool:
    """Whether this user may make a namespace of mounts, and a mount in it."""
    try:
        done = subprocess.run(
            [*OWN_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


class Mounts:
    """Mounts that the ranks of `jobs` see, and nobody else."""

    def __init__(self, jobs: WarmJobs) -> None:
        self._pid = jobs.process.pid

    def seen(self, path: Path) -> Path:
        """Where this process finds what lies at the ranks' `path`."""
        return Path(f"/proc/{self._pid}/root") / path.relative_to("/")

    def small_disk(self, path: Path, size: int) -> None:
        """An empty file system of `size` bytes at the folder `path`."""
        self._mount("-t", "tmpfs", "-o", f"size={size}", "none", path)

    def make_read_only(self, path: Path) -> None:
        """Whoever opens a file under `path` from now on cannot write to it."""
        self._mount("--bind", path, path)
        self._mount("-o", "remount,bind,ro", path)

    def undo(self, path: Path) -> None:
        """Take the newest mount at `path` away."""
        self._run("umount", "--lazy", path)

    def _mount(self, *words: object) -> None:
        self._run("mount", *words)

    def _run(self, *words: object) -> None:
        command = ["nsenter", "--target", str(self._pid), "--mount", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def fill(folder: Path) -> Path:
    """Leave no byte free on the disk of `folder`; the file that takes them all."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        block = bytes(65536)
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]
    return path
