"""Where a run's first state comes from: nothing, a tag of its own, or another run's step."""

from typing import Protocol

import torch

from stacking import distributed
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import Recipe
from stacking.modeling import BertForPreTraining, init_weights
from stacking.resume import snapshot_for, state_for
from stacking.run_branch import Trunk
from stacking.run_data import RunData
from stacking.run_folder import recipe_sha256
from stacking.run_log import RunLog
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
