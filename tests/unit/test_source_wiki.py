"""wiki: a dump's articles, however it is packed and cut."""

import bz2
import json
import lzma
import re
from collections import Counter
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.sources import wiki as source_wiki
from data_prep.sources.files import Document, Skipped, SourceOptions
from data_prep.sources.wiki import cut_pages, parse_pages

STRICT, SKIP = SourceOptions(), SourceOptions(skip_bad=True)
SHARED = Path(__file__).parents[3] / "shared/data/pretrain"
HEADER = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="de">
  <siteinfo><namespaces>
    <namespace key="0" case="first-letter" />
    <namespace key="6" case="first-letter">Datei</namespace>
    <namespace key="14" case="first-letter">Kategorie</namespace>
  </namespaces></siteinfo>
"""


def _page(text: str, *, ns: int = 0, extra: str = "", model: str = "wikitext") -> str:
    return f"""  <page>
    <title>T</title>
    <ns>{ns}</ns>{extra}
    <revision><model>{model}</model><text xml:space="preserve">{text}</text></revision>
  </page>
"""


def _write(path: Path, *pages: str, end: str = "</mediawiki>\n") -> Path:
    content = (HEADER + "".join(pages) + end).encode()
    path.write_bytes(bz2.compress(content) if path.suffix == ".bz2" else content)
    return path


def _read(path: Path, options: SourceOptions = STRICT) -> tuple[list[Document], Skipped]:
    documents, skipped = [], Skipped()
    for part in cut_pages(path, options):
        skipped.merge(part.skipped)
        documents += parse_pages(part, options, skipped)
    return documents, skipped


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
def test_articles_are_kept_and_other_pages_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(source_wiki, "BLOCK_BYTES", max(block, len(HEADER) + 20))
    path = _write(
        tmp_path / "a.xml",
        _page("'''One''' &lt;ref&gt;x&lt;/ref&gt; &amp;amp; &lt;page&gt;"),
        _page("#redirect [[x]]"),
        _page("x", extra='<redirect title="y" />'),
        _page("talk", ns=1),
        _page("{}", model="json"),
        _page("[[Datei:x|mini|y]]zwei[[Kategorie:z]]"),
        _page(""),
    )
    documents, skipped = _read(path)
    assert documents == [
        Document("One & <page>", f"{path}:7"),
        Document("zwei", f"{path}:32"),
        Document("", f"{path}:37"),
    ]
    assert (skipped.redirects, skipped.other_pages, skipped.num_broken) == (2, 2, 0)


def test_multistream_and_parts_of_any_size_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = [_page(f"article {i}\n" * (i % 7)) for i in range(50)]
    expected = [d.text for d in _read(_write(tmp_path / "a.xml", *pages))[0]]
    streams = [HEADER, "".join(pages[:20]), "".join(pages[20:]), "</mediawiki>"]
    path = tmp_path / "b.xml.bz2"
    path.write_bytes(b"".join(bz2.compress(stream.encode()) for stream in streams))
    monkeypatch.setattr(source_wiki, "BLOCK_BYTES", 999)
    assert len(list(cut_pages(path, STRICT))) > 5
    assert [d.text for d in _read(path)[0]] == expected


def test_last_revision_counts(tmp_path: Path) -> None:
    page = _page("old").replace("</page>", "<revision><text>new</text></revision></page>")
    assert _read(_write(tmp_path / "a.xml", page))[0][0].text == "new"


def test_dump_that_ends_early_is_refused_or_kept(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.xml", _page("one"), _page("two")[:90], end="")
    with pytest.raises(DataError, match=r"a\.xml:15: the XML ends early, without </mediawiki>"):
        _read(path)
    packed = _write(tmp_path / "a.xml.bz2", _page("one"))
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.xml\.bz2:1: the archive is truncated or corrupt"):
        _read(packed)
    documents, skipped = _read(path, SKIP)
    assert [document.text for document in documents] == ["one"]
    assert skipped.broken_files == skipped.num_broken == 1


def test_broken_page_does_not_take_others_with_it(tmp_path: Path) -> None:
    bad = [_page("a < b"), _page("&undefined;"), _page("x").replace("</revision>", "")]
    path = _write(tmp_path / "a.xml", _page("one"), *bad, _page("two"))
    with pytest.raises(DataError, match=r"a\.xml:15: this page is not XML: not well-formed"):
        _read(path)
    documents, skipped = _read(path, SKIP)
    assert [document.text for document in documents] == ["one", "two"]
    assert documents[1].origin == f"{path}:27"
    assert skipped.broken_records == len(skipped.messages) == 3


def test_page_above_the_limit_is_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_wiki, "BLOCK_BYTES", 700)
    monkeypatch.setattr(source_wiki, "MAX_LINE_BYTES", 2000)
    path = _write(tmp_path / "a.xml", _page("one"), _page("long\n" * 999), _page("two"))
    with pytest.raises(DataError, match=r"a\.xml:11: this page is longer than"):
        _read(path)
    documents, skipped = _read(path, SKIP)
    assert documents == [Document("one", f"{path}:7"), Document("two", f"{path}:1016")]
    assert skipped.broken_records == 1


@pytest.mark.parametrize(
    "content",
    ["", "<html></html>", "plain", '<!DOCTYPE m [<!ENTITY e "x">]><mediawiki><page></page>'],
)
def test_other_xml_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(content)
    with pytest.raises(DataError, match=r"a\.xml:1: not a MediaWiki dump"):
        _read(path)
    assert _read(path, SKIP)[1].broken_files == 1


def test_dump_without_pages_is_whole(tmp_path: Path) -> None:
    assert _read(_write(tmp_path / "a.xml")) == ([], Skipped())


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data/pretrain")
def test_real_dump_holds_the_words_that_another_extractor_found() -> None:
    (path,) = SHARED.glob("enwiki-*.xml-p*.bz2")
    documents, skipped = _read(path)
    assert (len(documents), skipped.redirects, skipped.other_pages) == (106, 99, 1)
    text = "\n".join(document.text for document in documents)
    assert not re.search(r"\{\{|\}\}|\[\[|\]\]|''|</?ref|https?:", text)
    lines = lzma.decompress((SHARED / "enwiki_sample.jsonl.xz").read_bytes()).splitlines()
    theirs = Counter(re.findall(r"\w+", " ".join(json.loads(line)["text"] for line in lines)))
    ours = Counter(re.findall(r"\w+", text))
    shared = (ours & theirs).total()
    # They keep headings and drop lists; the rest should agree.
    assert shared / theirs.total() > 0.98
    assert shared / ours.total() > 0.9
