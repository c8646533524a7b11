"""Documents in, clean and distinct texts out, with a count of what each rule removed."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data_prep.sources import Document

# Control and format characters (soft hyphen, zero-width space, byte-order mark, bidi marks).
# Zero-width joiners stay: they carry meaning in Indic scripts and Persian.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_NEW_LINES = re.compile("\r\n?|\u2028|\u2029|\x0b|\x0c|\x85")


@dataclass
class Funnel:
    """How many documents and characters came in, and what each rule removed; filled while texts
    stream by.
    """

    documents_read: int = 0
    characters_read: int = 0
    empty: int = 0
    duplicate: int = 0
    documents_kept: int = 0
    characters_kept: int = 0

    def rows(self) -> list[tuple[str, int]]:
        """Return (what, documents) in the order in which the rules apply."""
        return [
            ("documents read", self.documents_read),
            ("  removed: empty", self.empty),
            ("  removed: exact duplicate", self.duplicate),
            ("documents kept", self.documents_kept),
        ]


@dataclass
class Cleaner:
    """The cleaning rules with their memory of texts already seen (16 bytes and a set entry a
    document).
    """

    funnel: Funnel = field(default_factory=Funnel)
    _seen: set[bytes] = field(default_factory=set)

    def clean(self, documents: Iterable[Document]) -> Iterator[str]:
        """Yield the normalised text of each document that is neither empty nor seen before, in
        order.
        """
        for document in documents:
            self.funnel.documents_read += 1
            self.funnel.characters_read += len(document.text)
            text = normalise(document.text)
            if not text:
                self.funnel.empty += 1
            elif self._is_new(text):
                self.funnel.documents_kept += 1
                self.funnel.characters_kept += len(text)
                yield text
            else:
                self.funnel.duplicate += 1

    def _is_new(self, text: str) -> bool:
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


def normalise(text: str) -> str:
    """Return `text` in NFC with plain white space: one line a paragraph, single spaces, no
    invisible characters.

    NFC, not NFKC: NFKC also rewrites superscripts, fractions and ligatures ("10\u00b2" becomes
    "102"), which changes meaning. A lone surrogate, legal in a JSON string but not in UTF-8,
    becomes U+FFFD.
    """
    text = _NEW_LINES.sub("\n", _SURROGATES.sub("\ufffd", text))
    text = _INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    paragraphs = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)
