"""encoder: the ids and ends of a block are those of its sentences, one by one."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning.plain_text import normalise
from data_prep.text_block import TextBlock
from data_prep.tokens import encoder as tokens_module
from data_prep.tokens import words as words_module
from data_prep.tokens.encoder import TokenBlock, WordEncoder, without_id
from data_prep.tokens.sentence_merge import MergeCounts, MergeRules
from data_prep.tokens.sentences import split_document
from data_prep.tokens.tokenizer import (
    SubwordTokenizer,
    count_characters,
    from_json,
    from_tokens,
    load_tokenizer,
    train_tokenizer,
)

SHARED = Path(__file__).parents[3] / "shared/data"
NAMES = "[PAD] [UNK] [CLS] [SEP] [MASK]"
WHOLE = "a b c e the cat he mr no cab mask sep . , ! ? ' \" ( ) - # [ ] | 1"
PIECES = f"{NAMES} {WHOLE} \u3002 \u4f60 \u201c \u201d ##a ##b ##c ##e ##1 ##at ##the".split()
# Pieces of words: letters in both cases, accents (composed or not), marks, brackets, control
# characters, white space that is neither a space nor a line end, ideographs, special tokens.
PARTS = [
    *"abceABCTz1.,!?'\"()-#[]|\u00e9\u0301\u0130\u03a3\u2026\u2019\u201c\u201d\u4f60\u3002\uff01",
    *("\x01", "\x1f", "\x7f", "\u00a0", "\u200b", "\u200d", "\u2028", "\u037e", "\u226f", "\ufffd"),
    *("the", "The", "cat", "Mr", "No", "[MASK]", "[SEP]", "[mask]", "[MA", "\U0001f600", "a" * 101),
]
WORDS = st.one_of(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("".join),
    st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\n\x0b\x0c\r ")
    ).filter(bool),
)
PARAGRAPHS = st.lists(WORDS, min_size=1, max_size=8).map(" ".join)
TEXTS = st.lists(st.lists(PARAGRAPHS, min_size=1, max_size=3).map("\n".join), max_size=4)


def _changed(tokenizer: SubwordTokenizer, **changes: Any) -> SubwordTokenizer:
    return from_json(json.dumps(json.loads(tokenizer.to_json()) | changes))


def _with_added(tokenizer: SubwordTokenizer, content: str, **flags: bool) -> SubwordTokenizer:
    parsed = json.loads(tokenizer.to_json())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": tokenizer.vocab_size, "content": content, "special": True} | plain | flags
    return _changed(tokenizer, added_tokens=[*parsed["added_tokens"], token])


def _bpe() -> SubwordTokenizer:
    texts = ["The cat sat, the cats: a cab! (No.) \u201cHe\u201d"] * 3
    return train_tokenizer(texts, count_characters(texts), 70, kind="bpe")


UNCASED = from_tokens(PIECES)
TOKENIZERS = {
    "uncased": UNCASED,
    "cased": _changed(
        UNCASED,
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": False,
        },
    ),
    "bpe": _bpe(),
    "added": _with_added(UNCASED, "(A"),
    "normalised added": _with_added(UNCASED, "the", normalized=True),
    "other pre-tokenizer": _changed(UNCASED, pre_tokenizer={"type": "Whitespace"}),
}
ENCODERS = {name: WordEncoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def _expected(texts: Sequence[str], tokenizer: SubwordTokenizer) -> tuple[list[int], ...]:
    """Ids, sentence ends and document ends, by encoding each sentence on its own."""
    ids: list[int] = []
    sentence_ends: list[int] = []
    document_ends: list[int] = []
    for text in texts:
        before = len(sentence_ends)
        for sentence in tokenizer.encode(split_document(text)):
            if sentence:
                ids += sentence
                sentence_ends.append(len(ids))
        if len(sentence_ends) > before:
            document_ends.append(len(sentence_ends))
    return ids, sentence_ends, document_ends


def _parts(block: TokenBlock) -> tuple[list[int], ...]:
    return block.ids.tolist(), block.sentence_ends.tolist(), block.document_ends.tolist()


def test_only_tokenizers_that_look_at_words_alone_are_taken_apart() -> None:
    slow = {name: encoder.slow_because for name, encoder in ENCODERS.items()}
    assert [name for name, why in slow.items() if not why] == ["uncased", "cased", "bpe", "added"]
    assert slow["normalised added"] == "added token 'the'"
    assert slow["other pre-tokenizer"].endswith("pre_tokenizer Whitespace")
    assert "added token 'a b'" in WordEncoder(_with_added(UNCASED, "a b")).slow_because
    assert "added token '[x]'" in WordEncoder(_with_added(UNCASED, "[x]", lstrip=True)).slow_because


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(texts=TEXTS)
def test_block_is_what_its_sentences_are_one_by_one(name: str, texts: list[str]) -> None:
    # The encoder remembers words from example to example, as it does from block to block.
    block = ENCODERS[name].encode(TextBlock.from_texts(texts))
    assert _parts(block) == _expected(texts, TOKENIZERS[name])


def test_small_example_by_hand() -> None:
    texts = ["The cat. He", "\x01\n\x7f", "a b"]
    block = WordEncoder(UNCASED).encode(TextBlock.from_texts(texts))
    pieces = [PIECES[i] for i in block.ids]
    assert pieces == ["the", "cat", ".", "he", "a", "b"]
    assert block.ids.dtype == np.uint16
    assert (block.sentence_ends.tolist(), block.document_ends.tolist()) == ([3, 4, 6], [2, 3])
    lines = WordEncoder(UNCASED, sentences="lines").encode(TextBlock.from_texts(texts))
    assert (lines.sentence_ends.tolist(), lines.document_ends.tolist()) == ([4, 6], [1, 2])


def test_a_block_without_text_has_no_tokens() -> None:
    for encoder in ENCODERS.values():
        assert _parts(encoder.encode(TextBlock.from_texts([]))) == ([], [], [])


def test_forgetting_words_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Cat{i} cab, tha{i % 7}t. \u00e9t\u00e9{i % 5}" for i in range(50)]
    expected = _expected(texts, UNCASED)
    monkeypatch.setattr(tokens_module, "MAX_WORDS", 20)
    monkeypatch.setattr(words_module, "MAX_STEMS", 10)
    encoder = WordEncoder(UNCASED)
    found: list[int] = []
    for text in texts:
        found += encoder.encode(TextBlock.from_texts([text])).ids.tolist()
    assert found == expected[0]


def test_large_vocabularies_have_32_bit_ids() -> None:
    tokenizer = from_tokens([*PIECES, *(f"w{i}" for i in range(65_536 - len(PIECES)))])
    for encoder in (WordEncoder(tokenizer), WordEncoder(_with_added(tokenizer, "a b"))):
        block = encoder.encode(TextBlock.from_texts(["a w65400"]))
        assert block.ids.dtype == np.uint32
        assert block.ids.tolist() == _expected(["a w65400"], tokenizer)[0]


@pytest.mark.parametrize("name", ["uncased", "other pre-tokenizer"])
def test_merge_rules_apply_before_tokens(name: str) -> None:
    texts = ["The cat. A cab! (...) The cat, a cab.\nHe.", "- -"]
    rules = MergeRules(min_words=3, max_words=5, min_chars=4)
    block = WordEncoder(TOKENIZERS[name], merge=rules).encode(TextBlock.from_texts(texts))
    sentences = np.split(block.ids, block.sentence_ends[:-1])
    pieces = ["".join(PIECES[i] for i in ids) for ids in sentences]
    assert pieces == ["thecat.acab!", "thecat,acab."]
    assert block.document_ends.tolist() == [2]
    counts = block.merge_counts
    assert (counts.punctuation_only, counts.merged, counts.too_short) == (2, 1, 1)


@pytest.mark.parametrize("name", ["uncased", "other pre-tokenizer"])
def test_rules_may_drop_everything(name: str) -> None:
    encoder = WordEncoder(TOKENIZERS[name], merge=MergeRules(min_chars=99))
    block = encoder.encode(TextBlock.from_texts(["The cat.", "- -\nHe"]))
    assert _parts(block) == ([], [], [])
    assert block.merge_counts.too_short == 2


@pytest.mark.skipif(not (SHARED / "tokenizer").exists(), reason="needs ../shared/data/tokenizer")
def test_every_line_of_udhr_has_bert_base_uncased_ids() -> None:
    """350 languages; the file's own tokenizer encodes each line whole."""
    tokenizer = load_tokenizer(SHARED / "tokenizer/tokenizer.json")
    lines: list[str] = []
    with zipfile.ZipFile(SHARED / "extras/udhr2.zip") as archive:
        for name in archive.namelist():
            text = archive.read(name).decode("utf-8", errors="replace")
            lines += [line for line in normalise(text).split("\n") if line]
    lines = list(dict.fromkeys(lines))
    assert len(lines) > 20_000
    block = WordEncoder(tokenizer, sentences="lines").encode(TextBlock.from_texts(lines))
    expected = [ids for ids in tokenizer.encode(lines) if ids]
    assert block.ids.tolist() == [token for ids in expected for token in ids]
    assert np.diff(block.sentence_ends, prepend=0).tolist() == [len(ids) for ids in expected]
    assert len(block.document_ends) == len(expected)


def test_an_unwanted_id_goes_with_what_it_leaves_empty() -> None:
    ids = np.array([5, 0, 6, 0, 0, 7, 0], np.uint16)
    # Two documents: [5 0] [6] and [0] [0]; a third: [7 0].
    block = TokenBlock(ids, np.array([2, 3, 4, 5, 7]), np.array([2, 4, 5]), MergeCounts())
    left = without_id(block, 0)
    assert left.ids.tolist() == [5, 6, 7]
    assert left.sentence_ends.tolist() == [1, 2, 3]
    assert left.document_ends.tolist() == [2, 3]
    assert without_id(left, 0) is left
