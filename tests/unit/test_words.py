"""words: stems, odd words and words with added tokens get the tokenizer's own ids."""

import json

import pyarrow as pa
import pytest

from data_prep.tokens.tokenizer import from_tokens
from data_prep.tokens.words import WordPieces, binary_array, id_type, number, views

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] a the cat ##s ##a - \u2019 \u201c e ##t " + "b" * 101
TOKENIZER = from_tokens(PIECES.split())


def _pieces() -> WordPieces:
    return WordPieces(TOKENIZER, json.loads(TOKENIZER.to_json()))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("The", "the"),
        ("cats", "cat ##s"),
        ("THE-cat", "the - cat"),
        ("cat\u2019s", "cat \u2019 [UNK]"),
        ("\u201ccat", "\u201c cat"),
        ("\u00c9ta", "e ##t ##a"),
        ("a[MASK]cat", "a [MASK] cat"),
        ("[SEP]", "[SEP]"),
        ("a\x01t", "a ##t"),
        ("\x7f", ""),
        ("b" * 101, "[UNK]"),
        ("\u2028cat", "cat"),
        ("--", "- -"),
    ],
)
def test_a_words_ids_are_the_tokenizers(word: str, expected: str) -> None:
    (ids,) = _pieces().lists(pa.array([f"{word} ".encode()])).to_pylist()
    assert [TOKENIZER.tokens[i] for i in ids] == expected.split()
    assert [ids] == TOKENIZER.encode([word])


def test_all_words_at_once_give_the_same_in_order() -> None:
    words = ["\u00c9ta", "The", "[SEP]", "cats", "\x7f", "a-a", "\u00c9", "the[MASK]", "cats"]
    array = pa.array([f"{word} ".encode() for word in words])
    pieces = _pieces()
    for _ in range(2):  # the second time all stems are known
        assert pieces.lists(array).to_pylist() == TOKENIZER.encode(words)
    assert pieces.lists(array[2:5]).to_pylist() == TOKENIZER.encode(words[2:5])
    assert pieces.lists(array[:0]).to_pylist() == []


def test_known_words_keep_their_numbers() -> None:
    codes, known = number(pa.array([], pa.binary()), pa.array([b"x", b"y", b"x"]))
    assert (codes.to_pylist(), known.to_pylist()) == ([0, 1, 0], [b"x", b"y"])
    codes, known = number(known, pa.array([b"z", b"y", b"z"]))
    assert (codes.to_pylist(), known.to_pylist()) == ([2, 1, 2], [b"x", b"y", b"z"])


def test_strings_are_views_of_one_buffer() -> None:
    words = binary_array(b"ab c\n", views(pa.array([b"ab ", b"c\n"]))[1])
    assert words.to_pylist() == [b"ab ", b"c\n"]
    data, ends = views(words[1:])
    assert (data.tobytes(), ends.tolist()) == (b"c\n", [2])


def test_ids_have_the_type_of_the_rows() -> None:
    assert (id_type(65_535), id_type(65_536)) == (pa.uint16(), pa.uint32())
