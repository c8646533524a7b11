"""What a slow network costs: stages of which the top alone trains beside whole models, and knobs.

    python benchmarks/network.py [--recipe mslt_small] [--set KEY=VALUE ...] [--batch 16]
        [--megabits 0 1000 100] [--delay-ms 0 5] [--ranks-per-host 1] [--steps 3] [--rounds 3]

Two hosts made of network namespaces (tests/multi_node/two_hosts.py), ranks of one thread, gloo
through a cable that `tc` makes slow: `tbf` limits what each host sends (0: no limit), `netem`
delays every packet. Where the kernel has no `netem` delays are left out, and it says so.

    stages    every stage of the recipe, and beside one that freezes layers the same model of which
              everything trains
    knobs     the model of the last stage, --accumulate micro steps a step: ZeRO stages, buckets and
              the type that travels, in those classes of DeepSpeed that fp16 on a GPU runs in

All engines live at once and take turns under every network, in every round. Seconds are medians of
steps, each begun together; bytes are the kernel's counter of what the first host sends the other.
`t0/t` is the time of the last stage's model for all steps of the recipe over that of the recipe,
switches left out. Needs root and namespaces; where they are forbidden it says so. Ends with one
JSON line.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from on_ranks import first_state, random_batch, resolved
from slow_network import Network, limit, sent_bytes

from stacking import distributed, engine
from stacking.config import BertConfig, Freeze, OptimizerConfig, Recipe
from stacking.config_loading import load_recipe
from stacking.cost import training_flops
from stacking.deepspeed_config import ResolvedEngine
from stacking.engine import TrainEngine

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("integration", "multi_node")]
from two_hosts import ADDRESSES, INTERFACE, obstacle, two_hosts  # noqa: E402

PORT = 29_500
PROBE_ELEMENTS = 1_000_000  # fp32, all-reduced to see how fast the network is
PLAIN = "ZeRO 1"
KNOBS: dict[str, tuple[int, dict[str, object]]] = {
    PLAIN: (1, {}),
    "ZeRO 1, fp32 travels": (1, {"communication_data_type": "fp32"}),
    "ZeRO 1, buckets of 100,000": (1, {"reduce_bucket_size": 100_000}),
    "ZeRO 1, reduced to owners": (1, {"use_multi_rank_bucket_allreduce": False}),
    "ZeRO 2": (2, {}),
    "ZeRO 2, fp32 travels": (2, {"communication_data_type": "fp32"}),
    "ZeRO 3": (3, {"stage3_param_persistence_threshold": 0}),
}
HIERARCHY = "ZeRO 3, parted by host"  # where a host has several ranks
_MEASURED = {"bytes": "bytes", "seconds": "time"}
Values = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """An engine to measure, and the shape of its batches."""

    name: str
    config: BertConfig
    freeze: Freeze | None
    settings: ResolvedEngine
    seq_length: int
    num_predictions: int


def main() -> None:
    """Two ranks measure; print their tables and the JSON line."""
    arguments = _parsed()
    if arguments.answer is not None:
        _measure(arguments)
        return
    if reason := obstacle():
        print(f"skipped: {reason}")
        print(json.dumps({"benchmark": "network", "skipped": reason}))
        return
    found, recipe = _on_two_hosts(arguments.ranks_per_host), _recipe(arguments)
    print(f"{recipe.name}: {recipe.global_batch_size} sequences of {recipe.data.max_seq_length}, "
          f"bf16, gloo, two hosts with {arguments.ranks_per_host} ranks each")  # fmt: skip
    if found["left_out"]:
        print(f"without delay: {found['left_out']}")
    for network in found["networks"]:
        network["t0/t"] = _report(network, recipe)
    del arguments.answer
    print(json.dumps({"benchmark": "network", **vars(arguments), **found}))


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="mslt_small")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=_count, default=16, help="sequences of all ranks")
    parser.add_argument("--accumulate", type=_count, default=4, help="micro steps, for the knobs")
    parser.add_argument("--megabits", type=_amount, nargs="+", default=[0, 1000, 100])
    parser.add_argument("--delay-ms", type=_amount, nargs="+", default=[0, 5])
    parser.add_argument("--ranks-per-host", type=_count, default=1)
    parser.add_argument("--steps", type=_count, default=3, help="timed steps of each turn")
    parser.add_argument("--rounds", type=_count, default=3)
    parser.add_argument("--answer", type=Path, default=None, help=argparse.SUPPRESS)  # of a rank
    return parser.parse_args()


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return number


def _amount(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give 0 (none) or more")
    return number


def _recipe(arguments: argparse.Namespace) -> Recipe:
    path = ROOT / "launch" / "recipes" / f"{arguments.recipe}.json"
    return load_recipe(path, [*arguments.set, f"global_batch_size={arguments.batch}"])


# -- the hosts, and what they found ------------------------------------------------------------


def _on_two_hosts(ranks_each: int) -> dict[str, Any]:
    """What rank 0 has written down."""
    with two_hosts() as hosts, tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        meeting = {"WORLD_SIZE": str(2 * ranks_each), "LOCAL_SIZE": str(ranks_each),
                   "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(PORT),
                   "GLOO_SOCKET_IFNAME": INTERFACE, "PYTHONPATH": str(ROOT)}  # fmt: skip
        words = ["python", Path(__file__), *sys.argv[1:], "--answer", answer]
        ranks = [
            hosts[rank // ranks_each].start(*words, variables={
                **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank % ranks_each)
            })
            for rank in range(2 * ranks_each)
        ]  # fmt: skip
        with ThreadPoolExecutor() as pool:  # all are read: one whose pipe is full would wait
            said = list(pool.map(lambda rank: rank.communicate()[0], ranks))
        if any(rank.returncode for rank in ranks):
            raise SystemExit("\n".join(said))
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def _report(network: dict[str, Any], recipe: Recipe) -> float:
    """Print one network's tables; its t0/t."""
    costs = network["costs"]
    print(f"\n{network['name']}: {network['megabits_reached']:,.0f} Mbit/s reached, "
          f"{1e3 * network['message_seconds']:.1f} ms for a message to each other")  # fmt: skip
    print(f"  {'stage':<28}{'MB sent':>9}{'ms':>9}   times the whole model's")
    for name, cost in costs.items():
        if name in {*KNOBS, HIERARCHY} or name.endswith(WHOLE):
            continue
        whole = costs.get(name.partition(",")[0] + WHOLE)
        beside = f"{_ratio(cost, whole, 'bytes')}{_ratio(cost, whole, 'seconds')}" if whole else ""
        print(f"  {name:<28}{cost['bytes'] / 1e6:>9.2f}{1e3 * cost['seconds']:>9.0f}{beside}")
    seconds = [costs[_name(recipe, index)]["seconds"] for index in range(len(recipe.stages))]
    saved = _saved(seconds, recipe)
    print(f"  t0/t {saved:.2f}; by FLOPs {_saved(_flops(recipe), recipe):.2f}")
    print(f"  {'knob':<28}{'MB sent':>9}{'ms':>9}   times {PLAIN}'s")
    for name in [name for name in (*KNOBS, HIERARCHY) if name in costs]:
        cost, plain = costs[name], costs[PLAIN]
        print(f"  {name:<28}{cost['bytes'] / 1e6:>9.2f}{1e3 * cost['seconds']:>9.0f}"
              f"{_ratio(cost, plain, 'bytes')}{_ratio(cost, plain, 'seconds')}")  # fmt: skip
    return saved


def _ratio(cost: Mapping[str, float], other: Mapping[str, float], key: str) -> str:
    return f"{cost[key] / other[key]:>9.2f} {_MEASURED[key]}"


def _saved(costs: list[float], recipe: Recipe) -> float:
    """Of the last stage's model for all steps, over the recipe's: `costs` are those of a step."""
    steps = [stage.steps for stage in recipe.stages]
    return sum(steps) * costs[-1] / sum(a * b for a, b in zip(steps, costs, strict=True))


def _flops(recipe: Recipe) -> list[float]:
    return [
        training_flops(
            recipe.stage_model(index), recipe.global_batch_size,
            recipe.stage_data(index).max_seq_length,
            recipe.stage_data(index).max_predictions_per_seq, freeze=stage.freeze,
        )
        for index, stage in enumerate(recipe.stages)
    ]  # fmt: skip


# -- one rank ----------------------------------------------------------------------------------


def _measure(arguments: argparse.Namespace) -> None:
    """All engines under all networks, in turns; rank 0 writes the medians down."""
    engine.start()
    found, left_out = _networks(arguments)
    cases = _cases(_recipe(arguments), arguments.accumulate)
    engines = [
        TrainEngine(case.config, OptimizerConfig(), case.settings, first_state(case.config),
                    case.freeze)
        for case in cases
    ]  # fmt: skip
    for case, built in zip(cases, engines, strict=True):
        _step(built, case, 0)  # the first one allocates
    for number in range(1, 1 + arguments.rounds):
        for network, values in found.items():
            _put_behind(network)
            _note(values, "network", _probe())
            for case, built in zip(cases, engines, strict=True):
                for _ in range(arguments.steps):
                    _note(values, case.name, _step(built, case, number))
    if distributed.is_main():
        answer = {"left_out": left_out, "networks": [_summary(*one) for one in found.items()]}
        arguments.answer.write_text(json.dumps(answer))
    for built in engines:
        built.destroy()
    distributed.shut_down()


def _networks(arguments: argparse.Namespace) -> tuple[dict[Network, dict[str, Values]], str]:
    """Those that this kernel can make, nothing measured yet; why it cannot make the others."""
    asked = [Network(rate, delay) for delay in arguments.delay_ms for rate in arguments.megabits]
    faults = {network: _put_behind(network) for network in asked}
    _put_behind(Network(0))
    wrong = [fault for fault in faults.values() if fault]
    return {network: {} for network, fault in faults.items() if not fault}, "".join(wrong[:1])


def _put_behind(network: Network) -> str:
    """Both hosts' interfaces; "", or what `tc` said against it. Collective."""
    own = limit(INTERFACE, network) if distributed.local_rank() == 0 else ""
    return next(filter(None, distributed.gather_objects(own)), "")


def _summary(network: Network, values: dict[str, Values]) -> dict[str, Any]:
    """Medians, for JSON."""
    medians = {
        name: {key: statistics.median(numbers) for key, numbers in one.items()}
        for name, one in values.items()
    }
    itself = medians.pop("network")
    return {"name": str(network), **asdict(network), **itself, "costs": medians}


def _note(values: dict[str, Values], name: str, found: dict[str, float]) -> None:
    for key, value in found.items():
        values.setdefault(name, {}).setdefault(key, []).append(value)


def _probe() -> dict[str, float]:
    """How fast the network is: what this host sends, and a message that both wait for."""
    small, large = torch.zeros(1), torch.zeros(PROBE_ELEMENTS)
    messages = [_timed(lambda: distributed.sum_over_ranks(small))["seconds"] for _ in range(5)]
    sent = _timed(lambda: distributed.sum_over_ranks(large))
    return {"megabits_reached": 8e-6 * sent["bytes"] / sent["seconds"],
            "message_seconds": statistics.median(messages)}  # fmt: skip


def _step(built: TrainEngine, case: Case, number: int) -> dict[str, float]:
    """Seconds and bytes of one optimizer step."""
    micro_steps = case.settings.gradient_accumulation_steps
    shape = case.settings.micro_batch_size, case.seq_length
    batches = [
        random_batch(case.config, *shape, micro_steps * number + micro, case.num_predictions)
        for micro in range(micro_steps)
    ]
    sums = [float(batches[0].num_masked), float(shape[0])]
    counts = torch.tensor(sums) * (micro_steps * distributed.world_size())
    return _timed(lambda: built.train_step(batches, learning_rate=1e-4, counts=counts, seed=number))


def _timed(task: Callable[[], object]) -> dict[str, float]:
    """Begun together on all ranks; the bytes until all are done."""
    distributed.barrier()
    sent, began = sent_bytes(INTERFACE), time.perf_counter()
    task()
    seconds = time.perf_counter() - began
    distributed.barrier()
    return {"seconds": seconds, "bytes": float(sent_bytes(INTERFACE) - sent)}


# -- what is measured --------------------------------------------------------------------------

WHOLE = ", all train"


def _name(recipe: Recipe, index: int) -> str:
    """Of a stage."""
    model, freeze = recipe.stage_model(index), recipe.stages[index].freeze
    size = f"{index + 1}: {model.num_hidden_layers} x {model.hidden_size}"
    return f"{size}, {freeze.layers} frozen" if freeze else size


def _cases(recipe: Recipe, accumulate: int) -> list[Case]:
    """Stages, those that freeze layers also whole, and the knobs."""
    share = recipe.global_batch_size // distributed.world_size()
    found = []
    for index, stage in enumerate(recipe.stages):
        data, model = recipe.stage_data(index), recipe.stage_model(index)
        name = _name(recipe, index)
        case = Case(name, model, stage.freeze, resolved(1, "bf16", share), data.max_seq_length,
                    data.max_predictions_per_seq)  # fmt: skip
        found.append(case)
        if stage.freeze:
            found.append(replace(case, name=name.partition(",")[0] + WHOLE, freeze=None))
    knobs = [
        replace(found[-1], name=name, settings=_with_knob(zero, changes, share, accumulate))
        for name, (zero, changes) in _knobs().items()
    ]
    return found + knobs


def _knobs() -> dict[str, tuple[int, dict[str, object]]]:
    ranks_each = distributed.local_world_size()
    if ranks_each == 1:
        return KNOBS
    zero, changes = KNOBS["ZeRO 3"]
    return KNOBS | {HIERARCHY: (zero, changes | {"zero_hpz_partition_size": ranks_each})}


def _with_knob(
    zero_stage: int, changes: Mapping[str, object], share: int, micro_steps: int
) -> ResolvedEngine:
    """`share` sequences a rank and step, in so many micro steps."""
    settings = resolved(zero_stage, "bf16", share // micro_steps)
    document = {key: value for key, value in settings.deepspeed.items() if key != "data_types"}
    zero: Any = document["zero_optimization"]
    top = {key: value for key, value in changes.items() if key == "communication_data_type"}
    document |= top | {
        "train_batch_size": share * distributed.world_size(),
        "gradient_accumulation_steps": micro_steps,
        "zero_optimization": zero | {k: v for k, v in changes.items() if k not in top},
    }
    return replace(settings, deepspeed=document, gradient_accumulation_steps=micro_steps)


if __name__ == "__main__":
    main()
