"""What a stage that trains only the top layers saves (MSLT), measured beside arithmetic.

    python benchmarks/freezing.py [--layers 12] [--hidden 256] [--trained-layers 3] [--ranks 1 2]

Both stages run in one engine after the other, in turn, on the same batches: everything trains, or
the top layers and the heads alone. Beside the median step time of both stand the FLOPs of
stacking/cost.py; beside the bytes that torch's reducing collectives are really given, those of the
trained parameters. Activations are the bytes that autograd keeps between forward and backward,
state those of the tensors that the engine holds after a step: weights, masters, moments, buffers.
CPU, gloo; ends with one JSON line.
"""

import argparse
import gc
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stacking import distributed, engine
from stacking.config import BertConfig, Freeze, OptimizerConfig
from stacking.cost import trained_parameters, training_flops
from stacking.dataset import MaskedLMBatch
from stacking.deepspeed_config import ResolvedEngine
from stacking.engine import TrainEngine
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot

PREDICTIONS_SHARE = 0.15
REDUCING = ("all_reduce", "reduce", "reduce_scatter_tensor")
Measured = dict[str, list[float]]


def main() -> None:
    """Measure on each number of ranks; print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--trained-layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=30_522)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences of one rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--decoder", choices=["freeze", "train"], default="freeze")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config, freeze = _sizes(arguments)
    shape = (arguments.batch, arguments.seq_length, _predictions(arguments))
    flops = [training_flops(config, *shape, freeze=kind) for kind in (None, freeze)]
    width = 4 if arguments.precision == "fp32" else 2
    sent = [width * trained_parameters(config, kind) for kind in (None, freeze)]
    rows = []
    for ranks in arguments.ranks:
        full, frozen = (_medians(kind) for kind in _on_ranks(ranks, arguments))
        rows.append({"ranks": ranks, "full": full, "frozen": frozen,
                     "frozen_share": {key: frozen[key] / full[key] for key in full}})  # fmt: skip
        _print(rows[-1], flops[1] / flops[0], sent)
    theory = {"flops_share": flops[1] / flops[0], "reduced_bytes": sent}
    result = {"benchmark": "freezing", **vars(arguments), "results": rows, "theory": theory}
    print(json.dumps(result))


def _print(row: dict[str, Any], flops_share: float, sent: list[int]) -> None:
    names = {"step_seconds": ("step", 1e3, "ms"), "reduced_bytes": ("reduced a step", 1e-6, "MB"),
             "activation_bytes": ("activations", 1e-6, "MB"),
             "state_bytes": ("state", 1e-6, "MB")}  # fmt: skip
    theory = {"step_seconds": f"FLOPs: {flops_share:.3f}",
              "reduced_bytes": f"trained parameters: {sent[1] / sent[0]:.3f} "
                               f"({sent[0] / 1e6:.1f} -> {sent[1] / 1e6:.1f} MB)"}  # fmt: skip
    print(f"{row['ranks']} ranks{'everything':>20}{'top layers':>14}{'share':>8}  by arithmetic")
    for key, (name, factor, unit) in names.items():
        full, frozen = (f"{row[kind][key] * factor:.1f} {unit}" for kind in ("full", "frozen"))
        share = row["frozen_share"][key]
        print(f"  {name:<15}{full:>11}{frozen:>14}{share:>8.3f}  {theory.get(key, '')}")


def _medians(measured: Measured) -> dict[str, float]:
    return {key: statistics.median(values) for key, values in measured.items()}


def _on_ranks(ranks: int, arguments: argparse.Namespace) -> tuple[Measured, Measured]:
    """What rank 0 measured: with everything trained, with the top alone."""
    context = multiprocessing.get_context("spawn")
    answers: SimpleQueue[tuple[Measured, Measured]] = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      LOCAL_SIZE=str(ranks), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # fmt: skip
    processes = []
    for rank in range(ranks):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))  # a child inherits it
        processes.append(context.Process(target=_measure, args=(arguments, answers)))
        processes[-1].start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
    return answers.get()


def _measure(
    arguments: argparse.Namespace, answers: "SimpleQueue[tuple[Measured, Measured]]"
) -> None:
    """One rank: both kinds in turn."""
    reduced: list[int] = []
    _record(reduced)
    engine.start()
    config, freeze = _sizes(arguments)
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(1))
    snapshot = Snapshot({name: p.detach().clone() for name, p in model.named_parameters()})
    del model
    found: tuple[Measured, Measured] = ({}, {})
    for _ in range(arguments.rounds):
        for kind, measured in zip((None, freeze), found, strict=True):
            before = _tensor_bytes()
            built = TrainEngine(config, OptimizerConfig(), _resolved(arguments), snapshot, kind)
            values = _turn(built, arguments, reduced)
            values["state_bytes"] = [float(_tensor_bytes() - before)]
            for key, numbers in values.items():
                measured.setdefault(key, []).extend(numbers)
            built.destroy()
            del built
    if distributed.is_main():
        answers.put(found)
    distributed.shut_down()


def _turn(built: TrainEngine, arguments: argparse.Namespace, reduced: list[int]) -> Measured:
    """Timed steps of one engine after a warm one, in which autograd is watched."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in built._engine.module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _step(built, arguments, 0)
    seconds, sent = [], []
    for step in range(1, 1 + arguments.steps):
        reduced.clear()
        distributed.barrier()
        began = time.perf_counter()
        _step(built, arguments, step)
        seconds.append(time.perf_counter() - began)
        sent.append(float(sum(reduced)))
    activations = [float(sum(kept.values()))]
    return {"step_seconds": seconds, "reduced_bytes": sent, "activation_bytes": activations}


def _step(built: TrainEngine, arguments: argparse.Namespace, step: int) -> None:
    shape = (arguments.batch, arguments.seq_length)
    generator = torch.Generator().manual_seed(1000 * step + distributed.rank())
    ids = torch.randint(1000, arguments.vocab_size, shape, generator=generator)
    positions = torch.arange(1, 1 + _predictions(arguments)).expand(shape[0], -1)
    batch = MaskedLMBatch(
        input_ids=ids,
        token_type_ids=torch.zeros_like(ids),
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        masked_lm_positions=positions,
        masked_lm_ids=ids.gather(1, positions),
        next_sentence_labels=torch.zeros(shape[0], dtype=torch.int64),
        sample_indices=np.arange(shape[0]),
        num_masked=positions.numel(),
        num_real_tokens=ids.numel(),
    )
    counts = torch.tensor([float(positions.numel()), float(shape[0])]) * distributed.world_size()
    built.train_step([batch], learning_rate=1e-4, counts=counts, seed=step)


def _tensor_bytes() -> int:
    """Bytes of all tensors of this process; a storage counts once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _sizes(arguments: argparse.Namespace) -> tuple[BertConfig, Freeze]:
    config = BertConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        intermediate_size=4 * arguments.hidden,
        max_position_embeddings=arguments.seq_length,
    )
    frozen = arguments.layers - arguments.trained_layers
    return config, Freeze(layers=frozen, decoder=arguments.decoder)


def _predictions(arguments: argparse.Namespace) -> int:
    return int(PREDICTIONS_SHARE * arguments.seq_length)


def _resolved(arguments: argparse.Namespace) -> ResolvedEngine:
    optimizer = {"lr": 0.0, "torch_adam": True, "fused": True}
    return ResolvedEngine(
        deepspeed={
            "train_batch_size": arguments.batch * distributed.world_size(),
            "train_micro_batch_size_per_gpu": arguments.batch,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": optimizer},
            "bf16": {"enabled": arguments.precision == "bf16"},
            "zero_optimization": {"stage": arguments.zero_stage},
        },
        precision=arguments.precision,
        zero_stage=arguments.zero_stage,
        micro_batch_size=arguments.batch,
        gradient_accumulation_steps=1,
        log_every=1,
        apex_layer_norm=False,
        notices=(),
        debug_notices=(),
    )


def _record(reduced: list[int]) -> None:
    """Note the bytes of each tensor that this process gives to a reducing collective."""

    def recorded(real: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object, **options: object) -> object:
            tensors = [value for value in (*given, *options.values()) if isinstance(value, Tensor)]
            reduced.append(max(tensor.nbytes for tensor in tensors))
            return real(*given, **options)

        return call

    for name in REDUCING:  # before the process group exists: DeepSpeed keeps some of them
        setattr(torch.distributed, name, recorded(getattr(torch.distributed, name)))


if __name__ == "__main__":
    main()
