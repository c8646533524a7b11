"""tokenizer: training is a function of the text, and both files give one tokenizer."""

import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.errors import DataError
from data_prep.tokens.tokenizer import (
    Kind,
    SubwordTokenizer,
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


def _train(texts: list[str], vocab_size: int = 90, *, kind: Kind = "wordpiece") -> SubwordTokenizer:
    return train_tokenizer(iter(texts), count_characters(texts), vocab_size, kind=kind)


def _byte_level() -> str:
    """A tokenizer.json as RoBERTa's: bytes, spaces in front of words, other special names."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [*names, *"thecat.", "\u0120", "th", "the", "\u0120c", "at", "\u0120cat"]
    merges = [("t", "h"), ("th", "e"), ("\u0120", "c"), ("a", "t"), ("\u0120c", "at")]
    pieces = list(dict.fromkeys(pieces))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(names)
    return str(tokenizer.to_str())


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_is_deterministic_and_independent_of_document_order(kind: Kind) -> None:
    reference = _train(TEXTS, kind=kind)
    for _ in range(5):
        assert _train(TEXTS, kind=kind).to_json() == reference.to_json()
    assert _train(TEXTS[::-1], kind=kind).to_json() == reference.to_json()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_special_tokens_have_the_first_ids_and_pad_is_zero(kind: Kind) -> None:
    tokenizer = _train(TEXTS, kind=kind)
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


def test_bpe_follows_its_merges_and_wordpiece_the_longest_piece() -> None:
    texts = ["ab ab ab ab bc bc bc abc"] * 2
    bpe, wordpiece = (_train(texts, 13, kind=kind) for kind in ("bpe", "wordpiece"))
    assert bpe.tokens == wordpiece.tokens
    assert bpe.merges == [("a", "##b"), ("b", "##c")]
    (ids,) = bpe.encode(["abcb"])
    assert [bpe.tokens[i] for i in ids] == ["ab", "##c", "##b"]
    assert [bpe.is_continuation[i] for i in ids] == [False, True, True]
    (ids,) = bpe.encode(["a\u0416\u0416b \u0416"])
    assert [bpe.tokens[i] for i in ids] == ["a", "[UNK]", "##b", "[UNK]"]


def test_bpe_is_saved_whole_and_its_hash_covers_the_merges(tmp_path: Path) -> None:
    tokenizer = _train(TEXTS, kind="bpe")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.sha256, loaded.merges) == (tokenizer.sha256, tokenizer.merges)
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)
    assert tokenizer.sha256 != _train(TEXTS).sha256
    content = json.loads(tokenizer.to_json())
    content["model"]["merges"].reverse()
    assert from_json(json.dumps(content)).sha256 != tokenizer.sha256
    with pytest.raises(DataError, match=r"vocab\.txt: lists pieces of BPE without its merges"):
        load_tokenizer(tmp_path / "vocab.txt")


def test_byte_level_bpe_is_read_with_its_own_special_names() -> None:
    tokenizer = from_json(_byte_level())
    assert tokenizer.special_token_ids == {"cls": 0, "pad": 1, "sep": 2, "unk": 3, "mask": 4}
    (ids,) = tokenizer.encode(["the cat."])
    assert [tokenizer.tokens[i] for i in ids] == ["the", "\u0120cat", "."]
    assert [tokenizer.is_continuation[i] for i in [*ids, 4]] == [True, False, True, False]


def test_tokenizers_that_cannot_be_read_are_refused() -> None:
    content = json.loads(_byte_level())
    faults = [({"dropout": 0.1}, "dropout"), ({"end_of_word_suffix": "</w>"}, "end-of-word")]
    for change, message in faults:
        changed = content | {"model": content["model"] | change}
        with pytest.raises(DataError, match=message):
            from_json(json.dumps(changed))
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(DataError, match="a WordLevel tokenizer; WordPiece and BPE are read"):
        from_json(words.to_str())
    gap = json.loads(from_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]).to_json())
    gap["model"]["vocab"]["a"] = 7
    with pytest.raises(DataError, match="its 6 ids are not 0 to 5"):
        from_json(json.dumps(gap))


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
