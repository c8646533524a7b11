"""Small files whole, if they are plain files: a pipe would wait for ever, a device never end."""

import errno
import stat
from pathlib import Path

MOST_BYTES = 64 * 2**20  # of JSON or a vocabulary; the largest manifests have a few millions


def require_plain(path: Path) -> int:
    """The size of a plain file in bytes, links followed; OSError where there is none."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is no plain file", str(path))
    return found.st_size


def read_plain(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """All bytes of a plain file; OSError where it is none, or larger than `most_bytes`."""
    size = require_plain(path)
    if size > most_bytes:
        raise OSError(errno.EFBIG, f"has {size:,} bytes, more than {most_bytes:,}", str(path))
    return path.read_bytes()
