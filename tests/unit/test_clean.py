"""data_prep.clean: plain white space, no duplicates, and a count of what was removed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.clean import Cleaner, normalise
from data_prep.sources import Document


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \t b\u00a0c ", "a b c"),
        ("one\r\n\r\n two\rthree", "one\ntwo\nthree"),
        ("e\u0301", "\u00e9"),
        ("10\u00b2 \ufb01", "10\u00b2 \ufb01"),
        ("zero\u200bwidth so\u00adft\ufeff\x00", "zerowidth soft"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        (" \n\t", ""),
    ],
)
def test_normalise_keeps_meaning_and_drops_noise(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


@given(st.text())
def test_normalise_is_idempotent_and_encodable(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    once.encode("utf-8")


def test_funnel_counts_every_document_once() -> None:
    raw = ["a b", " a  b ", "", "c", "c", "a b"]
    cleaner = Cleaner()
    kept = list(cleaner.clean(Document(text, "x:1") for text in raw))
    funnel = cleaner.funnel
    assert kept == ["a b", "c"]
    counts = (funnel.documents_read, funnel.empty, funnel.duplicate, funnel.documents_kept)
    assert counts == (6, 1, 3, 2)
    assert funnel.characters_kept == 4
    assert funnel.rows()[0] == ("documents read", 6)
