"""What jobs of fine-tuning share: the model, read once, progress, and results that say of what.

A result is a JSON file that is written last; what has one is done, if its conditions are the same.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from data_prep.shard_format import file_sha256, write_atomically
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import ConfigError, NonFiniteError
from stacking.fine_tuning import FineTuner, Setting
from stacking.pretrained import Pretrained, load

_TOLD_EVERY = 30.0  # seconds
FLAG_OF = {
    "num_epochs": "--epochs", "batch_size": "--batch-size", "learning_rate": "--learning-rate",
    "dropout": "--dropout",
}  # fmt: skip
"""The flags that replace a field of Setting."""


@dataclass(frozen=True)
class Start:
    """What a job begins with and how it runs, by the names of files."""

    model: Path
    tag: str | None = None
    tokenizer: Path | None = None
    deepspeed_config: Path | None = None
    strict_precision: bool = False

    def load(self) -> Pretrained:
        """The model; read once a process."""
        return _load(self.model, self.tag, self.tokenizer)

    def conditions(
        self, setting: Setting, seed: int, files: Mapping[Any, Path]
    ) -> dict[str, object]:
        """What a finished result must have had to be one of the same job."""
        config = load_deepspeed_config(self.deepspeed_config)
        document = json.dumps(config.document, sort_keys=True)
        return {
            "model": self.load().digest,
            "setting": asdict(setting),
            "seed": seed,
            "deepspeed_config": hashlib.sha256(document.encode()).hexdigest(),
            **{name: file_sha256(path) for name, path in files.items()},
        }


@dataclass(frozen=True)
class Asked:
    """How often and how, as the flags say; what is None is the recipe's own."""

    num_seeds: int = 1
    first_seed: int = 1
    processes: int = 1
    num_epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    dropout: float | None = None

    def __post_init__(self) -> None:
        """ConfigError with all faults."""
        least = {"seeds": self.num_seeds, "first-seed": self.first_seed,
                 "processes": self.processes, "epochs": self.num_epochs,
                 "batch-size": self.batch_size}  # fmt: skip
        faults = [f"--{name}: got {value}; allowed: 1 or more"
                  for name, value in least.items() if value is not None and value < 1]  # fmt: skip
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            faults.append(f"--learning-rate: got {self.learning_rate}; allowed: above 0, at most 1")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            faults.append(f"--dropout: got {self.dropout}; allowed: 0 or more, below 1")
        if faults:
            raise ConfigError(faults)

    @property
    def seeds(self) -> range:
        """Of the runs that are reported."""
        return range(self.first_seed, self.first_seed + self.num_seeds)

    @property
    def settings(self) -> dict[str, int | float]:
        """What replaces the recipe's, by the fields of Setting."""
        found = {name: getattr(self, name) for name in FLAG_OF}
        return {name: value for name, value in found.items() if value is not None}


def of_flags(given: Mapping[str, Any]) -> tuple[Start, Asked]:
    """From the values of fine_tuning_flags.FLAGS by name, among others."""
    names = [{field.name for field in fields(kind)} for kind in (Start, Asked)]
    start, asked = ({name: given[name] for name in own} for own in names)
    return Start(**start), Asked(**asked)


@lru_cache(maxsize=1)
def _load(model: Path, tag: str | None, tokenizer: Path | None) -> Pretrained:
    return load(model, tag, tokenizer)


def read_finished(
    path: Path, conditions: Mapping[str, object], *, but: Collection[str] = ()
) -> tuple[dict[str, float], float]:
    """Scores and seconds of a result file; ConfigError if it is none, or of other conditions.

    `but`: conditions in which it may differ.
    """
    try:
        told = json.loads(path.read_bytes())
        found, scores = dict(told["conditions"]), dict(told["scores"])
        seconds = float(told["seconds"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no result of a fine-tuning ({error}); delete it") from error
    asked = json.loads(json.dumps(conditions))
    other = sorted(name for name in (asked | found).keys() - set(but)
                   if asked.get(name) != found.get(name))  # fmt: skip
    if other:
        raise ConfigError(
            f"{path}: is of another {', '.join(other)}; give another --out, or delete it"
        )
    return scores, seconds


def read_done(
    name: str, path: Path, files: Iterable[Path], conditions: Mapping[str, object]
) -> tuple[dict[str, float], float] | None:
    """Scores and seconds of a job that is done; None if there is no result.

    Nor is it done if one of the `files` that it wrote has gone, which is told. ConfigError as
    `read_finished` has it.
    """
    if not path.exists():
        return None
    found = read_finished(path, conditions)
    gone = [file for file in files if not file.exists()]
    if gone:
        print(f"{name}: {gone[0]} has gone, so it is done again", file=sys.stderr, flush=True)
    return None if gone else found


def write_result(
    path: Path,
    start: Pretrained,
    tuner: FineTuner,
    *,
    scores: Mapping[str, float],
    seconds: float,
    conditions: Mapping[str, object],
    notes: Iterable[str],
) -> None:
    """Write what makes a job done."""
    content = {
        "scores": dict(scores),
        "model": start.origin,
        "precision": tuner.precision,
        "seconds": round(seconds, 1),
        "notes": [*tuner.notices, *notes, *start.notes()],
        "conditions": dict(conditions),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


@cache
def tell_once(line: str) -> None:
    """On stderr, once in this process."""
    print(line, file=sys.stderr, flush=True)


def require_writable(folder: Path) -> None:
    """Make --out; ConfigError where nothing can be written, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out: {folder} cannot be written: {error.strerror}; give another folder"
        ) from error


@contextmanager
def naming(job: str) -> Iterator[None]:
    """Say in which job a loss or a logit became no number."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{job}: {error}") from error


def teller(what: str) -> Callable[[int, int, float], None]:
    """Says every half minute how far a job is."""
    began = last = time.monotonic()

    def tell(done: int, total: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > _TOLD_EVERY:
            last = now
            left = (now - began) / done * (total - done)
            print(f"{what}: step {done:,}/{total:,}  loss {loss:.3f}  left {left / 60:.0f} min",
                  file=sys.stderr, flush=True)  # fmt: skip

    return tell
