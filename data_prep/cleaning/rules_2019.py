"""StackingBERT's rewriting of lines (Gong et al., 2019), a function a rule: text in, text out.

A text is many lines at once; no rule looks across a line end, but for the one that joins lines.
Results may hold repeated spaces and blank lines, which the caller takes away.
"""

import re

# Perl's \p{C} without NUL, which may part documents, and without the unassigned code points, which
# depend on the Unicode version.
_UNPRINTABLE = re.compile(
    "[\x01-\x09\x0b-\x1f\x7f-\x9f\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
    "\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ud800-\uf8ff\ufdd0-\ufdef\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f\U000f0000-\U0010ffff]"
)
_MANY_DOTS = re.compile(r"\.{4,}")
_ASTERISK = re.compile(r" \*(?=[^\s])")
# The sentence goes on behind the line end. Patterns begin with a literal and look back from there:
# that is ten times as fast.
_BROKEN_LINE = re.compile(r"\n(?<=[A-Za-z0-9,]\n)(?=[a-z])")

_AFTER_BRACKET = re.compile(r"\) ([.!:?;,])")
_BEFORE_PERCENT = re.compile(r" %(?<=[0-9] %)")
_APOSTROPHE = re.compile("[\u2018\u2019](?<=[A-Za-z].)(?=[A-Za-z])")
_QUOTE_BEFORE_COMMA = re.compile(r'"([,.]+)')
# In this order: two single marks that rules before have made become one double mark.
_MARKS = (
    ("\u201e", '"'),
    ("\u201c", '"'),
    ("\u201d", '"'),
    ("\u2013", "-"),
    ("\u2014", " - "),
    ("\u00b4", "'"),
    ("\u2018", '"'),
    ("\u201a", '"'),
    ("\u2019", '"'),
    ("''", '"'),
    ("\u2026", "..."),
    ("\u00ab", '"'),
    ("\u00bb", '"'),
)


def clean_up(text: str) -> str:
    """Mend typing habits: four and more dots, << and >>, doubled commas, an asterisk at a word."""
    if "...." in text:
        text = _MANY_DOTS.sub("...", text)
    text = text.replace("<<", "\u00ab").replace(">>", "\u00bb")
    text = text.replace(",,", ",").replace(",.", ".")
    return _ASTERISK.sub(" ", text) if " *" in text else text


def normalise_punctuation(text: str) -> str:
    """Write punctuation as the Moses script normalize-punctuation does for English.

    Straight quotation marks, ASCII dashes and dots, spaces outside brackets and none inside, none
    before a colon, commas and full stops before the closing quotation mark. The script is that of
    May 2019; since November it makes a single mark of U+2018 and U+201A. Its rules for no-break
    spaces are left out: white space is plain already.
    """
    text = squeeze(text.replace("(", " (").replace(")", ") "))
    text = _AFTER_BRACKET.sub(r")\1", text).replace("( ", "(").replace(" )", ")")
    text = _BEFORE_PERCENT.sub("%", text).replace(" :", ":").replace(" ;", ";")
    text = text.replace("`", "'").replace("''", ' " ')
    if not text.isascii():
        text = _APOSTROPHE.sub("'", text)
    for mark, plain in _MARKS:
        text = text.replace(mark, plain)
    return _QUOTE_BEFORE_COMMA.sub(r'\1"', squeeze(text))


def drop_unprintable(text: str) -> str:
    """Put a space in place of each control, format, private-use and surrogate character."""
    return _UNPRINTABLE.sub(" ", text)


def join_broken_lines(text: str) -> tuple[str, int]:
    """Join a line that ends in a letter, digit or comma to a next one that starts lower-case.

    Return the text and the number of line ends that went.
    """
    return _BROKEN_LINE.subn(" ", text)


def squeeze(text: str) -> str:
    """Make one space of many, and none at the ends of lines."""
    while "  " in text:
        text = text.replace("  ", " ")
    return text.replace(" \n", "\n").replace("\n ", "\n")
