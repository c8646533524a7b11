"""data_prep.tokenizer: training is a function of the text, and both files give one tokenizer."""

import hashlib
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.tokenizer import (
    WordPieceTokenizer,
    count_characters,
    from_json,
    from_tokens,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    f"The {word} runs, and the {word}s ran: na\u00efve!" for word in ("cat", "dog", "Bird")
] * 3
BERT_UNCASED = Path(__file__).parents[3] / "shared/data/tokenizer"


def _train(texts: list[str], vocab_size: int = 90) -> WordPieceTokenizer:
    return train_tokenizer(iter(texts), count_characters(texts), vocab_size)


def test_training_is_deterministic_and_independent_of_document_order() -> None:
    reference = _train(TEXTS)
    for _ in range(5):
        assert _train(TEXTS).tokens == reference.tokens
    assert _train(TEXTS[::-1]).tokens == reference.tokens


def test_special_tokens_have_the_first_ids_and_pad_is_zero() -> None:
    tokenizer = _train(TEXTS)
    assert tokenizer.tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.special_token_ids == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    assert len(set(tokenizer.tokens)) == tokenizer.vocab_size <= 90


def test_words_are_lower_cased_and_frequent_ones_whole() -> None:
    tokenizer = _train(TEXTS)
    (ids,) = tokenizer.encode(["THE Naive cats"])
    pieces = [tokenizer.tokens[i] for i in ids]
    assert pieces[:2] == ["the", "naive"]
    assert "".join(pieces[2:]).replace("##", "") == "cats"
    assert [tokenizer.is_continuation[i] for i in ids] == [p.startswith("##") for p in pieces]


def test_unseen_character_is_unknown() -> None:
    assert _train(TEXTS).encode(["\u0416"]) == [[1]]


def test_both_files_give_the_same_ids_and_hash(tmp_path: Path) -> None:
    tokenizer = _train(TEXTS)
    tokenizer.save(tmp_path)
    expected = tokenizer.encode(TEXTS)
    for name in ("vocab.txt", "tokenizer.json", "."):
        loaded = load_tokenizer(tmp_path / name)
        assert loaded.sha256 == tokenizer.sha256
        assert loaded.encode(TEXTS) == expected
    digest = hashlib.sha256((tmp_path / "vocab.txt").read_bytes()).hexdigest()
    assert digest == tokenizer.sha256
    assert _train(TEXTS[:3]).sha256 != tokenizer.sha256


def test_faulty_vocabularies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too small: this text needs \d+ pieces"):
        _train(TEXTS, 9)
    with pytest.raises(DataError, match=r"\[SEP\], \[MASK\] missing among 4"):
        from_tokens(["[PAD]", "[UNK]", "[CLS]", "a"])
    with pytest.raises(DataError, match="'a' stands twice"):
        from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "a"])
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        from_json("{}")
    with pytest.raises(DataError, match="holds neither"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="cannot be read as a vocabulary"):
        load_tokenizer(tmp_path / "vocab.txt")


@pytest.mark.skipif(not BERT_UNCASED.exists(), reason="needs ../shared/data/tokenizer")
def test_bert_base_uncased_files_agree() -> None:
    ours = load_tokenizer(BERT_UNCASED / "vocab.txt")
    theirs = load_tokenizer(BERT_UNCASED / "tokenizer.json")
    assert ours.sha256 == theirs.sha256
    lines = ["Caf\u00e9 d\u00e9j\u00e0-vu, \u4f60\u597d! don't [MASK] 12,5\u20ac"]
    assert ours.encode(lines) == theirs.encode(lines)
