"""Twenty switches in one process: what an engine was is gone, and memory is flat.

`engine.destroy()` of DeepSpeed alone leaves hooks, engines and patched functions behind.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import signal
import threading
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from engines import CONFIG, build, fresh_weights, train
from launching import ROOT
from ranks import run_on_ranks
from stage_plans import Stage, grown
from torch import nn

from stacking import Trainer, distributed, engine
from stacking.config_loading import load_recipe
from stacking.deepspeed_config import load_deepspeed_config
from stacking.engine import TrainEngine
from stacking.modeling import BertForPreTraining
from stacking.snapshot import Snapshot

SWITCHES = 20
MOST_GROWTH_BYTES = 5 * 2**20
SMALL, LARGE = Stage(CONFIG.model_copy(update={"num_hidden_layers": 1})), Stage(CONFIG)
PATCHED = (torch, torch.Tensor, torch.nn.functional, torch.distributed, torch.autograd,
           nn.Module, nn.Linear, nn.Embedding, nn.LayerNorm, BertForPreTraining)  # fmt: skip
"""Where DeepSpeed puts functions of its own, in zero.Init and in its ZeRO-3 linear layer."""
WATCHED = ("DeepSpeedEngine", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3",
           "BF16_Optimizer", "DeepSpeedZeRoOffload", "AdamW", "SynchronizedWallClockTimer",
           "ThroughputTimer", "CudaEventTimer", "BertForPreTraining")  # fmt: skip


def resident_bytes() -> int:
    """Of this process, after free memory has gone back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def living() -> dict[str, int]:
    """How many objects of the watched classes there are."""
    names = Counter(type(found).__name__ for found in gc.get_objects())
    return {name: names[name] for name in WATCHED if names[name]}


def functions() -> dict[str, int]:
    """Which function each public name of torch stands for."""
    return {
        f"{getattr(owner, '__name__', owner)}.{name}": id(value)
        for owner in PATCHED
        for name, value in vars(owner).items()
        if callable(value) or isinstance(value, staticmethod | classmethod)
    }


def surroundings() -> dict[str, object]:
    """What a process has besides its own objects."""
    process = psutil.Process()
    return {
        "process groups": len(torch.distributed.distributed_c10d._world.pg_map),
        "python threads": sorted(thread.name for thread in threading.enumerate()),
        "files": sorted(file.path for file in process.open_files()),
        "children": len(process.children(recursive=True)),
        "at exit": atexit._ncallbacks(),
        "signals": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
        "collector": gc.isenabled(),
        "default type": str(torch.get_default_dtype()),
        "living": living(),
    }


def hooks(root: nn.Module) -> Counter[str]:
    """Hooks on a model's modules and parameters, and those on all modules, by kind."""
    found: Counter[str] = Counter()
    for module in root.modules():
        found.update({k: len(v) for k, v in vars(module).items() if k.endswith("_hooks")})
    for parameter in root.parameters():
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{kind} of parameters"] += len(getattr(parameter, kind) or ())
    for name, value in vars(nn.modules.module).items():
        if name.startswith("_global_") and name.endswith("_hooks"):
            found[name] += len(value)
    return +found  # without zeros


@dataclass(frozen=True)
class Census:
    """What one rank found."""

    resident: list[int]  # bytes after each switch
    alive: list[int]  # engines, optimizers and modules that outlived each switch
    hooks: list[Counter[str]]  # of each switch's new engine
    surroundings: list[dict[str, object]]  # after each switch
    handles: list[tuple[int, int]]  # file descriptors and threads after each switch
    patched: list[str]  # names that stand for another function than before


def switch_once(case: tuple[int, str], step: int) -> tuple[list[object], Counter[str]]:
    """Train, grow 1 -> 2 layers and train; weak references to all that was, and the new hooks."""
    watched: list[weakref.ref[object]] = []

    def watch(built: TrainEngine) -> None:
        inner = built._engine
        base = getattr(inner.optimizer, "optimizer", inner.optimizer)
        watched.extend(map(weakref.ref, (inner, inner.module, inner.optimizer, base)))

    small = build(*case, Snapshot(fresh_weights(SMALL.config)), SMALL.config)
    train(small, range(step, step + 1))
    watch(small)
    snapshot = small.snapshot()
    small.destroy()
    large = build(*case, grown(snapshot, SMALL, LARGE))
    del snapshot
    train(large, range(step, step + 1))
    watch(large)
    module: nn.Module = large._engine.module
    counted = hooks(module)
    large.destroy()
    assert not hooks(module), hooks(module)
    return list(watched), counted


def switch_many_times(cases: list[tuple[int, str]]) -> dict[tuple[int, str], Census]:
    """In one process group."""
    importlib.import_module("torch._dynamo")  # it patches torch.manual_seed, whoever imports it
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # a leak shows better where nothing is kept
    engine.start()
    gc.freeze()  # what is here already need not be looked through again at each switch
    assert not living()
    found = {}
    for case in cases:
        census = Census([], [], [], [], [], [])
        before = functions()
        for step in range(SWITCHES):
            watched, counted = switch_once(case, step)
            census.resident.append(resident_bytes())
            census.alive.append(sum(ref() is not None for ref in watched))  # type: ignore[operator]
            census.hooks.append(counted)
            census.surroundings.append(surroundings())
            process = psutil.Process()
            census.handles.append((process.num_fds(), process.num_threads()))
        after = functions()
        census.patched.extend(name for name, what in before.items() if after.get(name) != what)
        found[case] = census
    distributed.shut_down()
    return found


QUICK = [(3, "fp32")]
SLOW = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (3, "bf16"),
        (1, "bf16_fp32")]  # fmt: skip


@pytest.mark.parametrize(
    "cases",
    [pytest.param(cases, marks=pytest.mark.slow, id=f"{cases[0]}") for cases in (QUICK, SLOW)],
)
def test_twenty_switches_leave_nothing_behind(cases: list[tuple[int, str]]) -> None:
    for answer in run_on_ranks(switch_many_times, 2, cases):
        assert isinstance(answer, dict)
        for case, census in answer.items():
            check(case, census)


def check(case: tuple[int, str], census: Census) -> None:
    assert census.alive == [0] * SWITCHES, case
    assert census.patched == [], case
    assert census.hooks == census.hooks[:1] * SWITCHES, case
    for after in census.surroundings[1:]:  # the first switch imports and opens things once
        assert after == census.surroundings[1], case
    assert census.surroundings[1]["living"] == {}, case
    for counts in zip(*census.handles, strict=True):
        # The runtime's own come and go by one; what a switch left would add up.
        assert max(counts[-5:]) <= max(counts[:5]), (case, counts)
    growth = [late - census.resident[1] for late in census.resident[1:]]
    assert growth[-1] < MOST_GROWTH_BYTES, (case, growth)
    assert growth[-1] <= 0.02 * census.resident[1], (case, growth)


def run_of_21_stages(data: Path, run_dir: Path) -> tuple[list[int], dict[str, object]]:
    """A whole job: resident memory at each switch, and what is left of it at its end."""
    stages = [
        {"num_hidden_layers": 4, "steps": 2, "freeze": {"layers": 1 + stage % 2} if stage else None}
        for stage in range(SWITCHES + 1)
    ]
    changes = [
        "model.vocab_size=400", "model.type_vocab_size=2", "model.num_nsp_labels=2",
        "model.pooler=true", "model.position=learned", f"stages={json.dumps(stages)}",
    ]  # fmt: skip
    recipe = load_recipe(ROOT / "launch" / "recipes" / "tiny_test.json", changes)
    config = load_deepspeed_config(ROOT / "deepspeed_configs" / "cpu_fp32.json")
    files = {file.path for file in psutil.Process().open_files()}
    Trainer(recipe, config, data_dir=data, run_dir=run_dir).fit()
    resident = [
        json.loads(line)["rss_bytes"]
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
        if '"stage_switch"' in line
    ]
    gc.collect()
    left = {name: count for name, count in living().items() if name != "SynchronizedWallClockTimer"}
    opened = {file.path for file in psutil.Process().open_files()} - files
    names = sorted(thread.name for thread in threading.enumerate())
    return resident, {"living": left, "files": opened, "threads": names}


@pytest.mark.slow
def test_a_job_of_twenty_switches_stays_flat_and_leaves_nothing(
    tiny_data: Path, tmp_path: Path
) -> None:
    (answer,) = run_on_ranks(run_of_21_stages, 1, tiny_data, tmp_path / "run")
    assert isinstance(answer, tuple)
    resident, left = answer
    assert len(resident) == SWITCHES
    assert resident[-1] <= 1.02 * resident[1], resident
    log = str(tmp_path / "run" / "log.txt")  # the log takes Python's warnings to the end
    assert left["files"] <= {log}, left
    assert left["living"] == {}
    assert left["threads"] == ["MainThread"]
