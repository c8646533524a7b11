"""A run's state committed under a tag: ranks compared, state gathered, written, logged."""

import time

from stacking import distributed
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.checkpoint_writer import CheckpointWriter
from stacking.config import Recipe
from stacking.engine import TrainEngine
from stacking.errors import CheckpointError
from stacking.rank_agreement import require_equal
from stacking.run_log import RunLog
from stacking.schedule import stage_start
from stacking.snapshot import Snapshot
from stacking.stage_growth import StageGrowth

DIFFERENT_WEIGHTS = (
    "they should hold the same weights: a device is broken, or hosts of different kinds round "
    "differently (ZeRO 1 to 3 compute each weight on one of them)"
)


class RunSaver:
    """Saves one run; `close` at its end."""

    def __init__(self, recipe: Recipe, manager: CheckpointManager, log: RunLog) -> None:
        """`manager`: of the run's folder."""
        self._recipe = recipe
        self._manager = manager
        self._log = log
        self._writer = CheckpointWriter(manager)

    @property
    def has_failed(self) -> bool:
        """Whether this rank has lost a checkpoint or a row, which `settle` would raise."""
        return self._writer.has_failed or self._log.has_failed

    def save(
        self, engine: TrainEngine, state: TrainState, tag: str, *, wait: bool = False
    ) -> Snapshot | None:
        """Begin to commit `state` under `tag`; with `wait`, return when that is done. Collective.

        Returns the gathered state, on the main rank. Raises CheckpointError, on all ranks, if this
        save, with `wait`, or the one before failed; UserError if ranks that should hold the same
        weights do not, as a broken host or driver can make them.
        """
        began = time.perf_counter()
        self.settle()
        weights = {f"the weights at step {state.global_step}": str(engine.replica_digest())}
        require_equal(weights, DIFFERENT_WEIGHTS)
        snapshot = engine.snapshot()
        if snapshot is not None:
            self._writer.write(tag, snapshot, state)
            self._measure_symmetry(snapshot, state)
        if wait:
            self.settle()
        self._log.save(state, tag, time.perf_counter() - began)
        return snapshot

    def settle(self) -> None:
        """Wait for the save under way; all ranks learn if it, or a row, failed. Collective."""
        distributed.only_on_main(self._writer.settle)
        distributed.only_on_main(self._log.settle)

    def latest_tag(self) -> str | None:
        """The furthest tag that is whole; None in a new run. Main rank only.

        CheckpointError if there are tags and none of them can be read.
        """
        checkpoint, complaints = self._manager.latest_good()
        if complaints and checkpoint is None:
            raise CheckpointError(
                f"--run-dir {self._manager.folder.parent}: none of its checkpoints can be read, so "
                "there is nothing to continue, and runs are never overwritten; give another "
                "folder: " + "; ".join(complaints)
            )
        for complaint in complaints:
            self._log.say(f"skipping a checkpoint: {complaint}")
        if complaints and checkpoint is not None:
            self._manager.rewind(checkpoint.tag)  # or damaged tags would count as the newest
        return None if checkpoint is None else checkpoint.tag

    def _measure_symmetry(self, snapshot: Snapshot, state: TrainState) -> None:
        """Log how alike the copies are that the growth into this stage made of units."""
        steps = state.global_step - stage_start(state.stage, self._recipe.stages)
        if state.stage and steps:
            similarity = StageGrowth(self._recipe, state.stage).similarity(snapshot.weights)
            self._log.symmetry(state, steps, similarity)

    def close(self, at_most: float) -> None:
        """Finish a save that is under way, as after an error; its own fault is but logged.

        `at_most`: seconds to wait for it; a disk may hang.
        """
        self._writer.close(at_most)
