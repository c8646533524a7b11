"""data_prep.text_block: documents and paragraphs survive the buffer, in any selection."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.text_block import TextBlock

WORD = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=5)
PARAGRAPH = st.lists(WORD, min_size=1, max_size=4).map(" ".join)
DOCUMENTS = st.lists(st.lists(PARAGRAPH, min_size=1, max_size=4), max_size=6)


@given(DOCUMENTS)
def test_texts_come_back(documents: list[list[str]]) -> None:
    texts = ["\n".join(paragraphs) for paragraphs in documents]
    block = TextBlock.from_texts(texts)
    assert block.texts() == texts
    assert block.num_documents == len(texts)
    assert len(block.paragraph_ends) == sum(len(paragraphs) for paragraphs in documents)
    assert block.text.count(b"\n") == len(block.paragraph_ends)


@given(DOCUMENTS, st.data())
def test_paragraphs_are_dropped_and_empty_documents_go(
    documents: list[list[str]], data: st.DataObject
) -> None:
    block = TextBlock.from_texts(["\n".join(paragraphs) for paragraphs in documents])
    size = sum(len(paragraphs) for paragraphs in documents)
    flags = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    left = iter(flags)
    expected = [[p for p in paragraphs if not next(left)] for paragraphs in documents]
    kept = block.without(np.array(flags, np.bool_))
    assert kept.texts() == ["\n".join(paragraphs) for paragraphs in expected if paragraphs]
    assert kept.num_documents == sum(bool(paragraphs) for paragraphs in expected)


@given(DOCUMENTS, st.data())
def test_documents_are_selected(documents: list[list[str]], data: st.DataObject) -> None:
    texts = ["\n".join(paragraphs) for paragraphs in documents]
    flags = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    kept = TextBlock.from_texts(texts).select(np.array(flags, np.bool_))
    assert kept.texts() == [text for text, is_kept in zip(texts, flags, strict=True) if is_kept]
