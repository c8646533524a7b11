"""Plain text in, documents out: ended by a blank line (as in Google's BERT), a line or the file."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.sources.files import Document, RawPart, Skipped, SourceOptions
from data_prep.sources.reading import not_utf8, whole_lines

KIND = ".txt"
# Text without a blank line is cut into documents of at most this size, at a line's end.
MAX_DOCUMENT_BYTES = 8 << 20
# Line ends with nothing but white space between them.
_BLANK_LINES = re.compile(r"\n\s*\n")
# Stands for a line that could not be decoded, so that the numbers of the others stay right.
_LOST_LINE = "\0"


def cut_text(path: Path, options: SourceOptions) -> Iterator[RawPart]:
    """Yield parts that end between documents; a document above MAX_DOCUMENT_BYTES is cut at a
    line's end, which is counted.
    """
    lines = whole_lines(path, KIND, options)
    if options.documents == "line":
        yield from lines
        return
    held: RawPart | None = None
    for part in lines:
        if held is None:
            held = part
        elif held.first + held.payload.count(b"\n") == part.first:
            held = _joined(held, part)
        else:  # a line between them was left out: the document ends there
            yield held
            held = part
        while (cut := _document_end(held.payload, options))[0]:
            ready, held = _split(held, *cut)
            yield ready
    if held is not None and (held.payload or held.skipped.num_broken):
        yield held


def parse_text(part: RawPart, options: SourceOptions, skipped: Skipped) -> list[Document]:
    """Return the documents of a part; blank lines between them are none."""
    text = _decoded(part, options, skipped)
    if options.documents == "file":
        return [_document(text, part, part.first)] if text else []
    if options.documents == "line":
        lines = enumerate(text.split("\n"), part.first)
        return [_document(line, part, number) for number, line in lines if line.strip()]
    documents, start, number = [], 0, part.first
    ends = [(match.start(), match.end()) for match in _BLANK_LINES.finditer(text)]
    for end, next_start in [*ends, (len(text), len(text))]:
        body = text[start:end].lstrip()
        if body:
            first = number + text.count("\n", start, end - len(body))
            documents.append(_document(body, part, first))
        number += text.count("\n", start, next_start)
        start = next_start
    return documents


def _document(text: str, part: RawPart, number: int) -> Document:
    if _LOST_LINE in text:
        text = "\n".join(line for line in text.split("\n") if line != _LOST_LINE)
    return Document(text.rstrip(), f"{part.path}:{number}")


def _decoded(part: RawPart, options: SourceOptions, skipped: Skipped) -> str:
    """Return the part's text; a line that is not UTF-8 is refused or replaced by _LOST_LINE."""
    payload = part.payload.replace(b"\r\n", b"\n")
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError:
        lines = []
    for number, raw in enumerate(payload.split(b"\n"), part.first):
        try:
            lines.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            skipped.refuse(options, "broken_lines", not_utf8(part.path, number, error))
            lines.append(_LOST_LINE)
    return "\n".join(lines)


def _document_end(payload: bytes, options: SourceOptions) -> tuple[int, bool]:
    """Return where the part can be cut, 0 for nowhere, and whether that is inside a document."""
    limit = min(len(payload), MAX_DOCUMENT_BYTES)
    end = _last_blank_line(payload, limit) if options.documents == "blank-line" else 0
    if end or limit == len(payload):
        return end, False
    return payload.rfind(b"\n", 0, limit) + 1 or payload.find(b"\n", limit) + 1, True


def _last_blank_line(payload: bytes, limit: int) -> int:
    """Return the offset behind the last blank line of the first `limit` bytes, or 0."""
    end = payload.rfind(b"\n", 0, limit)
    while end > 0:
        start = payload.rfind(b"\n", 0, end)
        if start >= 0 and not payload[start + 1 : end].strip():
            return end + 1
        end = start
    return 0


def _split(part: RawPart, end: int, is_cut: bool) -> tuple[RawPart, RawPart]:
    ready = replace(part, payload=part.payload[:end], num_bytes=end)
    ready.skipped.cut_documents += is_cut
    rest = replace(
        part,
        first=part.first + ready.payload.count(b"\n"),
        payload=part.payload[end:],
        num_bytes=part.num_bytes - end,
        skipped=Skipped(),
    )
    return ready, rest


def _joined(held: RawPart, part: RawPart) -> RawPart:
    held.skipped.merge(part.skipped)
    payload = held.payload + part.payload
    return replace(held, payload=payload, num_bytes=len(payload), position=part.position)
