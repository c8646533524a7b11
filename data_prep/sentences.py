"""A paragraph in, its sentences out, by rules about end marks, abbreviations and capitals.

Measured on the gold boundaries inside the paragraphs of UD English-EWT dev (web text, much of it
without marks or capitals): precision 0.974, recall 0.757, F1 0.852; with the paragraphs' ends,
which this function is given as line ends, F1 0.912. Recall is lost on purpose where the next word
begins with a small letter: '"What?" he said.'
"""

import re
from collections.abc import Iterator

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

_END = re.compile(
    r"""(?P<mark>[.!?\u2026]+|[\u3002\uff01\uff1f])   # the end mark
    (?P<close>["'\u2019\u201d\u00bb)\]]*)              # quotes and brackets that close with it
    (?:(?P<space>\s+)|(?<=[\u3002\uff01\uff1f]))       # white space, except after ideographic marks
    (?P<open>["'\u2018\u201c\u00ab(\[]*)(?P<next>\S)  # how the rest begins
    """,
    re.VERBOSE,
)
_WORD_BEFORE = re.compile(r"[\w.&'\u2019-]*$")


def split_sentences(paragraph: str) -> list[str]:
    """Return the sentences of one paragraph; joined with spaces they give the paragraph."""
    starts = [0, *_boundaries(paragraph), len(paragraph)]
    pieces = (paragraph[a:b].strip() for a, b in zip(starts, starts[1:], strict=False))
    return [piece for piece in pieces if piece]


def split_document(text: str) -> list[str]:
    """Return the sentences of a text whose lines are paragraphs: a line's end always ends a
    sentence.
    """
    return [sentence for line in text.split("\n") for sentence in split_sentences(line)]


def _boundaries(paragraph: str) -> Iterator[int]:
    """Yield the offsets at which a sentence begins, without the first."""
    position = 0
    while match := _END.search(paragraph, position):
        # Only the mark and its closers are consumed: what opens the next sentence may hold the next
        # mark.
        position = match.end("close") + len(match["space"] or "")
        if _ends_sentence(paragraph, match):
            yield position


def _ends_sentence(paragraph: str, match: re.Match[str]) -> bool:
    following = match["next"]
    if following.islower():
        return False
    if match["mark"] != ".":
        # "Yes! yes" and '"What?" he said' are refused above; an ellipsis continues unless a capital
        # follows.
        return True
    # 64 characters hold any abbreviation; a slice keeps the cost constant in the paragraph's
    # length.
    before = paragraph[max(0, match.start() - 64) : match.start()]
    found = _WORD_BEFORE.search(before)
    word = found[0] if found else ""
    return _full_stop_ends(
        word, paragraph[match.start("next") : match.start("next") + 32], bool(match["close"])
    )


def _full_stop_ends(word: str, rest: str, is_closed: bool) -> bool:
    """Decide for one full stop after `word`; `rest` does not begin with a small letter."""
    bare = word.lower().lstrip("'\u2019-.")
    if bare in _NUMBERED and not rest[0].isdigit():
        return bare == "no" or is_closed
    if bare in NEVER_LAST:
        return False
    first = re.match(r"[\w'\u2019]+", rest)
    starts_like_a_sentence = first is not None and first[0].lower() in _STARTERS
    if bare in MAY_BE_LAST:
        return starts_like_a_sentence
    is_initial = len(bare) == 1 and bare.isalpha() and word[-1:].isupper()
    if is_initial or re.fullmatch(r"(?:\w\.)+\w", bare):
        return starts_like_a_sentence
    return True
