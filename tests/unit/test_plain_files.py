"""Small files are read whole if they are files: no pipe is waited for, no device read on and on."""

import os
from pathlib import Path

import pytest

from data_prep.plain_files import read_plain, require_plain


def test_a_plain_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "b").symlink_to("a")
    assert read_plain(tmp_path / "b") == b"12345"
    assert require_plain(tmp_path / "b") == 5


def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "loop"):
        with pytest.raises(OSError, match=str(path)):
            read_plain(path)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "none")


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(2**40)  # sparse: holds nothing
    with pytest.raises(OSError, match="1,099,511,627,776 bytes"):
        read_plain(tmp_path / "big")
