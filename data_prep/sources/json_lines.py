"""JSON lines in, documents out: one record a line, its text under a chosen key."""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import DataError
from data_prep.sources.files import Document, RawPart, Skipped, SourceOptions
from data_prep.sources.reading import not_utf8, whole_lines

KIND = ".jsonl"
# Fields named in a message.
_MOST_KEYS = 20


def cut_json_lines(path: Path, options: SourceOptions) -> Iterator[RawPart]:
    """Yield parts of whole lines."""
    return whole_lines(path, KIND, options)


def parse_json_lines(part: RawPart, options: SourceOptions, skipped: Skipped) -> list[Document]:
    """Return the documents of a part; blank lines are no records."""
    documents = []
    for number, raw in enumerate(part.payload.split(b"\n"), part.first):
        if raw and not raw.isspace():
            origin = f"{part.path}:{number}"
            try:
                documents.append(Document(_text_of(raw, part.path, number, options.field), origin))
            except DataError as error:
                skipped.refuse(options, "broken_lines", str(error))
    return documents


def _text_of(raw: bytes, path: str, number: int, field: str) -> str:
    try:
        record: object = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(not_utf8(path, number, error)) from error
    except json.JSONDecodeError as error:
        raise _not_json(path, number, f"{error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number, or nesting, without end
        raise _not_json(path, number, str(error)) from error
    if not isinstance(record, dict):
        raise _not_json(path, number, f"got {type(record).__name__}")
    text = record.get(field)
    if isinstance(text, str):
        return text
    keys = ", ".join(sorted(record)[:_MOST_KEYS]) or "none"
    state = "not a string" if field in record else "missing"
    raise DataError(
        f"{path}:{number}: field {field!r} is {state}; fields of this record: {keys}; "
        "choose one with --field"
    )


def _not_json(path: str, number: int, what: str) -> DataError:
    return DataError(
        f"{path}:{number}: not a JSON object: {what}; mend the line, or leave such lines out with "
        "--skip-bad"
    )
