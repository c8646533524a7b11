"""A block of clean text in, its ids out, with the ends of sentences and documents.

W: words of the block; T: tokens; Q: sentences; D': documents with a token.
"""

import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.text_block import BoolArray, IntArray, TextBlock
from data_prep.tokens.sentence_merge import MergeCounts, MergeRules, Sentences, merge_sentences
from data_prep.tokens.sentences import (
    ENDS_SENTENCE,
    IDEOGRAPHIC_MARKS,
    LAST_CHARACTERS,
    WordEnd,
    inner_ends,
    word_end,
    word_start,
)
from data_prep.tokens.tokenizer import SubwordTokenizer
from data_prep.tokens.words import (
    Bytes,
    WordPieces,
    binary_array,
    id_type,
    list_offsets,
    number,
    views,
    why_not_word_local,
)

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Codes = npt.NDArray[np.int32]

# Distinct words remembered from block to block; a reset costs time, never changes ids.
MAX_WORDS = 1 << 18
MAX_WORD_BYTES = 16 << 20
# What the slow way sends to the tokenizer at once; it holds some 100 bytes a token meanwhile.
SENTENCES_PER_CALL = 4096

_SPACE, _NEW_LINE = 0x20, 0x0A
_UNKNOWN = -1
# Last bytes of the words that are worth a closer look.
_MAY_END = np.zeros(256, np.bool_)
_MAY_END[[character.encode()[-1] for character in LAST_CHARACTERS]] = True
# First bytes of the marks that may stand inside a word (`inner_ends`).
_IDEOGRAPHIC_LEADS = np.zeros(256, np.bool_)
_IDEOGRAPHIC_LEADS[[mark.encode()[0] for mark in IDEOGRAPHIC_MARKS]] = True


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """The ids of a block's documents, without special tokens."""

    ids: Ids
    """All documents one behind the other, [T], read-only; uint16 where the vocabulary allows it."""
    sentence_ends: IntArray
    """Offset into `ids` behind each sentence, ascending, [Q]; no sentence is empty."""
    document_ends: IntArray
    """Offset into `sentence_ends` behind each document, ascending, [D']; a document without a token
    is left out.
    """
    merge_counts: MergeCounts
    """What the merge rules took out; zeros without them."""


def without_id(block: TokenBlock, unwanted: int) -> TokenBlock:
    """Return the block without one id: "[PAD]" in a text would be padding inside a row. Sentences
    and documents that lose all their tokens go.
    """
    is_kept = block.ids != unwanted
    if is_kept.all():
        return block
    ends = np.concatenate([[0], np.cumsum(is_kept)])[block.sentence_ends]
    is_sentence = np.diff(ends, prepend=0) > 0
    sentences = np.concatenate([[0], np.cumsum(is_sentence)])[block.document_ends]
    is_document = np.diff(sentences, prepend=0) > 0
    return TokenBlock(
        block.ids[is_kept], ends[is_sentence], sentences[is_document], block.merge_counts
    )


class WordEncoder:
    """Cuts blocks into sentences and tokenises them; one a process, as it remembers words.

    The ids are those of `tokenizer.encode` for each sentence. Where a word's ids cannot depend on
    its neighbours each distinct word is tokenised once; with any other tokenizer
    (`slow_because` says why) whole sentences are.
    """

    _keys: pa.BinaryArray
    _lists: pa.ListArray
    _ends: npt.NDArray[np.int8]
    _starts: npt.NDArray[np.int8]

    def __init__(
        self,
        tokenizer: SubwordTokenizer,
        *,
        sentences: Literal["rules", "lines"] = "rules",
        merge: MergeRules | None = None,
    ) -> None:
        content = json.loads(tokenizer.to_json())
        self.slow_because = why_not_word_local(content, tokenizer.special_tokens["sep"])
        self._tokenizer = tokenizer
        self._cuts_paragraphs = sentences == "rules"
        self._merge = merge
        self._pieces = None if self.slow_because else WordPieces(tokenizer, content)
        self._id_type = id_type(tokenizer.vocab_size)
        self._forget()

    def encode(self, block: TextBlock) -> TokenBlock:
        """Return the block's ids with the ends of its sentences and documents."""
        data = np.frombuffer(block.text, np.uint8)
        if not len(data):
            nothing = np.zeros(0, np.int64)
            return TokenBlock(
                pa.array([], self._id_type).to_numpy(), nothing, nothing, MergeCounts()
            )
        word_ends = self._ends_of_words(block.text, data)
        words = binary_array(block.text, word_ends)
        codes = self._codes(words)
        ends_paragraph = data[word_ends - 1] == _NEW_LINE
        ends_sentence = ends_paragraph
        if self._cuts_paragraphs:
            ends_sentence = self._ends_sentence(codes, ends_paragraph)
        is_kept: BoolArray | None = None
        counts = MergeCounts()
        if self._merge is not None:
            text = Sentences(data, word_ends, ends_paragraph, ends_sentence)
            is_kept, ends_sentence, counts = merge_sentences(self._merge, text)
        # Offsets into the words behind each sentence, [Q], and behind each document, [D].
        sentences: IntArray = np.flatnonzero(ends_sentence) + 1
        documents = np.flatnonzero(ends_paragraph)[np.cumsum(block.paragraph_counts) - 1] + 1
        document_ends = np.searchsorted(sentences, documents, side="right")
        if is_kept is not None:
            sentences = np.cumsum(is_kept, dtype=np.int64)[sentences - 1]
            codes, words = codes[is_kept], words.filter(pa.array(is_kept))
        if self._pieces is None:
            ids, sentence_ends = self._encode_sentences(words, sentences)
        else:
            lists = self._lists.take(pa.array(codes))
            ids = lists.values.to_numpy()
            sentence_ends = list_offsets(lists)[sentences].astype(np.int64)
        return _without_empty(ids, sentence_ends, document_ends, counts)

    def _ends_of_words(self, text: bytes, data: Bytes) -> IntArray:
        """Return the offset behind each word with its space, [W]; inner ends cut words in two."""
        ends = np.flatnonzero((data == _SPACE) | (data == _NEW_LINE)) + 1
        if self._cuts_paragraphs and _IDEOGRAPHIC_LEADS[data].any():
            characters = np.flatnonzero((data & 0xC0) != 0x80)
            inner = characters[np.array(inner_ends(text.decode()), np.int64)]
            ends = np.union1d(ends, inner)
        return ends

    def _codes(self, words: pa.BinaryArray) -> Codes:
        """Return the number of each word among those remembered, [W], and remember the new ones."""
        if len(self._keys) > MAX_WORDS or self._keys.nbytes > MAX_WORD_BYTES:
            self._forget()
        num_known = len(self._keys)
        numbers, self._keys = number(self._keys, words)
        new = self._keys[num_known:]
        if self._pieces is not None:
            self._lists = pa.concat_arrays([self._lists, self._pieces.lists(new)])
        ends = _classify_ends(new) if self._cuts_paragraphs else np.zeros(len(new), np.int8)
        self._ends = np.concatenate([self._ends, ends])
        self._starts = np.concatenate([self._starts, np.full(len(new), _UNKNOWN, np.int8)])
        codes: Codes = numbers.to_numpy()
        return codes

    def _ends_sentence(self, codes: Codes, ends_paragraph: BoolArray) -> BoolArray:
        """Whether each word is the last of its sentence, [W]."""
        ends = self._ends[codes]
        last = np.flatnonzero((ends != WordEnd.NEVER) & ~ends_paragraph)
        following = codes[last + 1]
        self._classify_starts(following)
        result = ends_paragraph.copy()
        result[last[ENDS_SENTENCE[ends[last], self._starts[following]]]] = True
        return result

    def _classify_starts(self, codes: Codes) -> None:
        """Classify the beginnings of words that have not followed an end mark before."""
        new = np.unique(codes[self._starts[codes] == _UNKNOWN])
        self._starts[new] = [word_start(text) for text in _texts(self._keys.take(pa.array(new)))]

    def _encode_sentences(self, words: pa.BinaryArray, sentences: IntArray) -> tuple[Ids, IntArray]:
        """Send whole sentences through the tokenizer."""
        data, word_ends = views(words)
        text = data.tobytes()
        ends = word_ends[sentences - 1].tolist()
        texts = [text[a:b].rstrip(b" \n").decode() for a, b in zip([0, *ends], ends, strict=False)]
        ids = [pa.array([], self._id_type)]
        counts: list[int] = []
        for first in range(0, len(texts), SENTENCES_PER_CALL):
            lists = self._tokenizer.encode(texts[first : first + SENTENCES_PER_CALL])
            counts += map(len, lists)
            ids.append(pa.array([token for tokens in lists for token in tokens], self._id_type))
        return pa.concat_arrays(ids).to_numpy(), np.cumsum(np.array(counts, np.int64))

    def _forget(self) -> None:
        self._keys = pa.array([], pa.binary())
        self._lists = pa.array([], pa.list_(self._id_type))
        self._ends = self._starts = np.zeros(0, np.int8)


def _classify_ends(words: pa.BinaryArray) -> npt.NDArray[np.int8]:
    """Return the `WordEnd` of each word, [N]; one without a space behind it has an inner end."""
    data, ends = views(words)
    last = data[ends - 1]
    is_inner = (last != _SPACE) & (last != _NEW_LINE)
    result = np.where(is_inner, WordEnd.FORCED, WordEnd.NEVER).astype(np.int8)
    may_end = np.flatnonzero(~is_inner & _MAY_END[data[ends - 2]])
    result[may_end] = [word_end(text) for text in _texts(words.take(pa.array(may_end)))]
    return result


def _texts(words: pa.BinaryArray) -> list[str]:
    """Return words without the space behind them."""
    return [word.rstrip(b" \n").decode() for word in words.to_pylist()]


def _without_empty(
    ids: Ids,
    sentence_ends: IntArray,
    document_ends: IntArray,
    counts: MergeCounts,
) -> TokenBlock:
    """Leave out sentences without a token and documents without a sentence."""
    is_kept = np.diff(sentence_ends, prepend=0) > 0
    document_ends = np.concatenate(([0], np.cumsum(is_kept)))[document_ends]
    document_ends = document_ends[np.diff(document_ends, prepend=0) > 0]
    return TokenBlock(ids, sentence_ends[is_kept], document_ends, counts)
