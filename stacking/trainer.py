"""The training loop: a recipe, shards and a DeepSpeed JSON in; a run folder out.

Phases, in order, each able to be the one a run resumes in:
TRAIN a stage -> SAVE its end -> SWITCH to the next -> TRAIN ... -> DONE.
"""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from stacking import distributed, engine, engine_options, metrics
from stacking.autopsy import autopsy
from stacking.checkpoint import CheckpointManager
from stacking.config import Recipe
from stacking.dataset import PretrainingLoader
from stacking.deepspeed_config import (
    Accelerator,
    DeepSpeedConfig,
    ResolvedEngine,
    place_monitors,
    resolve_stages,
)
from stacking.engine import TrainEngine
from stacking.engine_log import log_to
from stacking.errors import ConfigError, NonFiniteError, UserError
from stacking.growth.legality import recipe_faults
from stacking.progress import ProgressReporter
from stacking.rank_agreement import require_equal
from stacking.rank_ledger import EXPECTED_AT_MOST, LEARNING_STEP_AT_MOST, WatchLimits
from stacking.rank_watch import RankWatch, end_process
from stacking.run_branch import Conditions, Trunk
from stacking.run_data import RunData
from stacking.run_folder import RunFolder, recipe_sha256
from stacking.run_log import RunLog
from stacking.run_origin import Beginning, Origin
from stacking.run_saving import RunSaver
from stacking.run_staging import DataPlace, Session
from stacking.run_start import Start
from stacking.schedule import stage_rates, stage_start
from stacking.snapshot import Snapshot
from stacking.stage_switch import SwitchReport, switch_stage
from stacking.stopping import Outcome, StopLimits, StopRequest
from stacking.timetable import Timetable

OUT_OF_MEMORY = (
    "rank {rank} has not enough memory for this model; less is needed with a smaller "
    "train_micro_batch_size_per_gpu, activation_checkpointing, a higher zero_optimization.stage or "
    "more ranks: the same command goes on from the last checkpoint with any of them"
)


class Trainer:
    """Trains all stages of a recipe in one process group, resuming where a run folder stands."""

    def __init__(
        self,
        recipe: Recipe,
        deepspeed_config: DeepSpeedConfig,
        *,
        data_dir: Path,
        stage_data: Path | None = None,
        run_dir: Path,
        resume: str = "auto",
        branch_from: Trunk | None = None,
        start_from: Start | None = None,
        strict_precision: bool = False,
        limits: StopLimits | None = None,
        hang_timeout: float = WatchLimits.hung_after,
    ) -> None:
        """Refuse a growth that is not possible (ConfigError), the same on all ranks.

        `stage_data`: a folder on each node's own disk, for copies of the shards that are read.
        `branch_from`: the run whose first steps a new run takes over.
        `start_from`: the Hugging Face folder with whose weights a new run begins.
        `hang_timeout`: seconds without progress on any rank after which the process ends (exit
        code 4; see rank_watch.py).

        All else is checked in fit(), where all ranks hear of a fault that one of them finds.
        """
        if faults := recipe_faults(recipe):
            raise ConfigError(faults)
        if hang_timeout <= 0:
            raise ConfigError("--hang-timeout: got no time; allowed: more than 0 seconds")
        self.recipe = recipe
        self.folder = RunFolder(run_dir)
        self._deepspeed_config = deepspeed_config
        self._place = DataPlace(data_dir, stage_data)
        self._strict_precision = strict_precision
        self._limits = limits or StopLimits()
        self._timetable = Timetable(recipe)
        self._last_step = self._limits.last_step(recipe.total_steps)
        self._hang_timeout = hang_timeout
        self._watch = RankWatch(WatchLimits(hung_after=hang_timeout), self._end_at_once)
        self._after_watch = ExitStack()  # what is under way and must be finished
        self._manager = CheckpointManager(self.folder.checkpoints, recipe.checkpoint.keep_last)
        self._beginning = Beginning(
            recipe, self.folder, self._manager,
            resume=resume, trunk=branch_from, start=start_from,
        )  # fmt: skip
        self._engine: TrainEngine | None = None
        self._loader: PretrainingLoader | None = None
        self._resolved: list[ResolvedEngine] = []
        self._is_stopping = False

    def fit(self) -> Outcome:
        """Train to the end, to a limit or to the first signal. Collective."""
        owns_group = not distributed.has_group()
        try:
            accelerator = engine.start(self._hang_timeout)
            # The watch would take a main rank that still writes for the last one left.
            with self._after_watch, self._watch:
                return self._fit(accelerator)
        except (MemoryError, RuntimeError) as error:
            if engine.is_out_of_memory(error):
                raise UserError(OUT_OF_MEMORY.format(rank=distributed.rank())) from error
            raise
        finally:
            # Also after a fault: a thread that still reads while Python ends aborts the process.
            if self._loader is not None:
                self._loader.close()
            if owns_group:
                distributed.shut_down()

    def _end_at_once(self, code: int) -> None:
        """End this process, for the watch: the main thread may wait in a collective for ever.

        A save under way is finished: it holds what the lost rank took part in.
        """
        try:
            self._after_watch.close()
        finally:  # whatever the save met: nobody else ends this process
            end_process(code)

    def _fit(self, accelerator: Accelerator) -> Outcome:
        self._watch.mark(0, "checking data and settings")
        self._place.open()
        distributed.together(lambda: self._prepare(accelerator))
        self._resolved = engine_options.settle(self._resolved, engine.current_device())
        require_equal(self._what_ranks_share())
        self._watch.mark(0, "checking the run folder", EXPECTED_AT_MOST)
        distributed.on_main(self._enter_folder)
        stages = len(self.recipe.stages)
        with (
            ProgressReporter(self.recipe.total_steps, stages) as progress,
            StopRequest(self._limits.seconds) as self._stop,
        ):
            self._log = RunLog(
                self.recipe,
                self.folder,
                progress,
                device=engine.current_device(),
                precision=self._resolved[0].precision,
            )
            self._saver = RunSaver(self.recipe, self._manager, self._log)
            self._after_watch.callback(self._saver.close, EXPECTED_AT_MOST)
            outcome = self._run()
            if self._engine is not None:
                self._engine.destroy()
                self._engine = None
            return outcome

    def _what_ranks_share(self) -> dict[str, str]:
        """What must be equal on all ranks, shortly."""
        settings = json.dumps([stage.deepspeed for stage in self._resolved], sort_keys=True)
        return {
            "the recipe": recipe_sha256(self.recipe)[:12],
            "the DeepSpeed JSON": hashlib.sha256(settings.encode()).hexdigest()[:12],
            "the training shards": str(self._data.fingerprint),
            "the validation shards": str(self._data.validation_fingerprint),
            "the versions of torch, DeepSpeed and this trainer": engine.versions(),
        }

    def _prepare(self, accelerator: Accelerator) -> None:
        """Check data and engine settings; reads only."""
        self._data = RunData(self.recipe, self._place.folder)
        resolved = resolve_stages(
            self._deepspeed_config,
            self.recipe,
            world_size=distributed.world_size(),
            accelerator=accelerator,
            strict_precision=self._strict_precision,
        )
        self._resolved = [place_monitors(stage, self.folder.path) for stage in resolved]

    def _enter_folder(self) -> None:
        device, ranks = engine.current_device().type, distributed.world_size()
        conditions = Conditions(self._data.fingerprint, device, ranks, self._resolved)
        self._beginning.enter(conditions, self._data)
        log_to(self.folder.log)

    def _run(self) -> Outcome:
        for notice in dict.fromkeys(line for r in self._resolved for line in r.notices):
            self._log.say(notice)
        self._watch.mark(0, "looking for a checkpoint", EXPECTED_AT_MOST)
        tag = distributed.on_main(lambda: self._beginning.choose_tag(self._saver, self._log))
        origin = self._beginning.origin(tag, self._data)
        self._session_began = time.perf_counter()
        self._state = distributed.on_main(origin.state)
        if self._state.global_step >= self.recipe.total_steps:
            return self._done()
        if self._state.global_step >= self._last_step or not self._stage_data():
            return self._stopped()
        self._begin(origin)
        last_stage = len(self.recipe.stages) - 1
        while self._train_stage():
            if self._state.stage == last_stage:
                self._save(f"stage{last_stage + 1}_end", wait=True)
                return self._done()
            if self._is_stopping:
                self._save(f"stage{self._state.stage + 1}_end", wait=True)
                break
            self._switch(self._leave_stage)
        return self._stopped()

    def _stage_data(self) -> bool:
        """Copy what this session reads to each node; False if a rank wants to stop before."""
        step = self._state.global_step
        session = Session(
            mark=lambda: self._watch.mark(step, "staging data", EXPECTED_AT_MOST),
            say=self._log.say,
            is_stopping=lambda: self._stop.is_requested,
        )
        return self._place.fill(lambda: self._data.shards_read(step, self._last_step), session)

    def _done(self) -> Outcome:
        self._log.run_end(self._state)
        self._saver.settle()
        return Outcome.DONE

    def _stopped(self) -> Outcome:
        step = self._state.global_step
        self._log.say(f"stopped after step {step}, everything is saved; the same command continues")
        return Outcome.STOPPED

    # -- beginning and resuming ----------------------------------------------------------------

    def _begin(self, origin: Origin) -> None:
        """Build the engine that goes on from `origin`; the main rank alone reads."""
        origin.announce(self._log, self._state)

        def take() -> Snapshot | None:
            return distributed.only_on_main(origin.snapshot)

        if self._state.global_step == stage_start(self._state.stage + 1, self.recipe.stages):
            self._switch(lambda report: take())
        else:
            self._build(take())

    def _build(self, snapshot: Snapshot | None) -> TrainEngine:
        """Make the engine and the loader of the current stage, from the main rank's snapshot."""
        self._watch.mark(self._state.global_step, "building", EXPECTED_AT_MOST)
        stage = self._state.stage
        resolved = self._resolved[stage]
        config = self.recipe.stage_model(stage)
        freeze = self.recipe.stages[stage].freeze
        self._engine = TrainEngine(config, self.recipe.optimizer, resolved, snapshot, freeze)
        self._engine.restore_counters(self._state.global_step, self.recipe.global_batch_size)
        self._loader = self._data.loader(stage, resolved.micro_batch_size)
        if self._state.loader:
            self._loader.load_state_dict(self._state.loader)
        return self._engine

    # -- one stage -----------------------------------------------------------------------------

    def _train_stage(self) -> bool:
        """Train to the stage's last step; False if a signal or a limit came first."""
        assert self._engine is not None
        device = self._engine.device
        end = stage_start(self._state.stage + 1, self.recipe.stages)
        window = metrics.Window(device)
        log_every = self._resolved[self._state.stage].log_every
        while self._state.global_step < end:
            stop = self._train_step(window, device)
            step = self._state.global_step
            due = self._timetable.after(step)
            is_limit = step == self._limits.steps
            is_logged = step % log_every == 0 or due.evaluates or due.saves or is_limit
            # On a GPU the wish to stop is read only where the host waits anyway.
            is_read = device.type == "cpu" or is_logged
            self._is_stopping = is_limit or (is_read and bool(stop.item() > 0))
            is_stopping = self._is_stopping and step < end
            if is_logged or is_stopping:
                self._log_window(window)
            if due.evaluates:
                self._evaluate()
            if (due.saves and step < end) or is_stopping:
                self._save(due.tag, wait=is_stopping)
            if due.evaluates or due.saves:
                window.restart()  # neither is training time
            if is_stopping:
                return False
        return True

    def _train_step(self, window: metrics.Window, device: torch.device) -> torch.Tensor:
        """One optimizer step; returns how many ranks want to stop, on the device."""
        assert self._engine is not None
        assert self._loader is not None
        step = self._state.global_step
        self._watch.mark(step + 1, "reading data")
        began = time.perf_counter()
        digest = self._loader.sample_hash(step)
        batches = next(self._loader)
        waited = time.perf_counter() - began
        self._watch.mark(step + 1, "training")
        masked = sum(batch.num_masked for batch in batches)
        sequences = sum(len(batch.input_ids) for batch in batches)
        stops = self._stop.is_requested or self._saver.has_failed
        wish = torch.tensor([masked, sequences, float(stops)])
        counts = distributed.sum_over_ranks(distributed.to_device(wish, device))
        rate, new_rate = stage_rates(self.recipe, step)
        seed = self.recipe.seed + step
        try:
            totals = self._engine.train_step(
                batches,
                learning_rate=rate,
                new_learning_rate=new_rate,
                counts=counts[:2].clamp(min=1),
                seed=seed,
            )
        except NonFiniteError as fault:
            numbers = {"lr": rate, "dropout_seed": seed, "grad_norm": self._engine.grad_norm,
                       "loss_scale": self._engine.loss_scale}  # fmt: skip
            raise autopsy(
                self.folder.autopsy, fault, self._engine, self._state, batches, numbers
            ) from fault
        window.add(totals, batches, waited)
        chained = hashlib.sha256((self._state.sample_hash + digest).encode()).hexdigest()[:16]
        self._update(
            global_step=step + 1, sample_hash=chained, loader=dict(self._loader.state_dict())
        )
        return counts[2]

    def _log_window(self, window: metrics.Window) -> None:
        assert self._engine is not None
        engine.synchronize()
        rates = window.take()
        self._update(
            tokens=self._state.tokens + rates.tokens,
            real_tokens=self._state.real_tokens + rates.real_tokens,
        )
        self._log.train(self._engine, self._state, rates, self._elapsed())

    def _evaluate(self) -> None:
        assert self._engine is not None
        self._watch.mark(self._state.global_step, "evaluating", EXPECTED_AT_MOST)
        totals = self._engine.evaluate(self._data.validation(self._state.stage)).tolist()
        self._log.evaluation(self._engine, self._state, totals, self._elapsed())

    # -- saving and switching ------------------------------------------------------------------

    def _save(self, tag: str, *, wait: bool = False) -> Snapshot | None:
        """Begin to commit the current state under `tag`; see RunSaver.save."""
        assert self._engine is not None
        self._watch.mark(self._state.global_step, "saving", EXPECTED_AT_MOST)
        self._update(elapsed_seconds=self._elapsed())
        self._session_began = time.perf_counter()
        return self._saver.save(self._engine, self._state, tag, wait=wait)

    def _leave_stage(self, report: SwitchReport) -> Snapshot | None:
        """Save the stage's end and tear its engine down."""
        assert self._engine is not None
        assert self._loader is not None
        with report.timed("save"):
            snapshot = self._save(f"stage{self._state.stage + 1}_end", wait=True)
        with report.timed("tear_down"):
            self._loader.close()
            self._engine.destroy()
            self._engine = None
        return snapshot

    def _switch(self, take: Callable[[SwitchReport], Snapshot | None]) -> None:
        """Grow into the next stage; `take` hands over the old stage's state."""
        began = time.perf_counter()
        self._watch.mark(self._state.global_step, "growing", EXPECTED_AT_MOST)
        to_stage = self._state.stage + 1
        probe = self._data.probe(to_stage, engine.current_device())
        learned = self.recipe.stages[to_stage].learned
        if learned is not None:
            at_most = EXPECTED_AT_MOST + learned.steps * LEARNING_STEP_AT_MOST
            self._watch.mark(self._state.global_step, "learning growth", at_most)
            self._log.say(f"learning a growth map in {learned.steps} steps on the main rank")

        def build(snapshot: Snapshot | None) -> TrainEngine:
            layers = self.recipe.stages[to_stage].num_hidden_layers
            self._update(stage=to_stage, num_hidden_layers=layers)
            return self._build(snapshot)

        _, report = switch_stage(self.recipe, to_stage, take, build, probe)
        report.seconds = time.perf_counter() - began
        # Before the tag: a kill between the two repeats the row, the other order would lose it.
        self._log.stage_switch(self._state, report)
        self._save(f"stage{to_stage + 1}_begin")

    # -- accounts ------------------------------------------------------------------------------

    def _update(self, **changes: object) -> None:
        self._state = self._state.model_copy(update=changes)

    def _elapsed(self) -> float:
        return self._state.elapsed_seconds + time.perf_counter() - self._session_began
