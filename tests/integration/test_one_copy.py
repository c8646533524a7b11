"""One full copy of the state per node: what each rank holds while a stage is left and entered.

Peaks of resident memory (VmHWM), on a model of 20 million parameters, through the real switch.
n: parameters. The full state is 12 n bytes: fp32 weights and both moments.
"""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import STILL, batch, build, fresh_weights, train
from ranks import run_on_ranks

from stacking import distributed, engine
from stacking.config import BertConfig, Recipe
from stacking.engine import TrainEngine
from stacking.snapshot import Snapshot
from stacking.stage_switch import Probe, SwitchReport, switch_stage

BEFORE, AFTER = (
    STILL.model_copy(
        update={"num_hidden_layers": layers, "hidden_size": 512, "intermediate_size": 2048}
    )
    for layers in (3, 6)
)
FEW_TENSORS = 0.10
"""Share of the full state: a matrix is up to 2 % of it, and to gather one takes a few its size."""
RECIPE = Recipe.model_validate(
    {
        "name": "one_copy",
        "model": AFTER.model_dump(),
        "data": {"max_seq_length": 9, "max_predictions_per_seq": 2},
        "learning_rate": {"schedule": "constant", "peak": 1e-3},
        "stages": [
            {"num_hidden_layers": 3, "steps": 2},
            {"num_hidden_layers": 6, "steps": 2, "moments": "grow"},
        ],
    }
)
Peaks = dict[str, float]
"""By phase: the largest resident memory, in bytes above that of a process without an engine."""


def status_bytes(field: str, pid: int | str = "self") -> float:
    """VmRSS, VmHWM or VmData of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024.0 * int(line.split()[1])
    raise AssertionError(field)


def give_back_free_memory() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def phase(peaks: Peaks, name: str) -> Iterator[None]:
    """Note the peak of what happens inside; `peaks` has the process's own size as `nothing`."""
    give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    yield
    peaks[name] = status_bytes("VmHWM") - peaks["nothing"]


def switch_and_measure(zero_stage: int) -> Peaks:
    """Peaks while the state is read, grown and put into the next stage's engine."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # as a user who has chosen; keeps ours away
    ctypes.CDLL("libc.so.6").mallopt(-3, 65536)  # every tensor is a mapping, gone when it is freed
    engine.start()
    warm = build(zero_stage, "fp32", Snapshot(fresh_weights(STILL)), STILL)
    train(warm, range(1))
    warm.destroy()
    give_back_free_memory()
    peaks = {"nothing": status_bytes("VmRSS")}
    old: TrainEngine | None = build(zero_stage, "fp32", first_snapshot(BEFORE), BEFORE)
    assert old is not None
    train(old, range(2))

    def take(report: SwitchReport) -> Snapshot | None:
        nonlocal old
        assert old is not None
        with phase(peaks, "snapshot"):
            taken = old.snapshot()
        old.destroy()
        old = None
        growing.__enter__()
        return taken

    def make(snapshot: Snapshot | None) -> TrainEngine:
        growing.__exit__(None, None, None)
        with phase(peaks, "build"):
            return build(zero_stage, "fp32", snapshot, AFTER)

    growing = phase(peaks, "growth")
    probe = Probe(replace(batch(0, 0), next_sentence_labels=None), torch.device("cpu"))
    new, _ = switch_stage(RECIPE, 1, take, make, probe)
    train(new, range(2, 3))
    new.destroy()
    distributed.shut_down()
    return peaks


def first_snapshot(config: BertConfig) -> Snapshot | None:
    """The main rank's, as everywhere."""
    return Snapshot(fresh_weights(config)) if distributed.is_main() else None


def size(config: BertConfig) -> int:
    return sum(weight.numel() for weight in fresh_weights(config).values())


def own_bytes(zero_stage: int, n: int, ranks: int) -> float:
    """What a rank's fp32 engine takes: weights, masters, gradients, both moments."""
    if zero_stage == 3:
        return 20 * n / ranks
    return 8 * n + 12 * n / ranks


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "ranks"), [(1, 2), (3, 2), (3, 4)])
def test_only_the_main_rank_ever_holds_the_full_state(zero_stage: int, ranks: int) -> None:
    before, after = size(BEFORE), size(AFTER)
    few = FEW_TENSORS * 12 * after
    own = {
        "snapshot": own_bytes(zero_stage, before, ranks),
        "growth": 0.0,
        "build": own_bytes(zero_stage, after, ranks),
    }
    full = {
        "snapshot": 12 * before,
        # Both states, and for the moments which numbers are old and where the others come from.
        "growth": 12 * (before + after) + 10 * after,
        "build": 12 * after,
    }
    answers = run_on_ranks(switch_and_measure, ranks, zero_stage)
    for rank, peaks in enumerate(answers):
        assert isinstance(peaks, dict)
        for name, mine in own.items():
            most = mine + few + (full[name] if rank == 0 else 0)
            shares = {k: round(v / (12 * after), 2) for k, v in peaks.items()}
            assert peaks[name] <= most, (rank, name, round(most / (12 * after), 2), shares)
