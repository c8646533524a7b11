"""Checkpoints of a run: a Snapshot and a TrainState in, a committed folder out, and back.

`checkpoints/<tag>/` holds weights.safetensors and moments.safetensors (full size, fp32, independent
of ranks and ZeRO stage; nothing is pickled), state.json, and COMMITTED: the other files' sizes and
sha256. The folder is written under another name, synced, and renamed as its last act, so a tag
either is whole or does not exist. moments.safetensors holds only parameters with a history, and is
missing if there is none.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import Self

from data_prep.plain_files import read_plain
from stacking.config_model import MOST_LAYERS
from stacking.errors import CheckpointError
from stacking.snapshot import LossScaler, Snapshot

MARKER = "COMMITTED"
WEIGHTS, MOMENTS_FILE, STATE = "weights.safetensors", "moments.safetensors", "state.json"
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TrainState(BaseModel):
    """All that decides the next batch and update, besides the Snapshot."""

    model_config = _STRICT

    global_step: int = Field(ge=0, description="Optimizer steps done in the whole run.")
    stage: int = Field(ge=0, description="0-based growth stage of the weights.")
    num_hidden_layers: int = Field(gt=0, description="Depth of the weights.")
    loader: dict[str, int] = Field(description="PretrainingLoader.state_dict().")
    sample_hash: str = Field("", description="Chained digest of every step's sample indices.")
    tokens: int = Field(0, ge=0, description="Tokens trained on, padding included.")
    real_tokens: int = Field(0, ge=0, description="Tokens trained on, padding excluded.")
    elapsed_seconds: float = Field(0.0, ge=0, description="Training time over all sessions.")
    recipe_sha256: str = Field(description="Digest of what is trained.")
    tokenizer_sha256: str = Field(
        "", description="Of the data's tokenizer.json; empty where they have none."
    )


class Cohort(BaseModel):
    """Parameters of one age, as state.json lists them; who is in none is old and has no history."""

    model_config = _STRICT

    optimizer_steps: int = Field(ge=0, description="Adam's count: since their moments were fresh.")
    is_new: bool = Field(description="Whether they came with the current stage.")
    names: tuple[str, ...] = Field(
        min_length=1, description="Parameters; 'layers.0-2,5.x' stands for layers 0, 1, 2 and 5."
    )


class StateFile(BaseModel):
    """state.json: what is not a tensor."""

    model_config = _STRICT

    train: TrainState
    loss_scaler: LossScaler | None = Field(description="fp16: the scale and its counters.")
    cohorts: tuple[Cohort, ...]

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        self.ages()
        if self.loss_scaler and not 0 < self.loss_scaler.scale < math.inf:
            raise ValueError(f"loss_scaler: got scale {self.loss_scaler.scale}")
        return self

    def ages(self) -> dict[str, tuple[int, bool]]:
        """Parameter -> (optimizer steps, is new); ValueError if a name cannot be read."""
        found: dict[str, tuple[int, bool]] = {}
        for cohort in self.cohorts:
            for name in (name for folded in cohort.names for name in _unfold(folded)):
                if name in found:
                    raise ValueError(f"{name}: in two cohorts")
                found[name] = (cohort.optimizer_steps, cohort.is_new)
        return found


class Checkpoint:
    """One committed tag on disk."""

    def __init__(self, folder: Path) -> None:
        """Read and check the small files; CheckpointError names what is wrong."""
        self.folder = folder
        self.tag = folder.name
        try:
            self._files = _marked_files(json.loads(read_plain(folder / MARKER)))
            self._small = StateFile.model_validate_json(read_plain(folder / STATE))
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
            raise CheckpointError(
                f"{folder}: not a committed checkpoint of this format: {STATE}: {'; '.join(faults)}"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder}: not a committed checkpoint ({error})") from error
        self._verify(STATE)
        self.state = self._small.train

    def verify(self) -> None:
        """Compare every file with the marker; CheckpointError on a difference."""
        for name in self._files:
            self._verify(name)

    def _verify(self, name: str) -> None:
        path = self.folder / name
        advice = f"take another tag (--resume TAG, export --tag TAG) or delete {self.folder}"
        try:
            is_whole = path.is_file() and _fingerprint(path) == self._files.get(name)
        except OSError as error:  # a bad sector
            raise CheckpointError(f"{path}: cannot be read ({error}); {advice}") from error
        if not is_whole:
            raise CheckpointError(f"{path}: missing or changed since it was committed; {advice}")

    def weights(self) -> dict[str, Tensor]:
        """fp32 weights by parameter name."""
        return self._load(WEIGHTS)

    def snapshot(self) -> Snapshot:
        """Weights, moments and counts as they were saved; CheckpointError if they do not agree."""
        flat = self._load(MOMENTS_FILE) if MOMENTS_FILE in self._files else {}
        moments: dict[str, dict[str, Tensor]] = {}
        for path, tensor in flat.items():
            key, _, name = path.partition("/")
            moments.setdefault(key, {})[name] = tensor
        ages = self._small.ages()
        snapshot = Snapshot(
            self.weights(),
            moments,
            {name: steps for name, (steps, _) in ages.items() if steps},
            frozenset(name for name, (_, is_new) in ages.items() if is_new),
            self._small.loss_scaler,
        )
        if faults := snapshot.faults():
            raise CheckpointError(f"{self.folder}: its files do not agree: {'; '.join(faults[:5])}")
        return snapshot

    def _load(self, name: str) -> dict[str, Tensor]:
        self._verify(name)
        try:
            tensors = safetensors.torch.load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / name}: cannot be read ({error})") from error
        for key, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise CheckpointError(
                    f"{self.folder / name}: {key} is {tensor.dtype}; checkpoints are fp32"
                )
        return tensors


class CheckpointManager:
    """The tags of one run folder."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        """`folder`: RUN_DIR/checkpoints; `keep_last`: how many periodic tags stay."""
        self.folder = folder
        self.keep_last = keep_last

    def committed(self) -> list[Checkpoint]:
        """All committed tags that can be read, oldest first."""
        return self._scan()[0]

    def _scan(self) -> tuple[list[Checkpoint], list[str]]:
        """Committed tags, oldest first, and one line for each whose small files are broken."""
        found, complaints = [], []
        for marker in self.folder.glob(f"[!.]*/{MARKER}"):
            try:
                found.append(Checkpoint(marker.parent))
            except CheckpointError as error:
                complaints.append(str(error))
        found.sort(key=lambda c: (c.state.global_step, c.state.stage, c.tag))
        return found, complaints

    def latest(self) -> Checkpoint | None:
        """The furthest committed tag, None in a new run."""
        found = self.committed()
        return found[-1] if found else None

    def latest_good(self) -> tuple[Checkpoint | None, list[str]]:
        """The furthest tag whose files are unchanged, and one line for each that is not."""
        found, complaints = self._scan()
        for checkpoint in reversed(found):
            try:
                checkpoint.verify()
            except CheckpointError as error:
                complaints.append(str(error))
            else:
                return checkpoint, complaints
        return None, complaints

    def load(self, tag: str) -> Checkpoint:
        """The named tag, verified."""
        if tag not in (marker.parent.name for marker in self.folder.glob(f"[!.]*/{MARKER}")):
            known = ", ".join(c.tag for c in self.committed()) or "none"
            raise CheckpointError(
                f"no committed checkpoint {tag!r} in {self.folder}; there: {known}"
            )
        checkpoint = Checkpoint(self.folder / tag)
        checkpoint.verify()
        return checkpoint

    def rewind(self, tag: str) -> None:
        """Set aside all tags after `tag`: the run goes on from there. They move to superseded/."""
        start = self.load(tag).state
        # The furthest first: a kill in between leaves no later tag that would be taken for newest.
        for later in reversed(self.committed()):
            if (later.state.global_step, later.state.stage) > (start.global_step, start.stage):
                aside = self.folder / "superseded" / later.tag
                aside.parent.mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                later.folder.rename(aside)

    def mend(self) -> None:
        """Clean up after a kill, before tags are read: one rank only, which alone may write.

        CheckpointError on a read-only disk.
        """
        try:
            self._mend_leftovers()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: cannot be written: {error}; make it writable"
            ) from error

    def save(self, tag: str, snapshot: Snapshot, state: TrainState) -> None:
        """Write and commit one tag; one rank only. CheckpointError on a full or read-only disk."""
        temporary = self.folder / f".{tag}.{os.getpid()}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mend_leftovers()
            temporary.mkdir()
            safetensors.torch.save_file(snapshot.weights, temporary / WEIGHTS)
            flat = {f"{key}/{name}": tensor for key, named in snapshot.moments.items()
                    for name, tensor in named.items()}  # fmt: skip
            if flat:
                safetensors.torch.save_file(flat, temporary / MOMENTS_FILE)
            (temporary / STATE).write_text(_state_file(snapshot, state).model_dump_json(indent=1))
            mode = (temporary / STATE).stat().st_mode
            for path in temporary.iterdir():
                path.chmod(mode)  # safetensors leaves its files to their owner alone
            files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
            (temporary / MARKER).write_text(json.dumps({"tag": tag, "files": files}, indent=1))
            _sync(temporary)
            self._replace(temporary, self.folder / tag)
            self._retire()
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {tag!r} could not be written to {self.folder}: {error}; free some "
                "space or make the folder writable, then run the same command again to continue"
            ) from error

    def _replace(self, temporary: Path, final: Path) -> None:
        old = self.folder / f".{final.name}.old"
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        _sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _mend_leftovers(self) -> None:
        for path in self.folder.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        for old in self.folder.glob(".*.old"):  # a kill between the two renames of _replace
            final = self.folder / old.name[1 : -len(".old")]
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(final)

    def _retire(self) -> None:
        periodic = [c for c in self.committed() if c.tag.startswith("step_")]
        for checkpoint in periodic[: -self.keep_last]:
            # Renamed first: a half-deleted tag must not look committed, and the next mend ends it.
            gone = self.folder / f".{checkpoint.tag}.{os.getpid()}.tmp"
            checkpoint.folder.rename(gone)
            shutil.rmtree(gone)


def _marked_files(marker: object) -> dict[str, dict[str, object]]:
    """Name -> size and sha256 of a COMMITTED's content; ValueError if it is none."""
    files = marker.get("files") if isinstance(marker, dict) else None
    names = set(files) if isinstance(files, dict) else set()
    if not isinstance(files, dict) or names | {MOMENTS_FILE} != {WEIGHTS, MOMENTS_FILE, STATE}:
        raise ValueError(f"{MARKER} lists other files than a checkpoint's")
    return files


def _state_file(snapshot: Snapshot, state: TrainState) -> StateFile:
    members: dict[tuple[int, bool], list[str]] = {}
    for name in snapshot.weights:
        age = (snapshot.optimizer_steps.get(name, 0), name in snapshot.new_names)
        if age != (0, False):
            members.setdefault(age, []).append(name)
    cohorts = tuple(
        Cohort(optimizer_steps=steps, is_new=is_new, names=tuple(_fold(members[steps, is_new])))
        for steps, is_new in sorted(members, reverse=True)
    )
    return StateFile(train=state, loss_scaler=snapshot.loss_scaler, cohorts=cohorts)


def _fold(names: Iterable[str]) -> list[str]:
    """`a.0.b`, `a.1.b`, `a.2.b`, `a.5.b`, `c` -> `a.0-2,5.b`, `c`."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if found is None:
            numbers[name, ""] = []
        else:
            numbers.setdefault((found[1], found[3]), []).append(int(found[2]))
    return [before + _ranges(sorted(found)) + after for (before, after), found in numbers.items()]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1]
    parts = [numbers[i:j] for i, j in pairwise([0, *breaks, len(numbers)])] if numbers else []
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def _unfold(folded: str) -> Iterator[str]:
    """The names that `_fold` made one of."""
    found = re.fullmatch(r"(.*?\.)(\d[\d,-]*)(\..*)", folded)
    if found is None:
        yield folded
        return
    for part in found[2].split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not 0 < len(span) <= MOST_LAYERS:
            raise ValueError(f"{folded!r}: got the range {part}")
        yield from (f"{found[1]}{number}{found[3]}" for number in span)


def _fingerprint(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            digest = hashlib.sha256(file.read())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
