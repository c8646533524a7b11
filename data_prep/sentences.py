"""A paragraph in, its sentences out, by rules about end marks, abbreviations and capitals.

Measured on the gold boundaries inside the paragraphs of UD English-EWT dev (web text, much of it
without marks or capitals): precision 0.974, recall 0.757, F1 0.852; with the paragraphs' ends,
which this function is given as line ends, F1 0.912. Recall is lost on purpose where the next word
begins with a small letter: '"What?" he said.'
"""

import re
from enum import IntEnum

import numpy as np

_TITLES = (
    "mr mrs ms messrs dr prof rev hon st sr jr gen col maj capt cpt lt sgt cmdr adm gov sen rep "
    "pres supt insp fr msgr mme mlle"
)
_OTHERS = (
    "vs etc viz cf al ca approx est dept ed eds trans vol vols no nos pp fig figs eq sec ch chap "
    "art op cit lit incl ext tel"
)
_MONTHS = "jan feb mar apr jun jul aug sept sep oct nov dec"
_FIRMS = "co corp inc ltd bros assn univ inst natl intl mt ft ave blvd rd"
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
    ABBREVIATION = 2
    """A full stop that is the word's own and may be the sentence's too: "etc."."""
    NUMBERED = 3
    """A full stop behind a word that a number follows, if it does not end: "No."."""
    FORCED = 4
    """The end of a paragraph, or an ideographic mark with the next word right behind it."""


class WordStart(IntEnum):
    """How the next word begins, quotes and brackets left out; the columns of `ENDS_SENTENCE`."""

    SMALL = 0
    DIGIT = 1
    STARTER = 2
    """A word that commonly begins a sentence, such as "The"."""
    OTHER = 3


ENDS_SENTENCE = np.array(
    [
        [False, False, False, False],
        [False, True, True, True],
        [False, False, True, False],
        [False, False, True, True],
        [True, True, True, True],
    ]
)
"""Whether a sentence ends between two words, [WordEnd, WordStart]."""

# The classes of plain words with a full stop.
_FULL_STOPS = {
    **dict.fromkeys(MAY_BE_LAST, WordEnd.ABBREVIATION),
    **dict.fromkeys(NEVER_LAST | _NUMBERED, WordEnd.NEVER),
    "no": WordEnd.NUMBERED,
}
IDEOGRAPHIC_MARKS = "\u3002\uff01\uff1f"
_MARK = re.compile(
    rf"""(?P<mark>[.!?\u2026]+|[{IDEOGRAPHIC_MARKS}]+)
    (?P<close>["'\u2019\u201d\u00bb)\]]*)  # quotes and brackets that close with it
    $""",
    re.VERBOSE,
)
_OPENERS = "\"'\u2018\u201c\u00ab(["
_BARE_WORD = re.compile(r"[\w.&'\u2019-]*$")
_FIRST_WORD = re.compile(r"[\w'\u2019]+")
_LETTERS_AND_STOPS = re.compile(r"(?:\w\.)+\w")
# Ideographic marks end a sentence without a space; a run of them and what closes stay together.
_INNER_END = re.compile(
    rf"[{IDEOGRAPHIC_MARKS}]+[\u2019\u201d\u00bb\u300d\u300f\uff09\u3011\u300b]*(?=[^ \n])"
)
_LONGEST_ABBREVIATION = 64  # characters; a slice keeps the cost constant in the word's length


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
        if following is None or ENDS_SENTENCE[word_end(last), word_start(following[0])]:
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
    if word.endswith(".") and len(bare) > 1 and bare.isalpha():  # nearly all; only a shortcut
        return _FULL_STOPS.get(bare.lower(), WordEnd.MARK)
    match = _MARK.search(word)
    if match is None:
        return WordEnd.NEVER
    if match["mark"] != ".":
        # "Yes! yes" and '"What?" he said' go on; an ellipsis goes on unless a capital follows.
        return WordEnd.MARK
    found = _BARE_WORD.search(word[max(0, match.start() - _LONGEST_ABBREVIATION) : match.start()])
    return _full_stop(found[0] if found else "", bool(match["close"]))


def word_start(word: str) -> WordStart:
    """Classify the beginning of a word."""
    rest = word.lstrip(_OPENERS) or word[-1:]
    if rest[0].islower():
        return WordStart.SMALL
    if rest[0].isdigit():
        return WordStart.DIGIT
    first = _FIRST_WORD.match(rest)
    is_starter = first is not None and first[0].lower() in _STARTERS
    return WordStart.STARTER if is_starter else WordStart.OTHER


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
    bounds = [0, *inner_ends(word), len(word)]
    return [word[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
