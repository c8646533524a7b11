"""RUN@STEP: the committed step of another run at which a run begins, without copying it.

Nothing of the trunk is changed. Its rows up to the step become the branch's first ones, so that a
branch's folder tells the whole run that its recipe describes, with all that it cost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import Self

from stacking.branches import history_faults
from stacking.checkpoint import Checkpoint, CheckpointManager, TrainState
from stacking.config import Recipe
from stacking.config_loading import JsonObject, read_json_object
from stacking.deepspeed_config import ResolvedEngine, resolved_precision
from stacking.errors import CheckpointError, ConfigError, UserError
from stacking.metrics import last_row
from stacking.report_metrics import Row, read_metrics, read_rows
from stacking.resume import snapshot_for, state_for
from stacking.run_folder import RunFolder, recipe_sha256
from stacking.schedule import stage_at
from stacking.snapshot import Snapshot

_INHERITED = ("train", "evaluation", "stage_switch", "symmetry", "save", "resume")


@dataclass(frozen=True)
class Conditions:
    """What a run trains on and with, besides its recipe."""

    data_fingerprint: int  # of the training data
    device: str  # "cpu" or "cuda"
    num_ranks: int
    engines: Sequence[ResolvedEngine]  # one a stage


@dataclass(frozen=True)
class Trunk:
    """Where a branch leaves."""

    folder: Path
    step: int  # optimizer steps done

    @classmethod
    def parse(cls, text: str) -> Self:
        """RUN_DIR@STEP; ConfigError otherwise."""
        folder, _, step = text.rpartition("@")
        if not folder or not step.isdecimal() or not 0 < int(step) < 2**40:
            raise ConfigError(
                f"--branch-from: got {text!r}; allowed: RUN_DIR@STEP, a run's folder and one of "
                "its saved steps, such as runs/trunk@12000"
            )
        return cls(Path(folder), int(step))

    def __str__(self) -> str:
        """As on the command line."""
        return f"{self.folder}@{self.step}"

    def check(self, own: RunFolder, recipe: Recipe, conditions: Conditions) -> None:
        """Refuse what cannot begin in `own` from here, or began there otherwise. Reads only.

        UserError where the trunk's steps are not the recipe's own first ones, made under other
        conditions, or not saved, and where `own` holds a run that did not begin here.
        """
        if own.has_begun():
            self._check_began_here(own)
            return
        checkpoint = self._checkpoint(recipe)
        if faults := list(self._other_conditions(recipe, conditions)):
            raise ConfigError(
                f"--branch-from {self}: the trunk's steps become this run's own, so they must be "
                "made alike: " + "; ".join(faults)
            )
        state_for(checkpoint, recipe)
        checkpoint.verify()

    def state(self, recipe: Recipe) -> TrainState:
        """What a run of `recipe` begins with, once `check` has found nothing."""
        state = state_for(self._checkpoint(recipe), recipe)
        return state.model_copy(update={"recipe_sha256": recipe_sha256(recipe)})

    def snapshot(self, recipe: Recipe) -> Snapshot:
        """Weights and moments there."""
        return snapshot_for(self._checkpoint(recipe), recipe)

    def rows(self, recipe: Recipe) -> list[Row]:
        """The trunk's rows of metrics.jsonl until there."""
        stage = _stage_before(recipe, self.step)
        return [
            row
            for row in read_rows(self._metrics)
            if row["event"] in _INHERITED
            and _number(row, "global_step") <= self.step
            and _number(row, "stage", "to_stage") <= stage
        ]

    @property
    def _metrics(self) -> Path:
        return RunFolder(self.folder).metrics

    def _check_began_here(self, own: RunFolder) -> None:
        """Of a run that goes on. One that lies in its trunk's folder may be moved with it."""
        start = last_row(own.metrics, "run_start")
        if start is None:
            return
        began = str(start.get("branch_from", ""))
        folder, _, step = began.rpartition("@")
        is_inside = self.folder.resolve() in own.path.resolve().parents
        if step == str(self.step) and (
            is_inside or Path(folder).resolve() == self.folder.resolve()
        ):
            return
        raise ConfigError(
            f"--branch-from {self}: the run in --run-dir {own.path} began "
            + (f"from {began}" if began else "by itself")
            + "; leave --branch-from away to continue it, or give another folder"
        )

    def _other_conditions(self, recipe: Recipe, ours: Conditions) -> Iterator[str]:
        """How the trunk was trained otherwise, by its first row and its DeepSpeed JSON."""
        start = read_metrics(self._metrics).start
        if start.data_fingerprint not in (None, ours.data_fingerprint):
            yield (
                f"was trained on other data (fingerprint {start.data_fingerprint}, of --data "
                f"{ours.data_fingerprint}); give the trunk's data"
            )
        device = "cpu" if start.device.startswith("cpu") else "cuda"
        given: list[tuple[str, object, object]] = [
            ("device", ours.device, device),
            ("number of ranks", ours.num_ranks, start.world_size),
            ("precision", ours.engines[0].precision, start.precision),
        ]
        for stage in range(_stage_before(recipe, self.step) + 1):
            engine, of_trunk = ours.engines[stage].deepspeed, self._engine(stage)
            place = f"of stages.{stage}"
            given.append((f"optimizer {place}", _optimizer(engine), _optimizer(of_trunk)))
            if stage:  # the first row tells the first one's
                precisions = resolved_precision(engine), resolved_precision(of_trunk)
                given.append((f"precision {place}", *precisions))
        for what, got, allowed in given:
            if got != allowed:
                yield f"{what}: got {got}; allowed: {allowed}"

    def _engine(self, stage: int) -> JsonObject:
        """What the trunk's stage (0-based) ran with."""
        path = RunFolder(self.folder).deepspeed
        stages = read_json_object(path).get("stages")
        engine = stages[stage] if isinstance(stages, list) and stage < len(stages) else None
        if not isinstance(engine, dict):
            raise UserError(f"{path}: has no stage {stage} (from 0); was it edited?")
        return engine

    def _checkpoint(self, recipe: Recipe) -> Checkpoint:
        """The committed step."""
        folder = RunFolder(self.folder)
        if not folder.recipe.is_file():
            raise ConfigError(f"--branch-from {self}: {self.folder} is no run of this trainer")
        if faults := history_faults(folder.own_recipe(), recipe, self.step):
            raise ConfigError(
                f"--branch-from {self}: its first {self.step} steps are not those of this recipe: "
                + "; ".join(faults)
            )
        saved = CheckpointManager(folder.checkpoints).committed()
        stage = _stage_before(recipe, self.step)
        at = [c for c in saved if (c.state.global_step, c.state.stage) == (self.step, stage)]
        if not at:
            steps = ", ".join(str(step) for step in sorted({c.state.global_step for c in saved}))
            raise CheckpointError(
                f"--branch-from {self}: no checkpoint of step {self.step} is there; saved steps: "
                f"{steps or 'none'}; to keep more, raise checkpoint.keep_last or state the "
                "branches in the trunk's recipe"
            )
        return at[0]


def _optimizer(engine: JsonObject) -> str:
    block = engine.get("optimizer")
    return str(block.get("type")) if isinstance(block, dict) else "Muon or apex's LAMB"


def _stage_before(recipe: Recipe, step: int) -> int:
    """The stage that made the last step before."""
    return stage_at(step - 1, recipe.stages).stage


def _number(row: Row, *names: str) -> int:
    found = next((row[name] for name in names if name in row), 0)
    if type(found) is not int:
        raise UserError(f"metrics.jsonl: got {found!r} for {names[0]}; was it edited?")
    return found
