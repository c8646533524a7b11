"""A paragraph in, its sentences out, by rules about end marks, abbreviations and capitals.

Each place between two words is decided by the end of the one and the beginning of the other, so
that `data_prep.tokens.encoder` can classify each distinct word once.

Measured on the gold boundaries inside the paragraphs of UD English-EWT dev (web text, much of it
without marks or capitals): precision 0.987, recall 0.795, F1 0.880; with the paragraphs' ends,
which this function is given as line ends, F1 0.928 (`benchmarks/sentences.py`, beside libraries).
The rules were written with an eye on that file, so other web text may score a little lower.
Recall is lost on purpose where the next word begins with a small letter: "Who knows? he said."
"""

import re
from enum import IntEnum

import numpy as np

_TITLES = (
    "mr mrs ms messrs dr drs prof rev hon st sr jr gen col maj capt cpt lt sgt cmdr adm gov sen "
    "rep pres supt insp fr msgr mme mlle ps p.s"
)
_OTHERS = (
    "vs etc viz cf al ca approx est dept ed eds trans vol vols no nos pp fig figs eq sec ch chap "
    "art op cit lit incl ext tel "
    "cert esp misc prob resp subsp"
)
_MONTHS = "jan feb mar apr jun jul aug sept sep oct nov dec"
_FIRMS = "co corp inc ltd pvt bros assn univ inst natl intl mt ft ave blvd rd"
_LETTERS = "e.g i.e a.m p.m u.s u.k u.n d.c b.c a.d ph.d b.a m.a"
_COMMON_STARTS = (
    "a after all although an and as at but by during for from he her his however i if in it its "
    "many most no on one or our she since so some such that the their there these they this those "
    "though to today we what when where while who why with yes you"
)
# Words after which a full stop does not end the sentence when a capital follows.
NEVER_LAST = frozenset(
    f"{_TITLES} vs viz cf ca approx vol vols no nos pp fig figs eq sec chap op mt ft".split()
)
# Words that may end a sentence: their full stop ends it only before a word that commonly begins
# one.
MAY_BE_LAST = frozenset(f"{_OTHERS} {_MONTHS} {_FIRMS} {_LETTERS}".split()) - NEVER_LAST

_STARTERS = frozenset(_COMMON_STARTS.split())
_NUMBERED = frozenset(
    {"no", "nos", "vol", "vols", "pp", "fig", "figs", "eq", "sec", "chap", "op", "art", "ch"}
)


class WordEnd(IntEnum):
    """How a word ends; the rows of `ENDS_SENTENCE`."""

    NEVER = 0
    """No end mark, or a full stop that is always the word's own: "Mr."."""
    MARK = 1
    CLEAR_MARK = 2
    """A mark that ends even where the writer uses no capitals: a full stop behind a plain word,
    "!!"."""
    ABBREVIATION = 3
    """A full stop that is the word's own and may be the sentence's too: "etc."."""
    NUMBERED = 4
    """A full stop behind a word that a number follows, if it does not end: "No."."""
    FORCED = 5
    """The end of a paragraph, or an ideographic mark with the next word right behind it."""


class WordStart(IntEnum):
    """How the next word begins, quotes and brackets left out; the columns of `ENDS_SENTENCE`."""

    NONE = 0
    """Marks that close or go on: ")", ".", ":-)"."""
    SMALL = 1
    SMALL_I = 2
    """The pronoun in small letters: no sentence of edited English holds it elsewhere."""
    DIGIT = 3
    STARTER = 4
    """A word that commonly begins a sentence, such as "The"."""
    OTHER = 5


ENDS_SENTENCE = np.array(
    [  # NONE, SMALL, SMALL_I, DIGIT, STARTER, OTHER
        [False, False, False, False, False, False],
        [False, False, True, True, True, True],
        [False, True, True, True, True, True],
        [False, False, False, False, True, False],
        [False, False, False, False, True, True],
        [True, True, True, True, True, True],
    ]
)
"""Whether a sentence ends between two words, [WordEnd, WordStart]."""

IDEOGRAPHIC_MARKS = "\u3002\uff01\uff1f"
# Quotes and brackets that can only close.
_CLOSERS = "\u2019\u201d\u00bb\u300d\u300f\uff09\u3011\u300b"
LAST_CHARACTERS = f".!?\u2026{IDEOGRAPHIC_MARKS}\"')](" + _CLOSERS
"""What a word that may end a sentence ends with; only a first look."""

# The shortest word, in small letters, whose full stop is no abbreviation's unless it is listed. 38
# million characters of textbooks, reviews, news and encyclopedia hold 535 such stops before a small
# letter; looked through, only subsp., cert., prob. and dept. are abbreviations, and listed above.
_PLAIN_WORD_LETTERS = 4
_SMALL_I = frozenset(("i", "im", "ive", "i'm", "i've", "i'll", "i'd", "i\u2019m", "i\u2019ve"))
_CONTINUING = f".,;:!?\u2026)]}}{_CLOSERS}"
_EMOTICON = re.compile(r"[:;=]['^o-]?[()]+")
# The classes of plain words with a full stop.
_FULL_STOPS = {
    **dict.fromkeys(MAY_BE_LAST, WordEnd.ABBREVIATION),
    **dict.fromkeys(NEVER_LAST | _NUMBERED, WordEnd.NEVER),
    "no": WordEnd.NUMBERED,
}
_MARK = re.compile(
    rf"""(?P<mark>[.!?\u2026]+|[{IDEOGRAPHIC_MARKS}]+)
    (?P<close>["')\]{_CLOSERS}]*)  # quotes and brackets that close with it
    $""",
    re.VERBOSE,
)
_OPENERS = "\"'\u2018\u201c\u00ab(["
_BARE_WORD = re.compile(r"[\w.&'\u2019-]*$")
_FIRST_WORD = re.compile(r"[\w'\u2019]+")
_LETTERS_AND_STOPS = re.compile(r"(?:\w\.)+\w")
# Ideographic marks end a sentence without a space; a run of them and what closes stay together.
_INNER_END = re.compile(
    rf"(?<![{IDEOGRAPHIC_MARKS}])[{IDEOGRAPHIC_MARKS}]+[{_CLOSERS}]*"
    rf"(?=[^ \n{IDEOGRAPHIC_MARKS}{_CLOSERS}])"
)
_LONGEST_END = 64  # characters that are looked at; the cost of a long word stays constant


def split_sentences(paragraph: str) -> list[str]:
    """Return the sentences of one paragraph; joined with spaces (nothing behind an ideographic
    mark inside a word) they give the paragraph.
    """
    words = [_parts(word) for word in paragraph.split(" ") if word]
    sentences: list[str] = []
    current: list[str] = []
    for (*closed, last), following in zip(words, [*words[1:], None], strict=False):
        for part in closed:
            sentences.append("".join([*current, part]))
            current = []
        current.append(last)
        may_end = following is None or last[-1] in LAST_CHARACTERS
        if may_end and _is_end(last, following):
            sentences.append("".join(current))
            current = []
        else:
            current.append(" ")
    return sentences


def split_document(text: str) -> list[str]:
    """Return the sentences of a text whose lines are paragraphs: a line's end always ends a
    sentence.
    """
    return [sentence for line in text.split("\n") for sentence in split_sentences(line)]


def inner_ends(text: str) -> list[int]:
    """Return the offsets inside words at which a sentence ends, as it does behind an ideographic
    mark without a space.
    """
    ends = (match.end() for match in _INNER_END.finditer(text))
    return [end for end in ends if not text[end].islower()]


def word_end(word: str) -> WordEnd:
    """Classify the end of a word, without the space behind it."""
    bare = word[:-1]
    if word.endswith(".") and len(bare) > 1 and bare.isalpha():  # nearly all
        is_plain = len(bare) >= _PLAIN_WORD_LETTERS and bare.islower()
        return _FULL_STOPS.get(bare.lower(), WordEnd.CLEAR_MARK if is_plain else WordEnd.MARK)
    word = word[-_LONGEST_END:]
    match = _MARK.search(word)
    if match is None:
        return WordEnd.MARK if _EMOTICON.fullmatch(word) else WordEnd.NEVER
    if match["mark"] != ".":
        # "Yes! yes" and '"What?" he said' go on; an ellipsis goes on unless a capital follows.
        is_clear = len(match["mark"]) > 1 and not match["close"] and "." not in match["mark"]
        return WordEnd.CLEAR_MARK if is_clear else WordEnd.MARK
    found = _BARE_WORD.search(word[: match.start()])
    return _full_stop(found[0] if found else "", bool(match["close"]))


def word_start(word: str) -> WordStart:
    """Classify the beginning of a word."""
    if word[0] in _CONTINUING and not any(character.isalnum() for character in word):
        return WordStart.NONE
    rest = word.lstrip(_OPENERS) or word[-1:]
    if rest[0].islower():
        return WordStart.SMALL_I if rest.rstrip(".,!?") in _SMALL_I else WordStart.SMALL
    if rest[0].isdigit():
        return WordStart.DIGIT
    first = _FIRST_WORD.match(rest)
    is_starter = first is not None and first[0].lower() in _STARTERS
    return WordStart.STARTER if is_starter else WordStart.OTHER


def _is_end(word: str, following: list[str] | None) -> bool:
    if following is None:
        return True
    return bool(ENDS_SENTENCE[word_end(word), word_start(following[0])])


def _full_stop(word: str, is_closed: bool) -> WordEnd:
    """Classify a full stop behind `word`, which has none."""
    bare = word.lower().lstrip("'\u2019-.")
    if bare in _NUMBERED:
        return WordEnd.NUMBERED if bare == "no" or is_closed else WordEnd.NEVER
    if bare in NEVER_LAST:
        return WordEnd.NEVER
    is_initial = len(bare) == 1 and bare.isalpha() and word[-1:].isupper()
    if bare in MAY_BE_LAST or is_initial or _LETTERS_AND_STOPS.fullmatch(bare):
        return WordEnd.ABBREVIATION
    return WordEnd.MARK


def _parts(word: str) -> list[str]:
    """Cut a word at its inner ends."""
    if word.isascii():
        return [word]
    bounds = [0, *inner_ends(word), len(word)]
    return [word[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
