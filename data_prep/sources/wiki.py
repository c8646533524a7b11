"""A MediaWiki XML dump in, its articles out: one document a page, its last revision."""

import functools
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast
from xml.etree import ElementTree

from data_prep.errors import DataError
from data_prep.sources.files import Document, RawPart, Skipped, SourceOptions
from data_prep.sources.reading import (
    BLOCK_BYTES,
    BYTE_ORDER_MARK,
    FETCH_AGAIN,
    MAX_LINE_BYTES,
    Reader,
    too_long,
)
from data_prep.sources.wikitext import WikiText

KIND = ".xml"
_START, _END, _LAST = b"<page>", b"</page>", b"</mediawiki>"
# Numbers of the namespaces whose links are no text: media, file, category.
_DROPPED_NAMESPACES = ("-2", "6", "14")


def cut_pages(path: Path, options: SourceOptions) -> Iterator[RawPart]:
    """Yield parts of whole pages. No tag can stand inside a page's text, where `<` is written
    `&lt;`, so the bytes `</page>` always end a page.
    """
    if importlib.util.find_spec("mwparserfromhell") is None:
        raise DataError(f"{path}: reading a dump needs the package mwparserfromhell; install it")
    reader = Reader(path)
    try:
        yield from _cut(path, options, reader)
    finally:
        reader.close()


def parse_pages(part: RawPart, options: SourceOptions, skipped: Skipped) -> list[Document]:
    """Return the articles of a part; redirects and pages of other kinds are counted."""
    extractor = _extractor(part.namespaces)
    documents = []
    number = part.first
    for raw in part.payload.split(_END)[:-1]:
        start = max(raw.find(_START), 0)
        first = number + raw.count(b"\n", 0, start)
        number += raw.count(b"\n")
        try:
            wikitext = _wikitext(ElementTree.fromstring(raw[start:] + _END), skipped)
        except ElementTree.ParseError as error:
            what = str(error).partition(":")[0]
            skipped.refuse(
                options,
                "broken_records",
                f"{part.path}:{first + error.position[0] - 1}: this page is not XML: {what}; "
                "mend it, or leave it out with --skip-bad",
            )
            continue
        if wikitext is not None:
            documents.append(Document(extractor.prose(wikitext), f"{part.path}:{first}"))
    return documents


def _cut(path: Path, options: SourceOptions, reader: Reader) -> Iterator[RawPart]:
    rest = reader.read(BLOCK_BYTES).removeprefix(BYTE_ORDER_MARK)
    start = max(rest.find(_START), 0)
    namespaces = _namespaces(rest[:start] or rest)
    line, rest, skipped = 1 + rest.count(b"\n", 0, start), rest[start:], Skipped()

    def part(payload: bytes) -> RawPart:
        return RawPart(
            KIND,
            str(path),
            line,
            payload,
            reader.position,
            len(payload),
            namespaces or frozenset(),
            skipped,
        )

    if namespaces is None:
        fault = reader.fault or "not a MediaWiki dump: no <mediawiki>; name a pages-articles file"
        skipped.refuse(options, "broken_files", f"{path}:1: {fault}")
        yield part(b"")
        return
    piece = rest
    while piece:
        end = rest.rfind(_END) + len(_END)
        if end >= len(_END):
            yield part(rest[:end])
            line, rest, skipped = line + rest.count(b"\n", 0, end), rest[end:], Skipped()
        elif len(rest) > MAX_LINE_BYTES:
            skipped.refuse(options, "broken_records", too_long(path, line, "page"))
            num_lines, rest = _behind_page(reader, rest)
            line += num_lines
            continue  # whole pages may stand behind it
        piece = reader.read(BLOCK_BYTES)
        rest += piece
    if reader.fault or _LAST not in rest:
        fault = reader.fault or f"the XML ends early, without </mediawiki>; {FETCH_AGAIN}"
        line += rest.count(b"\n")
        skipped.refuse(options, "broken_files", f"{path}:{line}: {fault}")
    if skipped.num_broken:
        yield part(b"")


def _behind_page(reader: Reader, rest: bytes) -> tuple[int, bytes]:
    """Read on to the end of this page; return its line ends and what is there of the next one."""
    num_lines = 0
    while (end := rest.find(_END)) < 0:
        piece = reader.read(BLOCK_BYTES)
        if not piece:
            return num_lines, rest
        kept = rest[-len(_END) :]
        num_lines += rest.count(b"\n") - kept.count(b"\n")
        rest = kept + piece
    end += len(_END)
    return num_lines + rest.count(b"\n", 0, end), rest[end:]


def _wikitext(page: ElementTree.Element, skipped: Skipped) -> str | None:
    """Return the source of an article; None, and counted, for other pages."""
    revisions = page.findall("revision")
    is_wikitext = bool(revisions) and revisions[-1].findtext("model", "wikitext") == "wikitext"
    if page.findtext("ns", "0") != "0" or not is_wikitext:
        skipped.other_pages += 1
        return None
    text = revisions[-1].findtext("text") or ""
    if page.find("redirect") is not None or text.lstrip()[:9].upper() == "#REDIRECT":
        skipped.redirects += 1
        return None
    return text


def _namespaces(header: bytes) -> frozenset[str] | None:
    """Return the wiki's own names of its file and category pages; None if it is no dump."""
    # A document type could define entities; a dump has none.
    if b"<mediawiki" not in header or b"<!DOCTYPE" in header:
        return None
    parser: ElementTree.XMLPullParser[ElementTree.Element] = ElementTree.XMLPullParser(["end"])
    try:
        parser.feed(header)
        events = cast("Iterable[tuple[str, ElementTree.Element]]", parser.read_events())
        elements = [element for _, element in events]
    except ElementTree.ParseError:
        return None
    return frozenset(
        element.text
        for element in elements
        if element.tag.endswith("namespace")
        and element.get("key") in _DROPPED_NAMESPACES
        and element.text
    )


@functools.lru_cache(maxsize=4)
def _extractor(namespaces: frozenset[str]) -> WikiText:
    return WikiText(namespaces)
