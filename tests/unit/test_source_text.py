"""plain: documents end where they should, however the file is cut."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.sources import plain as source_text
from data_prep.sources import reading
from data_prep.sources.files import Document, Skipped, SourceOptions
from data_prep.sources.plain import cut_text, parse_text


def _read(path: Path, options: SourceOptions) -> tuple[list[Document], Skipped]:
    documents, skipped = [], Skipped()
    for part in cut_text(path, options):
        skipped.merge(part.skipped)
        documents += parse_text(part, options, skipped)
    return documents, skipped


def _write(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "a.txt").write_bytes(content)
    return tmp_path / "a.txt"


TEXT = b"\xef\xbb\xbf\n one\r\ntwo\n\n \t\nthree\n\xe3\x80\x80\nfour"


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("blank-line", [("one\ntwo", 2), ("three", 6), ("four", 8)]),
        ("line", [(" one", 2), ("two", 3), ("three", 6), ("four", 8)]),
        ("file", [("\n one\ntwo\n\n \t\nthree\n\u3000\nfour", 1)]),
    ],
)
def test_documents_are_ended_as_asked(
    tmp_path: Path, documents: str, expected: list[tuple[str, int]]
) -> None:
    path = _write(tmp_path, TEXT)
    options = SourceOptions(documents=documents)  # type: ignore[arg-type]
    found, _ = _read(path, options)
    assert found == [Document(text, f"{path}:{number}") for text, number in expected]


@given(
    text=st.text(st.sampled_from("ab \t\n\n\n\u00e9\u3000"), max_size=80), block=st.integers(1, 20)
)
def test_cutting_does_not_change_the_documents(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int
) -> None:
    path = _write(tmp_path_factory.mktemp("cut"), text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        found, _ = _read(path, SourceOptions())
    lines = text.split("\n")
    expected = [body.strip() for body in re.split(r"\n(?:\s*\n)+", "\n" + text + "\n\n")]
    assert [document.text for document in found] == [body for body in expected if body]
    for document in found:
        number = int(document.origin.rpartition(":")[2])
        assert lines[number - 1].strip() == document.text.split("\n")[0].strip()


@pytest.mark.parametrize("documents", ["blank-line", "file"])
def test_document_without_end_is_cut_at_lines_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: str
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 37)
    monkeypatch.setattr(source_text, "MAX_DOCUMENT_BYTES", 100)
    lines = [f"line number {i}" for i in range(60)]
    lines[30] = "long " * 40
    path = _write(tmp_path, "\n".join(lines).encode())
    found, skipped = _read(path, SourceOptions(documents=documents))  # type: ignore[arg-type]
    assert "\n".join(document.text for document in found) == "\n".join(map(str.rstrip, lines))
    assert skipped.cut_documents == len(found) - 1 > 6
    assert all(len(d.text) <= 100 or d.text.startswith("long") for d in found)


def test_undecodable_line_is_refused_or_left_out(tmp_path: Path) -> None:
    path = _write(tmp_path, b"one\nt\xffo\nthree\n\nfour\n")
    with pytest.raises(DataError, match=r"a\.txt:2: not valid UTF-8: byte 0xff at byte 1 of the"):
        _read(path, SourceOptions())
    found, skipped = _read(path, SourceOptions(skip_bad=True))
    assert found == [Document("one\nthree", f"{path}:1"), Document("four", f"{path}:5")]
    assert skipped.broken_lines == 1
    assert skipped.messages[0].startswith(f"{path}:2: not valid UTF-8")


def test_over_long_line_ends_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 9)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 5)
    path = _write(tmp_path, b"one\ntwo\nmuch too long\nthree\nfour\n")
    found, skipped = _read(path, SourceOptions(skip_bad=True))
    assert found == [Document("one\ntwo", f"{path}:1"), Document("three\nfour", f"{path}:4")]
    assert skipped.broken_lines == skipped.num_broken == 1
