"""Second step: chunks of clean documents to rows on disk, sorted by their shuffling keys."""

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.clean_step import CleanBlock, load_block
from data_prep.instances import RowBuilder, Rows, row_type
from data_prep.masking import hash_chain, splitmix64
from data_prep.settings import PrepareSettings
from data_prep.shard_format import SPLITS, Split
from data_prep.shard_writer import SHUFFLE_STREAM
from data_prep.text_block import TextBlock
from data_prep.tokens.encoder import TokenBlock, WordEncoder, without_id
from data_prep.tokens.sentence_merge import MergeRules
from data_prep.tokens.tokenizer import SubwordTokenizer, load_tokenizer
from data_prep.workspace import Workspace, hash_of, load_arrays, save_arrays, temporary_name

# A chunk is made of whole blocks of at least this size in all. Random pairs are drawn inside it.
CHUNK_BYTES = 1 << 20
LENGTH_BINS = 24
"""Bin i counts the documents of 2^i to 2^(i + 1) - 1 tokens."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive blocks whose documents of one split become rows together."""

    split: Split
    index: int
    blocks: tuple[CleanBlock, ...]


@dataclass(frozen=True)
class RowJob:
    """A chunk and what to make of it; carried to a worker."""

    chunk: Chunk
    settings: PrepareSettings


@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """What a chunk gave; its rows and keys are on disk."""

    split: Split
    index: int
    num_rows: int
    num_documents: int
    num_bytes: int
    num_tokens: int
    """Without special tokens, before any are trimmed."""
    merged: dict[str, int]
    """Sentences that each rule of the short-sentence merge took out."""
    seconds: dict[str, float]
    hashes: list[str]
    """Of the rows' and the keys' file."""


def chunks_of(blocks: Iterable[CleanBlock]) -> Iterator[Chunk]:
    """Group blocks into chunks of each split; each has two documents or more, if its split has, so
    that pairs can be made. Depends on nothing but the blocks.
    """
    held = list(blocks)
    for split in SPLITS:
        index = 0
        waiting: list[Chunk] = []
        current: list[CleanBlock] = []
        num_bytes = num_documents = 0
        for block in held:
            documents = _num_documents(block, split)
            if not documents:
                continue
            current.append(block)
            num_documents += documents
            num_bytes += block.num_bytes * documents // block.num_documents
            if num_bytes >= CHUNK_BYTES and num_documents >= 2:
                yield from waiting
                waiting = [Chunk(split, index, tuple(current))]
                index += 1
                current, num_bytes, num_documents = [], 0, 0
        if current and num_documents < 2 and waiting:
            last = waiting.pop()
            yield Chunk(split, last.index, (*last.blocks, *current))
        else:
            yield from waiting
            if current:
                yield Chunk(split, index, tuple(current))


def documents_of(out: Path, chunk: Chunk) -> TextBlock:
    """Return the clean documents of a chunk."""
    texts = []
    for block in chunk.blocks:
        text = load_block(out, block)
        if block.split is None:
            number = block.first_document + np.arange(text.num_documents)
            is_held_out = number % block.held_out_every == block.held_out_every - 1
            text = text.select(is_held_out == (chunk.split == "validation"))
        texts.append(text)
    counts = np.concatenate([text.paragraph_counts for text in texts])
    return TextBlock(b"".join(text.text for text in texts), counts)


def row_job(job: RowJob) -> ChunkRows:
    """Make the rows of one chunk, unless an earlier run has done so."""
    settings, chunk = job.settings, job.chunk
    path = Workspace(settings.out).rows(chunk.split, chunk.index)
    done = _finished(path)
    if done is not None:
        return done
    start = time.perf_counter()
    text = documents_of(settings.out, chunk)
    loaded = time.perf_counter()
    tokenizer, encoder, builder = _tools(settings)
    tokens = without_id(encoder.encode(text), tokenizer.special_token_ids["pad"])
    encoded = time.perf_counter()
    rows = np.concatenate(
        [_rows(builder, tokens, job, copy) for copy in range(settings.dupe_factor)]
    )
    planned = time.perf_counter()
    keys = _keys(settings.seed, chunk, len(rows))
    order = np.argsort(keys)
    with temporary_name(path) as temporary:
        rows[order].tofile(temporary)
    keys_path = path.with_suffix(".keys")
    with temporary_name(keys_path) as temporary:
        keys[order].tofile(temporary)
    finished = ChunkRows(
        split=chunk.split,
        index=chunk.index,
        num_rows=len(rows),
        num_documents=len(tokens.document_ends),
        num_bytes=len(text.text),
        num_tokens=len(tokens.ids),
        merged=asdict(tokens.merge_counts),
        seconds={
            "reading text": loaded - start,
            "tokenising": encoded - loaded,
            "building rows": planned - encoded,
            "writing rows": time.perf_counter() - planned,
        },
        hashes=[hash_of(path), hash_of(keys_path)],
    )
    save_arrays(path.with_suffix(".npz"), _counts(tokenizer, tokens, rows), finished.__dict__)
    return finished


def load_counts(out: Path, chunk: ChunkRows) -> dict[str, npt.NDArray[np.int64]]:
    """Return a chunk's counts: ids [V], row lengths [S + 1], document lengths [LENGTH_BINS]."""
    loaded = load_arrays(Workspace(out).rows(chunk.split, chunk.index).with_suffix(".npz"))
    if loaded is None:
        raise OSError(f"the counts of chunk {chunk.index} are damaged or gone; run again")
    return loaded[0]


def _finished(path: Path) -> ChunkRows | None:
    loaded = load_arrays(path.with_suffix(".npz"))
    if loaded is None:
        return None
    done = ChunkRows(**loaded[1])
    return done if [hash_of(path), hash_of(path.with_suffix(".keys"))] == done.hashes else None


def _num_documents(block: CleanBlock, split: Split) -> int:
    """Documents of a block that belong to a split."""
    if block.split is not None:
        return block.num_documents if block.split == split else 0
    end = block.first_document + block.num_documents
    every = block.held_out_every
    held_out = end // every - block.first_document // every
    return held_out if split == "validation" else block.num_documents - held_out


def _rows(builder: RowBuilder, tokens: TokenBlock, job: RowJob, copy: int) -> Rows:
    chunk, seed = job.chunk, job.settings.seed
    generator = random.Random(f"{seed}:{chunk.split}:{chunk.index}:{copy}")
    return builder.rows(tokens, job.settings.pairs, generator)


def _keys(seed: int, chunk: Chunk, num_rows: int) -> npt.NDArray[np.uint64]:
    """Return the shuffling key of each row, [N]: sorting by a hash is a shuffle that no version of
    numpy can change. splitmix64 is a bijection, so no two rows of a split have one key.
    """
    rows = np.arange(num_rows, dtype=np.uint64) + np.uint64(chunk.index << 32)
    return splitmix64(rows ^ hash_chain(seed, SHUFFLE_STREAM[chunk.split])[0])


def _counts(
    tokenizer: SubwordTokenizer, tokens: TokenBlock, rows: Rows
) -> dict[str, npt.NDArray[Any]]:
    ids = rows["input_ids"]
    lengths = (ids != tokenizer.special_token_ids["pad"]).sum(axis=1)
    ends = tokens.sentence_ends[tokens.document_ends - 1]
    document_lengths = np.diff(ends, prepend=0)
    bins = np.minimum(np.log2(np.maximum(document_lengths, 1)).astype(np.int64), LENGTH_BINS - 1)
    return {
        "ids": np.bincount(ids.ravel(), minlength=tokenizer.vocab_size),
        "row_lengths": np.bincount(lengths, minlength=ids.shape[1] + 1),
        "document_lengths": np.bincount(bins, minlength=LENGTH_BINS),
    }


def _tools(settings: PrepareSettings) -> tuple[SubwordTokenizer, WordEncoder, RowBuilder]:
    """Return what a worker keeps from job to job."""
    return _make_tools(
        settings.out,
        settings.sentences,
        settings.merge_short,
        settings.max_seq_length,
        settings.pairs != "none",
        settings.short_seq_prob,
    )


@lru_cache(maxsize=1)
def _make_tools(
    out: Path,
    sentences: Any,
    merge_short: bool,
    max_seq_length: int,
    has_pairs: bool,
    short_seq_prob: float,
) -> tuple[SubwordTokenizer, WordEncoder, RowBuilder]:
    tokenizer = load_tokenizer(out / "tokenizer.json")
    special = tokenizer.special_token_ids
    builder = RowBuilder(
        max_seq_length=max_seq_length,
        cls_id=special["cls"],
        sep_id=special["sep"],
        pad_id=special["pad"],
        dtype=row_type(max_seq_length, tokenizer.vocab_size, has_pairs),
        is_continuation=np.array(tokenizer.is_continuation, np.bool_),
        short_seq_prob=short_seq_prob,
    )
    merge = MergeRules() if merge_short else None
    encoder = WordEncoder(tokenizer, sentences=sentences, merge=merge)
    return tokenizer, encoder, builder
