"""--start-from HF_DIR: the Hugging Face folder whose weights a run begins with.

What the run keeps of it is in its first row; the folder is read once, before the run's first step.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor
from typing_extensions import Self

from stacking.config import Recipe
from stacking.errors import ConfigError, UserError
from stacking.metrics import last_row
from stacking.run_data import RunData
from stacking.run_folder import RunFolder

_FOLDER, _SHA256 = "start_from", "start_sha256"


@dataclass(frozen=True)
class FirstWeights:
    """What lay in the folder, as the recipe's first stage has it.

    Attributes:
        weights: fp32, by the names of BertForPreTraining's parameters.
        sha256: of what the folder holds of them, whatever its file format.
        notes: what begins at BERT's initialisation or was left out, and what was not checked.
    """

    weights: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Start:
    """The folder to begin from."""

    folder: Path
    sha256: str = ""
    """That its weights must have, as another run began with them; "": any."""

    @classmethod
    def at(cls, text: str) -> Self:
        """HF_DIR of the command line."""
        return cls(Path(text))

    @classmethod
    def of_run(cls, run_dir: Path) -> Self | None:
        """Where that run's weights began; None: at random ones, or it has not begun."""
        begun = recorded_start(run_dir)
        return cls(Path(begun[_FOLDER]), begun[_SHA256]) if begun else None

    def check_began_here(self, own: RunFolder) -> None:
        """ConfigError where the run in `own`, which goes on, began otherwise."""
        if last_row(own.metrics, "run_start") is None:
            return
        began = recorded_start(own.path).get(_FOLDER)
        if began and Path(began).resolve() == self.folder.resolve():
            return
        raise ConfigError(
            f"--start-from {self.folder}: the run in --run-dir {own.path} began from "
            f"{began or 'random weights'}; leave --start-from away to continue it, or give another "
            "--run-dir"
        )

    def read(self, recipe: Recipe, data: RunData) -> FirstWeights:
        """The folder's weights. Reads only.

        UserError where they are not those of the recipe's first stage, were trained with another
        vocabulary than that of `data`, or are not those of `sha256`.
        """
        # Only the rank that reads, of the runs that begin so, spends seconds on transformers.
        room = importlib.import_module("stacking.hf_start")
        found = cast(FirstWeights, room.first_weights(self.folder, recipe, data))
        if self.sha256 and found.sha256 != self.sha256:
            raise UserError(
                f"--start-from {self.folder}: its weights have changed since the run that this one "
                f"is a branch of began with them (sha256 {found.sha256[:12]}, then "
                f"{self.sha256[:12]}); put them back"
            )
        return found

    def row(self, found: FirstWeights) -> dict[str, object]:
        """What the run's first row tells."""
        return {_FOLDER: str(self.folder), _SHA256: found.sha256}


def recorded_start(run_dir: Path) -> Mapping[str, str]:
    """What a run's first row tells of its first weights; empty where they were random."""
    start = last_row(RunFolder(run_dir).metrics, "run_start") or {}
    return {key: str(start[key]) for key in (_FOLDER, _SHA256)} if start.get(_FOLDER) else {}
