"""Parquet in, documents out: one a row, its text in a chosen column of strings."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.files import Document, RawPart, Skipped, SourceOptions
from data_prep.sources.reading import BLOCK_BYTES, FETCH_AGAIN, open_file

KIND = ".parquet"
# Rows read at once at most: repeated texts are stored once, so a file does not say how long its
# rows are.
_MOST_ROWS = 8192
_READ_BYTES = 1 << 20


def cut_rows(path: Path, options: SourceOptions) -> Iterator[RawPart]:
    """Yield parts of whole rows, the text's column alone, as an Arrow stream. A row group may be
    of any size: it is read in batches.
    """
    skipped = Skipped()
    row = 1
    file_bytes = path.stat().st_size
    with open_file(path) as stream:
        try:
            file = pq.ParquetFile(stream, buffer_size=_READ_BYTES, pre_buffer=False)
            fault = _column_fault(file.schema_arrow, options.field)
            num_rows = max(file.metadata.num_rows, 1)
            for batch in [] if fault else _batches(file, options.field):
                position = file_bytes * (row - 1 + batch.num_rows) // num_rows
                payload = _payload(batch)
                yield RawPart(KIND, str(path), row, payload, position, len(payload))
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            what = " ".join(str(error).split())
            fault = f"row {row} and those behind it cannot be read: {what}; {FETCH_AGAIN}"
    if fault:
        skipped.refuse(options, "broken_files", f"{path}: {fault}")
        yield RawPart(KIND, str(path), row, b"", file_bytes, 0, skipped=skipped)


def parse_rows(part: RawPart, options: SourceOptions, skipped: Skipped) -> list[Document]:
    """Return the documents of a part."""
    documents: list[Document] = []
    if not part.payload:
        return documents
    texts = pa.ipc.open_stream(part.payload).read_all().column(0).to_pylist()
    for number, text in enumerate(texts, part.first):
        origin = f"{part.path}: row {number}"
        if text is None:
            skipped.refuse(
                options,
                "broken_records",
                f"{origin}: column {options.field!r} is empty (null); "
                "leave such rows out with --skip-bad",
            )
            continue
        try:
            documents.append(Document(text.decode("utf-8"), origin))
        except UnicodeDecodeError as error:
            skipped.refuse(
                options,
                "broken_records",
                f"{origin}: not valid UTF-8: byte 0x{text[error.start]:02x} at byte "
                f"{error.start} of the text; leave such rows out with --skip-bad",
            )
    return documents


def _batches(file: pq.ParquetFile, field: str) -> Iterator[pa.RecordBatch]:
    """Yield the column in batches of about BLOCK_BYTES."""
    metadata = file.metadata
    column = metadata.schema.names.index(field)
    for group in range(metadata.num_row_groups):
        about = metadata.row_group(group)
        row_bytes = about.column(column).total_uncompressed_size / max(about.num_rows, 1)
        rows = min(max(int(BLOCK_BYTES / max(row_bytes, 1)), 1), _MOST_ROWS)
        yield from file.iter_batches(rows, row_groups=[group], columns=[field])


def _payload(batch: pa.RecordBatch) -> bytes:
    # As bytes: Arrow does not look whether strings are UTF-8.
    column = batch.column(0).cast(pa.large_binary())
    columns = pa.record_batch([column], names=["text"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, columns.schema) as writer:
        writer.write_batch(columns)
    return bytes(sink.getvalue().to_pybytes())


def _column_fault(schema: pa.Schema, field: str) -> str | None:
    """Return why `field` cannot be read as text, or None."""
    index = schema.get_field_index(field)
    if index < 0:
        names = ", ".join(schema.names[:20])
        return f"column {field!r} is missing; columns are {names}; choose one with --field"
    kind = schema.field(index).type
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (
        pa.types.is_string(inner)
        or pa.types.is_large_string(inner)
        or pa.types.is_binary(inner)
        or pa.types.is_large_binary(inner)
    )
    return None if is_text else f"column {field!r} holds {kind}, not text; choose one with --field"
