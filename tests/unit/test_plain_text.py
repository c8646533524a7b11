"""plain_text: plain white space and NFC; the quick tests agree with the slow function."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning.plain_text import find_unclean, is_plain, normalise

# Characters at the edges of every class that the quick test tells apart.
EDGES = (
    "\x00\x08\x09\x0a\x0b\x0c\x0d\x0e\x1c\x1f !a{~\x7f\x80\x85\x9f\u00a0\u00a1\u00ac\u00ad\u00ae"
    "\u00bf\u00c0\u00e9\u02ff\u0300\u0301\u0340\u037e\u0387\u03b1\u05d0\u1100\u1161\u1680\u1fef"
    "\u2000\u2001\u200a\u200b\u200c\u200d\u200e\u200f\u2010\u2019\u2027\u2028\u2029\u202a\u202e"
    "\u202f\u2030\u203f\u205f\u2060\u2080\u20ac\u20bf\u20c0\u2126\u212b\u2329\u3000\u4e00\uac00"
    "\ud800\udfff\uf900\ufeff\ufffd\U0001d15e\U0001f600\U000e0001"
)
TEXTS = st.text(st.sampled_from(EDGES) | st.characters(exclude_categories=()), max_size=12)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \t b\u00a0c ", "a b c"),
        ("one\r\n\r\n two\rthree", "one\ntwo\nthree"),
        ("e\u0301", "\u00e9"),
        ("e\u00ad\u0301", "\u00e9"),
        ("10\u00b2 \ufb01", "10\u00b2 \ufb01"),
        ("zero\u200bwidth so\u00adft\ufeff\x00", "zerowidth soft"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        (" \n\t", ""),
    ],
)
def test_normalise_keeps_meaning_and_drops_noise(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


@given(TEXTS)
def test_normalise_is_idempotent_and_encodable(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    once.encode("utf-8")


@given(TEXTS)
def test_a_text_is_plain_when_normalise_leaves_it(text: str) -> None:
    assert is_plain(text) == (normalise(text) == text)
    assert is_plain(normalise(text))


@given(st.lists(TEXTS | st.text("ab \n", max_size=5), min_size=1, max_size=6))
def test_the_quick_test_never_misses_and_is_sure_only_when_right(texts: list[str]) -> None:
    encoded = [text.encode("utf-8", "surrogatepass") + b"\n" for text in texts]
    buffer = np.frombuffer(b"".join(encoded), np.uint8)
    surely, perhaps = find_unclean(buffer, np.cumsum([len(text) for text in encoded]))
    for index, text in enumerate(texts):
        is_changed = not text or normalise(text) != text
        assert not surely[index] or is_changed, ascii(text)
        assert surely[index] or perhaps[index] or not is_changed, ascii(text)


def test_the_quick_test_misses_no_single_character() -> None:
    # Every character below the ideographs' extension A, and the edges, alone among clean ones.
    texts = [f"a{character}b" for character in [*map(chr, range(0x3400)), *EDGES]]
    encoded = [text.encode("utf-8", "surrogatepass") + b"\n" for text in texts]
    buffer = np.frombuffer(b"".join(encoded), np.uint8)
    surely, perhaps = find_unclean(buffer, np.cumsum([len(text) for text in encoded]))
    is_changed = np.array([normalise(text) != text for text in texts])
    assert not (surely & ~is_changed).any()
    assert not (is_changed & ~surely & ~perhaps).any()
    assert [is_plain(text) for text in texts] == (~is_changed).tolist()


def test_common_punctuation_needs_no_second_look() -> None:
    text = "\u201cna\u00efve\u201d \u2013 it\u2019s 5 \u20ac\u2026".encode() + b"\n"
    surely, perhaps = find_unclean(np.frombuffer(text, np.uint8), np.array([len(text)]))
    assert not surely[0]
    assert not perhaps[0]
