"""parquet: columns of text are read in batches, and every fault is named."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import DataError
from data_prep.sources import parquet as source_parquet
from data_prep.sources.files import Document, Skipped, SourceOptions
from data_prep.sources.parquet import cut_rows, parse_rows

STRICT, SKIP = SourceOptions(), SourceOptions(skip_bad=True)


def _read(path: Path, options: SourceOptions = STRICT) -> tuple[list[Document], Skipped]:
    documents, skipped = [], Skipped()
    for part in cut_rows(path, options):
        skipped.merge(part.skipped)
        documents += parse_rows(part, options, skipped)
    return documents, skipped


def _write(tmp_path: Path, texts: object, kind: object = None) -> Path:
    path = tmp_path / "a.parquet"
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind)})  # type: ignore[arg-type]
    pq.write_table(table, path, row_group_size=7)
    return path


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_every_type_of_text_column_gives_its_rows(tmp_path: Path, kind: object) -> None:
    texts = [f"t\u00e9xt {i % 3}" for i in range(16)]
    path = _write(tmp_path, texts, kind)
    assert _read(path)[0] == [
        Document(text, f"{path}: row {number}") for number, text in enumerate(texts, 1)
    ]


def test_a_row_group_is_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, [f"{i:0100}" for i in range(7)])
    monkeypatch.setattr(source_parquet, "BLOCK_BYTES", 300)
    parts = list(cut_rows(path, STRICT))
    assert [part.first for part in parts] == [1, 3, 5, 7]
    positions = [part.position for part in parts]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size
    assert [d.text for d in _read(path)[0]] == [f"{i:0100}" for i in range(7)]


def test_empty_row_and_bad_bytes_are_refused_or_counted(tmp_path: Path) -> None:
    path = _write(tmp_path, [b"one", None, b"\xff", b""], pa.binary())
    with pytest.raises(DataError, match=r"a\.parquet: row 2: column 'text' is empty \(null\)"):
        _read(path)
    found, skipped = _read(path, SKIP)
    assert [document.text for document in found] == ["one", ""]
    assert skipped.broken_records == 2
    assert "row 3: not valid UTF-8: byte 0xff at byte 0" in skipped.messages[1]


def test_wrong_column_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path, ["one"])
    with pytest.raises(DataError, match="'body' is missing; columns are id, text; .*--field"):
        _read(path, SourceOptions(field="body"))
    with pytest.raises(DataError, match="column 'id' holds int64, not text"):
        _read(path, SourceOptions(field="id"))
    found, skipped = _read(path, SourceOptions(field="id", skip_bad=True))
    assert (found, skipped.broken_files) == ([], 1)


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet"])
def test_file_that_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: row 1 and those behind it cannot be read"):
        _read(path)


def test_damaged_page_keeps_the_rows_before_it(tmp_path: Path) -> None:
    path = _write(tmp_path, [f"{i} " * 9 for i in range(21)])
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset
    content[start : start + 60] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"row 8 and those behind it cannot be read"):
        _read(path)
    found, skipped = _read(path, SKIP)
    assert (len(found), skipped.broken_files) == (7, 1)
