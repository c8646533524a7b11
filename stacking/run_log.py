"""What a run writes and says: rows of metrics.jsonl, monitor events, and lines for people."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from stacking import distributed, metrics
from stacking.checkpoint import TrainState
from stacking.config import BertConfig, Recipe, Stage
from stacking.cost import num_parameters, trained_parameters, training_flops
from stacking.engine import TrainEngine, versions
from stacking.progress import ProgressReporter
from stacking.run_data import RunData
from stacking.run_folder import RunFolder
from stacking.schedule import stage_rates, stage_start
from stacking.stage_switch import SwitchReport

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
}

LOCKED, STEPS_TO_COME_APART = 0.9999, 50
"""Copies of a unit whose cosine is above LOCKED after so many steps do not come apart."""


class RunLog:
    """One run's record; rows are written by the main rank only."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        progress: ProgressReporter,
        *,
        device: torch.device,
        precision: str,
    ) -> None:
        """Open metrics.jsonl for appending and measure what `mfu` is a share of."""
        self._recipe = recipe
        self._path = folder.metrics
        self._log = metrics.MetricsLog(folder.metrics)
        self._progress = progress
        self._device = device
        self._precision = precision
        rate = metrics.measure_matmul_flops(device, _DTYPES[precision])
        self._peak_flops = rate * distributed.world_size()

    @property
    def has_failed(self) -> bool:
        """Whether a row was lost, which `settle` would raise."""
        return self._log.has_failed

    def settle(self) -> None:
        """UserError if a row could not be written."""
        self._log.settle()

    def say(self, line: str) -> None:
        """One line to the user."""
        self._progress.say(line)

    def run_start(self, data: RunData, origin: Mapping[str, object] | None = None) -> None:
        """The first row; rows of an attempt that left no checkpoint go.

        `origin`: what it tells of where the run began, if not by itself at random weights.
        """
        self._log.clear()
        recipe = self._recipe
        models = [recipe.stage_model(stage) for stage in range(len(recipe.stages))]
        self._log.write("run_start", {
            "name": recipe.name, "total_steps": recipe.total_steps,
            "stages": [_stage_row(model, stage)
                       for model, stage in zip(models, recipe.stages, strict=True)],
            "world_size": distributed.world_size(), "device": str(self._device),
            "device_name": metrics.device_name(self._device),
            "precision": self._precision, "unigram_loss": data.unigram_loss(),
            "data_fingerprint": data.fingerprint,
            "validation_fingerprint": data.validation_fingerprint,
            "matmul_flops_per_second": self._peak_flops, "versions": versions(),
            **(origin or {}),
        })  # fmt: skip

    def inherit(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Rows of the trunk, as they are."""
        for row in rows:
            self._log.write(str(row["event"]), {k: v for k, v in row.items() if k != "event"})

    def resume(self, state: TrainState, tag: str) -> None:
        """A new process goes on; rows after this step supersede older ones."""
        self._log.write("resume", {"global_step": state.global_step, "tag": tag})
        self.say(f"resuming from {tag} at step {state.global_step} of {self._recipe.total_steps}")

    def train(
        self, engine: TrainEngine, state: TrainState, rates: metrics.WindowRates, elapsed: float
    ) -> None:
        """The steps since the last such row."""
        loss = rates.mlm_loss + rates.nsp_loss
        step, recipe = state.global_step, self._recipe
        rate, new_rate = stage_rates(recipe, step - 1)
        per_second = rates.real_tokens / rates.seconds
        freeze = recipe.stages[state.stage].freeze
        data = recipe.stage_data(state.stage)
        flops = metrics.model_flops(engine.config, data, rates, freeze)
        self._log.write("train", {
            "global_step": step, "stage": state.stage,
            "num_hidden_layers": state.num_hidden_layers, "lr": rate, "new_lr": new_rate,
            "loss": loss, "mlm_loss": rates.mlm_loss, "nsp_loss": rates.nsp_loss,
            "mlm_accuracy": rates.mlm_accuracy, "tokens": state.tokens,
            "real_tokens": state.real_tokens, "step_seconds": rates.seconds / rates.steps,
            "tokens_per_second": per_second, "model_flops": flops,
            "mfu": flops / rates.seconds / self._peak_flops,
            "data_wait_seconds": rates.data_wait_seconds / rates.steps,
            "elapsed_seconds": elapsed, "loss_scale": engine.loss_scale,
            "skipped_steps": engine.skipped_steps, "grad_norm": engine.grad_norm,
            **engine.cohort_grad_norms, "sample_hash": state.sample_hash,
        })  # fmt: skip
        named = {"loss": loss, "lr": rate, "tokens_per_second": per_second}
        engine.write_monitor([(f"Train/{name}", value, step) for name, value in named.items()])
        numbers = f"loss {loss:.3f}  lr {rate:.2e}  {per_second:,.0f} tokens/s"
        left = self._seconds_left(step, state.stage, rates.seconds / rates.steps)
        self._progress.step(step, state.stage, state.num_hidden_layers, numbers, left)

    def _seconds_left(self, step: int, stage: int, step_seconds: float) -> float:
        """Time of the steps to come, if each stage's steps cost what their FLOPs say."""
        recipe = self._recipe
        flops = [_sequence_flops(recipe, index) for index in range(len(recipe.stages))]
        here = (stage_start(stage + 1, recipe.stages) - step) * flops[stage]
        later = range(stage + 1, len(flops))
        to_come = here + sum(recipe.stages[s].steps * flops[s] for s in later)
        return step_seconds * to_come / flops[stage]

    def evaluation(
        self, engine: TrainEngine, state: TrainState, totals: Sequence[float], elapsed: float
    ) -> None:
        """`totals`: sums of TrainEngine.evaluate."""
        mlm, nsp, correct, masked, sequences = totals
        val_mlm, val_nsp = mlm / max(1, masked), nsp / max(1, sequences)
        accuracy = correct / max(1, masked)
        self._log.write("evaluation", {
            "global_step": state.global_step, "stage": state.stage,
            "num_hidden_layers": state.num_hidden_layers, "val_loss": val_mlm + val_nsp,
            "val_mlm_loss": val_mlm, "val_nsp_loss": val_nsp, "val_mlm_accuracy": accuracy,
            "tokens": state.tokens, "elapsed_seconds": elapsed,
            "residual_rms": engine.residual_rms,
        })  # fmt: skip
        engine.write_monitor([("Validation/mlm_loss", val_mlm, state.global_step)])
        self.say(f"step {state.global_step}: validation MLM loss {val_mlm:.3f}, "
                 f"accuracy {accuracy:.1%}")  # fmt: skip

    def stage_switch(self, state: TrainState, report: SwitchReport) -> None:
        """A growth."""
        self._log.write("stage_switch", {"global_step": state.global_step, **report.row()})
        self.say(
            f"step {state.global_step}: grown, {report.summary}, in {report.seconds:.1f} s; "
            f"probe loss {report.loss_before:.3f} -> {report.loss_after:.3f}"
        )
        if report.warning:
            self.say(f"warning: {report.warning}")

    def save(self, state: TrainState, tag: str, stall_seconds: float) -> None:
        """A checkpoint; `stall_seconds`: what training waited for it. Writing may still go on."""
        self._log.write("save", {
            "global_step": state.global_step, "tag": tag, "stall_seconds": stall_seconds,
        })  # fmt: skip

    def symmetry(self, state: TrainState, steps: int, similarity: dict[str, float]) -> None:
        """How alike duplicated units are, `steps` steps after they were made."""
        if not similarity:
            return
        self._log.write("symmetry", {
            "global_step": state.global_step, "stage": state.stage, "steps_in_stage": steps,
            "duplicate_similarity": similarity,
        })  # fmt: skip
        locked = [kind for kind, cosine in similarity.items() if cosine > LOCKED]
        if locked and steps >= STEPS_TO_COME_APART:
            self.say(
                f"warning: step {state.global_step}: {steps} steps after growth the copies of "
                f"{', '.join(locked)} units are still equal (cosine above {LOCKED}), so the width "
                "is wasted; use an operator that breaks the symmetry, such as ffn 'split' or "
                "hidden 'uneven'"
            )

    def run_end(self, state: TrainState) -> None:
        """The closing row, once, and the result in one line."""
        if not distributed.is_main():
            return
        start = metrics.last_row(self._path, "run_start") or {}
        final = metrics.last_row(self._path, "evaluation") or {}
        newest = metrics.last_row(self._path)
        if newest is None or newest["event"] != "run_end":
            self._log.write("run_end", {
                "global_step": state.global_step, "final_val_loss": final.get("val_loss"),
                "val_mlm_loss": final.get("val_mlm_loss"),
                "unigram_loss": start.get("unigram_loss"),
                "elapsed_seconds": state.elapsed_seconds,
            })  # fmt: skip
        self.say(
            f"done: {state.global_step} steps, {state.tokens:,} tokens, "
            f"{state.elapsed_seconds:.0f} s; "
            f"validation MLM loss {_nats(final.get('val_mlm_loss'))}, "
            f"unigram frequencies {_nats(start.get('unigram_loss'))}"
        )


def _stage_row(model: BertConfig, stage: Stage) -> dict[str, int]:
    return {
        "num_hidden_layers": model.num_hidden_layers,
        "steps": stage.steps,
        "num_parameters": num_parameters(model),
        "num_trained": trained_parameters(model, stage.freeze),
    }


def _nats(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "unknown"


def _sequence_flops(recipe: Recipe, stage: int) -> int:
    """FLOPs of training on one sequence in `stage`."""
    data = recipe.stage_data(stage)
    sizes = data.max_seq_length, data.max_predictions_per_seq
    return training_flops(recipe.stage_model(stage), 1, *sizes, freeze=recipe.stages[stage].freeze)
