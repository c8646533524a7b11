"""How long training waits for a checkpoint, beside DeepSpeed's own save_checkpoint.

    python benchmarks/saving.py [--layers 12] [--hidden 512] [--ranks 2] [--interval 20]

One engine takes steps for about `--interval` seconds, then saves: not at all, as the trainer does
(gathered, then written in a thread while steps go on), by the same code waited for, or by
DeepSpeed's save_checkpoint. The four take turns. `stall` is the time that a round took beyond the
steps of the round without saving; its share is of the whole round, so of the time between saves.
CPU, gloo; ends with one JSON line.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from on_ranks import first_state, on_ranks, resolved, step

from stacking import distributed, engine
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.checkpoint_writer import CheckpointWriter
from stacking.config import BertConfig, OptimizerConfig
from stacking.engine import TrainEngine
from stacking.rank_agreement import require_equal

KINDS = ("none", "thread", "waited", "deepspeed")
STATE = TrainState(global_step=1, stage=0, num_hidden_layers=1, loader={}, recipe_sha256="")


def main() -> None:
    """Measure; print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences of one rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--interval", type=float, default=20.0, help="seconds between saves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: /tmp)")
    arguments = parser.parse_args()
    found = on_ranks(_measure, arguments.ranks, arguments)
    base = statistics.median(found["none"])
    print(f"{found['parameters'][0] / 1e6:.1f} M parameters, {found['steps'][0]:.0f} steps a round")
    stalls = {}
    for kind in KINDS:
        seconds = statistics.median(found[kind])
        stalls[kind] = {"seconds": seconds - base, "share": (seconds - base) / seconds}
        print(f"{kind:<10} round {seconds:7.2f} s   stall {seconds - base:6.2f} s   "
              f"{stalls[kind]['share']:6.1%} of the time between saves")  # fmt: skip
    ratio = stalls["thread"]["seconds"] / max(1e-9, stalls["deepspeed"]["seconds"])
    given = {key: str(value) for key, value in vars(arguments).items()}
    result = {"benchmark": "saving", **given, "rounds_seconds": found, "stalls": stalls,
              "stall_ratio_to_deepspeed": ratio}  # fmt: skip
    print(json.dumps(result))


def _measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """One rank: all kinds in turn, `rounds` times."""
    engine.start()
    size = arguments.hidden
    config = BertConfig(
        vocab_size=8192, hidden_size=size, num_hidden_layers=arguments.layers,
        num_attention_heads=size // 64, intermediate_size=4 * size, max_position_embeddings=512,
    )  # fmt: skip
    snapshot = first_state(config)
    settings = resolved(arguments.zero_stage, arguments.precision, arguments.batch)
    built = TrainEngine(config, OptimizerConfig(), settings, snapshot)
    folder = distributed.on_main(lambda: Path(tempfile.mkdtemp(dir=arguments.folder)))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    found["parameters"] = [float(sum(w.numel() for w in snapshot.weights.values()))]
    del snapshot
    try:
        with closing(CheckpointWriter(CheckpointManager(folder))) as writer:
            saves = _savers(built, writer, folder)
            steps = _steps(built, arguments)
            found["steps"] = [float(steps)]
            for save in saves.values():  # warm
                save()
            for _ in range(arguments.rounds):
                for kind in KINDS:
                    distributed.only_on_main(writer.settle)
                    distributed.barrier()
                    began = time.perf_counter()
                    saves[kind]()
                    _train(built, arguments, steps)
                    distributed.barrier()
                    found[kind].append(time.perf_counter() - began)
    finally:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
    built.destroy()
    distributed.shut_down()
    return found


def _savers(
    built: TrainEngine, writer: CheckpointWriter, folder: Path
) -> dict[str, Callable[[], None]]:
    """What each kind does between two rounds of steps."""

    def thread() -> None:
        distributed.only_on_main(writer.settle)
        require_equal({"the weights": str(built.replica_digest())})
        snapshot = built.snapshot()
        if snapshot is not None:
            writer.write("step_1", snapshot, STATE)

    def waited() -> None:
        thread()
        distributed.only_on_main(writer.settle)

    def deepspeed() -> None:
        built._engine.save_checkpoint(str(folder / "deepspeed"), tag="step_1")

    return dict(zip(KINDS, (lambda: None, thread, waited, deepspeed), strict=True))


def _steps(built: TrainEngine, arguments: argparse.Namespace) -> int:
    """How many steps take about the interval; every rank's count is rank 0's."""
    _train(built, arguments, 2)
    began = time.perf_counter()
    _train(built, arguments, 3)
    seconds = (time.perf_counter() - began) / 3
    return distributed.on_main(lambda: max(1, round(arguments.interval / seconds)))


def _train(built: TrainEngine, arguments: argparse.Namespace, steps: int) -> None:
    for number in range(steps):
        step(built, arguments.batch, arguments.seq_length, number)


if __name__ == "__main__":
    main()
