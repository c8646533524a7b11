"""The data of one run: shards and a recipe in; batches to train, validate and probe on out."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from data_prep.shard_format import file_sha256
from stacking import distributed, engine, metrics
from stacking.config import DataConfig, Learned, Recipe
from stacking.dataset import (
    MaskedLMBatch,
    PretrainingLoader,
    check_compatible,
    load_token_counts,
    open_shards,
    validation_batches,
)
from stacking.errors import ShardError
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
        manifest = self._training.manifest
        if manifest is not None and len(counts) != manifest.vocab_size:
            raise ShardError(
                f"{self._data_dir}/token_counts.npy: counts {len(counts)} pieces, the manifest's "
                f"vocabulary has {manifest.vocab_size}; prepare the data again, or delete the file"
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
