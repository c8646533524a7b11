"""Wires the steps: raw files -> clean text -> rows -> shards; the same bytes for any number of
workers, and a killed run goes on where it was.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.clean_step import (
    HELD_OUT_EVERY,
    CleanBlock,
    CleanJob,
    clean_job,
    drop_duplicates,
    finished_block,
)
from data_prep.cleaning.funnel import Funnel
from data_prep.errors import DataError
from data_prep.instances import row_type
from data_prep.masking import MaskingPolicy
from data_prep.progress import Advance, Steps
from data_prep.report.page import write_page
from data_prep.report.report import PrepareReport
from data_prep.row_step import (
    LENGTH_BINS,
    Chunk,
    ChunkRows,
    RowJob,
    chunks_of,
    documents_of,
    load_counts,
    row_job,
)
from data_prep.settings import PrepareSettings, fingerprint, is_finished
from data_prep.shard_format import (
    FORMAT_VERSION,
    SPLITS,
    Manifest,
    Split,
    read_manifest,
    write_manifest,
    write_token_counts,
)
from data_prep.shard_step import DoneShard, shard_job, shard_jobs
from data_prep.shard_writer import ShardLayout, exclusive_folder
from data_prep.sources.blocks import find_files, input_bytes, read_blocks
from data_prep.tokens.tokenizer import (
    SubwordTokenizer,
    count_characters,
    load_tokenizer,
    train_tokenizer,
)
from data_prep.workers import Workers, open_workers
from data_prep.workspace import Workspace, load_json, save_json

# A vocabulary is trained on at most this much text, evenly spread over the corpus: counts of words
# change little beyond it, and the trainer holds every distinct word.
VOCABULARY_BYTES = 256 << 20


def prepare_shards(settings: PrepareSettings, is_live: bool = False) -> PrepareReport | None:
    """Turn raw text into a finished data folder, or report that it is finished already.

    `is_live`: draw progress bars on stderr, if it is a terminal. None: this is an MPI rank that
    worked for the first one.
    """
    size = max(1, settings.workers)  # checked below, by one rank, with everything else
    with open_workers(size, settings.mpi) as workers, Steps(is_live) as steps:
        if workers is None:
            return None
        settings.check()
        wanted = fingerprint(settings)
        if is_finished(settings.out, wanted):
            return PrepareReport.of_finished(settings.out, read_manifest(settings.out))
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        with exclusive_folder(settings.out, digest) as is_continued:
            return _Run(settings, wanted, workers, steps).make(is_continued)


def train_vocabulary(settings: PrepareSettings, is_live: bool = False) -> SubwordTokenizer:
    """Train the vocabulary of the clean training documents into the folder `settings.out`."""
    settings.check()
    with open_workers(settings.workers, use_mpi=False) as workers, Steps(is_live) as steps:
        assert workers is not None, "only MPI has ranks without work"
        with exclusive_folder(settings.out):
            return _Run(settings, {}, workers, steps).vocabulary()


class _Run:
    """One run's state: what it was asked for, who works, and what it has counted."""

    def __init__(
        self,
        settings: PrepareSettings,
        wanted: dict[str, object],
        workers: Workers,
        steps: Steps,
    ) -> None:
        self.settings = settings
        self.wanted = wanted
        self.workers = workers
        self.steps = steps
        self.workspace = Workspace(settings.out)
        self.report = PrepareReport(out=settings.out, funnel=Funnel(), num_workers=workers.size)

    def make(self, is_continued: bool) -> PrepareReport:
        """Run all steps inside the owned folder."""
        blocks = self._clean(is_continued)
        tokenizer = self._tokenizer(blocks)
        chunks = self._rows(blocks)
        self._check(chunks)
        shards = self._shards(chunks, tokenizer)
        manifest = self._manifest(chunks, shards, tokenizer)
        self.report.finish(manifest, self.steps.seconds)
        if not self.settings.no_page:
            write_page(self.report)
        write_manifest(self.settings.out, manifest)
        return self.report

    def vocabulary(self) -> SubwordTokenizer:
        """Clean the text and train on it."""
        return self._tokenizer(self._clean(is_continued=False))

    def _clean(self, is_continued: bool) -> list[CleanBlock]:
        """Return the blocks of clean text without duplicates."""
        self.workspace.make_folders()
        files = find_files(self.settings.validation) if self.settings.validation else []
        total = input_bytes(files) + input_bytes(find_files(self.settings.inputs))
        blocks: list[CleanBlock] = []
        with self.steps.step("cleaning", total) as advance:
            position = 0
            for block in self._clean_blocks(is_continued):
                self.report.add_block(block)
                advance(max(0, block.position - position))
                position = max(position, block.position)
                # Counted: a corpus has many blocks.
                blocks.append(replace(block, funnel={}, messages=[], seconds={}))
            save_json(self.workspace.complete, len(blocks))
        dropped = drop_duplicates(
            self.settings.out,
            blocks,
            self.settings.dedup,
            self.settings.near_dedup,
            self.report.funnel,
        )
        kept = []
        with self.steps.step("duplicates", sum(block.num_bytes for block in blocks)) as advance:
            for before, block in zip(blocks, dropped, strict=True):
                kept.append(block)
                advance(before.num_bytes)
        return self._hold_out(kept)

    def _hold_out(self, blocks: list[CleanBlock]) -> list[CleanBlock]:
        """Refuse a corpus without one of its splits; of a small one hold out the last document."""
        counts: dict[Split | None, int] = {"training": 0, "validation": 0, None: 0}
        for block in blocks:
            counts[block.split] += block.num_documents
        why = f"; skipped: {self.report.messages[0]}" if self.report.messages else ""
        if not counts["training"] + counts[None]:
            raise DataError(
                f"the training inputs hold no text: every document is empty or a duplicate{why}"
            )
        if self.settings.validation and not counts["validation"]:
            raise DataError(f"the --validation files hold no text{why}")
        if counts[None] == 1:
            raise DataError(
                "there is only one document, and one must be held out: name held-out files with "
                f"--validation, or tell what ends a document with --documents{why}"
            )
        if counts[None]:
            every = min(HELD_OUT_EVERY, counts[None])
            return [replace(block, held_out_every=every) for block in blocks]
        return blocks

    def _clean_blocks(self, is_continued: bool) -> Iterator[CleanBlock]:
        """Yield the blocks in order; what an earlier run has cleaned is not cleaned again."""
        out = self.settings.out
        complete = load_json(self.workspace.complete) if is_continued else None
        if complete is not None:
            found = [finished_block(out, index) for index in range(complete)]
            if all(found):
                yield from (block for block in found if block is not None)
                return
        # The inputs are read (not parsed) again: where blocks are cut depends on what is before.
        jobs = self._clean_jobs()
        done: list[CleanBlock] = []
        if is_continued:
            for job in jobs:
                block = finished_block(out, job.index)
                if block is None:
                    jobs = chain([job], jobs)
                    break
                done.append(block)
        yield from done
        yield from self.workers.run(clean_job, jobs)

    def _clean_jobs(self) -> Iterator[CleanJob]:
        settings = self.settings
        groups: list[tuple[Split | None, tuple[Path, ...]]] = [
            ("validation", settings.validation),
            ("training" if settings.validation else None, settings.inputs),
        ]
        index = position = 0
        for split, inputs in groups:
            files = find_files(inputs) if inputs else []
            for block in read_blocks(files, settings.source_options):
                yield CleanJob(
                    index=index,
                    split=split,
                    block=replace(block, position=position + block.position),
                    options=settings.source_options,
                    rules=settings.rules,
                    dedup=settings.dedup,
                    near_dedup=settings.near_dedup,
                    out=settings.out,
                )
                index += 1
            position += input_bytes(files)

    def _tokenizer(self, blocks: list[CleanBlock]) -> SubwordTokenizer:
        """Load or train the tokenizer and put it into the folder."""
        settings = self.settings
        chunks = [] if settings.tokenizer else self._vocabulary_chunks(blocks)
        num_bytes = sum(block.num_bytes for chunk in chunks for block in chunk.blocks)
        with self.steps.step("vocabulary", 2 * num_bytes) as advance:  # two passes over the text
            if settings.tokenizer:
                tokenizer = load_tokenizer(settings.tokenizer)
            else:
                counts = count_characters(self._texts(chunks, advance))
                if not counts:
                    raise DataError(
                        "the training inputs hold no text; nothing to make a vocabulary of"
                    )
                tokenizer = train_tokenizer(
                    self._texts(chunks, advance),
                    counts,
                    settings.vocab_size,
                    kind=settings.tokenizer_kind,
                )
            tokenizer.save(settings.out)
        return tokenizer

    def _vocabulary_chunks(self, blocks: list[CleanBlock]) -> list[Chunk]:
        """Return the training chunks, or every n-th of them if there are too many."""
        chunks = [chunk for chunk in chunks_of(blocks) if chunk.split == "training"]
        num_bytes = sum(block.num_bytes for chunk in chunks for block in chunk.blocks)
        return chunks[:: -(-num_bytes // VOCABULARY_BYTES) or 1]

    def _texts(self, chunks: list[Chunk], advance: Advance) -> Iterator[str]:
        """Yield the documents of some chunks."""
        for chunk in chunks:
            yield from documents_of(self.settings.out, chunk).texts()
            advance(sum(block.num_bytes for block in chunk.blocks))

    def _rows(self, blocks: list[CleanBlock]) -> list[ChunkRows]:
        """Turn the clean text into rows."""
        jobs = (RowJob(chunk, self.settings) for chunk in chunks_of(blocks))
        chunks = []
        with self.steps.step("rows", sum(block.num_bytes for block in blocks)) as advance:
            for chunk in self.workers.run(row_job, jobs):
                self.report.add_chunk(chunk)
                advance(chunk.num_bytes)
                chunks.append(replace(chunk, seconds={}))
        return chunks

    def _check(self, chunks: list[ChunkRows]) -> None:
        """Refuse splits without a row, and tell what pairs of a single document mean."""
        for split in SPLITS:
            if not sum(chunk.num_rows for chunk in _of(chunks, split)):
                raise DataError(f"the {split} documents gave no sequence: they hold no word")
            documents = sum(chunk.num_documents for chunk in _of(chunks, split))
            if documents == 1 and self.settings.pairs == "nsp":
                self.report.notes.append(
                    f"there is only one {split} document: its random next texts are its own"
                )

    def _shards(self, chunks: list[ChunkRows], tokenizer: SubwordTokenizer) -> list[DoneShard]:
        """Shuffle the rows into shards."""
        dtype = row_type(
            self.settings.max_seq_length, tokenizer.vocab_size, self.settings.pairs != "none"
        )
        layout = _layout(self.settings, tokenizer)
        jobs = chain.from_iterable(
            shard_jobs(self.settings.out, split, _of(chunks, split), dtype, layout)
            for split in SPLITS
        )
        shards = []
        total = sum(chunk.num_rows for chunk in chunks)
        with self.steps.step("shards", total, "rows") as advance:
            for shard in self.workers.run(shard_job, jobs):
                self.report.add_seconds(shard.seconds)
                advance(shard.entry.rows)
                shards.append(shard)
        return shards

    def _manifest(
        self, chunks: list[ChunkRows], shards: list[DoneShard], tokenizer: SubwordTokenizer
    ) -> Manifest:
        """Count the rows, write token_counts.npy, and return what stands in the manifest."""
        settings, special = self.settings, tokenizer.special_token_ids
        ids = np.zeros(tokenizer.vocab_size, np.int64)
        documents = np.zeros(LENGTH_BINS, np.int64)
        lengths = {split: np.zeros(settings.max_seq_length + 1, np.int64) for split in SPLITS}
        for chunk in chunks:
            counts = load_counts(settings.out, chunk)
            lengths[chunk.split] += counts["row_lengths"]
            if chunk.split == "training":
                ids += counts["ids"]
                documents += counts["document_lengths"]
        write_token_counts(settings.out, ids, special)
        self.report.row_lengths = lengths["training"].tolist()
        self.report.document_lengths = documents.tolist()
        num_documents = {s: sum(c.num_documents for c in _of(chunks, s)) for s in SPLITS}
        num_tokens = {s: sum(c.num_tokens for c in _of(chunks, s)) for s in SPLITS}
        share = np.arange(settings.max_seq_length + 1) / settings.max_seq_length
        padding = {s: 1 - float(lengths[s] @ share / lengths[s].sum()) for s in SPLITS}
        return Manifest(
            format_version=FORMAT_VERSION,
            dialect="nvidia" if settings.static_masks else "unmasked",
            max_seq_length=settings.max_seq_length,
            max_predictions_per_seq=settings.num_predictions if settings.static_masks else 0,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            special_token_ids=special,
            has_next_sentence_labels=settings.pairs != "none",
            seed=settings.seed,
            num_documents={str(split): number for split, number in num_documents.items()},
            settings=self.wanted,
            statistics={
                **{f"{split}_tokens": num_tokens[split] for split in SPLITS},
                **{f"{split}_padding_share": round(padding[split], 6) for split in SPLITS},
            },
            training=tuple(shard.entry for shard in shards if shard.split == "training"),
            validation=tuple(shard.entry for shard in shards if shard.split == "validation"),
        )


def _of(chunks: list[ChunkRows], split: Split) -> list[ChunkRows]:
    return [chunk for chunk in chunks if chunk.split == split]


def _layout(settings: PrepareSettings, tokenizer: SubwordTokenizer) -> ShardLayout:
    policy = MaskingPolicy(
        vocab_size=tokenizer.vocab_size,
        special_token_ids=tokenizer.special_token_ids,
        masked_lm_prob=settings.masked_lm_prob,
        max_predictions_per_seq=settings.num_predictions,
        is_continuation=np.array(tokenizer.is_continuation) if settings.whole_word else None,
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
