"""Where a run's first state comes from: nothing, a tag of its own, or another run's step."""

from typing import Protocol

import torch

from stacking import distributed
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import Recipe
from stacking.modeling import BertForPreTraining, init_weights
from stacking.resume import snapshot_for, state_for
from stacking.run_branch import Conditions, Trunk
from stacking.run_data import RunData
from stacking.run_folder import RunFolder, recipe_sha256
from stacking.run_log import RunLog
from stacking.run_saving import RunSaver
from stacking.snapshot import Snapshot


class Origin(Protocol):
    """One way to begin. `state` and `snapshot` are the main rank's alone."""

    def state(self) -> TrainState:
        """Position and counters; UserError where they are not of this recipe."""
        ...

    def snapshot(self) -> Snapshot:
        """Weights and moments."""
        ...

    def announce(self, log: RunLog, state: TrainState) -> None:
        """The rows that the run begins with. Collective."""
        ...


class NewRun:
    """Random weights."""

    def __init__(self, recipe: Recipe, data: RunData) -> None:
        """Of the first stage's size."""
        self._recipe = recipe
        self._data = data

    def state(self) -> TrainState:
        """Nothing is done yet."""
        return TrainState(
            global_step=0,
            stage=0,
            num_hidden_layers=self._recipe.stages[0].num_hidden_layers,
            loader={},
            recipe_sha256=recipe_sha256(self._recipe),
            tokenizer_sha256=self._data.tokenizer_sha256(),
        )

    def snapshot(self) -> Snapshot:
        """Weights by the recipe's seed."""
        model = BertForPreTraining(self._recipe.stage_model(0))
        init_weights(model, torch.Generator().manual_seed(self._recipe.seed))
        return Snapshot({name: p.detach() for name, p in model.named_parameters()})

    def announce(self, log: RunLog, state: TrainState) -> None:
        """The first row."""
        log.run_start(self._data)


class Resumed:
    """A committed tag of the run itself."""

    def __init__(self, recipe: Recipe, manager: CheckpointManager, tag: str) -> None:
        """`manager`: of the run's folder."""
        self._recipe = recipe
        self._manager = manager
        self._tag = tag

    def state(self) -> TrainState:
        """As it was saved."""
        return state_for(self._manager.load(self._tag), self._recipe)

    def snapshot(self) -> Snapshot:
        """As it was saved."""
        return snapshot_for(self._manager.load(self._tag), self._recipe)

    def announce(self, log: RunLog, state: TrainState) -> None:
        """Rows after this step are superseded."""
        log.resume(state, self._tag)


class Branched:
    """A committed step of another run, which has made this recipe's first steps."""

    def __init__(self, recipe: Recipe, data: RunData, trunk: Trunk) -> None:
        """`trunk`: the other run and its step."""
        self._recipe = recipe
        self._data = data
        self._trunk = trunk

    def state(self) -> TrainState:
        """The trunk's, as this run's."""
        return self._trunk.state(self._recipe)

    def snapshot(self) -> Snapshot:
        """The trunk's."""
        return self._trunk.snapshot(self._recipe)

    def announce(self, log: RunLog, state: TrainState) -> None:
        """A first row of its own, then the trunk's."""
        log.run_start(self._data, str(self._trunk))
        distributed.only_on_main(lambda: log.inherit(self._trunk.rows(self._recipe)))
        log.say(f"branching from {self._trunk}, to {self._recipe.total_steps} steps")


class Beginning:
    """Which of them it is: what the user asked for, held against what lies in the run's folder."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        manager: CheckpointManager,
        resume: str,
        trunk: Trunk | None,
    ) -> None:
        """`manager`: of the folder; `resume`: auto, never or a tag; `trunk`: --branch-from."""
        self._recipe = recipe
        self._folder = folder
        self._manager = manager
        self._resume = resume
        self._trunk = trunk

    def check(self, conditions: Conditions) -> None:
        """UserError where the run cannot begin or go on as asked. Reads only; main rank only."""
        self._folder.check(self._recipe, self._resume)
        if self._trunk is not None:
            self._trunk.check(self._folder, self._recipe, conditions)

    def choose_tag(self, saver: RunSaver, log: RunLog) -> str | None:
        """The tag to continue from, None in a new run. Main rank only."""
        if self._resume not in ("auto", "never"):
            if not self._folder.was_rewound_to(self._resume):
                self._manager.rewind(self._resume)
                self._folder.note_rewind(self._resume)
                return self._resume
            log.say(f"this run went back to {self._resume} before and goes on from there; "
                    f"to go back again delete {self._folder.rewound}")  # fmt: skip
        return saver.latest_tag()

    def origin(self, tag: str | None, data: RunData) -> Origin:
        """`tag`: what `choose_tag` said, on every rank."""
        if tag is not None:
            return Resumed(self._recipe, self._manager, tag)
        if self._trunk is not None:
            return Branched(self._recipe, data, self._trunk)
        return NewRun(self._recipe, data)
