"""The data of one run: shards and a recipe in; batches to train, validate and probe on out."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data_prep.shard_format import Manifest, file_sha256
from stacking import distributed, engine, metrics
from stacking.config import DataConfig, Learned, Recipe
from stacking.dataset import (
    PREFETCHED_STEPS,
    MaskedLMBatch,
    PretrainingLoader,
    check_compatible,
    load_token_counts,
    open_shards,
    validation_batches,
    validation_rows,
)
from stacking.errors import ShardError
from stacking.sample_order import BLOCK_ROWS, SampleOrder
from stacking.schedule import stage_start
from stacking.stage_switch import Probe

PROBE_SEQUENCES = 8


class RunData:
    """Training and validation shards, read as the stages of a recipe want them."""

    def __init__(self, recipe: Recipe, data_dir: Path) -> None:
        """Open and check; reads only. Raises ShardError with all that does not fit."""
        self._recipe = recipe
        self._data_dir = data_dir
        self._training = open_shards(data_dir, "training")
        self._validation = open_shards(data_dir, "validation")
        for shards in (self._training, self._validation):
            check_compatible(shards, recipe.model, recipe.data)
            for stage in range(len(recipe.stages)):
                model, data = recipe.stage_model(stage), recipe.stage_data(stage)
                check_compatible(shards, model, data, may_cut=True)

    @property
    def folder(self) -> Path:
        """Where the shards are read."""
        return self._data_dir

    @property
    def manifest(self) -> Manifest | None:
        """What the folder says of itself; None: somebody else's shards."""
        return self._training.manifest

    @property
    def fingerprint(self) -> int:
        """Of the training shards: the same on every host, or the ranks train on different data."""
        return self._training.fingerprint

    @property
    def validation_fingerprint(self) -> int:
        """Of the validation shards: losses of runs that share it can be compared."""
        return self._validation.fingerprint

    def tokenizer_sha256(self) -> str:
        """Of the tokenizer.json beside the shards; empty where there is none."""
        path = self._data_dir / "tokenizer.json"
        return file_sha256(path) if path.is_file() else ""

    def shards_read(self, first_step: int, last_step: int) -> set[str]:
        """File names of the shards that are read on this rank's node in these optimizer steps.

        `first_step` steps are done before, `last_step` when the session ends. Evaluation reads the
        same on all nodes; so does training, as a group of the order has rows for all ranks. Only
        growth maps are learned on the main rank's alone.
        """
        recipe, batch = self._recipe, self._recipe.global_batch_size
        names = self._training_shards(recipe.seed, first_step, last_step, batch)
        rows = validation_rows(self._validation, recipe.evaluation.max_sequences)
        names.update(self._validation.holding(rows, rows))
        for stage, settings in enumerate(recipe.stages):
            is_near = first_step <= stage_start(stage, recipe.stages) <= last_step
            if settings.learned is not None and is_near and distributed.is_main():
                learned = settings.learned
                names |= self._training_shards(
                    recipe.seed + stage, 0, learned.steps, learned.batch_size
                )
        return names

    def _training_shards(self, seed: int, first_step: int, last_step: int, batch: int) -> set[str]:
        num_rows = self._training.num_rows
        # A loader's thread is so far ahead: its queue, and the step that waits for room in it.
        stop = (last_step + PREFETCHED_STEPS + 1) * batch
        first = SampleOrder(num_rows, seed).blocks(first_step * batch, stop) * BLOCK_ROWS
        return set(self._training.holding(first, np.minimum(first + BLOCK_ROWS, num_rows) - 1))

    def loader(self, stage: int, micro_batch_size: int) -> PretrainingLoader:
        """This rank's training batches of `stage`, from the first sample on."""
        return PretrainingLoader(
            self._training,
            self._recipe.stage_data(stage),
            seed=self._recipe.seed,
            global_batch_size=self._recipe.global_batch_size,
            model_vocab_size=self._recipe.model.vocab_size,
            micro_batch_size=micro_batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=engine.current_device().type == "cuda",
        )

    def validation(self, stage: int) -> Iterator[MaskedLMBatch]:
        """This rank's validation batches, of the length that `stage` trains on."""
        rank, world_size = distributed.rank(), distributed.world_size()
        return self._validation_batches(self._recipe.stage_data(stage), rank, world_size)

    def probe(self, to_stage: int, device: torch.device) -> Probe:
        """Validation sequences short enough for both models; training ones to learn a map on."""
        both = self._recipe.stage_data(to_stage - 1), self._recipe.stage_data(to_stage)
        shorter = min(both, key=lambda data: data.max_seq_length)
        batches = self._validation_batches(shorter, 0, 1, PROBE_SEQUENCES)

        def learning_batches(learned: Learned) -> Iterator[dict[str, torch.Tensor]]:
            loader = PretrainingLoader(
                self._training,
                self._recipe.stage_data(to_stage),
                seed=self._recipe.seed + to_stage,
                global_batch_size=learned.batch_size,
                micro_batch_size=learned.batch_size,
                model_vocab_size=self._recipe.model.vocab_size,
            )
            with loader:
                for batches in islice(loader, learned.steps):
                    yield batches[0].to(device).inputs()

        return Probe(next(islice(batches, 1)), device, learning_batches)

    def unigram_loss(self) -> float | None:
        """Validation MLM loss of predicting training frequencies; known on the main rank."""
        counts = load_token_counts(self._data_dir)
        if counts is None or not distributed.is_main():
            return None
        if self.manifest is not None and len(counts) != self.manifest.vocab_size:
            raise ShardError(
                f"{self._data_dir}/token_counts.npy: counts {len(counts)} pieces, the manifest's "
                f"vocabulary has {self.manifest.vocab_size}; prepare the data again, or delete the "
                "file"
            )
        return metrics.unigram_loss(self._validation_batches(self._recipe.data, 0, 1), counts)

    def _validation_batches(
        self, data: DataConfig, rank: int, world_size: int, batch_size: int | None = None
    ) -> Iterator[MaskedLMBatch]:
        evaluation = self._recipe.evaluation
        return validation_batches(
            self._validation,
            data,
            seed=self._recipe.seed,
            max_sequences=evaluation.max_sequences,
            batch_size=batch_size or evaluation.batch_size,
            model_vocab_size=self._recipe.model.vocab_size,
            rank=rank,
            world_size=world_size,
        )
