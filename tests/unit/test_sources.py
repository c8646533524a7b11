"""data_prep.sources: every kind of file is streamed, every fault names file and line."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.sources import find_files, read_documents


def _texts(path: Path, field: str = "text") -> list[str]:
    return [document.text for document in read_documents([path], field)]


def _json_lines(*texts: str) -> bytes:
    return "".join(json.dumps({"id": 3, "body": text}) + "\n" for text in texts).encode()


def test_plain_and_compressed_json_lines_give_the_same_documents(tmp_path: Path) -> None:
    content = _json_lines("One.\nTwo.", "Th\u00e9 third")
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz"):
        assert _texts(tmp_path / name, "body") == ["One.\nTwo.", "Th\u00e9 third"]


def test_blank_lines_separate_documents_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\nfirst line\r\nsecond\n\n \n\nother\n")
    documents = list(read_documents([path]))
    assert [document.text for document in documents] == ["first line\nsecond", "other"]
    assert documents[1].origin == f"{path}:7"


def test_folder_gives_known_files_in_name_order(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a.jsonl.xz", "b/LICENSE.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files([tmp_path]) == [tmp_path / "a.jsonl.xz", tmp_path / "b/z.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"x\.jsonl:2: not a JSON object"),
        (b"[1]", r"x\.jsonl:2: not a JSON object: got list"),
        (b'{"body": "a", "id": 1}', r"x\.jsonl:2: field 'text' is missing.*body, id.*--field"),
        (b'{"text": 5}', r"x\.jsonl:2: field 'text' is not a string"),
        (b'{"text": "\xff"}', r"x\.jsonl:2: not valid UTF-8: byte 0xff at byte 10"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        _texts(path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_truncated_archive_is_an_error_and_not_an_end(tmp_path: Path, suffix: str) -> None:
    compress = gzip.compress if suffix == ".gz" else lzma.compress
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(compress(_json_lines(*(str(i) for i in range(999))))[:-30])
    with pytest.raises(DataError, match=r"x\.jsonl.*:\d+: the archive is truncated or corrupt"):
        _texts(path, "body")


def test_unknown_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    with pytest.raises(
        DataError, match=r"a\.pdf: unknown kind of file; allowed are \.jsonl, \.txt, \.xml"
    ):
        find_files([tmp_path / "a.pdf"])
    with pytest.raises(DataError, match="no file in this folder"):
        find_files([tmp_path])
    with pytest.raises(DataError, match="no such file"):
        find_files([tmp_path / "b.txt"])
    with pytest.raises(DataError, match="no input"):
        find_files([])
