"""Seconds of one stage switch, split by part: StackingBERT's, from half the depth, on CPU ranks.

    python benchmarks/switch.py [--sizes 12x768 24x1024] [--ranks 1 2] [--precision bf16]

An engine of half the depth takes a step, so that it has moments; then goes what Trainer does at a
switch (stacking/trainer.py, stage_switch.py):

    gather       the old stage's weights and moments, whole, on the main rank
    write        its last checkpoint, waited for: the switch begins from a committed one
    tear down    the old engine
    grow         StackingBERT's operator, with fresh moments
    probe        loss and logits of both models on the same sequences
    build        the module and deepspeed.initialize
    weights      fp32 weights into the new engine
    gather new   the new stage's first checkpoint, which a thread writes while training goes on

Medians over --switches. `in the thread`: what that last writing takes, with no training beside it;
it is no part of the switch. The share is of the 2019 run, 400,000 steps of 320 sequences of 384
tokens in 3 stages: both its switches, though the first is smaller, over its FLOPs at this machine's
measured rate, and at assumed rates of GPUs with the switch as slow as here. Ends with a JSON line.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from on_ranks import first_state, on_ranks, predictions, random_batch, resolved, step

from stacking import distributed, engine
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.checkpoint_writer import CheckpointWriter
from stacking.cluster_time import load_cluster
from stacking.config import OptimizerConfig, Recipe
from stacking.config_loading import load_recipe
from stacking.cost import num_parameters, training_flops
from stacking.engine import TrainEngine
from stacking.optimizer_state import OptimizerState
from stacking.rank_agreement import require_equal
from stacking.run_data import PROBE_SEQUENCES
from stacking.snapshot import Snapshot
from stacking.stage_switch import Probe, SwitchReport, switch_stage

RECIPE = Path(__file__).resolve().parents[1] / "launch" / "recipes" / "stackingbert_base.json"
PARTS = ("gather", "write", "tear_down", "grow", "probe", "build", "weights", "gather_new")
STATE = TrainState(global_step=1, stage=0, num_hidden_layers=1, loader={}, recipe_sha256="")
AT_MOST = 0.01  # of the run
GPUS = (1, 8)


def main() -> None:
    """Measure each size on each number of ranks; print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["12x768", "24x1024"], help="LAYERSxHIDDEN")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--seq-length", type=int, default=128, help="of the steps and the probe")
    parser.add_argument("--batch", type=int, default=4, help="sequences of one rank")
    parser.add_argument("--switches", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: /tmp)")
    arguments = parser.parse_args()
    results = []
    for size in arguments.sizes:
        for ranks in arguments.ranks:
            given = argparse.Namespace(**vars(arguments), size=size, world=ranks)
            results.append(_report(given, on_ranks(_measure, ranks, given, max(1, 2 // ranks))))
    given = {key: str(value) for key, value in vars(arguments).items()}
    print(json.dumps({"benchmark": "switch", **given, "results": results}))


def _report(arguments: argparse.Namespace, found: list[dict[str, float]]) -> dict[str, Any]:
    """Print and return the medians and the shares of the run."""
    medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
    recipe = _recipe(arguments)
    target, ranks = recipe.model, arguments.world
    print(f"{arguments.size}, {num_parameters(target) / 1e6:.0f} M parameters, "
          f"{arguments.precision}, ZeRO {arguments.zero_stage}, {ranks} ranks: "
          f"{medians['switch']:.2f} s a switch")  # fmt: skip
    for part in PARTS:
        share = medians[part] / medians["switch"]
        print(f"  {part.replace('_', ' '):<12}{medians[part]:8.2f} s {share:7.1%}")
    print(f"  in the thread, afterwards: {medians['in_the_thread']:.2f} s")
    flops = run_flops(recipe)
    shape = arguments.batch * ranks, arguments.seq_length, predictions(arguments.seq_length)
    rates = {"here": training_flops(target, *shape) / medians["step"]}
    for gpus in GPUS:
        rates[f"{gpus} x h100"] = gpus * load_cluster("h100").flops_per_second
    shares = {}
    for name, rate in rates.items():
        shares[name] = 2 * medians["switch"] / (2 * medians["switch"] + flops / rate)
        print(f"  {name:<9}{rate / 1e12:9.3f} TFLOP/s, run {flops / rate / 3600:10.2f} h: two "
              f"switches are {shares[name]:.4%} of it")  # fmt: skip
    print(
        f"  {AT_MOST:.0%} of every run longer than {2 * medians['switch'] / AT_MOST / 60:.1f} min"
    )
    return {"size": arguments.size, "ranks": ranks, "seconds": medians, "each": found,
            "shares": shares, "run_flops": flops}  # fmt: skip


def run_flops(recipe: Recipe) -> int:
    """Of the 2019 run at `recipe`'s size: a quarter, half and all of the depth."""
    published = load_recipe(RECIPE)
    length, masked = published.data.max_seq_length, published.data.max_predictions_per_seq
    total = 0
    for part, stage in zip((4, 2, 1), published.stages, strict=True):
        layers = max(1, recipe.model.num_hidden_layers // part)
        model = recipe.model.model_copy(update={"num_hidden_layers": layers})
        total += stage.steps * training_flops(model, published.global_batch_size, length, masked)
    return total


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """One switch of the 2019 model at this size."""
    layers, hidden = map(int, arguments.size.split("x"))
    stages = [
        {"num_hidden_layers": layers // 2, "steps": 1},
        {"num_hidden_layers": layers, "steps": 1, "depth": "stack"},
    ]
    changes = {
        "model.num_hidden_layers": layers, "model.hidden_size": hidden,
        "model.num_attention_heads": max(1, hidden // 64), "model.intermediate_size": 4 * hidden,
        "model.vocab_size": arguments.vocab_size, "stages": json.dumps(stages),
        "learning_rate": '{"schedule": "constant", "peak": 1e-4}',
    }  # fmt: skip
    return load_recipe(RECIPE, [f"{key}={value}" for key, value in changes.items()])


def _measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    """One rank: so many switches, one after the other."""
    engine.start()
    writing = [0.0]
    _time_writes(writing)
    folder = distributed.on_main(lambda: Path(tempfile.mkdtemp(dir=arguments.folder)))
    found = []
    try:
        with closing(CheckpointWriter(CheckpointManager(folder, keep_last=1))) as writer:
            for _ in range(arguments.switches):
                found.append(_switch(_recipe(arguments), arguments, writer, writing))
    finally:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
    distributed.shut_down()
    return found


def _switch(
    recipe: Recipe, arguments: argparse.Namespace, writer: CheckpointWriter, writing: list[float]
) -> dict[str, float]:
    """Seconds by part of one switch; `writing`: what writing weights into an engine has taken."""
    settings = resolved(arguments.zero_stage, arguments.precision, arguments.batch)
    source, target = recipe.stage_model(0), recipe.stage_model(1)
    first = first_state(source) if distributed.is_main() else None
    old = [TrainEngine(source, OptimizerConfig(), settings, first)]
    del first
    step(old[0], arguments.batch, arguments.seq_length, 0)
    batch = random_batch(source, PROBE_SEQUENCES, arguments.seq_length, 1)

    def take(report: SwitchReport) -> Snapshot | None:
        with report.timed("gather"):
            snapshot = _gather(old[0])
        with report.timed("write"):
            _write(writer, snapshot, "stage1_end")
            distributed.only_on_main(writer.settle)
        with report.timed("tear_down"):
            old.pop().destroy()
        return snapshot

    def build(snapshot: Snapshot | None) -> TrainEngine:
        return TrainEngine(target, OptimizerConfig(), settings, snapshot)

    writing[0] = 0.0
    distributed.barrier()
    began = time.perf_counter()
    built, report = switch_stage(recipe, 1, take, build, Probe(batch, torch.device("cpu")))
    with report.timed("gather_new"):
        _write(writer, _gather(built), "stage2_begin")
    parts = report.seconds_by_part | {"switch": time.perf_counter() - began}
    began = time.perf_counter()
    distributed.only_on_main(writer.settle)
    parts["in_the_thread"] = time.perf_counter() - began
    parts["weights"] = writing[0]
    parts["build"] -= writing[0]
    parts["step"] = _step_seconds(built, arguments)
    built.destroy()
    return parts


def _gather(built: TrainEngine) -> Snapshot | None:
    require_equal({"the weights": str(built.replica_digest())})
    return built.snapshot()


def _write(writer: CheckpointWriter, snapshot: Snapshot | None, tag: str) -> None:
    if snapshot is not None:
        writer.write(tag, snapshot, STATE)


def _step_seconds(built: TrainEngine, arguments: argparse.Namespace) -> float:
    """Of the second step: the first makes the moments."""
    step(built, arguments.batch, arguments.seq_length, 1)
    began = time.perf_counter()
    step(built, arguments.batch, arguments.seq_length, 2)
    return time.perf_counter() - began


def _time_writes(seconds: list[float]) -> None:
    """Add up what OptimizerState.write takes."""
    write = OptimizerState.write

    def timed(state: OptimizerState, snapshot: Snapshot) -> None:
        began = time.perf_counter()
        write(state, snapshot)
        seconds[0] += time.perf_counter() - began

    OptimizerState.write = timed  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
