"""What `shards` was asked for, checked as a whole, and what of it decides the shards' bytes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Literal

from data_prep.errors import DataError
from data_prep.shard_format import file_sha256
from data_prep.sources import find_files
from data_prep.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Everything that `shards` was asked for."""

    inputs: tuple[Path, ...]
    out: Path
    validation: tuple[Path, ...] = ()
    field: str = "text"
    tokenizer: Path | None = None
    vocab_size: int = 8192
    max_seq_length: int = 128
    pairs: Literal["none", "nsp"] = "none"
    static_masks: bool = False
    masked_lm_prob: float = 0.15
    max_predictions_per_seq: int = 0
    """0: masked_lm_prob of a full sequence, rounded up."""
    rows_per_shard: int = 65_536
    workers: int = 1
    seed: int = 1

    @property
    def num_predictions(self) -> int:
        """Masked positions P of one static row."""
        return self.max_predictions_per_seq or ceil(self.max_seq_length * self.masked_lm_prob)

    def check(self) -> None:
        """Raise one DataError that lists every impossible value."""
        faults = [
            f"--max-seq-length {self.max_seq_length}: at least 8"
            if self.max_seq_length < 8
            else "",
            f"--workers {self.workers}: at least 1" if self.workers < 1 else "",
            f"--rows-per-shard {self.rows_per_shard}: at least 1"
            if self.rows_per_shard < 1
            else "",
            f"--seed {self.seed}: 0 to 2^63 - 1" if not 0 <= self.seed < 1 << 63 else "",
            f"--masked-lm-prob {self.masked_lm_prob}: between 0 and 1"
            if not 0 < self.masked_lm_prob < 1
            else "",
            f"--max-predictions-per-seq {self.max_predictions_per_seq}: 0 to --max-seq-length"
            if not 0 <= self.max_predictions_per_seq <= self.max_seq_length
            else "",
        ]
        if any(faults):
            raise DataError("; ".join(fault for fault in faults if fault))


def fingerprint(settings: PrepareSettings) -> dict[str, object]:
    """Return what decides the bytes of the shards: names and hashes instead of paths, and not the
    workers.
    """
    wanted: dict[str, object] = {
        key: value
        for key, value in asdict(settings).items()
        if key
        not in ("inputs", "validation", "out", "tokenizer", "workers", "max_predictions_per_seq")
    }
    wanted["inputs"] = _hashes(settings.inputs)
    wanted["validation"] = _hashes(settings.validation)
    wanted["tokenizer"] = (
        load_tokenizer(settings.tokenizer).sha256 if settings.tokenizer else "trained"
    )
    wanted["max_predictions_per_seq"] = settings.num_predictions if settings.static_masks else 0
    if settings.tokenizer:
        del wanted["vocab_size"]
    return wanted


def _hashes(paths: Sequence[Path]) -> list[list[str]]:
    return [[path.name, file_sha256(path)] for path in find_files(paths)] if paths else []
