"""Distinct words in, the ids of each out: the same ids as the tokenizer gives inside any sentence.

Natural text repeats its words, so each distinct word is tokenised once and looked up afterwards.
That is right only where a word's ids do not depend on its neighbours; `why_not_word_local` says
whether they do. N: words. M: bytes of all of them.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Tokenizer, pre_tokenizers

from data_prep.text_block import BoolArray, IntArray
from data_prep.tokens.tokenizer import SubwordTokenizer

Bytes = npt.NDArray[np.uint8]
# What `tokenizer.json` says, parsed.
Content = dict[str, Any]

# Stems outside the vocabulary that are kept with their ids; a reset costs time, never changes ids.
MAX_STEMS = 1 << 17
MAX_STEM_BYTES = 8 << 20
# Words joined for one call of the tokenizer: its cost a call is then lost in its cost a word.
WORDS_PER_CALL = 1024

# What a byte is inside a word, for BERT's pre-tokenizer.
_SEPARATOR, _LETTER, _PUNCTUATION, _INSIDE, _ODD = range(5)
_IS_ASCII_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
_MARKED = re.compile(_IS_ASCII_PUNCTUATION.pattern + r".", re.DOTALL)


def _byte_kinds() -> Bytes:
    """[256]: printable ASCII is a letter or punctuation (all 32 symbols, as BERT has it); control
    characters and other bytes are odd.
    """
    kinds = np.full(256, _ODD, np.uint8)
    for code in range(0x21, 0x7F):
        is_punctuation = _IS_ASCII_PUNCTUATION.match(chr(code))
        kinds[code] = _PUNCTUATION if is_punctuation else _LETTER
    kinds[[0x20, 0x0A]] = _SEPARATOR
    return kinds


_KINDS = _byte_kinds()
_SAME = np.arange(256, dtype=np.uint8)
_LOWER = np.frombuffer(bytes(range(256)).lower(), np.uint8)


def why_not_word_local(content: Content, sep: str) -> str:
    """Return why the ids of a word could depend on its neighbours, "" where they cannot.

    BERT's normaliser works on characters, its pre-tokenizer cuts at white space, WordPiece and BPE
    see one word at a time. Added tokens are searched in the raw text before that: they must not
    reach over white space. Every other make of tokenizer is refused, without looking closer.
    """
    normaliser = (content["normalizer"] or {}).get("type")
    pre_tokenizer = (content["pre_tokenizer"] or {}).get("type")
    model = content["model"]
    if (normaliser, pre_tokenizer) != ("BertNormalizer", "BertPreTokenizer"):
        return f"normalizer {normaliser}, pre_tokenizer {pre_tokenizer}"
    if model["type"] not in ("WordPiece", "BPE") or model.get("dropout"):
        return f"model {model['type']}"
    added = content["added_tokens"]
    for token in added:
        text = token["content"]
        is_plain = not any(token[key] for key in ("single_word", "lstrip", "rstrip", "normalized"))
        # A mark at the front: no word that the model sees can be the same string.
        if not is_plain or len(text.split()) != 1 or not _MARKED.match(text):
            return f"added token {text!r}"
    if sep not in [token["content"] for token in added]:
        return f"{sep} is not an added token"
    return ""


class WordPieces:
    """Turns distinct words into lists of ids; remembers the parts of words it has seen."""

    _stems: pa.BinaryArray
    _ids: pa.ListArray

    def __init__(self, tokenizer: SubwordTokenizer, content: Content) -> None:
        self.id_type = id_type(tokenizer.vocab_size)
        self._tokenizer = tokenizer.tokenizer
        # Stems come lower-cased and cut: the bare model gives their ids without normalising again.
        self._bare = Tokenizer(tokenizer.tokenizer.model)
        self._bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self._fold = _LOWER if content["normalizer"]["lowercase"] else _SAME
        self._added = [token["content"].encode() for token in content["added_tokens"]]
        self._sep = tokenizer.special_tokens["sep"]
        self._sep_id = tokenizer.special_token_ids["sep"]
        self._vocabulary = _whole_words(content["model"])
        # WordPiece gives [UNK] for every longer stem: one character more is as good as a million.
        limit = content["model"].get("max_input_chars_per_word")
        self._longest = None if limit is None else limit + 1
        self._forget()

    def lists(self, words: pa.BinaryArray) -> pa.ListArray:
        """Return the ids of each word, lists of uint16 or uint32, [N].

        A word is at least one byte of UTF-8, with or without one space or line end behind it.
        """
        data, ends = views(words)
        if not len(ends):
            return pa.array([], pa.list_(self.id_type))
        kinds = _kinds_of(data)
        starts = np.concatenate(([0], ends[:-1]))
        is_odd = np.logical_or.reduceat(kinds == _ODD, starts)
        with_added = self._holds_added_token(data, ends)
        is_odd |= with_added
        if not is_odd.any():
            return self._plain_lists(data, kinds, ends)
        order = np.concatenate([np.flatnonzero(~is_odd), np.flatnonzero(is_odd)])
        kept = np.repeat(~is_odd, ends - starts)
        parts = [
            self._plain_lists(data[kept], kinds[kept], np.cumsum((ends - starts)[~is_odd])),
            self._odd_lists(words.filter(pa.array(is_odd)).to_pylist(), with_added[is_odd]),
        ]
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_arrays(parts).take(pa.array(back))

    def _plain_lists(self, data: Bytes, kinds: Bytes, ends: IntArray) -> pa.ListArray:
        """Cut printable words at their punctuation and look the parts, "stems", up."""
        is_start = kinds == _LETTER
        is_start[1:] &= kinds[:-1] != _LETTER
        is_start |= kinds == _PUNCTUATION
        is_text = kinds != _SEPARATOR
        stem_starts = np.flatnonzero(is_start[is_text]).astype(np.int32)
        text = self._fold[data[is_text]]
        stems = binary_array(text, np.append(stem_starts[1:], np.int32(len(text))))
        lists = self._stem_lists(stems)
        # Stems up to the end of each word: their lists, put together, are the word's.
        words_ends = np.cumsum(is_start)[ends - 1] if len(ends) else ends
        offsets = list_offsets(lists)[np.concatenate(([0], words_ends))]
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), lists.values)

    def _stem_lists(self, stems: pa.BinaryArray) -> pa.ListArray:
        codes, keys = number(self._stems, stems)
        num_known = len(self._stems)
        if len(keys) > num_known:
            new = self._tokenise_stems(keys[num_known:].to_pylist())
            self._ids = pa.concat_arrays([self._ids, new])
            self._stems = keys
        lists = self._ids.take(codes)
        is_full = len(self._stems) - len(self._vocabulary) > MAX_STEMS
        if is_full or self._stems.nbytes > MAX_STEM_BYTES:
            self._forget()
        return lists

    def _tokenise_stems(self, stems: Sequence[bytes]) -> pa.ListArray:
        """Return the ids of stems without white space, by the bare model."""
        ids: list[int] = []
        counts: list[IntArray] = []
        for first in range(0, len(stems), WORDS_PER_CALL):
            some = [stem[: self._longest] for stem in stems[first : first + WORDS_PER_CALL]]
            encoding = self._bare.encode(b" ".join(some).decode(), add_special_tokens=False)
            ids += encoding.ids
            counts.append(np.bincount(np.array(encoding.word_ids, np.int64), minlength=len(some)))
        return self._list_array(ids, np.concatenate(counts))

    def _odd_lists(self, words: Sequence[bytes], with_added: BoolArray) -> pa.ListArray:
        """Send words through the whole tokenizer, those without added tokens many in one text."""
        texts = [word.decode() for word in words]
        lists: list[list[int]] = [[] for _ in texts]
        joined = np.flatnonzero(~with_added).tolist()
        for first in range(0, len(joined), WORDS_PER_CALL):
            some = joined[first : first + WORDS_PER_CALL]
            found = self._encode_joined([texts[i] for i in some])
            for index, ids in zip(some, found, strict=True):
                lists[index] = ids
        for index in np.flatnonzero(with_added).tolist():
            (encoding,) = self._tokenizer.encode_batch_fast(
                [texts[index]], add_special_tokens=False
            )
            lists[index] = encoding.ids
        return pa.array(lists, pa.list_(self.id_type))

    def _encode_joined(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts that hold no added token in one call, with [SEP] between them."""
        joined = f" {self._sep} ".join(texts)
        (encoding,) = self._tokenizer.encode_batch_fast([joined], add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        cuts = np.flatnonzero(ids == self._sep_id)
        assert len(cuts) == len(texts) - 1, "a word without an added token gave [SEP]"
        flat = encoding.ids
        bounds = [-1, *cuts.tolist(), len(flat)]
        return [flat[a + 1 : b] for a, b in zip(bounds, bounds[1:], strict=False)]

    def _holds_added_token(self, data: Bytes, ends: IntArray) -> BoolArray:
        """Whether each word holds an added token, such as a literal "[MASK]", [N]."""
        found = np.zeros(len(ends), np.bool_)
        text = data.tobytes()
        for token in self._added:
            if token in text:
                at = [match.start() for match in re.finditer(re.escape(token), text)]
                found[np.searchsorted(ends, at, side="right")] = True
        return found

    def _list_array(self, ids: Sequence[int], counts: IntArray) -> pa.ListArray:
        offsets = np.concatenate(([0], np.cumsum(counts)))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids, self.id_type))

    def _forget(self) -> None:
        """Know the vocabulary's whole words only."""
        self._stems = pa.array(list(self._vocabulary), pa.binary())
        ids = list(self._vocabulary.values())
        self._ids = self._list_array(ids, np.ones(len(ids), np.int64))


def id_type(vocab_size: int) -> pa.DataType:
    """Return the smallest of uint16 and uint32 that holds the ids; the shards' rows have the same
    rule.
    """
    return pa.uint16() if vocab_size <= 65_535 else pa.uint32()


def binary_array(data: Bytes | bytes, ends: npt.NDArray[np.signedinteger]) -> pa.BinaryArray:
    """View bytes as strings that end at `ends`, [N], the first beginning at 0; nothing is copied
    but the ends.
    """
    offsets = np.empty(len(ends) + 1, np.int32)
    offsets[0] = 0
    offsets[1:] = ends
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.binary(), len(ends), buffers)


def views(words: pa.BinaryArray) -> tuple[Bytes, IntArray]:
    """Return the bytes of strings one behind the other, [M], and the end of each, [N]."""
    _, offsets, data = words.buffers()
    bounds = np.frombuffer(offsets, np.int32)[words.offset : words.offset + len(words) + 1]
    text = np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]]
    return text, (bounds[1:] - bounds[0]).astype(np.int64)


def list_offsets(lists: pa.ListArray) -> npt.NDArray[np.int32]:
    """Return the offsets of lists into their `values`, [N + 1]."""
    offsets: npt.NDArray[np.int32] = lists.offsets.to_numpy()
    return offsets


def number(known: pa.BinaryArray, words: pa.BinaryArray) -> tuple[pa.Array, pa.BinaryArray]:
    """Return the number of each word, [N], and all distinct words: the known ones keep their places
    at the front, new ones follow in the order of their first sight.
    """
    encoded = pa.chunked_array([known, words]).dictionary_encode()
    chunk = encoded.chunk(encoded.num_chunks - 1)  # an empty chunk is left out
    return chunk.indices, chunk.dictionary


def _kinds_of(data: Bytes) -> Bytes:
    """Return the kind of each byte, [M]."""
    kinds = _KINDS[data]
    # U+2010 to U+2027, dashes and quotes of printed text, are all punctuation (categories P*), have
    # no decomposition and no case: E2 80 90 to E2 80 A7.
    leads = np.flatnonzero(data == 0xE2)
    leads = leads[leads + 2 < len(data)]
    third = data[leads + 2]
    leads = leads[(data[leads + 1] == 0x80) & (third >= 0x90) & (third <= 0xA7)]
    kinds[leads] = _PUNCTUATION
    kinds[leads + 1] = kinds[leads + 2] = _INSIDE
    return kinds


def _whole_words(model: Content) -> dict[bytes, int]:
    """Return the words whose only piece is known beforehand: WordPiece takes the longest piece that
    fits, so a word of the vocabulary is one piece. BPE may stop short of it.
    """
    if model["type"] != "WordPiece":
        return {}
    vocabulary, limit = model["vocab"], model["max_input_chars_per_word"]
    return {token.encode(): index for token, index in vocabulary.items() if len(token) <= limit}
