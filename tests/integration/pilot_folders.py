"""Pilot runs with known curves, written without training: what a plan must find in them is known.

A model from scratch follows one law at the constant rate; the small one comes down faster for each
second, and lags behind it for each step; a grown one lags by a fixed gap, until it has mixed.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from run_folders import SECONDS, SWITCH, Row, Stages, start_row, write_run

T_MIX, GAP, EVERY = 200, 0.3, 50  # steps, nats, steps
WARMUP, DECAY = 0.05, 0.2  # shares of a pilot's steps
Law = Callable[[int, int], float]  # of stage (0-based) and step, nats


def scratch_loss(step: int) -> float:
    """Of the target, in nats."""
    return float(3 + 6 * (1 + step / 50) ** -0.5)


def small_loss(step: int) -> float:
    """Of the small model: behind the target by a gap that rises from 0 to 1."""
    return scratch_loss(step) + step / (step + 1000)


def grown_loss(switch: int, t_mix: int = T_MIX) -> Law:
    """The small model's, then the target's, `GAP` behind for the first `t_mix` steps."""

    def law(stage: int, step: int) -> float:
        late = GAP if step - switch < t_mix else 0.0
        return scratch_loss(step) + late if stage else small_loss(step)

    return law


def target_law(stage: int, step: int) -> float:
    """Of a run of one stage."""
    return scratch_loss(step)


def small_law(stage: int, step: int) -> float:
    """Of a run of one stage."""
    return small_loss(step)


def write_pilot(
    folder: Path,
    stages: Stages,
    law: Law,
    *,
    until: int | None = None,
    seconds: Mapping[int, float] = SECONDS,
    changes: Mapping[str, object] | None = None,
    seed: int = 1,
) -> Path:
    """A run with an evaluation every `EVERY` steps; `until`: stopped after so many of them."""
    steps = sum(count for _, count in stages)
    rate = {"warmup_steps": int(WARMUP * steps), "decay_steps": int(DECAY * steps)}
    given = {"learning_rate": rate, **(changes or {})}
    write_run(folder, stages, 1.0, changes=given, seed=seed, is_finished=until is None)
    rows: list[Row] = [start_row(folder.name, stages)]
    done, elapsed = 0, 0.0
    for stage, (layers, count) in enumerate(stages):
        if stage and (until is None or until >= done):
            rows.append(_switch_row(done, stage))
        for step in range(done + 1, done + count + 1):
            if until is not None and step > until:
                break
            elapsed += seconds[layers]
            if step % 10 == 0:
                rows.append(_train_row(step, stage, seconds[layers], elapsed))
            if step % EVERY == 0 or step == done + count:
                rows.append({"event": "evaluation", "global_step": step, "stage": stage,
                             "val_mlm_loss": law(stage, step), "val_mlm_accuracy": 0.1,
                             "elapsed_seconds": elapsed})  # fmt: skip
        done += count
    if until is None:
        rows.append({"event": "run_end", "global_step": steps})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _switch_row(step: int, stage: int) -> Row:
    return {
        "event": "stage_switch", "global_step": step, "to_stage": stage, "changes": {},
        "operator": "depth stack", "moments": "reset", "loss_before": 5.0, "loss_after": 5.5,
        "max_logit_difference": 1.0, "seconds": SWITCH,
    }  # fmt: skip


def _train_row(step: int, stage: int, seconds: float, elapsed: float) -> Row:
    return {
        "event": "train", "global_step": step, "stage": stage, "mlm_loss": 5.0, "lr": 1e-3,
        "tokens": 1, "tokens_per_second": 10.0, "step_seconds": seconds,
        "elapsed_seconds": elapsed,
    }  # fmt: skip


PLAN_STEPS = 1000  # of each pilot; the rate is constant from step 50 to 800


def write_pilots(folder: Path, *, t_mix: int = T_MIX, switch: int = 300) -> list[Path]:
    """Scratch, the small model alone, and one that grows, as long as each other."""
    return [
        write_pilot(folder / "scratch_1", [(8, PLAN_STEPS)], target_law),
        write_pilot(folder / "small_1", [(2, PLAN_STEPS)], small_law),
        write_pilot(
            folder / "grown_1",
            [(2, switch), (8, PLAN_STEPS - switch)],
            grown_loss(switch, t_mix),
        ),
    ]
