"""Clean documents as one buffer of UTF-8 bytes: what cleaning hands to tokenising."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

_NEW_LINE = 0x0A


@dataclass(frozen=True, eq=False)
class TextBlock:
    """D documents of P paragraphs in all.

    Invariants: every paragraph ends with one "\\n" and is not empty; inside it, words are separated
    by single spaces (U+0020), with none at either end; there is no other ASCII white space and no
    NUL. So exactly one separator byte follows each word.
    """

    text: bytes
    paragraph_counts: IntArray
    """Paragraphs of each document, [D], none 0."""

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> "TextBlock":
        """Build a block of texts that hold the invariants and do not end with a line end."""
        counts = np.array([text.count("\n") + 1 for text in texts], np.int64)
        joined = "\n".join(texts) + "\n" if texts else ""
        return cls(joined.encode("utf-8"), counts)

    @property
    def num_documents(self) -> int:
        """Number of documents D."""
        return len(self.paragraph_counts)

    @property
    def paragraph_ends(self) -> IntArray:
        """Byte offset behind each paragraph's line end, ascending, [P]."""
        return np.flatnonzero(np.frombuffer(self.text, np.uint8) == _NEW_LINE) + 1

    @property
    def document_ends(self) -> IntArray:
        """Byte offset behind each document's last line end, ascending, [D]."""
        return self.paragraph_ends[np.cumsum(self.paragraph_counts) - 1]

    def texts(self) -> list[str]:
        """Return the documents, a line a paragraph, without the last line end."""
        ends = [0, *self.document_ends.tolist()]
        return [self.text[a : b - 1].decode("utf-8") for a, b in pairwise(ends)]

    def without(self, is_dropped: BoolArray) -> "TextBlock":
        """Return the block without some paragraphs, [P]; a document that loses all of them goes."""
        if not is_dropped.any():
            return self
        sizes = np.diff(self.paragraph_ends, prepend=0)
        kept_bytes = np.repeat(~is_dropped, sizes)
        owners = np.repeat(np.arange(self.num_documents), self.paragraph_counts)
        counts = np.bincount(owners[~is_dropped], minlength=self.num_documents)
        text = np.frombuffer(self.text, np.uint8)[kept_bytes].tobytes()
        return TextBlock(text, counts[counts > 0])

    def select(self, is_kept: BoolArray) -> "TextBlock":
        """Return the block with only some of its documents, [D]."""
        if is_kept.all():
            return self
        # Whole runs of documents are copied at once.
        edges = np.flatnonzero(np.diff(is_kept, prepend=False, append=False)).reshape(-1, 2)
        starts = np.concatenate([[0], self.document_ends])
        text = b"".join(self.text[starts[a] : starts[b]] for a, b in edges.tolist())
        return TextBlock(text, self.paragraph_counts[is_kept])
