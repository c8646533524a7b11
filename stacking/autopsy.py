"""What is kept of a step whose loss or gradient is no number: RUN_DIR/autopsy/step_XXXXXXXX/.

A committed checkpoint of the state before that step, which changed nothing, with its batches
(batches.safetensors, `rank0/micro0/input_ids` and so on) and report.json. `--resume` never takes
it up; `launch/export.py` and `stacking.checkpoint.Checkpoint` read it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from stacking import distributed
from stacking.batch import MaskedLMBatch
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.engine import TrainEngine
from stacking.errors import CheckpointError, NonFiniteError, everybodys
from stacking.run_folder import write_text

_LISTED_SAMPLES, _LISTED_RANKS = 12, 4


def autopsy(
    folder: Path,
    fault: NonFiniteError,
    engine: TrainEngine,
    state: TrainState,
    batches: Sequence[MaskedLMBatch],
    numbers: dict[str, float | int | None],
) -> NonFiniteError:
    """Save what a step died of; the error to raise, the same on all ranks. Collective.

    Args:
        folder: RUN_DIR/autopsy.
        fault: what the engine said.
        engine: not updated by the step.
        state: before the step.
        batches: this rank's micro batches of the step.
        numbers: more of the step, for report.json.
    """
    found = [
        _Micro(loss, batch.sample_indices.tolist())
        for loss, batch in zip(engine.micro_losses, batches, strict=True)
    ]
    by_rank = distributed.gather_objects(found)
    tensors = distributed.gather_on_main([batch.inputs() for batch in batches])
    snapshot = engine.snapshot()
    step = state.global_step + 1
    tag = f"step_{step:08d}"

    def save() -> str:
        assert snapshot is not None
        assert tensors is not None
        try:
            CheckpointManager(folder, keep_last=10**9).save(tag, snapshot, state)
            named = {
                f"rank{rank}/micro{micro}/{name}": tensor
                for rank, its in enumerate(tensors)
                for micro, batch in enumerate(its)
                for name, tensor in batch.items()
            }
            safetensors.torch.save_file(named, folder / tag / "batches.safetensors")
            ranks = [[micro.row() for micro in its] for its in by_rank]
            report = {"step": step, "fault": str(fault), **numbers, "ranks": ranks}
            write_text(folder / tag / "report.json", json.dumps(report, indent=1) + "\n")
        except (CheckpointError, OSError, SafetensorError) as error:
            return f"It could not be kept for an autopsy: {error}"
        return f"State, batches and a report are in {folder / tag}"

    kept = distributed.on_main(save)
    message = (
        f"step {step}: {fault}{_where(by_rank)}; no weight was changed. {kept}. The same command "
        "goes back to the last checkpoint; if it ends here again, lower learning_rate.peak or "
        "raise warmup_steps, in another folder or with --resume TAG further back"
    )
    return everybodys(NonFiniteError(message))


@dataclass(frozen=True)
class _Micro:
    """One rank's micro batch: its loss (a sum over tokens, nats) and rows."""

    loss: float
    samples: list[int]

    def row(self) -> dict[str, object]:
        loss = self.loss if math.isfinite(self.loss) else str(self.loss)  # JSON has no NaN
        return {"loss": loss, "sample_indices": self.samples}


def _where(by_rank: Sequence[Sequence[_Micro]]) -> str:
    """Ranks and samples whose loss is not finite, or all of the step, as far as a line takes."""
    all_finite = all(math.isfinite(micro.loss) for micros in by_rank for micro in micros)
    parts: list[str] = []
    for rank, micros in enumerate(by_rank):
        bad = [micro for micro in micros if all_finite or not math.isfinite(micro.loss)]
        samples = [sample for micro in bad for sample in micro.samples]
        listed = ", ".join(map(str, samples[:_LISTED_SAMPLES]))
        more = len(samples) - _LISTED_SAMPLES
        if bad and len(parts) < _LISTED_RANKS:
            parts.append(f"on rank {rank} among samples {listed}" + f", {more} more" * (more > 0))
    return " " + "; ".join(parts)
