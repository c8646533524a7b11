"""One raw file in, its bytes out: decompressed, in whole lines, within a bound of memory."""

import bz2
import importlib
import importlib.util
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from data_prep.errors import DataError
from data_prep.sources.files import RawPart, Skipped, SourceOptions

# Input behind one unit of work. It decides where blocks are cut, so it must not depend on the
# machine or on the number of workers.
BLOCK_BYTES = 4 << 20
# A line, or a page of a dump, above this is no text: it is refused and never held.
MAX_LINE_BYTES = 32 << 20

_READ_BYTES = 1 << 20
# One zstd block of 4 bytes may unfold to 128 KiB: 1 KiB of input gives at most 32 MiB.
_ZSTD_READ_BYTES = 1 << 10
# Frames made with `zstd --long=31` need this window.
_ZSTD_WINDOW_BYTES = 1 << 31
FETCH_AGAIN = "fetch the file again, or keep what can be read of it with --skip-bad"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Reader:
    """The decompressed bytes of one file. After the end, `fault` says what was wrong with the
    archive, or is None.
    """

    def __init__(self, path: Path) -> None:
        self.fault: str | None = None
        self._path = path
        self._new_decoder = _decoder_of(path)
        self._file = open_file(path)
        self._pieces = self._decompressed()
        self._rest = memoryview(b"")

    @property
    def position(self) -> int:
        """Bytes read of the file as it lies on the disk."""
        return self._file.tell()

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer only at the end, none behind it."""
        pieces: list[memoryview] = []
        while size > 0 and (self._rest or self._next_piece()):
            pieces.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(pieces[-1])
        return b"".join(pieces)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _next_piece(self) -> bool:
        self._rest = memoryview(next(self._pieces, b""))
        return bool(self._rest)

    def _decompressed(self) -> Iterator[bytes]:
        if self._new_decoder is None:
            while data := self._read_file():
                yield data
            return
        try:
            yield from self._members(self._new_decoder)
        except _ArchiveFault as fault:
            self.fault = f"the archive is truncated or corrupt: {fault}; {FETCH_AGAIN}"

    def _members(self, new_decoder: "Callable[[], _Decoder]") -> Iterator[bytes]:
        """Yield the content of all members (streams, frames) one behind the other."""
        decoder, is_open, num_members = new_decoder(), False, 0
        data = b""
        while True:
            if decoder.eof:
                data, decoder, is_open = decoder.unused_data, new_decoder(), False
            if not data and (not is_open or decoder.needs_input):
                data = self._read_file()
                if not data:
                    break
            if not is_open:
                data = data.lstrip(b"\0")  # tape and xz padding between members
                if not data:
                    continue
                is_open, num_members = True, num_members + 1
            piece, data = _decode(decoder, data), b""
            if piece:
                yield piece
        if is_open or not num_members:
            raise _ArchiveFault("it ends early" if num_members else "it is empty")

    def _read_file(self) -> bytes:
        try:
            return self._file.read(_READ_BYTES)
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {error.strerror or error}") from error


def whole_lines(path: Path, kind: str, options: SourceOptions) -> Iterator[RawPart]:
    """Yield the file in parts of about BLOCK_BYTES that end with a line.

    A line above MAX_LINE_BYTES is refused or counted, and never held. A last line cut off by a
    broken archive is left out.
    """
    reader = Reader(path)
    line, rest, skipped = 1, b"", Skipped()

    def part(payload: bytes) -> RawPart:
        return RawPart(
            kind, str(path), line, payload, reader.position, len(payload), skipped=skipped
        )

    try:
        while piece := reader.read(BLOCK_BYTES):
            if line == 1 and not rest:
                piece = piece.removeprefix(BYTE_ORDER_MARK)
            first_end = piece.find(b"\n")
            if len(rest) + (first_end if first_end >= 0 else len(piece)) > MAX_LINE_BYTES:
                skipped.refuse(options, "broken_lines", too_long(path, line, "line"))
                piece, rest = _behind_line(reader, piece), b""
                line += 1
            end = piece.rfind(b"\n") + 1
            if end:
                payload = rest + piece[:end]
                yield part(payload)
                line, rest, skipped = line + payload.count(b"\n"), piece[end:], Skipped()
            else:
                rest += piece
        if reader.fault:
            skipped.refuse(options, "broken_files", f"{path}:{line}: {reader.fault}")
            rest = b""
        if rest or skipped.num_broken:
            yield part(rest)
    finally:
        reader.close()


def open_file(path: Path) -> BinaryIO:
    """Open without a buffer; raise DataError where the file cannot be opened."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def too_long(path: Path, line: int, what: str) -> str:
    """Return the message about a line or page that is no text."""
    return (
        f"{path}:{line}: this {what} is longer than {MAX_LINE_BYTES >> 20} MiB; "
        "break it up, or leave it out with --skip-bad"
    )


def not_utf8(path: str, line: int, error: UnicodeDecodeError) -> str:
    """Return the message about bytes of `line` that are no UTF-8; `error` counts from its start."""
    return (
        f"{path}:{line}: not valid UTF-8: byte 0x{error.object[error.start]:02x} at byte "
        f"{error.start} of the line; convert the file to UTF-8, or leave such lines out with "
        "--skip-bad"
    )


def _behind_line(reader: Reader, piece: bytes) -> bytes:
    """Read on to the end of this line and return what is there of the next ones."""
    while piece and b"\n" not in piece:
        piece = reader.read(BLOCK_BYTES)
    return piece[piece.find(b"\n") + 1 :]


class _ArchiveFault(Exception):
    """The archive ends early or its checksum is wrong."""


class _Decoder(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """zlib's decompressor with the face of bz2's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)  # with gzip's header and checksum

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _ZstdDecoder:
    """zstandard's decompressor with the face of bz2's; it has no `max_length`, so it is fed little
    at a time.
    """

    def __init__(self) -> None:
        library = importlib.import_module("zstandard")
        self._inner = library.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
        self._error: type[Exception] = library.ZstdError
        self._rest = b""
        self._offset = 0

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def needs_input(self) -> bool:
        return self._offset >= len(self._rest)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data) + self._rest[self._offset :]

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._rest, self._offset = self._rest[self._offset :] + data, 0
        pieces, size = [], 0
        while size < max_length and not self.needs_input and not self.eof:
            end = self._offset + _ZSTD_READ_BYTES
            try:
                pieces.append(self._inner.decompress(self._rest[self._offset : end]))
            except self._error as error:
                raise _ArchiveFault(str(error)) from error
            self._offset = end
            size += len(pieces[-1])
        return b"".join(pieces)


def _decode(decoder: _Decoder, data: bytes) -> bytes:
    try:
        return decoder.decompress(data, _READ_BYTES)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise _ArchiveFault(str(error)) from error


def _decoder_of(path: Path) -> Callable[[], _Decoder] | None:
    if path.suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise DataError(
            f"{path}: reading .zst needs the package zstandard; install it, or use .gz or .xz"
        )
    decoders: dict[str, Callable[[], _Decoder]] = {
        ".gz": _GzipDecoder,
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lzma.LZMADecompressor,
        ".zst": _ZstdDecoder,
    }
    return decoders.get(path.suffix)
