"""Where a run's first state comes from: nothing, a folder, a tag of its own, another run's step."""

from typing import Protocol

import torch

from stacking import distributed
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import Recipe
from stacking.errors import ConfigError
from stacking.modeling import BertForPreTraining, init_weights
from stacking.resume import snapshot_for, state_for
from stacking.run_branch import Conditions, Trunk
from stacking.run_data import RunData
from stacking.run_folder import RunFolder, recipe_sha256
from stacking.run_log import RunLog
from stacking.run_saving import RunSaver
from stacking.run_start import FirstWeights, Start, recorded_start
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


class Continued(NewRun):
    """A new run with the weights of a Hugging Face folder."""

    def __init__(
        self, recipe: Recipe, data: RunData, start: Start, found: FirstWeights | None
    ) -> None:
        """`found`: what `start` has, the main rank's alone."""
        super().__init__(recipe, data)
        self._start = start
        self._found = found

    def snapshot(self) -> Snapshot:
        """The folder's weights; they are handed over."""
        assert self._found is not None, "read by the main rank before the run began"
        weights, self._found = self._found.weights, None
        return Snapshot(weights)

    def announce(self, log: RunLog, state: TrainState) -> None:
        """A first row that names the folder, and what is to be told of it."""
        found = self._found
        log.run_start(self._data, None if found is None else self._start.row(found))
        log.say(f"beginning with the weights of {self._start.folder}")
        for note in () if found is None else found.notes:
            log.say(f"{self._start.folder}: {note}")


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
        begun = distributed.only_on_main(lambda: recorded_start(self._trunk.folder)) or {}
        log.run_start(self._data, {"branch_from": str(self._trunk), **begun})
        distributed.only_on_main(lambda: log.inherit(self._trunk.rows(self._recipe)))
        log.say(f"branching from {self._trunk}, to {self._recipe.total_steps} steps")


class Beginning:
    """Which of them it is: what the user asked for, held against what lies in the run's folder."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        manager: CheckpointManager,
        *,
        resume: str,
        trunk: Trunk | None,
        start: Start | None,
    ) -> None:
        """`manager`: of the folder; `resume`: auto, never or a tag.

        ConfigError where a new run would begin both with a step of `trunk` and with `start`.
        """
        if trunk is not None and start is not None:
            raise ConfigError(
                f"--start-from: got {start.folder} with --branch-from {trunk}; allowed: one of "
                "them, as a branch begins with its trunk's weights"
            )
        self._start = start
        self._first: FirstWeights | None = None  # once they are checked; the main rank's alone
        self._recipe = recipe
        self._folder = folder
        self._manager = manager
        self._resume = resume
        self._trunk = trunk

    def enter(self, conditions: Conditions, data: RunData) -> None:
        """Make, mend and lock the folder; the main rank's alone, or ranks would race.

        UserError, and nothing is made, where the run cannot begin or go on as asked.
        """
        self._check(conditions, data)
        self._folder.create(self._recipe, data.folder)
        self._folder.write_deepspeed([engine.deepspeed for engine in conditions.engines])
        self._manager.mend()

    def _check(self, conditions: Conditions, data: RunData) -> None:
        self._folder.check(self._recipe, self._resume)
        if self._trunk is not None:
            self._trunk.check(self._folder, self._recipe, conditions)
        if self._start is not None:
            if self._folder.has_begun():
                self._start.check_began_here(self._folder)
            else:
                self._first = self._start.read(self._recipe, data)

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
        if self._start is not None:
            first, self._first = self._first, None
            return Continued(self._recipe, data, self._start, first)
        return NewRun(self._recipe, data)
