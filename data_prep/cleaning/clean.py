"""Documents in, one block of clean text out: plain white space always, the other rules as chosen; a
funnel counts what each rule took away.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from data_prep.cleaning.funnel import Funnel
from data_prep.cleaning.line_filters import LineMeasures, count_characters, measure_lines
from data_prep.cleaning.plain_text import find_unclean, is_plain, normalise
from data_prep.cleaning.rules_2019 import (
    clean_up,
    drop_unprintable,
    join_broken_lines,
    normalise_punctuation,
    squeeze,
)
from data_prep.errors import DataError
from data_prep.sources.blocks import Document
from data_prep.text_block import BoolArray, TextBlock

# Documents are looked at in groups of about this many characters: large enough that the cost of a
# numpy call vanishes, small enough for the processor's cache.
_GROUP_CHARACTERS = 1 << 19
# Parts documents while a rule rewrites all of them at once; clean text has no NUL.
_BETWEEN = "\n\0\n"
_NEW_LINE = 0x0A


@dataclass(frozen=True, kw_only=True)
class CleaningRules:
    """What is done to text beside plain white space; the defaults do nothing more."""

    clean_up: bool = False
    """Mend typing habits: four and more dots, << and >>, doubled commas, an asterisk at a word."""
    normalise_punctuation: bool = False
    """English Moses normalize-punctuation: straight quotation marks, ASCII dashes and dots."""
    drop_unprintable: bool = False
    """A space in place of each control, format, private-use or surrogate character."""
    join_lines: bool = False
    """Join a line that ends in a letter, digit or comma to a next one that starts lower-case."""
    backslash_to_space: bool = False
    """A space in place of each backslash, in lines that pass the filters."""
    min_line_chars: int = 0
    """Shortest line that is kept, in characters."""
    max_line_chars: int | None = None
    """Longest line that is kept, in characters; none: no limit."""
    min_letters: int = 0
    """Fewest ASCII letters of a line."""
    min_letter_share: float = 0.0
    """Smallest share of ASCII letters among a line's characters, 0 to 1."""
    max_slash_share: float = 1.0
    """Largest share of "/" among a line's characters, 0 to 1."""
    max_backslash_share: float = 1.0
    """Largest share of backslashes among a line's characters, 0 to 1."""
    max_pipe_share: float = 1.0
    """Largest share of "|" among a line's characters, 0 to 1."""
    drop_pipe_start: bool = False
    """Drop lines that begin with "|", rows of a table."""

    @property
    def rewrites(self) -> bool:
        """Whether any rule changes text before the line filters."""
        return (
            self.clean_up or self.normalise_punctuation or self.drop_unprintable or self.join_lines
        )

    @property
    def filters(self) -> bool:
        """Whether any rule drops lines."""
        none = CleaningRules()
        return any(getattr(self, key) != getattr(none, key) for key in _FILTERS)

    def faults(self) -> list[str]:
        """Return what is wrong with the values, a line a fault."""
        found = [
            f"{key}={getattr(self, key)}: not a share; allowed are 0 to 1"
            for key in _FILTERS
            if key.endswith("_share") and not 0 <= getattr(self, key) <= 1
        ]
        found += [
            f"{key}={getattr(self, key)}: below 0; allowed are 0 and more"
            for key in ("min_line_chars", "min_letters")
            if getattr(self, key) < 0
        ]
        if self.max_line_chars is not None and self.max_line_chars < max(1, self.min_line_chars):
            found.append(
                f"max_line_chars={self.max_line_chars}: every line would go; allowed are "
                f"min_line_chars={self.min_line_chars} and more, at least 1, or none"
            )
        return found


_FILTERS = (
    "min_line_chars",
    "max_line_chars",
    "min_letters",
    "min_letter_share",
    "max_slash_share",
    "max_backslash_share",
    "max_pipe_share",
    "drop_pipe_start",
)

# "2019": StackingBERT's cleaning (Gong et al., 2019; examples/bert of the released code). It also
# drops duplicate lines, which is dedup's work, and merges sentences, sentence_merge's.
PRESETS: Mapping[str, CleaningRules] = MappingProxyType(
    {
        "none": CleaningRules(),
        "2019": CleaningRules(
            clean_up=True,
            normalise_punctuation=True,
            drop_unprintable=True,
            join_lines=True,
            backslash_to_space=True,
            min_line_chars=50,
            max_line_chars=1_000_000,
            min_letters=50,
            min_letter_share=0.7,
            max_slash_share=0.05,
            max_backslash_share=0.05,
            max_pipe_share=0.05,
            drop_pipe_start=True,
        ),
    }
)


def rules_from(preset: str, changes: Sequence[str] = ()) -> CleaningRules:
    """Return a preset with changes ("min_line_chars=30"); raise DataError naming all faults."""
    if preset not in PRESETS:
        raise DataError(
            f"cleaning rules {preset!r} are unknown; choose one of {', '.join(PRESETS)}"
        )
    faults: list[str] = []
    values: dict[str, bool | int | float | None] = {}
    for change in changes:
        key, _, value = (part.strip() for part in change.partition("="))
        fault = _fault_of_key(key, change)
        if fault is None:
            try:
                values[key] = _parse(key, value)
            except ValueError:
                fault = f"{change}: {value!r} is no value of {key}; allowed is {_allowed(key)}"
        if fault is not None:
            faults.append(fault)
    rules = dataclasses.replace(PRESETS[preset], **values)  # type: ignore[arg-type]
    faults += rules.faults()
    if faults:
        raise DataError("cleaning rules: " + "; ".join(faults))
    return rules


def _fault_of_key(key: str, change: str) -> str | None:
    if "=" not in change:
        return f"{change!r}: a change is written key=value, as in min_line_chars=30"
    keys = [field.name for field in dataclasses.fields(CleaningRules)]
    if key in keys:
        return None
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0)
    return f"{key}: unknown; did you mean {near[0]}? All keys: {', '.join(keys)}"


def _parse(key: str, value: str) -> bool | int | float | None:
    """Raise ValueError for a value that is not of the key's type."""
    default = getattr(CleaningRules(), key)
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true"
    if isinstance(default, float):
        return float(value)
    if default is None and value.lower() == "none":
        return None
    return int(value)


def _allowed(key: str) -> str:
    default = getattr(CleaningRules(), key)
    if isinstance(default, bool):
        return "true or false"
    if isinstance(default, float):
        return "a number from 0 to 1"
    return "a whole number" + (" or none" if default is None else "")


def clean_documents(
    documents: Iterable[Document], rules: CleaningRules, funnel: Funnel
) -> list[str]:
    """Return the clean texts as clean_block does, as strings."""
    block = clean_block(documents, rules, funnel)
    return block.texts() if block.num_documents else []


def clean_block(documents: Iterable[Document], rules: CleaningRules, funnel: Funnel) -> TextBlock:
    """Return the clean documents as one block; empty ones are dropped, all of it is counted."""
    blocks = []
    for texts in _groups(documents):
        block = _read(texts, funnel)
        if not block.num_documents:
            continue
        if rules.rewrites:
            block = _rewritten(block, rules, funnel)
        if rules.filters:
            block = _filtered(block, rules, funnel)
        if rules.backslash_to_space and b"\\" in block.text:
            spaced = [text.replace("\\", " ") for text in block.texts()]
            block = _replaced(block, spaced, "punctuation", funnel)
        blocks.append(block)
    counts = [np.zeros(0, np.int64), *(block.paragraph_counts for block in blocks)]
    return TextBlock(b"".join(block.text for block in blocks), np.concatenate(counts))


def _groups(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= _GROUP_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _read(texts: list[str], funnel: Funnel) -> TextBlock:
    block, num_empty = _plain_block(texts)
    characters = sum(map(len, texts))
    # Blank lines are white space, not paragraphs.
    funnel.add("read", len(texts), len(block.paragraph_ends), characters)
    funnel.add("white_space", characters=characters - count_characters(block))
    funnel.add("empty", documents=num_empty)
    return block


def _plain_block(texts: list[str]) -> tuple[TextBlock, int]:
    """Return the normalised texts that are not empty, and the number of those that are.

    Most texts are plain already, so all are looked at together and only the others normalised.
    """
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    buffer = b"\n".join([*encoded, b""])
    ends = np.cumsum([len(text) + 1 for text in encoded])
    is_unclean, is_doubtful = find_unclean(np.frombuffer(buffer, np.uint8), ends)
    for index in np.flatnonzero(is_doubtful & ~is_unclean).tolist():
        is_unclean[index] = not is_plain(texts[index])
    if is_unclean.any():
        for index in np.flatnonzero(is_unclean).tolist():
            encoded[index] = normalise(texts[index]).encode("utf-8")
        encoded = [text for text in encoded if text]
        buffer = b"\n".join([*encoded, b""])
        ends = np.cumsum([len(text) + 1 for text in encoded], dtype=np.int64)
    line_ends = np.flatnonzero(np.frombuffer(buffer, np.uint8) == _NEW_LINE) + 1
    counts = np.diff(np.searchsorted(line_ends, ends, side="right"), prepend=0)
    return TextBlock(buffer, counts.astype(np.int64)), len(texts) - len(encoded)


def _replaced(block: TextBlock, texts: list[str], rule: str, funnel: Funnel) -> TextBlock:
    """Return the texts that take the place of the block's, one for one; count the difference."""
    assert len(texts) == block.num_documents, "a rule made more or fewer documents"
    new, num_empty = _plain_block(texts)
    funnel.add(
        rule,
        paragraphs=len(block.paragraph_ends) - len(new.paragraph_ends),
        characters=count_characters(block) - count_characters(new),
    )
    funnel.add("no_line_left", documents=num_empty)
    return new


def _rewritten(block: TextBlock, rules: CleaningRules, funnel: Funnel) -> TextBlock:
    """Apply the rules that change text, to all documents at once."""
    text = _BETWEEN.join(block.texts())
    if rules.clean_up:
        text = clean_up(text)
    if rules.normalise_punctuation:
        text = normalise_punctuation(text)
    if rules.drop_unprintable:
        text = drop_unprintable(text)
    num_joined = 0
    if rules.join_lines:
        text, num_joined = join_broken_lines(squeeze(text))
    # A join takes a line end away and adds a space, which white_space has not counted.
    funnel.add("joined", paragraphs=num_joined, characters=-num_joined)
    funnel.add("punctuation", paragraphs=-num_joined, characters=num_joined)
    return _replaced(block, text.split(_BETWEEN), "punctuation", funnel)


def _filtered(block: TextBlock, rules: CleaningRules, funnel: Funnel) -> TextBlock:
    """Drop lines; one that breaks several rules counts for the first."""
    lines = measure_lines(block)
    is_dropped = np.zeros(lines.characters.size, np.bool_)
    for rule, breaks in _breaches(lines, rules):
        is_new = breaks & ~is_dropped
        funnel.add(
            rule,
            paragraphs=int(np.count_nonzero(is_new)),
            characters=int(lines.characters[is_new].sum()),
        )
        is_dropped |= is_new
    kept = block.without(is_dropped)
    funnel.add("no_line_left", documents=block.num_documents - kept.num_documents)
    return kept


def _breaches(lines: LineMeasures, rules: CleaningRules) -> Iterator[tuple[str, BoolArray]]:
    """Yield each filter's name in the funnel and the lines that break it, [P]."""
    characters = lines.characters
    yield "short_line", characters < rules.min_line_chars
    if rules.max_line_chars is not None:
        yield "long_line", characters > rules.max_line_chars
    yield "few_letters", lines.letters < rules.min_letters
    # Divided, not multiplied: 7 of 10 is 0.7 to the last bit.
    yield "letter_share", lines.letters / characters < rules.min_letter_share
    yield "slashes", lines.slashes / characters > rules.max_slash_share
    yield "backslashes", lines.backslashes / characters > rules.max_backslash_share
    yield "pipes", lines.pipes / characters > rules.max_pipe_share
    if rules.drop_pipe_start:
        yield "pipe_start", lines.begins_with_pipe
