"""Texts in, a lower-casing WordPiece or BPE vocabulary out; or a vocabulary file in, the same
tokenizer out.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

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
from data_prep.shard_format import vocabulary_sha256

# In the order of their ids; [PAD]=0 is what NVIDIA's shards and the zero padding of every loader
# assume.
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
MIN_FREQUENCY = 2
# Most single characters in a vocabulary; BERT's own builder and `tokenizers`'
# BertWordPieceTokenizer use 1000 too.
ALPHABET_LIMIT = 1000
CONTINUATION = "##"


# Other names of the special tokens: RoBERTa's, and those with BERT's words.
OTHER_NAMES = {
    "pad": ("<pad>",),
    "unk": ("<unk>",),
    "cls": ("<s>", "<cls>"),
    "sep": ("</s>", "<sep>"),
    "mask": ("<mask>",),
}
# Pre-tokenizers that mark the pieces which begin a word, instead of those which continue one.
WORD_BEGINS = {"ByteLevel": "\u0120", "Metaspace": "\u2581"}

Kind = Literal["wordpiece", "bpe"]
Merges = Sequence[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class SubwordTokenizer:
    """A trained WordPiece or BPE tokenizer; adds no special tokens."""

    tokenizer: Tokenizer
    tokens: list[str]
    """The pieces in id order, [V]."""
    special_tokens: dict[str, str]
    """This vocabulary's own names for pad, unk, cls, sep, mask."""
    merges: Merges | None = None
    """The merges of BPE in their order; None: WordPiece."""
    word_begin: str = ""
    """What pieces that begin a word begin with; "": the others begin with "##"."""

    @property
    def vocab_size(self) -> int:
        """Number of word pieces V, special ones included."""
        return len(self.tokens)

    @cached_property
    def sha256(self) -> str:
        """Of the vocabulary, as the manifest names it."""
        return vocabulary_sha256(self.tokens, self.merges)

    @cached_property
    def special_token_ids(self) -> dict[str, int]:
        """Ids under the manifest's names pad, unk, cls, sep, mask."""
        return {name: self.tokens.index(token) for name, token in self.special_tokens.items()}

    @cached_property
    def is_continuation(self) -> list[bool]:
        """Whether piece i continues a word, [V]."""
        if not self.word_begin:
            return [token.startswith(CONTINUATION) for token in self.tokens]
        special = set(self.special_tokens.values())
        begins = tuple({self.word_begin, *special})
        return [not token.startswith(begins) for token in self.tokens]

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
    texts: Iterable[str], counts: Counter[str], vocab_size: int, *, kind: Kind = "wordpiece"
) -> SubwordTokenizer:
    """Train a vocabulary on `texts`; `counts` are their characters (`count_characters`), which fix
    the alphabet.

    The library alone gives other ids in each run: it numbers single characters in the order of a
    hash map, and merges of equal count are decided by those numbers. Here they are numbered before
    training, so the result is a function of the text. Both kinds learn the same merges; WordPiece
    forgets them and takes the longest piece that fits.
    """
    alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET_LIMIT])
    pieces = [CONTINUATION + c for c in alphabet if _can_continue_a_word(c)]
    smallest = len(SPECIAL_TOKENS) + len(alphabet) + len(pieces)
    if vocab_size < smallest:
        raise DataError(
            f"--vocab-size {vocab_size} is too small: this text needs {smallest} pieces for "
            "its single characters alone"
        )
    tokenizer = _with_bert_rules(models.BPE(continuing_subword_prefix=CONTINUATION))
    trainer = trainers.BpeTrainer(
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
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if kind == "wordpiece":
        return from_tokens(tokens)
    return _bpe(tokens, _merges(json.loads(tokenizer.to_str())["model"]))


def count_characters(texts: Iterable[str]) -> Counter[str]:
    """Count the characters of the normalised texts, without white space."""
    normaliser = normalizers.BertNormalizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normaliser.normalize_str(text))
    for character in [c for c in counts if c.isspace()]:
        del counts[character]
    return counts


def load_tokenizer(path: Path) -> SubwordTokenizer:
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
    if '"type":"BPE"' in _beside(path).replace(" ", ""):
        raise DataError(f"{path}: lists pieces of BPE without its merges; give the tokenizer.json")
    return from_tokens(content.removesuffix("\n").replace("\r\n", "\n").split("\n"), str(path))


def from_json(content: str, origin: str = "tokenizer.json") -> SubwordTokenizer:
    """Build the tokenizer from the content of `tokenizer.json`, with its own normaliser."""
    try:
        parsed: Any = json.loads(content)
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # `tokenizers` raises Exception itself: the boundary of a library
        raise DataError(
            f"{origin}: not a tokenizer.json of the library `tokenizers`: {error}"
        ) from error
    model = parsed["model"]
    kind = model.get("type", "WordPiece")  # left out by old versions of the library
    if kind not in ("WordPiece", "BPE"):
        raise DataError(f"{origin}: a {kind} tokenizer; WordPiece and BPE are read")
    if model.get("dropout") or model.get("end_of_word_suffix"):
        raise DataError(f"{origin}: BPE with dropout or an end-of-word suffix is not read")
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise DataError(f"{origin}: its {len(tokens)} ids are not 0 to {len(tokens) - 1}")
    special = _special_tokens(tokens, origin)
    # Truncation, padding and special tokens are the packer's business, not the tokenizer's.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    merges = _merges(model) if kind == "BPE" else None
    return SubwordTokenizer(tokenizer, tokens, special, merges, _word_begin(parsed))


def from_tokens(tokens: Sequence[str], origin: str = "vocabulary") -> SubwordTokenizer:
    """Build the lower-casing WordPiece tokenizer of a vocabulary given in id order."""
    special = _special_tokens(tokens, origin)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.WordPiece(vocabulary, unk_token=special["unk"], max_input_chars_per_word=100)
    return SubwordTokenizer(_finished(model, vocabulary, special), list(tokens), special)


def _bpe(tokens: Sequence[str], merges: Merges) -> SubwordTokenizer:
    """Build the lower-casing BPE tokenizer; a run of unknown characters is one [UNK]."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(
        vocabulary,
        list(merges),
        unk_token=SPECIAL_TOKENS["unk"],
        continuing_subword_prefix=CONTINUATION,
        fuse_unk=True,
    )
    tokenizer = _finished(model, vocabulary, SPECIAL_TOKENS)
    return SubwordTokenizer(tokenizer, list(tokens), SPECIAL_TOKENS, merges)


def _merges(model: dict[str, Any]) -> Merges:
    """Return the merges of a parsed model; old versions of the library join the pair with a
    space.
    """
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in pairs]


def _finished(
    model: models.Model, vocabulary: dict[str, int], special: dict[str, str]
) -> Tokenizer:
    tokenizer = _with_bert_rules(model)
    tokenizer.add_special_tokens(list(special.values()))
    cls, sep = special["cls"], special["sep"]
    tokenizer.post_processor = processors.BertProcessing(
        (sep, vocabulary[sep]), (cls, vocabulary[cls])
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    return tokenizer


def _with_bert_rules(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _word_begin(content: dict[str, Any]) -> str:
    """Return how pieces that begin a word begin, by the pre-tokenizer of a parsed file."""
    rules = content.get("pre_tokenizer") or {}
    names = [rule["type"] for rule in rules.get("pretokenizers", [rules] if rules else [])]
    return next((WORD_BEGINS[name] for name in names if name in WORD_BEGINS), "")


def _beside(path: Path) -> str:
    """Return the tokenizer.json beside a file, "" where there is none."""
    try:
        return (path.parent / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _special_tokens(tokens: Sequence[str], origin: str) -> dict[str, str]:
    """Return this vocabulary's names of the special tokens; refuse one without them."""
    known = set(tokens)
    special = {
        name: next((token for token in (usual, *OTHER_NAMES[name]) if token in known), "")
        for name, usual in SPECIAL_TOKENS.items()
    }
    missing = [SPECIAL_TOKENS[name] for name, token in special.items() if not token]
    if missing:
        raise DataError(
            f"{origin}: not a BERT vocabulary: {', '.join(missing)} missing among "
            f"{len(tokens)} pieces"
        )
    if len(known) != len(tokens):
        twice = next(_repeated(tokens))
        raise DataError(f"{origin}: the piece {twice!r} stands twice; ids would be ambiguous")
    return special


def _repeated(tokens: Sequence[str]) -> Iterator[str]:
    return (token for token, count in Counter(tokens).items() if count > 1)


def _can_continue_a_word(character: str) -> bool:
    """Punctuation and CJK ideographs are words of their own for BERT's pre-tokenizer and never
    continue one.
    """
    is_ascii_symbol = character.isascii() and not character.isalnum()
    is_ideograph = unicodedata.name(character, "").startswith("CJK")
    return not (is_ascii_symbol or is_ideograph or unicodedata.category(character).startswith("P"))
