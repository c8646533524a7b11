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
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from on_ranks import first_state, on_ranks, predictions, resolved, step, tensor_bytes
from torch import Tensor

from stacking import distributed, engine
from stacking.config import BertConfig, Freeze, OptimizerConfig
from stacking.cost import trained_parameters, training_flops
from stacking.engine import TrainEngine

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
    shape = (arguments.batch, arguments.seq_length, predictions(arguments.seq_length))
    flops = [training_flops(config, *shape, freeze=kind) for kind in (None, freeze)]
    width = 4 if arguments.precision == "fp32" else 2
    sent = [width * trained_parameters(config, kind) for kind in (None, freeze)]
    rows = []
    for ranks in arguments.ranks:
        full, frozen = (_medians(kind) for kind in on_ranks(_measure, ranks, arguments))
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


def _measure(arguments: argparse.Namespace) -> tuple[Measured, Measured]:
    """One rank: both kinds in turn."""
    reduced: list[int] = []
    _record(reduced)
    engine.start()
    config, freeze = _sizes(arguments)
    snapshot = first_state(config)
    settings = resolved(arguments.zero_stage, arguments.precision, arguments.batch)
    found: tuple[Measured, Measured] = ({}, {})
    for _ in range(arguments.rounds):
        for kind, measured in zip((None, freeze), found, strict=True):
            before = tensor_bytes()
            built = TrainEngine(config, OptimizerConfig(), settings, snapshot, kind)
            values = _turn(built, arguments, reduced)
            values["state_bytes"] = [float(tensor_bytes() - before)]
            for key, numbers in values.items():
                measured.setdefault(key, []).extend(numbers)
            built.destroy()
            del built
    distributed.shut_down()
    return found


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
        step(built, arguments.batch, arguments.seq_length, 0)
    seconds, sent = [], []
    for number in range(1, 1 + arguments.steps):
        reduced.clear()
        distributed.barrier()
        began = time.perf_counter()
        step(built, arguments.batch, arguments.seq_length, number)
        seconds.append(time.perf_counter() - began)
        sent.append(float(sum(reduced)))
    activations = [float(sum(kept.values()))]
    return {"step_seconds": seconds, "reduced_bytes": sent, "activation_bytes": activations}


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
