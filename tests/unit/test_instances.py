"""data_prep.instances: packing loses no token and pairs follow BERT's algorithm."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.instances import InstanceBuilder, PretrainInstance, TokenDocument, row_type, to_rows

CLS, SEP, PAD = 2, 3, 0
LENGTH = 37
# Odd ids from 10 on begin words, even ones continue them.
CONTINUES = [i >= 10 and i % 2 == 0 for i in range(1000)]
BUILDER = InstanceBuilder(max_seq_length=LENGTH, cls_id=CLS, sep_id=SEP, is_continuation=CONTINUES)
SENTENCE = st.lists(st.integers(10, 999), min_size=1, max_size=90)
DOCUMENTS = st.lists(st.lists(SENTENCE, min_size=1, max_size=9), min_size=2, max_size=7)


def _numbered(lengths: list[list[int]]) -> list[TokenDocument]:
    """Documents of word-beginning ids that tell the document: 11, 13, ..."""
    return [[[11 + 2 * d] * n for n in document] for d, document in enumerate(lengths)]


def _texts(instance: PretrainInstance) -> list[list[int]]:
    assert instance.token_ids[0] == CLS
    assert instance.token_ids[-1] == SEP
    parts: list[list[int]] = [[]]
    for token in instance.token_ids[1:]:
        if token == SEP:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts[:-1]


@given(DOCUMENTS)
def test_packing_keeps_every_token_once_and_fits(documents: list[TokenDocument]) -> None:
    rows = BUILDER.pack(documents)
    assert all(len(row.token_ids) <= LENGTH for row in rows)
    assert all(row.segment_ids == [0] * len(row.token_ids) for row in rows)
    before = sorted(t for document in documents for sentence in document for t in sentence)
    assert sorted(t for row in rows for text in _texts(row) for t in text) == before


def test_sentences_stay_whole_where_they_fit() -> None:
    (row,) = BUILDER.pack(_numbered([[20, 15]]))
    assert row.token_ids == [CLS, *[11] * 35, SEP]
    # 34 of 35 places: a gap of 1 is within S/16 = 2, so the next sentence is not cut.
    first, second = BUILDER.pack(_numbered([[20, 14, 9]]))
    assert len(first.token_ids) == 36
    assert _texts(second) == [[11] * 9]


def test_long_sentence_is_cut_before_a_whole_word() -> None:
    sentence = [11, 12] * 30
    rows = BUILDER.pack([[sentence]])
    assert [len(text) for row in rows for text in _texts(row)] == [34, 26]
    assert _texts(rows[1])[0][0] == 11


def test_short_documents_share_rows_with_sep_between() -> None:
    rows = BUILDER.pack(_numbered([[10], [24], [9], [26]]))
    # 24 + 10 and 26 + 9 tokens with two [SEP]s: 36 of S - 1 = 36 and 37 > 36.
    assert sorted(sorted(len(t) for t in _texts(row)) for row in rows) == [[9], [10, 24], [26]]
    assert all(len(set(text)) == 1 for row in rows for text in _texts(row))


@given(DOCUMENTS, st.integers(0, 99))
def test_pairs_fit_have_two_texts_and_segments(documents: list[TokenDocument], seed: int) -> None:
    for row in BUILDER.pair(documents, random.Random(seed)):
        assert len(row.token_ids) <= LENGTH
        first, second = _texts(row)
        assert first
        assert second
        assert row.segment_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)


def test_random_next_comes_from_another_document_half_of_the_time() -> None:
    documents = _numbered([[5] * 40 for _ in range(50)])
    rows = BUILDER.pair(documents, random.Random(5))
    for row in rows:
        first, second = _texts(row)
        assert row.is_random_next == (first[0] != second[0])
    share = np.mean([row.is_random_next is True for row in rows])
    assert 0.4 < share < 0.6  # about 400 pairs: four standard deviations are 0.1


def test_pairs_are_a_function_of_the_generator() -> None:
    documents = _numbered([[5, 7, 9] * 5, [4, 6] * 9, [3] * 20])
    assert BUILDER.pair(documents, random.Random(1)) == BUILDER.pair(documents, random.Random(1))
    assert BUILDER.pair(documents, random.Random(1)) != BUILDER.pair(documents, random.Random(2))


def test_pairs_need_two_documents() -> None:
    with pytest.raises(DataError, match="at least two documents"):
        BUILDER.pair(_numbered([[5, 5]]), random.Random(1))


def test_rows_are_padded_and_labelled() -> None:
    instances = [
        PretrainInstance([2, 300, 3, 9, 3], [0, 0, 0, 1, 1], True),
        PretrainInstance([2, 5, 3], [0, 0, 0], False),
    ]
    rows = to_rows(instances, row_type(7, 500, has_pairs=True), PAD)
    assert rows["input_ids"].tolist() == [[2, 300, 3, 9, 3, 0, 0], [2, 5, 3, 0, 0, 0, 0]]
    assert rows["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0] * 7]
    assert rows["next_sentence_labels"].tolist() == [1, 0]
    assert row_type(7, 65_536, has_pairs=False)["input_ids"].base == np.dtype("u4")
    assert row_type(7, 65_535, has_pairs=False).names == ("input_ids", "segment_ids")
