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
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import torch

from stacking import distributed, engine
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.checkpoint_writer import CheckpointWriter
from stacking.config import BertConfig, OptimizerConfig
from stacking.dataset import MaskedLMBatch
from stacking.deepspeed_config import ResolvedEngine
from stacking.engine import TrainEngine
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot

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
    found = _on_ranks(arguments)
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


def _on_ranks(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round on rank 0, by kind."""
    context = multiprocessing.get_context("spawn")
    answers: SimpleQueue[dict[str, list[float]]] = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = str(arguments.ranks)
    os.environ.update(WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      LOCAL_SIZE=world, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # fmt: skip
    processes = []
    for rank in range(arguments.ranks):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))  # a child inherits it
        processes.append(context.Process(target=_measure, args=(arguments, answers)))
        processes[-1].start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
    return answers.get()


def _measure(arguments: argparse.Namespace, answers: "SimpleQueue[dict[str, list[float]]]") -> None:
    """One rank: all kinds in turn, `rounds` times."""
    engine.start()
    size = arguments.hidden
    config = BertConfig(
        vocab_size=8192, hidden_size=size, num_hidden_layers=arguments.layers,
        num_attention_heads=size // 64, intermediate_size=4 * size, max_position_embeddings=512,
    )  # fmt: skip
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(1))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    built = TrainEngine(config, OptimizerConfig(), _resolved(arguments), Snapshot(weights))
    folder = distributed.on_main(lambda: Path(tempfile.mkdtemp(dir=arguments.folder)))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    found["parameters"] = [float(sum(w.numel() for w in weights.values()))]
    del model, weights
    try:
        with CheckpointWriter(CheckpointManager(folder)) as writer:
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
    if distributed.is_main():
        answers.put(found)
    built.destroy()
    distributed.shut_down()


def _savers(
    built: TrainEngine, writer: CheckpointWriter, folder: Path
) -> dict[str, Callable[[], None]]:
    """What each kind does between two rounds of steps."""

    def thread() -> None:
        distributed.only_on_main(writer.settle)
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
    predictions = arguments.seq_length * 3 // 20
    shape = (arguments.batch, arguments.seq_length)
    ids = torch.randint(5, 8000, shape, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(1, predictions + 1).repeat(arguments.batch, 1)
    batch = MaskedLMBatch(
        input_ids=ids, token_type_ids=torch.zeros_like(ids),
        attention_mask=torch.ones_like(ids, dtype=torch.bool), masked_lm_positions=positions,
        masked_lm_ids=ids.gather(1, positions),
        next_sentence_labels=torch.zeros(arguments.batch, dtype=torch.long),
        sample_indices=np.arange(arguments.batch), num_masked=positions.numel(),
        num_real_tokens=ids.numel(),
    )  # fmt: skip
    world = distributed.world_size()
    counts = torch.tensor([positions.numel() * world, arguments.batch * world])
    for step in range(steps):
        built.train_step([batch], learning_rate=1e-5, counts=counts, seed=step)


def _resolved(arguments: argparse.Namespace) -> ResolvedEngine:
    document: dict[str, object] = {
        "train_batch_size": arguments.batch * arguments.ranks,
        "train_micro_batch_size_per_gpu": arguments.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True, "fused": True}},
        "bf16": {"enabled": arguments.precision == "bf16"},
        "zero_optimization": {"stage": arguments.zero_stage},
    }
    return ResolvedEngine(
        deepspeed=document, precision=arguments.precision, zero_stage=arguments.zero_stage,
        micro_batch_size=arguments.batch, gradient_accumulation_steps=1, log_every=10,
        apex_layer_norm=False, notices=(), debug_notices=(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
