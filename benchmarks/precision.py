"""Step time, memory and loss of each ZeRO stage in each precision, in one run.

    python benchmarks/precision.py [--layers 6] [--hidden 256] [--ranks 1 2] [--rounds 3]

The question it answers: bf16 at ZeRO 1 (fp32 masters beside bf16 weights), or torch_autocast at
ZeRO 0 (fp32 weights, bf16 products), which is the only 16 bits that stage 0 has here. All take
turns on the same batches from the same weights; `loss` is that after the same steps, `state`
the bytes of all tensors that the engine holds then. CPU, gloo; ends with one JSON line.
"""

import argparse
import json
import statistics
import time

from on_ranks import first_state, on_ranks, resolved, step, tensor_bytes

from stacking import distributed, engine
from stacking.config import BertConfig, OptimizerConfig
from stacking.engine import TrainEngine

CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16_autocast"),
         (1, "bf16_autocast"), (1, "bf16"), (2, "bf16"), (3, "bf16")]  # fmt: skip
Row = dict[str, float]


def main() -> None:
    """Measure on each number of ranks; print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences of one rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    results = {}
    for ranks in arguments.ranks:
        found = on_ranks(_measure, ranks, arguments)
        base = found["1 bf16"]["seconds"]
        print(f"{ranks} ranks\n  ZeRO, precision     step      of ZeRO 1 bf16   state   loss")
        for case, row in found.items():
            print(f"  {case:<16}{row['seconds'] * 1e3:9.1f} ms{row['seconds'] / base:12.2f}"
                  f"{row['state'] / 1e6:14.0f} MB{row['loss']:9.4f}")  # fmt: skip
        results[str(ranks)] = found
    ratio = results[str(arguments.ranks[-1])]
    ratio_line = ratio["0 bf16_autocast"]["seconds"] / ratio["1 bf16"]["seconds"]
    print(json.dumps({"benchmark": "precision", **vars(arguments), "results": results,
                      "autocast_zero0_to_bf16_zero1": ratio_line}))  # fmt: skip


def _measure(arguments: argparse.Namespace) -> dict[str, Row]:
    """One rank: medians over all turns."""
    engine.start()
    config = BertConfig(
        vocab_size=8192, hidden_size=arguments.hidden, num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        intermediate_size=4 * arguments.hidden, max_position_embeddings=512,
    )  # fmt: skip
    snapshot = first_state(config)
    turns: dict[str, list[Row]] = {}
    for _ in range(arguments.rounds):
        for zero_stage, precision in CASES:
            before = tensor_bytes()
            settings = resolved(zero_stage, precision, arguments.batch)
            built = TrainEngine(config, OptimizerConfig(), settings, snapshot)
            seconds = []
            for number in range(1 + arguments.steps):
                distributed.barrier()
                began = time.perf_counter()
                loss = step(built, arguments.batch, arguments.seq_length, number)
                seconds.append(time.perf_counter() - began)
            row = {"seconds": statistics.median(seconds[1:]), "loss": loss,
                   "state": float(tensor_bytes() - before)}  # fmt: skip
            turns.setdefault(f"{zero_stage} {precision}", []).append(row)
            built.destroy()
    distributed.shut_down()
    return {case: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for case, rows in turns.items()}  # fmt: skip


if __name__ == "__main__":
    main()
