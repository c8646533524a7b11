"""Raw files in, documents out: JSON lines, plain text, MediaWiki dumps and Parquet, plain or
compressed, never a whole file in memory.

One process cuts the files into blocks between documents (`read_blocks`); any process turns a block
into documents (`parse_block`). Both are functions of the files and the options alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources.files import (
    Document,
    RawPart,
    Skipped,
    SourceOptions,
    find_files,
    input_bytes,
    kind_of,
)
from data_prep.sources.json_lines import cut_json_lines, parse_json_lines
from data_prep.sources.parquet import cut_rows, parse_rows
from data_prep.sources.plain import cut_text, parse_text
from data_prep.sources.reading import BLOCK_BYTES
from data_prep.sources.wiki import cut_pages, parse_pages

__all__ = [
    "Document",
    "RawBlock",
    "Skipped",
    "SourceOptions",
    "find_files",
    "input_bytes",
    "parse_block",
    "read_blocks",
]

_Cut = Callable[[Path, SourceOptions], Iterator[RawPart]]
_Parse = Callable[[RawPart, SourceOptions, Skipped], list[Document]]
_KINDS: dict[str, tuple[_Cut, _Parse]] = {
    ".jsonl": (cut_json_lines, parse_json_lines),
    ".txt": (cut_text, parse_text),
    ".xml": (cut_pages, parse_pages),
    ".parquet": (cut_rows, parse_rows),
}


@dataclass(frozen=True)
class RawBlock:
    """About BLOCK_BYTES of input, not yet parsed: part of a large file, or several small ones."""

    parts: tuple[RawPart, ...]
    position: int
    """Bytes of all inputs, as they lie on the disk, that were read when this was cut."""

    @property
    def num_bytes(self) -> int:
        """Size when decompressed."""
        return sum(part.num_bytes for part in self.parts)


def read_blocks(files: Sequence[Path], options: SourceOptions) -> Iterator[RawBlock]:
    """Yield the content of `files`, as `find_files` gives them, in order.

    Raises DataError `file:line: ...` at bad input, unless `options.skip_bad`.
    """
    held: list[RawPart] = []
    num_bytes = num_bytes_before = 0
    for path in files:
        cut, _ = _KINDS[kind_of(path)]
        for part in cut(path, options):
            held.append(part)
            num_bytes += part.num_bytes
            if num_bytes >= BLOCK_BYTES // 2:
                yield RawBlock(tuple(held), num_bytes_before + part.position)
                held, num_bytes = [], 0
        num_bytes_before += path.stat().st_size
    if held:
        yield RawBlock(tuple(held), num_bytes_before)


def parse_block(block: RawBlock, options: SourceOptions) -> tuple[list[Document], Skipped]:
    """Return the block's documents, in the files' order, and what was left out.

    Raises DataError `file:line: ...` at bad input, unless `options.skip_bad`.
    """
    documents: list[Document] = []
    skipped = Skipped()
    for part in block.parts:
        skipped.merge(part.skipped)
        documents += _KINDS[part.kind][1](part, options, skipped)
    return documents, skipped
