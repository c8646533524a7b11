"""Run folders whose comparison has a known answer, written without training."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from stacking.config import Recipe
from stacking.config_loading import merge, resolved_json

SECONDS = {2: 0.125, 3: 0.1875, 4: 0.25, 8: 0.5}  # of a step, by layers
SWITCH = 5.0  # seconds
BATCH, LENGTH = 4, 16
Row = dict[str, object]
Stages = Sequence[tuple[int, int]]  # (layers, steps)


def scratch_law(seconds: float) -> float:
    """The loss that scratch reaches in so many seconds of reference time."""
    return 9.0 - 0.7 * math.log(seconds)


def reference_seconds(stages: Stages) -> float:
    return sum(SECONDS[layers] * steps for layers, steps in stages) + SWITCH * (len(stages) - 1)


def write_run(
    folder: Path,
    stages: Stages,
    final: float | None = None,
    *,
    seed: int = 1,
    changes: Mapping[str, object] | None = None,
    start: Mapping[str, object] | None = None,
    is_finished: bool = True,
) -> Path:
    """A run whose validation loss ends at `final`; by default where scratch's law has it."""
    steps = sum(count for _, count in stages)
    document = {
        "name": folder.name.rpartition("_")[0] or folder.name,
        "model": {"vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2,
                  "num_hidden_layers": stages[-1][0], "max_position_embeddings": LENGTH},
        "data": {"max_seq_length": LENGTH, "max_predictions_per_seq": 3},
        "global_batch_size": BATCH, "seed": seed,
        "learning_rate": {"schedule": "wsd", "peak": 1e-3, "decay_steps": max(1, steps // 5)},
        "stages": [{"num_hidden_layers": layers, "steps": count} for layers, count in stages],
    }  # fmt: skip
    recipe = Recipe.model_validate(merge(document, changes or {}))
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(resolved_json(recipe))
    engines = [{"bf16": {"enabled": True}, "tensorboard": {"output_path": str(folder)}}] * len(
        stages
    )
    (folder / "deepspeed.json").write_text(json.dumps({"stages": engines}))
    loss = scratch_law(reference_seconds(stages)) if final is None else final
    rows = [start_row(folder.name, stages) | dict(start or {}), *stage_rows(stages, loss)]
    if is_finished:
        rows.append({"event": "run_end", "global_step": steps})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start_row(name: str, stages: Stages) -> Row:
    plans = [{"num_hidden_layers": layers, "steps": steps, "num_parameters": 9, "num_trained": 9}
             for layers, steps in stages]  # fmt: skip
    return {
        "event": "run_start", "name": name, "total_steps": sum(steps for _, steps in stages),
        "stages": plans, "world_size": 2, "device": "cpu", "precision": "bf16",
        "unigram_loss": 7.0, "data_fingerprint": 71, "validation_fingerprint": 72,
        "device_name": "a processor", "matmul_flops_per_second": 1e11,
    }  # fmt: skip


def stage_rows(stages: Stages, final: float) -> list[Row]:
    """Ten training rows a stage, one of them slow, and an evaluation at its end."""
    rows: list[Row] = []
    done, elapsed = 0, 0.0
    for stage, (layers, steps) in enumerate(stages):
        if stage:
            rows.append({
                "event": "stage_switch", "global_step": done, "to_stage": stage, "changes": {},
                "operator": "depth stack", "moments": "reset", "loss_before": 5.0,
                "loss_after": 5.5, "max_logit_difference": 1.0, "seconds": SWITCH,
            })  # fmt: skip
        for row in range(1, 11):
            elapsed += steps * SECONDS[layers] / 5  # as slow again as a step of the reference
            slow = 9.0 if row == 1 else 1.0
            rows.append({
                "event": "train", "global_step": done + row * steps // 10, "stage": stage,
                "mlm_loss": final + 1, "lr": 1e-3, "tokens": 1, "tokens_per_second": 10.0,
                "step_seconds": SECONDS[layers] * slow, "elapsed_seconds": elapsed,
            })  # fmt: skip
        done += steps
        is_last = stage == len(stages) - 1
        rows.append({
            "event": "evaluation", "global_step": done, "stage": stage, "val_mlm_accuracy": 0.1,
            "val_mlm_loss": final if is_last else final + 0.5, "elapsed_seconds": elapsed,
        })  # fmt: skip
    return rows


def scratch_runs(folder: Path, lengths: Sequence[int] = (100, 400, 1600)) -> list[Path]:
    return [write_run(folder / f"scratch{n}_1", [(8, n)]) for n in lengths]


GROWN: Stages = [(2, 400), (8, 300)]


def twice_as_fast(folder: Path, error: float = 0.0, seed: int = 1, ratio: float = 2.0) -> Path:
    """A grown run that needs half of scratch's reference time, but for `error` nats."""
    final = scratch_law(ratio * reference_seconds(GROWN)) + error
    return write_run(folder / f"grown_{seed}", GROWN, final, seed=seed)
