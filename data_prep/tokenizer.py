"""Texts in, a lower-casing WordPiece vocabulary out; or a vocabulary file in, the same tokenizer
out.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data_prep.errors import DataError

# In the order of their ids; [PAD]=0 is what NVIDIA's shards and the zero padding of every loader
# assume.
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
MIN_FREQUENCY = 2
# Most single characters in a vocabulary; BERT's own builder and `tokenizers`'
# BertWordPieceTokenizer use 1000 too.
ALPHABET_LIMIT = 1000
CONTINUATION = "##"


@dataclass(frozen=True, eq=False)
class WordPieceTokenizer:
    """A trained WordPiece tokenizer with BERT's normaliser; adds no special tokens."""

    tokenizer: Tokenizer
    tokens: list[str]

    @property
    def vocab_size(self) -> int:
        """Number of word pieces V, special ones included."""
        return len(self.tokens)

    @property
    def sha256(self) -> str:
        """Hash of the vocabulary in id order: the same for `vocab.txt` and `tokenizer.json` of one
        vocabulary.
        """
        return vocabulary_sha256(self.tokens)

    @cached_property
    def special_token_ids(self) -> dict[str, int]:
        """Ids under the manifest's names pad, unk, cls, sep, mask."""
        return {name: self.tokens.index(token) for name, token in SPECIAL_TOKENS.items()}

    @cached_property
    def is_continuation(self) -> list[bool]:
        """Whether piece i continues a word ("##..."), [V]."""
        return [token.startswith(CONTINUATION) for token in self.tokens]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        return [
            encoding.ids
            for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`, to be carried into another process."""
        return str(self.tokenizer.to_str())

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `vocab.txt` into a folder."""
        lines = "".join(f"{token}\n" for token in self.tokens)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "tokenizer.json").write_text(self.to_json() + "\n", encoding="utf-8")
            (folder / "vocab.txt").write_text(lines, encoding="utf-8")
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from error


def train_tokenizer(
    texts: Iterable[str], counts: Counter[str], vocab_size: int
) -> WordPieceTokenizer:
    """Train WordPiece on `texts`; `counts` are their characters (`count_characters`), which fix the
    alphabet.

    The library alone gives other ids in each run: it numbers single characters in the order of a
    hash map, and merges of equal count are decided by those numbers. Here they are numbered before
    training, so the result is a function of the text.
    """
    alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET_LIMIT])
    pieces = [CONTINUATION + c for c in alphabet if _can_continue_a_word(c)]
    smallest = len(SPECIAL_TOKENS) + len(alphabet) + len(pieces)
    if vocab_size < smallest:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: this text needs {smallest} pieces for "
            "its single characters alone"
        )
    tokenizer = _untrained(models.WordPiece(unk_token=SPECIAL_TOKENS["unk"]))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[*SPECIAL_TOKENS.values(), *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUATION,
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    vocabulary = tokenizer.get_vocab()
    return from_tokens(sorted(vocabulary, key=vocabulary.__getitem__))


def count_characters(texts: Iterable[str]) -> Counter[str]:
    """Count the characters of the normalised texts, without white space."""
    normaliser = normalizers.BertNormalizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normaliser.normalize_str(text))
    for character in [c for c in counts if c.isspace()]:
        del counts[character]
    return counts


def load_tokenizer(path: Path) -> WordPieceTokenizer:
    """Load `vocab.txt`, `tokenizer.json`, or a folder that holds one of them."""
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).exists()]
        if not found:
            raise DataError(f"{path}: holds neither tokenizer.json nor vocab.txt")
        path = found[0]
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a vocabulary: {error}") from error
    if path.suffix == ".json":
        return from_json(content, str(path))
    return from_tokens(content.removesuffix("\n").replace("\r\n", "\n").split("\n"), str(path))


def from_json(content: str, origin: str = "tokenizer.json") -> WordPieceTokenizer:
    """Build the tokenizer from the content of `tokenizer.json`, with its own normaliser."""
    try:
        model: object = json.loads(content).get("model", {}).get("type", "WordPiece")
        tokenizer = Tokenizer.from_str(content)
    except (
        Exception
    ) as error:  # `tokenizers` raises bare Exception on a bad file; it is re-raised as ours.
        raise DataError(
            f"{origin}: not a tokenizer.json of the library `tokenizers`: {error}"
        ) from error
    if model != "WordPiece":
        raise DataError(f"{origin}: a {model} tokenizer; only WordPiece is read today")
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    _check_tokens(tokens, origin)
    # Truncation, padding and special tokens are the packer's business, not the tokenizer's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return WordPieceTokenizer(tokenizer, tokens)


def from_tokens(tokens: Sequence[str], origin: str = "vocabulary") -> WordPieceTokenizer:
    """Build the lower-casing tokenizer of a vocabulary given in id order."""
    _check_tokens(tokens, origin)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = _untrained(
        models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk"], max_input_chars_per_word=100)
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    cls, sep = SPECIAL_TOKENS["cls"], SPECIAL_TOKENS["sep"]
    tokenizer.post_processor = processors.BertProcessing(
        (sep, vocabulary[sep]), (cls, vocabulary[cls])
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return WordPieceTokenizer(tokenizer, list(tokens))


def vocabulary_sha256(tokens: Iterable[str]) -> str:
    """Hash a vocabulary in id order, a token a line: what `sha256sum vocab.txt` prints."""
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(f"{token}\n".encode())
    return digest.hexdigest()


def _untrained(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _check_tokens(tokens: Sequence[str], origin: str) -> None:
    missing = [token for token in SPECIAL_TOKENS.values() if token not in tokens]
    if missing:
        raise DataError(
            f"{origin}: not a BERT vocabulary: {', '.join(missing)} missing among "
            f"{len(tokens)} pieces"
        )
    if len(set(tokens)) != len(tokens):
        twice = next(_repeated(tokens))
        raise DataError(f"{origin}: the piece {twice!r} stands twice; ids would be ambiguous")


def _repeated(tokens: Sequence[str]) -> Iterator[str]:
    return (token for token, count in Counter(tokens).items() if count > 1)


def _can_continue_a_word(character: str) -> bool:
    """Punctuation and CJK ideographs are words of their own for BERT's pre-tokenizer and never
    continue one.
    """
    is_ascii_symbol = character.isascii() and not character.isalnum()
    is_ideograph = unicodedata.name(character, "").startswith("CJK")
    return not (is_ascii_symbol or is_ideograph or unicodedata.category(character).startswith("P"))
