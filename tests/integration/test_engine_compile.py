"""Checkpointed and compiled layers in the engine: the same training, over switches and ranks."""

import functools
import gc
import json
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engines import (
    CONFIG,
    OPTIMIZER,
    STILL,
    Settings,
    batch,
    fresh_weights,
    settings,
    state_of,
    train,
)
from launching import LAUNCH, ROOT, alone, rows
from ranks import run_on_ranks
from torch._dynamo.utils import counters

from stacking import distributed, engine
from stacking.config import BertConfig, Freeze
from stacking.deepspeed_schema import Compile
from stacking.engine import TrainEngine
from stacking.snapshot import Snapshot

Case = tuple[int, str, int, str]
"""ZeRO stage, precision, checkpoint interval, backend or "none"."""
MOST_DEVIATION = {"fp32": 2e-5, "bf16": 0.05}
QUICK: list[Case] = [(1, "fp32", 1, "aot_eager")]
SOAK: list[Case] = [(1, "fp32", 1, "inductor"), (0, "fp32", 1, "aot_eager"),
                    (2, "bf16", 1, "aot_eager")]  # fmt: skip
SLOW: list[Case] = [(2, "bf16", 2, "none")] + [
    (zero, precision, 1, "none")
    for zero in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    if zero or precision == "fp32"
]


@dataclass(frozen=True)
class Trained:
    """What a stage of two layers and one of three did, with an evaluation after each."""

    losses: list[float]
    evaluated: list[float]
    weights: dict[str, torch.Tensor]
    is_freed: bool  # whether no stage's module is left
    graphs: list[int]  # compiled so far, after each stage


@dataclass(frozen=True)
class Compared:
    """A case against the same training without options; by rank."""

    has_same_bits: bool
    deviation: float  # largest, of losses and evaluated sums without dropout
    repeats: bool  # whether the same seeds give the same bits
    is_freed: bool
    graphs: list[int]


def two_stages(resolved: Settings, config: BertConfig, freeze: Freeze | None = None) -> Trained:
    """Train and evaluate, switch, train and evaluate."""
    losses, evaluated, graphs, modules = [], [], [], []
    snapshot = Snapshot(fresh_weights(config))
    for steps in (range(3), range(3, 6)):
        trained = TrainEngine(config, OPTIMIZER, resolved, snapshot, freeze)  # type: ignore[arg-type]
        modules.append(weakref.ref(trained._engine.module))
        losses += train(trained, steps, 1e-3)
        evaluated += trained.evaluate(iter([batch(50), batch(51, rank=0)])).tolist()
        weights = state_of(trained).weights
        trained.destroy()
        graphs.append(int(counters["stats"]["unique_graphs"]))
        config, freeze = config.model_copy(update={"num_hidden_layers": 3}), None
        snapshot = Snapshot(fresh_weights(config) | weights)
    del trained
    gc.collect()
    return Trained(losses, evaluated, weights, all(ref() is None for ref in modules), graphs)


def is_same(ours: Trained, theirs: Trained) -> bool:
    return (ours.losses, ours.evaluated) == (theirs.losses, theirs.evaluated) and all(
        torch.equal(ours.weights[name], weight) for name, weight in theirs.weights.items()
    )


def compare(cases: list[Case]) -> dict[Case, Compared]:
    """In one process group."""
    engine.start()
    found = {}
    for case in cases:
        zero, precision, interval, backend = case
        plain = settings(zero, precision)
        how = Compile(enabled=True, backend=backend) if backend != "none" else None  # type: ignore[arg-type]
        asked = replace(plain, checkpoint_interval=interval, compile=how)
        still, ours = two_stages(plain, STILL), two_stages(asked, STILL)
        freeze = Freeze(layers=1)
        first, second = two_stages(asked, CONFIG, freeze), two_stages(asked, CONFIG, freeze)
        pairs = zip(ours.losses + ours.evaluated, still.losses + still.evaluated, strict=True)
        found[case] = Compared(
            has_same_bits=is_same(two_stages(plain, CONFIG, freeze), first),
            deviation=max(abs(a - b) for a, b in pairs),
            repeats=is_same(first, second),
            is_freed=ours.is_freed and second.is_freed,
            graphs=[*ours.graphs, *first.graphs, *second.graphs],
        )
    distributed.shut_down()
    return found


@functools.cache
def compared(kind: str) -> list[dict[Case, Compared]]:
    """By rank, of two; each kind in processes of its own."""
    cases = {"quick": QUICK, "slow": SLOW, "soak": SOAK}[kind]
    return run_on_ranks(compare, 2, cases)  # type: ignore[return-value]


CASE = pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(
            case,
            kind := "quick" if case in QUICK else "soak" if case in SOAK else "slow",
            id="-".join(map(str, case)),
            # test_engine_options.py has the quick ones.
            marks=[pytest.mark.slow, *[pytest.mark.soak] * (case in SOAK)],
        )
        for case in QUICK + SLOW + SOAK
    ],
)


@CASE
def test_options_change_no_number_and_hold_no_module(case: Case, kind: str) -> None:
    _, precision, _, backend = case
    for found in (answers[case] for answers in compared(kind)):
        assert found.repeats
        assert found.is_freed
        assert found.deviation <= MOST_DEVIATION[precision]
        if backend == "none":
            assert found.has_same_bits
            assert found.deviation == 0.0


@CASE
def test_a_switch_compiles_nothing_anew(case: Case, kind: str) -> None:
    backend = case[3]
    for found in (answers[case] for answers in compared(kind)):
        shallow, deep, _, thawed, *again = found.graphs
        if backend != "none":
            assert shallow > 0
        assert deep == shallow
        assert set(again) == {thawed}


def short_run(data: Path, folder: Path, variables: dict[str, str]) -> str:
    """What a run over a switch says that asks for both options."""
    options = {"activation_checkpointing": {"enabled": True}, "compile": {"enabled": True}}
    config = folder / "engine.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 1}, **options}))
    done = alone(
        [
            sys.executable, str(LAUNCH / "pretrain.py"), "--data", str(data),
            "--recipe", str(ROOT / "launch" / "recipes" / "tiny_test.json"),
            "--run-dir", str(folder / "run"), "--deepspeed_config", str(config),
            *("--set", "model.vocab_size=400", "--set", "stages.0.steps=2", "--max-steps", "3"),
        ],
        variables,
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert rows(folder / "run", "stage_switch")
    return done.stdout


def test_a_run_without_a_compiler_goes_on_and_says_so_in_one_line(
    tiny_data: Path, tmp_path: Path
) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    said = short_run(
        tiny_data, tmp_path, {"PATH": str(nothing), "TORCHINDUCTOR_CACHE_DIR": str(nothing)}
    )
    assert said.count("compile asked, but inductor cannot (") == 1
    assert said.count("uncompiled") == 1


@pytest.mark.slow
def test_a_compiled_run_leaves_no_process_behind(tiny_data: Path, tmp_path: Path) -> None:
    assert "uncompiled" not in short_run(tiny_data, tmp_path, {})
