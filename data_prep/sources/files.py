"""Which files are raw text and how they are asked to be read; the types that all kinds of sources
share.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple

from data_prep.errors import DataError

KINDS = (".jsonl", ".txt", ".xml", ".parquet")
# Parquet is read out of order and compresses inside.
STREAMED_KINDS = (".jsonl", ".txt", ".xml")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
# Other names of a kind. `.json` holds JSON lines in large public corpora (C4, RedPajama), but is
# mostly no text when it lies in a folder uncompressed.
_ALIASES = {".ndjson": ".jsonl", ".json": ".jsonl"}
# Where the pages of a multistream dump begin: no text, though it is called .txt.
_DUMP_INDEX = re.compile(r"-multistream-index\d*\.txt")
# Faults kept in words; the rest is only counted.
MAX_MESSAGES = 5


class Document(NamedTuple):
    """One text, a line a paragraph, and where it came from (`file:line`, for messages)."""

    text: str
    origin: str


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How raw files are read."""

    field: str = "text"
    """The text's key in JSON lines, its column in Parquet."""
    documents: Literal["blank-line", "file", "line"] = "blank-line"
    """What ends a document of plain text; other kinds have documents of their own."""
    skip_bad: bool = False
    """Count bad input and go on, instead of ending with an error."""


@dataclass
class Skipped:
    """What was left out or changed while reading, in numbers, and the first faults in words."""

    broken_lines: int = 0
    """Lines that are not UTF-8, not JSON, too long, or without the field."""
    broken_records: int = 0
    """Parquet rows without text, pages of a dump that are no XML or too long."""
    broken_files: int = 0
    """Files that end early or are not what their name says; their readable part was kept."""
    redirects: int = 0
    other_pages: int = 0
    """Pages of a dump that are no articles: talk, users, templates, categories."""
    cut_documents: int = 0
    """Times that plain text without a blank line was cut because it was too long."""
    messages: list[str] = field(default_factory=list)
    """`file:line: what is wrong` of the first MAX_MESSAGES faults."""

    @property
    def num_broken(self) -> int:
        """Number of faults: what would have been an error without `skip_bad`."""
        return self.broken_lines + self.broken_records + self.broken_files

    def merge(self, other: "Skipped") -> None:
        """Add the numbers of what was read later."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        del self.messages[MAX_MESSAGES:]

    def refuse(
        self,
        options: SourceOptions,
        what: Literal["broken_lines", "broken_records", "broken_files"],
        message: str,
    ) -> None:
        """Raise DataError with `message`, or count it where the user allows that."""
        if not options.skip_bad:
            raise DataError(message)
        setattr(self, what, getattr(self, what) + 1)
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)


@dataclass(frozen=True)
class RawPart:
    """Whole records of one file, not yet parsed; what a worker is given."""

    kind: str
    path: str
    first: int
    """Number of the payload's first line, from 1; of the row group, from 0, for Parquet."""
    payload: bytes
    position: int
    """Bytes of the file, as it lies on the disk, that were read when this was cut."""
    num_bytes: int
    """Size when decompressed; for Parquet, which carries no payload, as the file states it."""
    namespaces: frozenset[str] = frozenset()
    """Names of a dump's file and category pages in its own language."""
    skipped: Skipped = field(default_factory=Skipped)
    """Faults met before or behind this part."""


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Return the files behind `inputs`; a folder gives its known files, recursively and in name
    order, without hidden ones.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += _files_of_folder(path)
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        else:
            kind_of(path)
            files.append(path)
    if not files:
        raise DataError("no input was given; name at least one file or folder")
    return files


def kind_of(path: Path) -> str:
    """Return one of KINDS; raise DataError for other files."""
    if _DUMP_INDEX.search(path.name):
        raise DataError(f"{path}: the index of a dump holds no text; name the .xml file beside it")
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; {_allowed()}")
    return kind


def input_bytes(files: Sequence[Path]) -> int:
    """Return the size of all files as they lie on the disk."""
    return sum(path.stat().st_size for path in files)


def _files_of_folder(folder: Path) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and _kind(path) is not None
        and path.suffix != ".json"
        and not _DUMP_INDEX.search(path.name)
        and path.is_file()
    )
    if not found:
        raise DataError(f"{folder}: no file in this folder can be read; {_allowed()}")
    return found


def _kind(path: Path) -> str | None:
    """Return the text's kind, its suffix below the compression's; None for other files."""
    is_compressed = path.suffix in COMPRESSIONS
    inner = Path(path.stem).suffix if is_compressed else path.suffix
    # Parts of a dump are named `...xml-p1p41242.bz2`.
    inner = ".xml" if inner.startswith(".xml-p") else _ALIASES.get(inner, inner)
    return inner if inner in (STREAMED_KINDS if is_compressed else KINDS) else None


def _allowed() -> str:
    return (
        f"allowed are {', '.join(KINDS)}, all but the last also with "
        f"{', '.join(COMPRESSIONS)} behind"
    )
