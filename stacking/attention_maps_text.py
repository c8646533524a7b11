"""Text in, sentences with special tokens out, as the tokenizer of pre-training cuts them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from data_prep.plain_files import read_plain
from stacking.attention_maps import Sentence
from stacking.errors import ConfigError

DEFAULT_SENTENCE = "The river had risen over night, and by noon the lower road was under water."
MOST_SENTENCES = 1000
"""Of a file; more would change the shares in the third digit and take minutes."""


class Tokenizer(Protocol):
    """What is needed of data_prep's SubwordTokenizer."""

    @property
    def tokens(self) -> list[str]:
        """The pieces in the order of their ids."""

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Ids of cls, sep and others."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""


def read_sentences(
    sentence: str | None, path: Path | None, tokenizer: Tokenizer, longest: int
) -> tuple[Sentence, list[Sentence], list[str]]:
    """The sentence to show, those to measure, and what was left out of them.

    Shown is `sentence`, else the first of the file, else DEFAULT_SENTENCE; measured are those of
    the file, one a line, else the one shown. None has more than `longest` tokens. ConfigError where
    there is no such sentence.
    """
    measured, notes = ([], []) if path is None else _of_file(path, tokenizer, longest)
    if sentence is None and measured:
        shown = measured[0]
    else:
        shown = _of_text(DEFAULT_SENTENCE if sentence is None else sentence, tokenizer, longest)
    if unknown := shown.ids.count(tokenizer.special_token_ids["unk"]):
        notes.append(f"tokens shown that the vocabulary lacks: {unknown} of {len(shown.ids) - 2}")
    return shown, measured or [shown], notes


def _of_text(text: str, tokenizer: Tokenizer, longest: int) -> Sentence:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no text
        raise ConfigError(f"--sentence {text!r}: is no UTF-8 text: {error}") from error
    found = _framed(tokenizer.encode([text])[0], tokenizer)
    if len(found.ids) == 2:
        raise ConfigError(f"--sentence {text!r}: holds no token; give a sentence")
    if len(found.ids) > longest:
        raise ConfigError(
            f"--sentence: has {len(found.ids)} tokens with the two special ones; allowed: at most "
            f"{longest}, as in training"
        )
    return found


def _of_file(path: Path, tokenizer: Tokenizer, longest: int) -> tuple[list[Sentence], list[str]]:
    try:
        lines = [line for line in read_plain(path).decode("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: cannot be read as UTF-8 text: {error}") from error
    cut = [_framed(ids, tokenizer) for ids in tokenizer.encode(lines[:MOST_SENTENCES])]
    found = [sentence for sentence in cut if 2 < len(sentence.ids) <= longest]
    if not found:
        raise ConfigError(
            f"--text {path}: has no line of 1 to {longest - 2} tokens; give one sentence a line"
        )
    notes = []
    if len(lines) > MOST_SENTENCES:
        notes.append(f"lines of {path} that are used: the first {MOST_SENTENCES:,}")
    if len(found) < len(cut):
        reason = f"without a token or with more than {longest}"
        notes.append(f"lines of {path} left out, {reason}: {len(cut) - len(found)} of {len(cut)}")
    return found, notes


def _framed(ids: Sequence[int], tokenizer: Tokenizer) -> Sentence:
    special = tokenizer.special_token_ids
    framed = (special["cls"], *ids, special["sep"])
    return Sentence(tuple(tokenizer.tokens[i] for i in framed), framed)
