"""How long one AdamW update takes by each implementation that can run on a CPU.

    python benchmarks/optimizers.py [--parameters 10 110] [--threads 1 2] [--rounds 15]

Under ZeRO an optimizer sees one flat fp32 vector for each group of parameters and rank, and so does
each implementation here: torch's AdamW as one kernel (fused), as a list of tensors (foreach) and as
a loop, and DeepSpeed's CPU Adam, whose C++ is compiled first (about a minute, once for a machine).
They take turns, and the table gives medians and the ratio to torch's fused one. What cannot be
built is left out with the reason. Ends with one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stacking import engine

NUMBERS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
BYTES_PER_UPDATE = 28  # fp32 weight and both moments read and written, gradient read
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def main() -> None:
    """Time all implementations in turn at each size and number of threads; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parameters", type=float, nargs="+", default=[10, 110], help="in millions"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15, help="timed updates of each")
    arguments = parser.parse_args()
    makers, skipped = _implementations()
    for name, reason in skipped.items():
        print(f"{name}: left out: {reason}")
    rows = []
    for millions in arguments.parameters:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            medians = _medians(makers, int(millions * 1e6), arguments.rounds)
            rows.append(_row(millions, threads, medians))
    print(json.dumps({"benchmark": "optimizers", "rounds": arguments.rounds,
                      "results": rows, "skipped": skipped}))  # fmt: skip


def _row(millions: float, threads: int, medians: dict[str, float]) -> dict[str, object]:
    """Print one size and number of threads; give it back for the JSON line."""
    print(f"{millions:g} M parameters, {threads} threads")
    base = medians["torch fused"]
    for name, seconds in medians.items():
        speed = millions * 1e6 * BYTES_PER_UPDATE / seconds / 1e9
        print(f"  {name:<16}{seconds * 1e3:>9.1f} ms{seconds / base:>7.2f}{speed:>8.1f} GB/s")
    ratios = {name: round(seconds / base, 3) for name, seconds in medians.items()}
    seconds_of = {name: round(value, 5) for name, value in medians.items()}
    return {"million_parameters": millions, "threads": threads, "seconds": seconds_of,
            "ratio_to_torch_fused": ratios}  # fmt: skip


def _implementations() -> tuple[dict[str, Make], dict[str, str]]:
    """Those that run here, and why another does not."""
    makers: dict[str, Make] = {
        "torch fused": lambda given: torch.optim.AdamW(given, fused=True, **NUMBERS),
        "torch foreach": lambda given: torch.optim.AdamW(given, foreach=True, **NUMBERS),
        "torch loop": lambda given: torch.optim.AdamW(given, foreach=False, **NUMBERS),
    }
    if engine.deepspeed is None:
        return makers, {"DeepSpeed CPU": "DeepSpeed is not installed"}
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    def deepspeed_cpu(given: list[nn.Parameter]) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = DeepSpeedCPUAdam(given, adamw_mode=True, **NUMBERS)
        return made

    began = time.perf_counter()
    try:  # it is compiled at first use: no compiler, no ninja, a processor that it does not know
        deepspeed_cpu([nn.Parameter(torch.zeros(8))])
    except (RuntimeError, ImportError, OSError) as error:
        return makers, {"DeepSpeed CPU": str(error).strip().splitlines()[0]}
    print(f"DeepSpeed CPU: built or loaded in {time.perf_counter() - began:.1f} s")
    return makers | {"DeepSpeed CPU": deepspeed_cpu}, {}


def _medians(makers: dict[str, Make], numel: int, rounds: int) -> dict[str, float]:
    """Seconds of one update of a flat vector; all take turns after two warm updates."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(numel, generator=generator)
    gradient = torch.randn(numel, generator=generator)
    optimizers = {}
    for name, make in makers.items():
        parameter = nn.Parameter(start.clone())
        parameter.grad = gradient  # none of them writes to it
        optimizers[name] = make([parameter])
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(rounds + 2):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
