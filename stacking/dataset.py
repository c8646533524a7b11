"""Shards in, MaskedLMBatch out: one global sample order, masks from (seed, epoch, sample), exact
resume at any world size.

Shapes: B sequences, S tokens, P masked positions, N rows over all shards of a split.
"""

import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType

import numpy as np
import torch

from data_prep.masking import (
    IGNORED,
    BoolArray,
    IntArray,
    MaskingPolicy,
    mask_tokens,
    restore_originals,
    static_mask_is_real,
)
from data_prep.shard_format import VOCABULARY, file_sha256, load_token_counts, load_vocabulary
from stacking.batch import MaskedLMBatch
from stacking.config import DataConfig
from stacking.errors import ConfigError, ShardError
from stacking.sample_order import SampleOrder
from stacking.shard_reader import RowReader, ShardSet, check_compatible, layout_faults, open_shards
from stacking.truncation import cut_rows

__all__ = [
    "MaskedLMBatch",
    "PretrainingLoader",
    "ShardSet",
    "check_compatible",
    "load_token_counts",
    "open_shards",
    "validation_batches",
    "validation_rows",
]

PREFETCHED_STEPS = 2
_MOST_IDS = 2**31  # where neither manifest nor model say how many there are
# The producer looks this often whether it was told to stop.
_POLL_SECONDS = 0.1


class PretrainingLoader:
    """Yields this rank's micro batches of one optimizer step after the other, without end; a thread
    reads two steps ahead.

    Step t holds the global positions t*B ... (t+1)*B - 1, of which rank r has its consecutive
    share. Neither the order nor the masks depend on rank, world size or micro batch.
    """

    def __init__(
        self,
        shards: ShardSet,
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        model_vocab_size: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """`model_vocab_size`: the limit of ids in shards without manifest, checked a batch.

        `pin_memory`: put batches where a CUDA device copies them from while the host goes on.
        """
        if global_batch_size % (micro_batch_size * world_size):
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not a multiple of micro batch "
                f"{micro_batch_size} x "
                f"{world_size} ranks; choose a micro batch that divides "
                f"{global_batch_size // world_size}"
            )
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self._batches = _BatchMaker(shards, data, seed, model_vocab_size)
        self._shards = shards
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._pin_memory = pin_memory
        share = global_batch_size // world_size
        self._share = (rank * share, (rank + 1) * share)
        # The reader thread has an order of its own: caches are not shared between threads.
        self._order = SampleOrder(shards.num_rows, seed)
        self._hash_order = SampleOrder(shards.num_rows, seed)
        self._samples_consumed = 0
        self._prefetcher: _Prefetcher | None = None

    def __iter__(self) -> Iterator[list[MaskedLMBatch]]:
        """Return the loader: it is its own endless iterator."""
        return self

    def __next__(self) -> list[MaskedLMBatch]:
        """Return the micro batches of the next step: global / (micro x world) of them."""
        if self._prefetcher is None:
            self._prefetcher = _Prefetcher(self._steps_from(self._samples_consumed))
        step = self._prefetcher.take()
        self._samples_consumed += self._global_batch_size
        return step

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed loader needs; steps read ahead do not count as consumed."""
        return {
            "samples_consumed": self._samples_consumed,
            "num_rows": self._shards.num_rows,
            "seed": self._seed,
            "fingerprint": self._shards.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after `state`; a ShardError if the data or the seed are others, since the order
        would be another.
        """
        for name, own in self.state_dict().items():
            if name != "samples_consumed" and state.get(name, own) != own:
                raise ShardError(
                    f"{self._shards.data_dir}: the checkpoint was made with {name} "
                    f"{state[name]}, here it is {own}; "
                    "resume with the same data and seed, or start a new run"
                )
        consumed = state["samples_consumed"]
        if consumed < 0 or consumed % self._global_batch_size:
            raise ConfigError(
                f"{consumed} samples consumed is no multiple of global_batch_size "
                f"{self._global_batch_size}; "
                "resume with the global batch size of the checkpoint"
            )
        self.close()
        self._samples_consumed = consumed

    def sample_hash(self, step: int) -> str:
        """Return 12 hex digits over the rows and epochs of the GLOBAL batch of optimizer step
        `step` (0-based).
        """
        positions = np.arange(step * self._global_batch_size, (step + 1) * self._global_batch_size)
        rows, epochs = self._hash_order.locate(positions)
        return hashlib.sha256(np.stack([rows, epochs]).astype("<i8").tobytes()).hexdigest()[:12]

    def close(self) -> None:
        """Stop the reader thread; the next `next` starts another."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None

    def __enter__(self) -> "PretrainingLoader":
        """Return the loader."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the reader thread."""
        self.close()

    def _steps_from(self, samples_consumed: int) -> Iterator[list[MaskedLMBatch]]:
        start = samples_consumed
        while True:
            rows, epochs = self._order.locate(
                np.arange(start + self._share[0], start + self._share[1])
            )
            batches = [
                self._batches.make(
                    rows[i : i + self._micro_batch_size], epochs[i : i + self._micro_batch_size]
                )
                for i in range(0, rows.size, self._micro_batch_size)
            ]
            yield [batch.pinned() for batch in batches] if self._pin_memory else batches
            start += self._global_batch_size


def validation_batches(
    shards: ShardSet,
    data: DataConfig,
    *,
    seed: int,
    max_sequences: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    model_vocab_size: int | None = None,
) -> Iterator[MaskedLMBatch]:
    """Yield this rank's validation batches: rows spread evenly over the split, masks fixed by
    (seed, row), epoch 0.

    Every rank yields equally many batches of equal size. Filler rows are all [PAD] with
    masked_lm_ids and labels -100 and sample index -1; they attend to their first position, since a
    softmax over nothing is not a number.
    """
    batches = _BatchMaker(shards, data, seed, model_vocab_size)
    chosen = validation_rows(shards, max_sequences)
    per_rank = -(-chosen.size // world_size)
    size = min(batch_size, per_rank)
    mine = chosen[rank::world_size]
    for start in range(0, per_rank, size):
        rows = mine[start : start + size]
        yield batches.make(rows, np.zeros_like(rows), num_filler=size - rows.size)


def validation_rows(shards: ShardSet, max_sequences: int) -> IntArray:
    """Return the rows that are evaluated on: at most so many, spread evenly over the split."""
    count = min(max_sequences, shards.num_rows)
    return np.arange(count) * shards.num_rows // count


class _BatchMaker:
    """Makes batches of given rows: reads, restores or draws masks, checks, turns into tensors."""

    def __init__(
        self, shards: ShardSet, data: DataConfig, seed: int, model_vocab_size: int | None
    ) -> None:
        faults = layout_faults(shards, data, may_cut=True)
        if faults:
            raise ShardError("\n  - ".join([f"{shards.data_dir} ({shards.split}):", *faults]))
        self._shards = shards
        self._data = data
        self._seed = seed
        self._reader = RowReader(shards)
        self._policy = _policy(shards, data) if data.masking == "dynamic" else None
        manifest = shards.manifest
        self._pad_id = manifest.special_token_ids["pad"] if manifest else 0
        num_ids = manifest.vocab_size if manifest else model_vocab_size
        self._limits = {
            "input_ids": num_ids or _MOST_IDS,
            "masked_lm_ids": num_ids or _MOST_IDS,
            "masked_lm_positions": shards.max_seq_length,
            "segment_ids": 2,
            "next_sentence_labels": 2,
            "input_mask": 2,
        }

    def make(self, rows: IntArray, epochs: IntArray, num_filler: int = 0) -> MaskedLMBatch:
        """Return the batch of rows [B] and, behind them, `num_filler` empty ones."""
        rows = np.concatenate([rows, np.zeros(num_filler, np.int64)])
        epochs = np.concatenate([epochs, np.zeros(num_filler, np.int64)])
        fields = self._reader.read(rows)
        for name, values in fields.items():
            self._check_values(name, values, rows)
        mask = fields.get("input_mask")
        attention = fields["input_ids"] != self._pad_id if mask is None else mask != 0
        if self._policy is not None:
            attention = self._unmasked(fields, attention, self._policy)
        fields["input_ids"], positions, ids = self._masks(fields, rows, epochs)
        num_real = rows.size - num_filler
        num_real_tokens = int(np.count_nonzero(attention[:num_real]))
        fields["input_ids"][num_real:], attention[num_real:] = self._pad_id, False
        attention[num_real:, 0] = True
        fields["segment_ids"][num_real:], positions[num_real:], ids[num_real:] = 0, 0, IGNORED
        rows[num_real:] = -1
        labels = fields.get("next_sentence_labels")
        if labels is not None:
            labels[num_real:] = IGNORED
        return MaskedLMBatch(
            torch.from_numpy(fields["input_ids"]),
            torch.from_numpy(fields["segment_ids"]),
            torch.from_numpy(attention),
            torch.from_numpy(positions),
            torch.from_numpy(ids),
            None if labels is None else torch.from_numpy(labels),
            rows,
            num_masked=int(np.count_nonzero(ids != IGNORED)),
            num_real_tokens=num_real_tokens,
        )

    def _unmasked(
        self, fields: dict[str, IntArray], attention: BoolArray, policy: MaskingPolicy
    ) -> BoolArray:
        """Undo static masks and cut rows to the length asked for, in `fields`; the attention."""
        ids, length = fields["input_ids"], self._data.max_seq_length
        if self._shards.max_predictions_per_seq:
            ids = restore_originals(ids, fields["masked_lm_positions"], fields["masked_lm_ids"])
        if length < self._shards.max_seq_length:
            sep_id = policy.special_token_ids["sep"]
            ids, fields["segment_ids"], attention = cut_rows(
                ids, fields["segment_ids"], attention, max_seq_length=length, sep_id=sep_id
            )
        fields["input_ids"] = ids
        return attention

    def _masks(
        self, fields: dict[str, IntArray], rows: IntArray, epochs: IntArray
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Return masked ids [B, S], positions [B, P] and original ids [B, P] with -100 padding."""
        input_ids = fields["input_ids"]
        if self._policy is not None:
            masked = mask_tokens(
                input_ids, self._policy, seed=self._seed, epoch=epochs, sample_indices=rows
            )
            return masked.input_ids, masked.masked_lm_positions, masked.masked_lm_ids
        is_real = static_mask_is_real(fields["masked_lm_positions"])
        positions = np.where(is_real, fields["masked_lm_positions"], 0)
        ids = np.where(is_real, fields["masked_lm_ids"], IGNORED)
        missing = self._data.max_predictions_per_seq - positions.shape[1]
        if missing > 0:
            positions = np.pad(positions, ((0, 0), (0, missing)))
            ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=IGNORED)
        return input_ids, positions, ids

    def _check_values(self, name: str, values: IntArray, rows: IntArray) -> None:
        """Catch here what would be a device-side assertion in an embedding or a loss."""
        limit = self._limits[name]
        if not values.size or (int(values.max()) < limit and int(values.min()) >= 0):
            return
        first = tuple(np.argwhere((values >= limit) | (values < 0))[0].tolist())
        path, local = self._reader.place(int(rows[first[0]]))
        found = f"{path}: dataset {name} holds {int(values[first])} in row {local}; "
        if name in ("input_ids", "masked_lm_ids"):
            raise ShardError(
                f"{found}the vocabulary has {limit} pieces; these shards were made with another "
                "vocabulary"
            )
        raise ShardError(f"{found}allowed: 0 to {limit - 1}; the file is damaged")


class _Prefetcher:
    """Runs an endless iterator in a daemon thread, a bounded number of steps ahead."""

    def __init__(self, steps: Iterator[list[MaskedLMBatch]]) -> None:
        self._queue: queue.Queue[list[MaskedLMBatch] | Exception] = queue.Queue(PREFETCHED_STEPS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(steps,), name="shard-reader", daemon=True
        )
        self._thread.start()

    def take(self) -> list[MaskedLMBatch]:
        """Return the next step; what the thread raised is raised here, in every later call too."""
        item = self._queue.get()
        if isinstance(item, Exception):
            self._queue.put(item)
            raise item
        return item

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self._thread.join()

    def _run(self, steps: Iterator[list[MaskedLMBatch]]) -> None:
        try:
            for step in steps:
                if not self._put(step):
                    return
        except Exception as error:  # a thread's boundary: carried to the consumer, which raises it
            self._put(error)

    def _put(self, item: list[MaskedLMBatch] | Exception) -> bool:
        """Wait for room; False when told to stop."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False


def _policy(shards: ShardSet, data: DataConfig) -> MaskingPolicy:
    manifest = shards.manifest
    assert manifest is not None, "_layout_faults has refused dynamic masks without a manifest"
    continues: BoolArray | None = None
    if data.whole_word:
        vocabulary = load_vocabulary(shards.data_dir)
        if len(vocabulary) != manifest.vocab_size or not any(
            token.startswith("##") for token in vocabulary
        ):
            raise ShardError(
                f"{shards.data_dir / VOCABULARY}: whole-word masking needs the WordPiece "
                "vocabulary of the manifest "
                f"({manifest.vocab_size} pieces with ##); this one has {len(vocabulary)}; set "
                "data.whole_word to false"
            )
        if file_sha256(shards.data_dir / VOCABULARY) != manifest.tokenizer_sha256:
            raise ShardError(
                f"{shards.data_dir / VOCABULARY}: is not the manifest's, by its sha256; whole-word "
                "masking needs it unchanged; copy it again, or prepare the data again"
            )
        continues = np.array([token.startswith("##") for token in vocabulary])
    return MaskingPolicy(
        vocab_size=manifest.vocab_size,
        special_token_ids=manifest.special_token_ids,
        masked_lm_prob=data.masked_lm_prob,
        max_predictions_per_seq=data.max_predictions_per_seq,
        is_continuation=continues,
    )
