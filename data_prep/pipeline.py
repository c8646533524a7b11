"""Wires the steps: raw files -> clean texts -> sentences -> ids -> sequences -> shards; the same
bytes for any worker count.
"""

import random
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from data_prep.clean import Cleaner, Funnel
from data_prep.errors import DataError
from data_prep.instances import InstanceBuilder, row_type, to_rows
from data_prep.masking import MaskingPolicy
from data_prep.sentences import split_document
from data_prep.settings import PrepareSettings, fingerprint
from data_prep.shard_format import (
    FORMAT_VERSION,
    TOKEN_COUNTS,
    Manifest,
    ShardEntry,
    Split,
    read_manifest,
    write_atomically,
    write_manifest,
)
from data_prep.shard_writer import (
    ShardLayout,
    Spool,
    check_finished,
    exclusive_folder,
    write_shards,
)
from data_prep.sources import read_documents
from data_prep.tokenizer import (
    WordPieceTokenizer,
    count_characters,
    from_json,
    load_tokenizer,
    train_tokenizer,
)

# Work is dealt in chunks of about this many characters, a number that does not depend on the
# workers: a chunk's sequences never depend on another chunk.
CHUNK_CHARACTERS = 1 << 20
# Every 200th document is held out (199:1, as StackingBERT's split.py does by line).
HELD_OUT_EVERY = 200
SPLITS: tuple[Split, ...] = ("training", "validation")


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What was done, for people (`text`) and scripts (`asdict`)."""

    out: Path
    manifest: Manifest
    funnel: Funnel | None
    """None: the folder was finished before."""
    seconds: dict[str, float]

    def text(self) -> str:
        """Return the summary table."""
        if self.funnel is None:
            return f"{self.out}: already done with these settings; nothing to do"
        lines = [f"{name:<28}{count:>12,}" for name, count in self.funnel.rows()]
        for split in SPLITS:
            rows = sum(entry.rows for entry in self.manifest.entries(split))
            padding = self.manifest.statistics[f"{split}_padding_share"]
            lines.append(f"{split + ' sequences':<28}{rows:>12,}   padding {padding:.1%}")
        lines.append(f"{'vocabulary':<28}{self.manifest.vocab_size:>12,}")
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
        speed = self.funnel.characters_read / 1e6 / max(total, 1e-9)
        lines.append(f"{total:.1f} s ({parts}); {speed:.2f} M characters/s; {self.out}")
        return "\n".join(lines)


def prepare_shards(settings: PrepareSettings) -> PrepareReport:
    """Turn raw text into a finished data folder, or report that it is finished already."""
    settings.check()
    wanted = fingerprint(settings)
    if check_finished(settings.out, wanted):
        manifest = read_manifest(settings.out)
        assert manifest is not None, "check_finished has read it"
        return PrepareReport(out=settings.out, manifest=manifest, funnel=None, seconds={})
    with exclusive_folder(settings.out):
        return _make(settings, wanted)


def train_vocabulary(settings: PrepareSettings) -> WordPieceTokenizer:
    """Train the vocabulary on the cleaned training documents: one pass for the alphabet, one for
    the pieces.
    """

    def training_texts() -> Iterator[str]:
        return (text for split, text in _split_texts(settings, Cleaner()) if split == "training")

    counts = count_characters(training_texts())
    if not counts:
        raise DataError("the training inputs hold no text; nothing to make a vocabulary of")
    return train_tokenizer(training_texts(), counts, settings.vocab_size)


def _make(settings: PrepareSettings, wanted: dict[str, object]) -> PrepareReport:
    """Run all steps inside the owned folder."""
    clock = _Clock()
    tokenizer = (
        load_tokenizer(settings.tokenizer) if settings.tokenizer else train_vocabulary(settings)
    )
    tokenizer.save(settings.out)
    clock.lap("vocabulary")
    tally = _Tally(tokenizer.vocab_size)
    cleaner = Cleaner()
    dtype = row_type(settings.max_seq_length, tokenizer.vocab_size, settings.pairs == "nsp")
    with ExitStack() as stack:
        spools = {split: stack.enter_context(Spool(settings.out, split, dtype)) for split in SPLITS}
        for split, num_documents, rows in _rows_of_chunks(settings, tokenizer, cleaner):
            spools[split].append(rows)
            tally.add(split, num_documents, rows, tokenizer.special_token_ids["pad"])
        tally.check(settings)
        clock.lap("sequences")
        layout = _layout(settings, tokenizer)
        entries = {split: write_shards(spools[split], settings.out, layout) for split in SPLITS}
    write_atomically(
        settings.out / TOKEN_COUNTS, tally.token_counts_file(tokenizer.special_token_ids)
    )
    clock.lap("shards")
    manifest = _manifest(settings, wanted, tokenizer, tally, entries)
    write_manifest(settings.out, manifest)
    return PrepareReport(
        out=settings.out, manifest=manifest, funnel=cleaner.funnel, seconds=clock.seconds
    )


def _manifest(
    settings: PrepareSettings,
    wanted: dict[str, object],
    tokenizer: WordPieceTokenizer,
    tally: "_Tally",
    entries: dict[Split, tuple[ShardEntry, ...]],
) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        dialect="nvidia" if settings.static_masks else "unmasked",
        max_seq_length=settings.max_seq_length,
        max_predictions_per_seq=settings.num_predictions if settings.static_masks else 0,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        special_token_ids=tokenizer.special_token_ids,
        has_next_sentence_labels=settings.pairs == "nsp",
        seed=settings.seed,
        num_documents={split: tally.num_documents[split] for split in SPLITS},
        settings=wanted,
        statistics=tally.statistics(),
        training=entries["training"],
        validation=entries["validation"],
    )


def _rows_of_chunks(
    settings: PrepareSettings, tokenizer: WordPieceTokenizer, cleaner: Cleaner
) -> Iterator[tuple[Split, int, npt.NDArray[np.void]]]:
    """Yield (split, number of documents, rows) a chunk, in the order of the chunks whatever the
    workers do.
    """
    jobs = (
        _Job(split, index, texts, settings.max_seq_length, settings.pairs, settings.seed)
        for split, index, texts in _chunks(_split_texts(settings, cleaner))
    )
    if settings.workers == 1:
        _start_worker(tokenizer.to_json())
        yield from map(_run_job, jobs)
        return
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    with ProcessPoolExecutor(
        settings.workers, get_context("spawn"), _start_worker, (tokenizer.to_json(),)
    ) as pool:
        waiting: deque[Future[tuple[Split, int, npt.NDArray[np.void]]]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(_run_job, job))
                if len(waiting) > 2 * settings.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed (out of memory?); run again with fewer --workers"
            ) from error


@dataclass(frozen=True)
class _Job:
    """One chunk of documents and what to make of it; carried to a worker."""

    split: Split
    index: int
    texts: list[str]
    max_seq_length: int
    pairs: Literal["none", "nsp"]
    seed: int


# The tokenizer of this worker process: too large to be carried with every job.
_worker_tokenizer: list[WordPieceTokenizer] = []


def _start_worker(tokenizer_json: str) -> None:
    _worker_tokenizer[:] = [from_json(tokenizer_json)]


def _run_job(job: _Job) -> tuple[Split, int, npt.NDArray[np.void]]:
    tokenizer = _worker_tokenizer[0]
    special = tokenizer.special_token_ids
    sentences = [split_document(text) for text in job.texts]
    ids = iter(tokenizer.encode([sentence for document in sentences for sentence in document]))
    # A sentence of characters that the normaliser drops has no ids.
    documents = [[tokens for _ in document if (tokens := next(ids))] for document in sentences]
    documents = [document for document in documents if document]
    builder = InstanceBuilder(
        max_seq_length=job.max_seq_length,
        cls_id=special["cls"],
        sep_id=special["sep"],
        is_continuation=tokenizer.is_continuation,
    )
    if job.pairs == "nsp":
        instances = builder.pair(documents, random.Random(f"{job.seed}:{job.split}:{job.index}"))
    else:
        instances = builder.pack(documents)
    dtype = row_type(job.max_seq_length, tokenizer.vocab_size, job.pairs == "nsp")
    return job.split, len(job.texts), to_rows(instances, dtype, special["pad"])


def _split_texts(settings: PrepareSettings, cleaner: Cleaner) -> Iterator[tuple[Split, str]]:
    """Yield clean texts with their split; a held-out text is never trained on, as duplicates go to
    the split read first.
    """
    if settings.validation:
        for text in cleaner.clean(read_documents(settings.validation, settings.field)):
            yield "validation", text
        for text in cleaner.clean(read_documents(settings.inputs, settings.field)):
            yield "training", text
        return
    for index, text in enumerate(cleaner.clean(read_documents(settings.inputs, settings.field))):
        yield ("validation" if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "training"), text


def _chunks(texts: Iterator[tuple[Split, str]]) -> Iterator[tuple[Split, int, list[str]]]:
    """Group texts by split into chunks; each has at least two documents, if its split has, so that
    pairs can be made.
    """
    for_split: dict[Split, list[list[str]]] = {split: [[]] for split in SPLITS}
    counts = dict.fromkeys(SPLITS, 0)
    sizes = dict.fromkeys(SPLITS, 0)
    for split, text in texts:
        held = for_split[split]
        if sizes[split] >= CHUNK_CHARACTERS and len(held[-1]) >= 2:
            held.append([])
            sizes[split] = 0
        held[-1].append(text)
        sizes[split] += len(text)
        # One chunk is held back: a single last document joins it.
        if len(held) > 1 and len(held[-1]) >= 2:
            yield split, counts[split], held.pop(0)
            counts[split] += 1
    for split, held in for_split.items():
        rest = [text for chunk in held for text in chunk]
        if rest:
            yield split, counts[split], rest


class _Tally:
    """Counts over the rows as they stream by."""

    def __init__(self, vocab_size: int) -> None:
        self.num_documents = dict.fromkeys(SPLITS, 0)
        self._num_tokens = dict.fromkeys(SPLITS, 0)
        self._num_real = dict.fromkeys(SPLITS, 0)
        self._counts = np.zeros(vocab_size, np.int64)

    def add(
        self, split: Split, num_documents: int, rows: npt.NDArray[np.void], pad_id: int
    ) -> None:
        ids = rows["input_ids"]
        self.num_documents[split] += num_documents
        self._num_tokens[split] += ids.size
        self._num_real[split] += int(np.count_nonzero(ids != pad_id))
        if split == "training":
            self._counts += np.bincount(ids.ravel(), minlength=self._counts.size)

    def check(self, settings: PrepareSettings) -> None:
        """Refuse a folder without one of its splits."""
        if not self._num_tokens["training"]:
            raise DataError(
                "the training inputs gave no sequence: every document is empty or held out"
            )
        if not self._num_tokens["validation"]:
            hint = (
                "the --validation files hold no text"
                if settings.validation
                else f"every {HELD_OUT_EVERY}th document is held out and there are only "
                f"{self.num_documents['training']}: name held-out files with --validation"
            )
            raise DataError(f"no validation sequence: {hint}")

    def statistics(self) -> dict[str, float]:
        return {
            f"{split}_padding_share": round(1 - self._num_real[split] / self._num_tokens[split], 6)
            for split in SPLITS
        }

    def token_counts_file(self, special_token_ids: dict[str, int]) -> bytes:
        """Return the bytes of token_counts.npy; [UNK] is counted, since it is masked and predicted
        like a word.
        """
        counts = self._counts.copy()
        counts[[special_token_ids[name] for name in ("pad", "cls", "sep", "mask")]] = 0
        stream = BytesIO()
        np.save(stream, counts)
        return stream.getvalue()


class _Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _layout(settings: PrepareSettings, tokenizer: WordPieceTokenizer) -> ShardLayout:
    policy = MaskingPolicy(
        vocab_size=tokenizer.vocab_size,
        special_token_ids=tokenizer.special_token_ids,
        masked_lm_prob=settings.masked_lm_prob,
        max_predictions_per_seq=settings.num_predictions,
    )
    return ShardLayout(
        rows_per_shard=settings.rows_per_shard,
        seed=settings.seed,
        pad_id=tokenizer.special_token_ids["pad"],
        attributes={
            "format_version": FORMAT_VERSION,
            "tokenizer_sha256": tokenizer.sha256,
            "seed": settings.seed,
        },
        masking=policy if settings.static_masks else None,
    )
