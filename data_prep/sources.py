"""Raw files in, a stream of documents out: JSON lines and plain text, plain or compressed, never a
whole file in memory.
"""

import gzip
import importlib
import importlib.util
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from data_prep.errors import DataError

TEXT_KINDS = (".jsonl", ".txt")
COMPRESSIONS = (".gz", ".xz", ".zst")


@dataclass(frozen=True)
class Document:
    """One text, a line a paragraph, and where it came from (`file:line`, for messages)."""

    text: str
    origin: str


def read_documents(inputs: Sequence[Path], field: str = "text") -> Iterator[Document]:
    """Yield the documents of files and folders in the given order; `field` is the text's key in
    JSON lines.
    """
    for path in find_files(inputs):
        read = _read_json_lines if _kind(path) == ".jsonl" else _read_plain_text
        yield from read(path, field)


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Return the files behind `inputs`; a folder gives its known files, recursively and in name
    order.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) is not None)
            if not found:
                raise DataError(f"{path}: no file in this folder can be read; {_allowed()}")
            files += found
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif _kind(path) is None:
            raise DataError(f"{path}: unknown kind of file; {_allowed()}")
        else:
            files.append(path)
    if not files:
        raise DataError("no input was given; name at least one file or folder")
    return files


def _read_json_lines(path: Path, field: str) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record: object = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not a JSON object: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: not a JSON object: got {type(record).__name__}")
        text = record.get(field)
        if not isinstance(text, str):
            keys = ", ".join(sorted(record)) or "none"
            state = "not a string" if field in record else "missing"
            raise DataError(
                f"{path}:{number}: field {field!r} is {state}; fields of this record: {keys}; "
                "choose one with --field"
            )
        yield Document(text, f"{path}:{number}")


def _read_plain_text(path: Path, field: str) -> Iterator[Document]:
    """A blank line ends a document, as in Google's BERT; `field` has no meaning here."""
    paragraphs: list[str] = []
    first = 1
    for number, line in _lines(path):
        if line.strip():
            if not paragraphs:
                first = number
            paragraphs.append(line.rstrip("\r\n"))
        elif paragraphs:
            yield Document("\n".join(paragraphs), f"{path}:{first}")
            paragraphs = []
    if paragraphs:
        yield Document("\n".join(paragraphs), f"{path}:{first}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text); every fault of the file becomes one DataError with its
    line.
    """
    number = 0
    try:
        with _open(path) as stream:
            for raw in stream:
                number += 1
                # utf-8-sig would be right for line 1 only: a byte-order mark is legal there alone.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{number}: not valid UTF-8: byte 0x{error.object[error.start]:02x} at byte "
            f"{error.start} of the line; "
            "convert the file to UTF-8"
        ) from error
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}:{number + 1}: the archive is truncated or corrupt: {error}"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}:{number + 1}: cannot be read: {error.strerror or error}"
        ) from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return cast("IO[bytes]", lzma.open(path, "rb"))
    if path.suffix == ".zst":
        if importlib.util.find_spec("zstandard") is None:
            raise DataError(
                f"{path}: reading .zst needs the package zstandard; install it, or use .gz or .xz"
            )
        return cast("IO[bytes]", importlib.import_module("zstandard").open(path, "rb"))
    return path.open("rb")


def _kind(path: Path) -> str | None:
    """Return the text's kind, its suffix below the compression's; None for other files."""
    inner = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return inner if inner in TEXT_KINDS else None


def _allowed() -> str:
    return f"allowed are {', '.join(TEXT_KINDS)}, also with {', '.join(COMPRESSIONS)} behind"
