"""reading: every compression gives the same parts, within a bound of memory."""

import bz2
import gzip
import importlib.util
import lzma
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.sources import reading
from data_prep.sources.files import SourceOptions
from data_prep.sources.reading import Reader, whole_lines

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
STRICT, SKIP = SourceOptions(), SourceOptions(skip_bad=True)
SUFFIXES = pytest.mark.parametrize("suffix", COMPRESS)


def _content(num_lines: int) -> bytes:
    return b"".join(b"%d %s\n" % (i, random.Random(i).randbytes(20).hex().encode()) for i in
                    range(num_lines))  # fmt: skip


def _lines(path: Path, options: SourceOptions = STRICT) -> bytes:
    return b"".join(part.payload for part in whole_lines(path, ".txt", options))


@SUFFIXES
def test_members_one_behind_the_other_are_one_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    compress = COMPRESS[suffix]
    path.write_bytes(compress(b"one\ntw") + compress(b"") + compress(b"o\nthree") + bytes(8))
    assert _lines(path) == b"one\ntwo\nthree"


@SUFFIXES
def test_parts_do_not_depend_on_the_compression(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    plain, packed = tmp_path / "a.txt", tmp_path / f"a.txt{suffix}"
    plain.write_bytes(_content(300))
    packed.write_bytes(COMPRESS[suffix](_content(300)))
    parts = list(whole_lines(packed, ".txt", STRICT))
    expected = list(whole_lines(plain, ".txt", STRICT))
    assert len(parts) > 10
    assert [(p.first, p.payload) for p in parts] == [(p.first, p.payload) for p in expected]
    assert parts[-1].position == packed.stat().st_size


@SUFFIXES
def test_truncated_archive_is_refused_or_its_whole_lines_are_kept(
    tmp_path: Path, suffix: str
) -> None:
    content = _content(40_000)  # more than one block of bz2
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](content)[:-1000])
    with pytest.raises(
        DataError, match=rf"a\.txt\{suffix}:\d+: .*truncated or corrupt: .*--skip-bad$"
    ):
        _lines(path)
    parts = list(whole_lines(path, ".txt", SKIP))
    kept = b"".join(part.payload for part in parts)
    assert len(kept) > 100_000
    assert kept.endswith(b"\n")
    assert content.startswith(kept)
    assert sum(part.skipped.broken_files for part in parts) == 1


@SUFFIXES
def test_empty_archive_and_trailing_rubbish_are_faults(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=":1: the archive is truncated or corrupt: it is empty"):
        _lines(path)
    path.write_bytes(COMPRESS[suffix](b"line\n") + b"rubbish that is no archive")
    with pytest.raises(DataError, match=":2: the archive is truncated or corrupt"):
        _lines(path)
    assert _lines(path, SKIP) == b"line\n"


@SUFFIXES
@given(data=st.data())
def test_any_damage_is_a_one_line_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / f"a.txt{suffix}"
    packed = bytearray(COMPRESS[suffix](_content(20)))
    position = data.draw(st.integers(0, len(packed) - 1))
    packed[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(packed[: data.draw(st.integers(position, len(packed)))])
    kept = _lines(path, SKIP)
    try:
        whole = _lines(path)
    except DataError as error:
        whole = kept
        is_one_line = "\n" not in str(error)
    else:
        is_one_line = True
    assert is_one_line
    assert whole == kept


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_over_long_line_is_never_held(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    content = b"first\n" + b"x" * (150 << 20) + b"\nlast\n"
    packed = gzip.compress(content, 1) if suffix == ".gz" else zstandard.compress(content)
    path.write_bytes(packed if suffix else content)
    del content, packed
    tracemalloc.start()
    parts = list(whole_lines(path, ".txt", SKIP))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(part.first, part.payload) for part in parts] == [(1, b"first\n"), (3, b"last\n")]
    assert sum(part.skipped.broken_lines for part in parts) == 1
    assert peak < 120 << 20
    with pytest.raises(DataError, match=r":2: this line is longer than 32 MiB; .*--skip-bad"):
        _lines(path)


# A byte-order mark at the file's start is dropped, which another test shows.
LINE = st.binary(max_size=12).filter(lambda line: b"\n" not in line and line[:1] != b"\xef")


@given(
    lines=st.lists(LINE, max_size=9),
    block=st.integers(1, 9),
    spare=st.integers(0, 5),
)
def test_only_lines_above_the_limit_are_left_out(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block: int, spare: int
) -> None:
    longest = block + spare  # a block is never longer than a line may be
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        patch.setattr(reading, "MAX_LINE_BYTES", longest)
        parts = list(whole_lines(path, ".txt", SKIP))
    found = [
        (number, line)
        for part in parts
        for number, line in enumerate(part.payload.split(b"\n")[:-1], part.first)
    ]
    numbered = list(enumerate(lines, 1))
    assert found == [(number, line) for number, line in numbered if len(line) <= longest]
    assert sum(part.skipped.broken_lines for part in parts) == len(lines) - len(found)


def test_read_gives_exactly_what_is_asked_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"0123456789"))
    reader = Reader(path)
    assert [reader.read(4) for _ in range(4)] == [b"0123", b"4567", b"89", b""]
    assert reader.fault is None
    reader.close()


def test_missing_library_and_unreadable_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Reader(tmp_path / "a.txt")
    (tmp_path / "a.txt.zst").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs the package zstandard; install it"):
        Reader(tmp_path / "a.txt.zst")
