"""Two ranks with a thread each beside one rank with two threads, and what a model predicts of it.

    python benchmarks/scaling.py [--size 6x256] [--batch 16] [--zero-stage 1] [--write FILE.json]

The same global batch through TrainEngine, in turns: one rank, two ranks, two ranks with DeepSpeed's
overlap_comm. On the two ranks also the parts are measured that stacking/cluster_time.py asks for,
on both at once, without DeepSpeed:

    rate       FLOPs a second of forward and backward of the rank's own batch
    memory     bytes a second of the passes of an update, as UPDATE_BYTES counts them
    latency, bandwidth    of gloo's all-reduce: of 4 bytes, and of a bucket

From these the two-rank step is predicted and compared. A barrier before each collective tells what
it takes (`communication`) from waiting for the rank that comes later (`waiting`), which the model
leaves out: here other processes disturb one rank or the other. --write keeps the parts for
launch/plan.py --device; the network between nodes, of which there is none, is written as fast as
that inside. CPU, gloo; ends with one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from on_ranks import first_state, on_ranks, predictions, random_batch, resolved, step
from torch import Tensor

from stacking import distributed, engine
from stacking.cluster_time import UPDATE_BYTES, Cluster, RankWork, StepTime, sent_bytes, step_time
from stacking.config import BertConfig, OptimizerConfig
from stacking.cost import forward_flops, num_parameters, training_flops
from stacking.deepspeed_config import ResolvedEngine
from stacking.engine import TrainEngine
from stacking.modeling import BertForPreTraining

WARM = 3  # steps of an engine before the timed ones
BUCKET_ELEMENTS = 5_000_000  # of on_ranks.resolved
# Each with the passes of a ring that it makes.
COLLECTIVES = {"all_reduce": 2, "reduce": 1, "reduce_scatter_tensor": 1,
               "all_gather_into_tensor": 1}  # fmt: skip
KINDS = ("plain", "overlap_comm")
Measured = dict[str, list[float]]


@dataclass(frozen=True)
class Sent:
    """One collective of this rank."""

    seconds: float
    waited: float  # seconds before it, for the other rank
    size: float  # bytes that a rank sends in a ring


def main() -> None:
    """Measure in turns; print the table, the prediction and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="6x256", help="LAYERSxHIDDEN")
    parser.add_argument("--vocab-size", type=int, default=30_522)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="sequences of all ranks")
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(1, 4))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--write", type=Path, default=None, metavar="FILE.json")
    arguments = parser.parse_args()
    found: dict[int, Measured] = {1: {}, 2: {}}
    for _ in range(arguments.rounds):
        for ranks, all_of_it in found.items():
            for key, values in on_ranks(_measure, ranks, arguments, 2 // ranks).items():
                all_of_it.setdefault(key, []).extend(values)
    one, two = ({key: statistics.median(v) for key, v in found[n].items()} for n in (1, 2))
    cluster = _cluster(two)
    predicted = step_time(_work(arguments), cluster)
    _print(arguments, one, two, predicted)
    if arguments.write is not None:
        arguments.write.write_text(cluster.model_dump_json(indent=2) + "\n")
    given = {key: str(value) for key, value in vars(arguments).items()}
    print(json.dumps({
        "benchmark": "scaling", **given, "one_rank": one, "two_ranks": two,
        "speed_of_two_ranks": one["plain"] / two["plain"],
        "formula_bytes": sent_bytes(_work(arguments)),
        "predicted_seconds": predicted.total,
        "error": predicted.total / two["plain"] - 1,
        "error_without_waiting": predicted.total / (two["plain"] - two["plain_waiting"]) - 1,
        "cluster": cluster.model_dump(),
    }))  # fmt: skip


def _print(
    arguments: argparse.Namespace,
    one: dict[str, float],
    two: dict[str, float],
    predicted: StepTime,
) -> None:
    print(f"{arguments.size}, {arguments.batch} sequences of {arguments.seq_length}, "
          f"{arguments.precision}, ZeRO {arguments.zero_stage}")  # fmt: skip
    print(f"  one rank, two threads   {1e3 * one['plain']:8.1f} ms")
    for kind in KINDS:
        seconds, sending = two[kind], two[f"{kind}_communication"]
        print(f"  two ranks {kind:<13} {1e3 * seconds:8.1f} ms   {one['plain'] / seconds:5.2f} x   "
              f"communication {1e3 * sending:6.1f} ms, {sending / seconds:.1%}   "
              f"{two[f'{kind}_bytes'] / 1e6:.1f} MB sent a rank")  # fmt: skip
    formula = sent_bytes(_work(arguments))
    print(f"  by formula {formula / 1e6:.1f} MB; gloo: latency {1e6 * two['latency']:.0f} us, "
          f"{two['bandwidth'] / 1e9:.2f} GB/s; a rank: {two['rate'] / 1e9:.1f} GFLOP/s, "
          f"{two['memory'] / 1e9:.1f} GB/s of updates")  # fmt: skip
    whole, *apart = (two[f"plain{key}"] for key in ("", "_update", "_communication", "_waiting"))
    update, sending, waiting = apart
    parts = {
        "forward and backward": (predicted.forward + predicted.backward, whole - sum(apart)),
        "update": (predicted.update, update),
        "communication": (predicted.waiting, sending),
        "step without waiting": (predicted.total, whole - waiting),
        "step": (predicted.total, whole),
    }
    for name, (model, measured) in parts.items():
        print(f"  {name:<21} predicted {1e3 * model:8.1f} ms   measured {1e3 * measured:8.1f} ms   "
              f"{model / measured - 1:+.1%}")  # fmt: skip


def _cluster(two: dict[str, float]) -> Cluster:
    return Cluster(
        name="two CPU ranks, measured",
        flops_per_second=two["rate"],
        memory_bytes_per_second=two["memory"],
        ranks_per_node=2,
        link_bytes_per_second=two["bandwidth"],
        link_latency_seconds=two["latency"],
        network_bytes_per_second=two["bandwidth"],
        network_latency_seconds=two["latency"],
    )


def _work(arguments: argparse.Namespace) -> RankWork:
    """Of one of two ranks."""
    config = _config(arguments)
    shape = arguments.batch // 2, arguments.seq_length, predictions(arguments.seq_length)
    forward, numbers = forward_flops(config, *shape), num_parameters(config)
    return RankWork(
        ranks=2,
        forward_flops=forward,
        backward_flops=training_flops(config, *shape) - forward,
        micro_steps=1,
        num_parameters=numbers,
        num_trained=numbers,
        num_layers=config.num_hidden_layers,
        zero_stage=arguments.zero_stage,
        bytes_per_weight=2 if arguments.precision == "bf16" else 4,
        bucket_elements=BUCKET_ELEMENTS,
        overlaps=False,
    )


def _config(arguments: argparse.Namespace) -> BertConfig:
    layers, hidden = map(int, arguments.size.split("x"))
    return BertConfig(
        vocab_size=arguments.vocab_size, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), intermediate_size=4 * hidden,
        max_position_embeddings=512,
    )  # fmt: skip


def _measure(arguments: argparse.Namespace) -> Measured:
    """One rank: engines in turn, and on two ranks the parts."""
    sent: list[Sent] = []
    _record(sent)
    engine.start()
    config, ranks = _config(arguments), distributed.world_size()
    share = arguments.batch // ranks
    found: Measured = {}

    def note(values: Mapping[str, float]) -> None:
        for key, value in values.items():
            found.setdefault(key, []).append(value)

    for kind in KINDS[:ranks]:
        if ranks > 1:
            note(_parts(arguments, share, sent))
        settings = _settings(arguments, share, kind == "overlap_comm")
        built = TrainEngine(config, OptimizerConfig(), settings, first_state(config))
        updating = _time_updates(built, sent)
        for number in range(WARM):
            step(built, share, arguments.seq_length, number)
        for number in range(WARM, WARM + arguments.steps):
            distributed.barrier()
            sent.clear()
            began = time.perf_counter()
            step(built, share, arguments.seq_length, number)
            seconds = time.perf_counter() - began
            note({
                kind: seconds,
                f"{kind}_update": updating[0],
                f"{kind}_communication": sum(one.seconds for one in sent),
                f"{kind}_waiting": sum(one.waited for one in sent),
                f"{kind}_bytes": sum(one.size for one in sent),
            })  # fmt: skip
        built.destroy()
        del built
    distributed.shut_down()
    return found


def _time_updates(built: TrainEngine, sent: list[Sent]) -> list[float]:
    """Where the seconds of the last update will be, without the communication in it."""
    update, seconds = built._engine.step, [0.0]

    def timed() -> None:
        before = len(sent)
        began = time.perf_counter()
        update()
        seconds[0] = (
            time.perf_counter() - began - sum(one.seconds + one.waited for one in sent[before:])
        )

    built._engine.step = timed
    return seconds


def _settings(arguments: argparse.Namespace, share: int, overlaps: bool) -> ResolvedEngine:
    settings = resolved(arguments.zero_stage, arguments.precision, share)
    zero: Any = settings.deepspeed["zero_optimization"]
    document = settings.deepspeed | {"zero_optimization": zero | {"overlap_comm": overlaps}}
    return replace(settings, deepspeed=document)


def _parts(arguments: argparse.Namespace, share: int, sent: list[Sent]) -> dict[str, float]:
    """What stacking/cluster_time.py asks for, on all ranks at once."""
    config, ranks = _config(arguments), distributed.world_size()
    latency, bandwidth = _network(ranks, sent)
    return {
        "rate": _rate(config, arguments, share),
        "memory": _memory(num_parameters(config) // ranks, arguments.steps),
        "latency": latency,
        "bandwidth": bandwidth,
    }


def _rate(config: BertConfig, arguments: argparse.Namespace, share: int) -> float:
    """FLOPs a second of forward and backward alone."""
    model = BertForPreTraining(config).train()
    model.load_state_dict(first_state(config).weights)
    model.to(torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    batch = random_batch(config, share, arguments.seq_length, 0)

    def forward_and_backward() -> None:
        sums = model(**batch.inputs())
        loss = sums["mlm_loss_sum"] / batch.num_masked
        (loss + sums["nsp_loss_sum"] / len(batch.input_ids)).backward()
        model.zero_grad()

    seconds = _median_seconds(forward_and_backward, arguments.steps)
    shape = share, arguments.seq_length, predictions(arguments.seq_length)
    return training_flops(config, *shape) / seconds


def _memory(count: int, times: int) -> float:
    """Bytes a second of an update's passes over so many parameters."""
    masters = torch.zeros(count, requires_grad=True)
    weights = torch.zeros(count, dtype=torch.bfloat16)
    gradients, bucket = torch.ones_like(weights), torch.empty_like(weights)
    optimizer = torch.optim.AdamW([masters], fused=True)

    @torch.no_grad()
    def update() -> None:
        bucket.copy_(gradients)
        masters.grad = torch.cat([bucket]).float()
        masters.grad.mul_(1 / masters.grad.norm().clamp(min=1))
        optimizer.step()
        weights.copy_(masters)

    return UPDATE_BYTES * count / _median_seconds(update, times)


def _network(ranks: int, sent: list[Sent]) -> tuple[float, float]:
    """Latency of a message and bytes a second of a ring, from gloo's all-reduce in bf16."""
    seconds = []
    for elements in (2, BUCKET_ELEMENTS):
        sent.clear()
        for _ in range(10):
            distributed.sum_over_ranks(torch.zeros(elements, dtype=torch.bfloat16))
        seconds.append(statistics.median(one.seconds for one in sent[1:]))
    passes, size = 2 * (ranks - 1), 2 * BUCKET_ELEMENTS
    return seconds[0] / passes, passes / ranks * size / (seconds[1] - seconds[0])


def _median_seconds(task: Callable[[], object], times: int) -> float:
    """Of `times` turns after a warm one, begun together on all ranks."""
    seconds = []
    for _ in range(1 + times):
        distributed.barrier()
        began = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _record(sent: list[Sent]) -> None:
    """Note the seconds of each collective of this process, and the bytes that a ring would send."""

    def recorded(real: Callable[..., object], passes: int) -> Callable[..., object]:
        def call(*given: object, **options: object) -> object:
            tensors = [value for value in (*given, *options.values()) if isinstance(value, Tensor)]
            ranks = distributed.world_size()
            size = passes * (ranks - 1) / ranks * max(tensor.nbytes for tensor in tensors)
            began = time.perf_counter()
            torch.distributed.barrier()
            met = time.perf_counter()
            answer = real(*given, **options)
            sent.append(Sent(time.perf_counter() - met, met - began, size))
            return answer

        return call

    for name, passes in COLLECTIVES.items():  # before the process group: DeepSpeed keeps some
        real = getattr(torch.distributed, name)
        setattr(torch.distributed, name, recorded(real, passes))


if __name__ == "__main__":
    main()
