"""Unicode text to plain text: NFC, single spaces, a line a paragraph, nothing invisible; and a fast
test of which documents are so already.
"""

import re
import unicodedata

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_NEW_LINE, _SPACE, _DELETE = 0x0A, 0x20, 0x7F

# Control and format characters (soft hyphen, zero-width space, byte-order mark, bidi marks).
# Zero-width joiners stay: they carry meaning in Indic scripts and Persian.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_NEW_LINES = re.compile("\r\n?|\u2028|\u2029|\x0b|\x0c|\x85")
# Whatever normalise removes or replaces beside repeated spaces: all of the above, and white space.
_NOT_PLAIN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\xa0\u00ad\u1680\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f\u2060"
    "\u3000\ud800-\udfff\ufeff]|  | \n|\n[ \n]"
)


def normalise(text: str) -> str:
    """Return `text` in NFC with plain white space: one line a paragraph, single spaces, no
    invisible characters.

    NFC, not NFKC: NFKC also rewrites superscripts, fractions and ligatures ("10\u00b2" becomes
    "102"), which changes meaning. A lone surrogate, legal in a JSON string but not in UTF-8,
    becomes U+FFFD.
    """
    text = _NEW_LINES.sub("\n", _SURROGATES.sub("\ufffd", text))
    # Composed last: what is left of "e", soft hyphen, combining accent must compose as well.
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    paragraphs = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def is_plain(text: str) -> bool:
    """Tell whether normalise(text) would return `text`."""
    return (
        _NOT_PLAIN.search(text) is None
        and text[:1] not in (" ", "\n")
        and text[-1:] not in (" ", "\n")
        and unicodedata.is_normalized("NFC", text)
    )


def find_unclean(text: Bytes, ends: IntArray) -> tuple[BoolArray, BoolArray]:
    """Tell which documents of a buffer normalise would change: [D] surely, and [D] perhaps.

    `text` is UTF-8 (lone surrogates as three bytes), a line end behind each document; `ends` are
    the offsets behind those line ends, [D]. A document in neither array is plain.
    """
    surely = _positions_of_faults(text)
    doubtful, more = _positions_in_unicode(text)
    return _documents_at([*surely, *more], ends), _documents_at([doubtful], ends)


def _positions_of_faults(text: Bytes) -> list[IntArray]:
    """Offsets of control characters, and of separators that follow a separator."""
    is_separator = (text == _SPACE) | (text == _NEW_LINE)
    is_control = (text < _SPACE) & (text != _NEW_LINE)
    is_control |= text == _DELETE
    is_second = is_separator[1:] & is_separator[:-1]
    found = [np.zeros(1 if is_separator[:1].any() else 0, np.int64)]
    if is_control.any():
        found.append(np.flatnonzero(is_control))
    if is_second.any():
        found.append(np.flatnonzero(is_second) + 1)
    return found


def _positions_in_unicode(text: Bytes) -> tuple[IntArray, list[IntArray]]:
    """Offsets of characters from U+0300 that need a closer look, and of C1 controls, the
    no-break space and the soft hyphen.

    Without a character from U+0300 a text is in NFC, and of the common ones U+2010..U+2027 and
    U+2030..U+203F (dashes, quotation marks) and U+2080..U+20BF (subscripts, currencies) never
    compose.
    """
    leads = np.flatnonzero(text >= 0xC2)
    if not leads.size:
        return leads, []
    first, second = text[leads], text[leads + 1]
    is_latin_fault = (first == 0xC2) & ((second <= 0xA0) | (second == 0xAD))
    third = text[np.minimum(leads + 2, text.size - 1)]
    is_punctuation = (second == 0x80) & (third >= 0x90) & ((third & 0xF8) != 0xA8)
    is_harmless = (first == 0xE2) & (is_punctuation | (second == 0x82))
    return leads[(first >= 0xCC) & ~is_harmless], [leads[is_latin_fault]]


def _documents_at(positions: list[IntArray], ends: IntArray) -> BoolArray:
    found = np.zeros(len(ends), np.bool_)
    for offsets in positions:
        found[np.searchsorted(ends, offsets, side="right")] = True
    return found
