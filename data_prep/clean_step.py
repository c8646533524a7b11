"""First step: blocks of input to blocks of clean text on disk, then what of them is a duplicate."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.cleaning.clean import CleaningRules, clean_block
from data_prep.cleaning.dedup import FirstOccurrences, document_hashes, paragraph_hashes
from data_prep.cleaning.funnel import Funnel
from data_prep.cleaning.near_dedup import NearDuplicates, signatures
from data_prep.shard_format import Split
from data_prep.sources.blocks import RawBlock, Skipped, SourceOptions, parse_block
from data_prep.text_block import BoolArray, TextBlock
from data_prep.workspace import Workspace, load_arrays, save_arrays

# Every 200th document is held out (199:1, as StackingBERT's split.py does by line).
HELD_OUT_EVERY = 200
NUM_PERMUTATIONS = 128  # of MinHash; the estimate's standard error is then below 0.045
Dedup = Literal["none", "document", "paragraph"]


@dataclass(frozen=True, kw_only=True)
class CleanJob:
    """One block of input and what to do with it; carried to a worker."""

    index: int
    split: Split | None
    """None: every 200th document will be held out."""
    block: RawBlock
    options: SourceOptions
    rules: CleaningRules
    dedup: Dedup
    near_dedup: float
    out: Path


@dataclass(frozen=True, kw_only=True)
class CleanBlock:
    """What a block of clean text holds; its text is on disk."""

    index: int
    split: Split | None
    num_documents: int
    num_bytes: int
    position: int
    """Bytes of all inputs read so far."""
    num_input_bytes: int
    """Size of the input when decompressed."""
    funnel: dict[str, dict[str, int]]
    messages: list[str]
    cut_documents: int
    broken_files: int
    seconds: dict[str, float]
    first_document: int = 0
    """Number of its first document among all that are kept, duplicates gone."""
    held_out_every: int = HELD_OUT_EVERY
    """Of `split` None, every n-th of those documents is validation."""


def clean_job(job: CleanJob) -> CleanBlock:
    """Parse, clean and hash one block, unless an earlier run has done so."""
    path = Workspace(job.out).block(job.index)
    start = time.perf_counter()
    funnel = Funnel()
    documents, skipped = parse_block(job.block, job.options)
    _count_skipped(funnel, skipped)
    parsed = time.perf_counter()
    block = clean_block(documents, job.rules, funnel)
    cleaned = time.perf_counter()
    arrays: dict[str, npt.NDArray[Any]] = {
        "text": np.frombuffer(block.text, np.uint8),
        "paragraph_counts": block.paragraph_counts,
    }
    if job.dedup != "none":
        arrays["hashes"] = (paragraph_hashes if job.dedup == "paragraph" else document_hashes)(
            block
        )
    if job.near_dedup:
        arrays["signatures"] = signatures(block.texts(), NUM_PERMUTATIONS)
    hashed = time.perf_counter()
    done = CleanBlock(
        index=job.index,
        split=job.split,
        num_documents=block.num_documents,
        num_bytes=len(block.text),
        position=job.block.position,
        num_input_bytes=job.block.num_bytes,
        funnel=funnel.as_dict(),
        messages=skipped.messages,
        cut_documents=skipped.cut_documents,
        broken_files=skipped.broken_files,
        seconds={
            "parsing": parsed - start,
            "cleaning": cleaned - parsed,
            "hashing": hashed - cleaned,
        },
    )
    save_arrays(path, arrays, done.__dict__)
    return done


def _count_skipped(funnel: Funnel, skipped: Skipped) -> None:
    for rule, count in (
        ("broken_record", skipped.broken_lines + skipped.broken_records),
        ("redirect", skipped.redirects),
        ("other_page", skipped.other_pages),
    ):
        if count:
            funnel.add(rule, documents=count)


def finished_block(out: Path, index: int) -> CleanBlock | None:
    """Return what an earlier run made of a block; None: nothing, or it is damaged."""
    loaded = load_arrays(Workspace(out).block(index))
    return CleanBlock(**loaded[1]) if loaded else None


def load_block(out: Path, block: CleanBlock) -> TextBlock:
    """Return a block's text without its duplicates."""
    workspace = Workspace(out)
    arrays = _load(out, block.index, "text", "paragraph_counts")
    text = TextBlock(arrays["text"].tobytes(), arrays["paragraph_counts"])
    path = workspace.drop(block.index)
    return text.without(np.load(path, allow_pickle=False)) if path.exists() else text


def drop_duplicates(
    out: Path, blocks: list[CleanBlock], dedup: Dedup, near_dedup: float, funnel: Funnel
) -> Iterator[CleanBlock]:
    """Yield the blocks with their numbers after duplicates are gone; the flags go to disk.

    Of equal texts the first is kept, in the order of the inputs (held-out files come first).
    """
    folder = Workspace(out).folder
    exact = FirstOccurrences(folder / "exact")
    near = NearDuplicates(folder / "near", near_dedup or 1.0, NUM_PERMUTATIONS)
    for block in blocks:
        if dedup != "none":
            exact.add(_load(out, block.index, "hashes")["hashes"])
        if near_dedup:
            near.add(_load(out, block.index, "signatures")["signatures"])
    exact_flags = exact.duplicates() if dedup != "none" else None
    near_flags = near.duplicates() if near_dedup else None
    first_document = 0
    for block in blocks:
        is_repeated = next(exact_flags) if exact_flags is not None else None
        is_near = next(near_flags) if near_flags is not None else None
        kept = _drop(out, block, dedup, is_repeated, is_near, funnel)
        yield replace(kept, first_document=first_document)
        first_document += kept.num_documents


def _drop(
    out: Path,
    block: CleanBlock,
    dedup: Dedup,
    is_repeated: BoolArray | None,
    is_near: BoolArray | None,
    funnel: Funnel,
) -> CleanBlock:
    """Write the flags of one block's paragraphs, count them, and return what is left."""
    path = Workspace(out).drop(block.index)
    path.unlink(missing_ok=True)
    if not any(flags is not None and flags.any() for flags in (is_repeated, is_near)):
        return block
    arrays = _load(out, block.index, "text", "paragraph_counts")
    text = TextBlock(arrays["text"].tobytes(), arrays["paragraph_counts"])
    owners = np.repeat(np.arange(text.num_documents), text.paragraph_counts)
    is_dropped = np.zeros(len(owners), np.bool_)
    rules = {"document": "duplicate_document", "paragraph": "duplicate_paragraph", "none": ""}
    for rule, flags, of_documents in (
        (rules[dedup], is_repeated, dedup == "document"),
        ("near_duplicate", is_near, True),
    ):
        if flags is None or not flags.any():
            continue
        now = (flags[owners] if of_documents else flags) & ~is_dropped
        before = len(np.unique(owners[~is_dropped]))
        is_dropped |= now
        after = len(np.unique(owners[~is_dropped]))
        characters = _num_characters(text, now)
        if of_documents:
            funnel.add(rule, before - after, int(now.sum()), characters)
        else:
            funnel.add(rule, 0, int(now.sum()), characters)
            if before > after:
                funnel.add("no_line_left", documents=before - after)
    np.save(path, is_dropped)
    left = text.without(is_dropped)
    return replace(block, num_documents=left.num_documents, num_bytes=len(left.text))


def _num_characters(text: TextBlock, is_chosen: BoolArray) -> int:
    """Code points of some paragraphs, [P], without their line ends."""
    ends = text.paragraph_ends
    starts = np.concatenate([[0], ends[:-1]])
    chosen = zip(starts[is_chosen].tolist(), ends[is_chosen].tolist(), strict=True)
    return sum(len(text.text[a : b - 1].decode("utf-8")) for a, b in chosen)


def _load(out: Path, index: int, *names: str) -> dict[str, npt.NDArray[Any]]:
    loaded = load_arrays(Workspace(out).block(index), *names)
    if loaded is None:
        raise OSError(f"{Workspace(out).block(index)} is damaged or gone; run again")
    return loaded[0]
