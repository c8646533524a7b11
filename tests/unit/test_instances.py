"""data_prep.instances: packing loses no token, and pairs follow the papers' algorithms."""

import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.instances import Pairs, RowBuilder, Rows, row_type
from data_prep.tokens.encoder import TokenBlock
from data_prep.tokens.sentence_merge import MergeCounts

CLS, SEP, PAD = 2, 3, 0
LENGTH = 37
# Odd ids from 10 on begin words, even ones continue them.
CONTINUES = np.array([i >= 10 and i % 2 == 0 for i in range(1000)])
Documents = list[list[list[int]]]
SENTENCE = st.lists(st.integers(10, 999), min_size=1, max_size=90)
DOCUMENTS = st.lists(st.lists(SENTENCE, min_size=1, max_size=9), min_size=2, max_size=7)


def _builder(pairs: Pairs = "none", short_seq_prob: float = 0.1) -> RowBuilder:
    return RowBuilder(
        max_seq_length=LENGTH,
        cls_id=CLS,
        sep_id=SEP,
        pad_id=PAD,
        dtype=row_type(LENGTH, 1000, pairs != "none"),
        is_continuation=CONTINUES,
        short_seq_prob=short_seq_prob,
    )


def _block(documents: Documents) -> TokenBlock:
    sentences = [sentence for document in documents for sentence in document]
    return TokenBlock(
        np.array([t for sentence in sentences for t in sentence], np.uint16),
        np.cumsum([len(sentence) for sentence in sentences]).astype(np.int64),
        np.cumsum([len(document) for document in documents]).astype(np.int64),
        MergeCounts(),
    )


def _rows(documents: Documents, pairs: Pairs = "none", seed: int = 1, short: float = 0.1) -> Rows:
    return _builder(pairs, short).rows(_block(documents), pairs, random.Random(seed))


def _numbered(lengths: list[list[int]]) -> Documents:
    """Documents of word-beginning ids that tell the document: 11, 13, ..."""
    return [[[11 + 2 * d] * n for n in document] for d, document in enumerate(lengths)]


def _counted(num_documents: int, num_sentences: int) -> Documents:
    """Sentences of 5 equal tokens, each sentence with an id of its own."""
    return [
        [[11 + 2 * (d * num_sentences + s)] * 5 for s in range(num_sentences)]
        for d in range(num_documents)
    ]


def _texts(ids: npt.NDArray[np.uint16]) -> list[list[int]]:
    tokens = [int(t) for t in ids if t != PAD]
    assert tokens[0] == CLS
    assert tokens[-1] == SEP
    parts: list[list[int]] = [[]]
    for token in tokens[1:]:
        if token == SEP:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts[:-1]


@given(DOCUMENTS)
def test_packing_keeps_every_token_once_and_fits(documents: Documents) -> None:
    rows = _rows(documents)
    assert not rows["segment_ids"].any()
    before = sorted(t for document in documents for sentence in document for t in sentence)
    assert sorted(t for ids in rows["input_ids"] for text in _texts(ids) for t in text) == before


def test_sentences_stay_whole_where_they_fit() -> None:
    (row,) = _rows(_numbered([[20, 15]]))
    assert row["input_ids"].tolist() == [CLS, *[11] * 35, SEP]
    # 34 of 35 places: a gap of 1 is within S/16 = 2, so the next sentence is not cut.
    first, second = _rows(_numbered([[20, 14, 9]]))
    assert np.count_nonzero(first["input_ids"]) == 36
    assert _texts(second["input_ids"]) == [[11] * 9]


def test_long_sentence_is_cut_before_a_whole_word() -> None:
    rows = _rows([[[11, 12] * 30]])
    assert [len(text) for row in rows for text in _texts(row["input_ids"])] == [34, 26]
    assert _texts(rows[1]["input_ids"])[0][0] == 11


def test_a_word_longer_than_the_row_is_cut_all_the_same() -> None:
    rows = _rows([[[11] + [12] * 80]])
    assert [len(text) for row in rows for text in _texts(row["input_ids"])] == [35, 35, 11]


def test_short_documents_share_rows_with_sep_between() -> None:
    rows = _rows(_numbered([[10], [24], [9], [26]]))
    # 24 + 10 and 26 + 9 tokens with two [SEP]s: 36 of S - 1 = 36 and 37 > 36.
    texts = [_texts(row["input_ids"]) for row in rows]
    assert sorted(sorted(len(t) for t in row) for row in texts) == [[9], [10, 24], [26]]
    assert all(len(set(text)) == 1 for row in texts for text in row)


@pytest.mark.parametrize("pairs", ["nsp", "lines", "sop"])
@given(documents=DOCUMENTS, seed=st.integers(0, 99))
def test_pairs_fit_have_two_texts_and_segments(
    pairs: Pairs, documents: Documents, seed: int
) -> None:
    for row in _rows(documents, pairs, seed):
        first, second = _texts(row["input_ids"])
        assert first
        assert second
        used = len(first) + len(second) + 3
        expected = [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (LENGTH - used)
        assert row["segment_ids"].tolist() == expected


def test_random_next_comes_from_another_document_half_of_the_time() -> None:
    rows = _rows(_numbered([[5] * 40 for _ in range(50)]), "nsp", 5)
    for row in rows:
        first, second = _texts(row["input_ids"])
        assert row["next_sentence_labels"] == (first[0] != second[0])
    # About 400 pairs: four standard deviations are 0.1.
    assert 0.4 < rows["next_sentence_labels"].mean() < 0.6


def test_nsp_uses_every_sentence_as_googles_does() -> None:
    """The unused sentences of a random pair are given back: all text appears."""
    documents = _counted(9, 11)
    seen = {t for row in _rows(documents, "nsp") for text in _texts(row["input_ids"]) for t in text}
    assert seen == {t for document in documents for sentence in document for t in sentence}


def test_a_true_next_text_follows_in_the_document() -> None:
    rows = _rows(_counted(20, 20), "nsp", short=0.0)
    for row in rows[rows["next_sentence_labels"] == 0]:
        first, second = _texts(row["input_ids"])
        assert second[0] - first[-1] in (0, 2)  # 0: trimmed inside a sentence's equal tokens


def test_lines_pair_each_line_with_the_next_or_a_random_one() -> None:
    rows = _rows(_counted(40, 10), "lines")
    assert len(rows) == 400
    for row in rows:
        first, second = _texts(row["input_ids"])
        is_next = second[0] == first[0] + 2 and (first[0] - 11) // 2 % 10 != 9
        assert row["next_sentence_labels"] == (not is_next)
    # Half of nine in ten are true; the last line of a document has no next one.
    assert 0.45 < rows["next_sentence_labels"].mean() < 0.65


def test_sop_swaps_half_of_the_pairs_of_one_document() -> None:
    rows = _rows(_counted(40, 12), "sop", short=0.0)
    for row in rows:
        first, second = _texts(row["input_ids"])
        assert row["next_sentence_labels"] == (second[0] < first[0])
        assert (first[0] - 11) // 24 == (second[0] - 11) // 24
    assert 0.3 < rows["next_sentence_labels"].mean() < 0.7


def test_sop_cuts_a_lonely_sentence_and_leaves_out_a_lonely_token() -> None:
    (row,) = _rows([[[11, 13, 15, 17]], [[19]]], "sop")
    texts = sorted(_texts(row["input_ids"]))
    assert texts == [[11, 13], [15, 17]]


def test_pairs_are_a_function_of_the_generator() -> None:
    documents = _numbered([[5, 7, 9] * 5, [4, 6] * 9, [3] * 20])
    assert np.array_equal(_rows(documents, "nsp", 1), _rows(documents, "nsp", 1))
    assert not np.array_equal(_rows(documents, "nsp", 1), _rows(documents, "nsp", 2))


def test_trimming_takes_from_the_longer_side_and_from_both_ends() -> None:
    documents = [[list(range(11, 211, 2))], [list(range(211, 311, 2))]]
    starts = set()
    for seed in range(40):
        row = _rows(documents, "nsp", seed, short=0.0)[0]
        first, second = _texts(row["input_ids"])
        assert len(first) + len(second) == LENGTH - 3
        assert abs(len(first) - len(second)) <= 1
        starts.add(first[0])
    assert len(starts) > 5  # the front loses a binomial share


def test_rows_are_padded_and_ids_take_the_smallest_type() -> None:
    (row,) = _rows(_numbered([[2, 3]]), "sop")
    assert row["input_ids"][8:].tolist() == [PAD] * (LENGTH - 8)
    assert row_type(7, 65_536, has_pairs=False)["input_ids"].base == np.dtype("u4")
    assert row_type(7, 65_535, has_pairs=False).names == ("input_ids", "segment_ids")


def test_no_document_gives_no_row() -> None:
    assert len(_rows([], "none")) == len(_rows([], "nsp")) == 0
