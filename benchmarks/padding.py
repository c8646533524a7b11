"""What leaving padding out brings: real tokens per second with short documents in long rows.

    python benchmarks/padding.py [--size 6x256] [--seq-length 512] [--means 128 256] [--rounds 5]

Two engines of the same weights take turns on the same batches, new ones in each round, one with the
JSON's `unpadding`, one without. Lengths are drawn evenly between 1 and twice the mean, at most the
row. `limit` is the padded batch's tokens over the real ones: the gain if time were proportional to
tokens. Medians; ends with one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from on_ranks import first_state, random_batch, resolved
from step_cpu import RATE, model_of

from stacking import distributed, engine
from stacking.batch import MaskedLMBatch
from stacking.config import BertConfig, OptimizerConfig
from stacking.engine import TrainEngine

NUM_BATCHES = 4


def main() -> None:
    """Measure at each mean length; print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="6x256", help="LAYERSxHIDDEN")
    parser.add_argument("--vocab-size", type=int, default=30_522)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--means", type=int, nargs="+", default=[128, 256], help="of the lengths")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.update(OMP_NUM_THREADS=str(arguments.threads), DS_ACCELERATOR="cpu")
    engine.start()
    config = model_of(arguments.size, arguments.vocab_size)
    results = [_measure(config, arguments, mean) for mean in arguments.means]
    print(json.dumps({"benchmark": "padding", **vars(arguments), "results": results}))
    distributed.shut_down()


def _measure(config: BertConfig, arguments: argparse.Namespace, mean: int) -> dict[str, object]:
    numbers = iter(range(1 << 20))

    def fresh() -> list[MaskedLMBatch]:
        """Of other lengths than any before, as in training: kernels are built for a length."""
        return [_short(config, arguments, mean, next(numbers)) for _ in range(NUM_BATCHES)]

    settings = resolved(1, arguments.precision, arguments.batch)
    engines = {
        unpads: TrainEngine(
            config, OptimizerConfig(), replace(settings, unpads=unpads), first_state(config)
        )
        for unpads in (False, True)
    }
    seconds: dict[bool, list[float]] = {unpads: [] for unpads in engines}
    batches = fresh()
    losses = {unpads: _turn(built, batches)[1] for unpads, built in engines.items()}  # warm
    real = total = 0
    for _ in range(arguments.rounds):
        batches = fresh()
        real += sum(batch.num_real_tokens for batch in batches)
        total += sum(batch.input_ids.numel() for batch in batches)
        for unpads, built in engines.items():
            seconds[unpads].append(_turn(built, batches)[0])
    for built in engines.values():
        built.destroy()
    padded, unpadded = (statistics.median(seconds[unpads]) for unpads in (False, True))
    limit, a_round = total / real, real / arguments.rounds
    print(f"mean length {arguments.seq_length / limit:5.0f} of {arguments.seq_length}: "
          f"{a_round / padded:8,.0f} -> {a_round / unpadded:8,.0f} real tokens/s: "
          f"{padded / unpadded:.2f} x (limit {limit:.2f}); first losses "
          f"{losses[False]:.4f} {losses[True]:.4f}")  # fmt: skip
    return {"mean": mean, "gain": padded / unpadded, "limit": limit, "padded": seconds[False],
            "unpadded": seconds[True]}  # fmt: skip


def _short(
    config: BertConfig, arguments: argparse.Namespace, mean: int, number: int
) -> MaskedLMBatch:
    """A batch whose rows are real up to a random length; 15 % of that is masked."""
    whole = random_batch(config, arguments.batch, arguments.seq_length, number)
    generator = torch.Generator().manual_seed(number)
    lengths = torch.randint(1, 2 * mean + 1, (arguments.batch,), generator=generator)
    lengths = lengths.clamp(max=arguments.seq_length)
    mask = torch.arange(arguments.seq_length) < lengths[:, None]
    is_masked = whole.masked_lm_positions < (0.15 * lengths)[:, None]
    return replace(
        whole,
        input_ids=whole.input_ids.masked_fill(~mask, 0),
        attention_mask=mask,
        masked_lm_positions=whole.masked_lm_positions.where(is_masked, 0),
        masked_lm_ids=whole.masked_lm_ids.where(is_masked, -100),
        num_masked=int(is_masked.sum()),
        num_real_tokens=int(mask.sum()),
    )


def _turn(built: TrainEngine, batches: Sequence[MaskedLMBatch]) -> tuple[float, float]:
    """Seconds of one step on each batch, and the first step's loss."""
    losses = []
    began = time.perf_counter()
    for number, batch in enumerate(batches):
        counts = torch.tensor([max(batch.num_masked, 1), len(batch.input_ids)], dtype=torch.float32)
        sums = built.train_step([batch], learning_rate=RATE, counts=counts, seed=number)
        losses.append(float(sums[0] / counts[0]))
    return time.perf_counter() - began, losses[0]


if __name__ == "__main__":
    main()
