"""Real tokens per second of a whole training step on a CPU, beside Hugging Face transformers.

    python benchmarks/step_cpu.py [--sizes 6x256 12x768] [--batch 16] [--threads 2] [--rounds 5]

Five loops take turns with the same full batches, dropout, sentence pairs, clipping and AdamW:

    transformers   BertForPreTraining under torch.autocast(bfloat16), torch's fused AdamW
    as_it_comes    the same, with memory as glibc and torch leave it
    plain          this project's model in bf16, fp32 masters, AdamW, and nothing around it
    engine         this project's TrainEngine: DeepSpeed as in deepspeed_configs/cpu_bf16.json
    trainer        the same with data read from shards, metrics and a log row every ten steps

Each loop is a process of its own; all but one keep freed memory in huge pages, as the engine does
(distributed.keep_freed_memory). Medians over the rounds. `of peak`: the FLOPs that this project's
model needs (stacking/cost.py), in a second, over the machine's own rate of bf16 products, measured
in every round. `overhead`: time beyond the plain loop's. Ends with one JSON line for each size.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from loader import random_rows, write_shards
from on_ranks import first_state, predictions, random_batch, resolved
from torch import Tensor, nn
from typing_extensions import Self

from stacking import distributed, engine, metrics
from stacking.batch import MaskedLMBatch
from stacking.config import BertConfig, DataConfig, OptimizerConfig
from stacking.cost import training_flops
from stacking.dataset import PretrainingLoader
from stacking.engine import TrainEngine
from stacking.modeling import BertForPreTraining
from stacking.shard_reader import open_shards

RATE, DECAY, CLIP, LOG_EVERY = 1e-4, 0.01, 1.0, 10
Loop = Callable[[int], None]  # takes so many steps


def main() -> None:
    """Measure each size; print the tables and the JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["6x256", "12x768"], help="LAYERSxHIDDEN")
    parser.add_argument("--vocab-size", type=int, default=30_522)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="about, of each turn")
    parser.add_argument("--only", nargs="+", choices=MAKERS, metavar="LOOP")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # or the engine shares the cores out
    os.environ["DS_ACCELERATOR"] = "cpu"
    for size in arguments.sizes:
        _measure(model_of(size, arguments.vocab_size), arguments)


def model_of(size: str, vocab_size: int) -> BertConfig:
    """BERT of "LAYERSxHIDDEN", heads of 64."""
    layers, hidden = map(int, size.split("x"))
    return BertConfig(
        vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, intermediate_size=4 * hidden,
        max_position_embeddings=512,
    )  # fmt: skip


def _measure(config: BertConfig, arguments: argparse.Namespace) -> None:
    """All loops in turn, and the machine's rate between them."""
    with ExitStack() as stack:
        loops = {
            name: stack.enter_context(_Apart(name, config, arguments))
            for name in arguments.only or MAKERS
        }
        counts = {name: _steps_in(arguments.seconds, loop.take) for name, loop in loops.items()}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        rates = []
        for _ in range(arguments.rounds):
            rates.append(metrics.measure_matmul_flops(torch.device("cpu"), torch.bfloat16))
            for name, loop in loops.items():
                seconds[name].append(loop.take(counts[name]) / counts[name])
    _report(config, arguments, seconds, statistics.median(rates))


class _Apart:
    """A loop in a process of its own, which waits for its turn.

    The allocator's settings are a whole process's: the peer must not have ours.
    """

    def __init__(self, name: str, config: BertConfig, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, config, arguments))
        self._process.start()
        theirs.close()

    def take(self, steps: int) -> float:
        """Seconds of so many steps; the first turn also builds the loop."""
        self._line.send(steps)
        return float(self._line.recv())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        self._process.join()


def _serve(
    line: "Connection[float, int]", name: str, config: BertConfig, arguments: argparse.Namespace
) -> None:
    """Take as many steps as asked for, until the line is closed."""
    torch.set_num_threads(arguments.threads)
    if name != "as_it_comes":
        engine.start()
    batches = [
        random_batch(config, arguments.batch, arguments.seq_length, number) for number in range(8)
    ]
    with ExitStack() as stack, suppress(EOFError):
        loop = MAKERS[name](config, batches, stack)
        while True:
            steps = line.recv()
            began = time.perf_counter()
            loop(steps)
            line.send(time.perf_counter() - began)
    distributed.shut_down()


def _report(
    config: BertConfig,
    arguments: argparse.Namespace,
    seconds: dict[str, list[float]],
    rate: float,
) -> None:
    shape = arguments.batch, arguments.seq_length, predictions(arguments.seq_length)
    flops = training_flops(config, *shape)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = arguments.batch * arguments.seq_length
    peer, plain = medians.get("transformers"), medians.get("plain")
    print(f"{config.num_hidden_layers}x{config.hidden_size}, {arguments.batch} sequences of "
          f"{arguments.seq_length}, {arguments.threads} threads; {flops / 1e9:.0f} GFLOP a step, "
          f"{rate / 1e9:.0f} GFLOP/s of bf16 products")  # fmt: skip
    for name, median in medians.items():
        times = f"{peer / median:5.2f} x" if peer else ""
        over = f"{median / plain - 1:+7.1%}" if plain and name in ("engine", "trainer") else ""
        print(f"  {name:<13}{1e3 * median:9.1f} ms {tokens / median:9,.0f} tokens/s {times:>8}"
              f"   of peak {flops / median / rate:5.1%}   {over}")  # fmt: skip
    given = {key: value for key, value in vars(arguments).items() if key not in ("sizes", "only")}
    size = {"layers": config.num_hidden_layers, "hidden": config.hidden_size}
    print(json.dumps({"benchmark": "step_cpu", **size, **given, "step_seconds": seconds,
                      "matmul_flops_per_second": rate, "model_flops": flops}))  # fmt: skip


def _steps_in(seconds: float, take: Callable[[int], float]) -> int:
    """About how many steps take so long, after two warm ones."""
    take(2)
    return max(1, round(seconds / take(1)))


def _transformers(config: BertConfig, batches: Sequence[MaskedLMBatch], _: ExitStack) -> Loop:
    """The peer, as its users train it."""
    import transformers  # noqa: PLC0415  its import takes seconds

    torch.manual_seed(1)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "max_position_embeddings")  # fmt: skip
    sizes = {name: getattr(config, name) for name in names}
    model = transformers.BertForPreTraining(transformers.BertConfig(**sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    inputs = []
    for batch in batches:
        labels = torch.full_like(batch.input_ids, -100)
        labels.scatter_(1, batch.masked_lm_positions, batch.masked_lm_ids)
        inputs.append({"input_ids": batch.input_ids, "token_type_ids": batch.token_type_ids,
                       "labels": labels,
                       "next_sentence_label": batch.next_sentence_labels})  # fmt: skip

    def loop(steps: int) -> None:
        for number in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**inputs[number % len(inputs)]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    return loop


def _plain(config: BertConfig, batches: Sequence[MaskedLMBatch], _: ExitStack) -> Loop:
    """This project's model without anything around it."""
    model = BertForPreTraining(config).train()
    model.load_state_dict(first_state(config).weights)
    model.to(torch.bfloat16)
    weights = list(model.parameters())
    masters = [weight.detach().float() for weight in weights]
    gradients = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    optimizer = torch.optim.AdamW(masters, lr=RATE, weight_decay=DECAY, fused=True)

    def loop(steps: int) -> None:
        for number in range(steps):
            batch = batches[number % len(batches)]
            sums = model(**batch.inputs())
            loss = sums["mlm_loss_sum"] / batch.num_masked
            (loss + sums["nsp_loss_sum"] / len(batch.input_ids)).backward()
            with torch.no_grad():
                torch._foreach_copy_(gradients, [_gradient(weight) for weight in weights])
                nn.utils.clip_grad_norm_(masters, CLIP)
                optimizer.step()
                torch._foreach_copy_(weights, masters)
            model.zero_grad()

    return loop


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def _built(config: BertConfig, sequences: int, stack: ExitStack) -> TrainEngine:
    built = TrainEngine(
        config, OptimizerConfig(), resolved(1, "bf16", sequences), first_state(config)
    )
    stack.callback(built.destroy)
    return built


def _engine(config: BertConfig, batches: Sequence[MaskedLMBatch], stack: ExitStack) -> Loop:
    """DeepSpeed around it."""
    built = _built(config, len(batches[0].input_ids), stack)

    def loop(steps: int) -> None:
        for number in range(steps):
            batch = batches[number % len(batches)]
            counts = torch.tensor([batch.num_masked, len(batch.input_ids)], dtype=torch.float32)
            built.train_step([batch], learning_rate=RATE, counts=counts, seed=number)

    return loop


def _trainer(config: BertConfig, batches: Sequence[MaskedLMBatch], stack: ExitStack) -> Loop:
    """What Trainer does in a step, besides."""
    sequences, length = batches[0].input_ids.shape
    built = _built(config, sequences, stack)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "data")
    rows = random_rows(4096, length, config.vocab_size, padded=False)
    write_shards(folder, rows, 4, vocab_size=config.vocab_size)
    steps_of = stack.enter_context(
        PretrainingLoader(
            open_shards(folder, "training"),
            DataConfig(max_seq_length=length, max_predictions_per_seq=predictions(length)),
            seed=1,
            global_batch_size=sequences,
            micro_batch_size=sequences,
            model_vocab_size=config.vocab_size,
        )
    )
    log = metrics.MetricsLog(folder / "metrics.jsonl")
    stack.callback(log.close)
    window = metrics.Window(built.device)
    numbers: Iterator[int] = iter(range(1 << 40))

    def loop(steps: int) -> None:
        for number in (next(numbers) for _ in range(steps)):
            digest = steps_of.sample_hash(number)
            taken = next(steps_of)
            masked = sum(batch.num_masked for batch in taken)
            counts = distributed.sum_over_ranks(torch.tensor([masked, sequences, 0.0]))
            totals = built.train_step(taken, learning_rate=RATE, counts=counts[:2], seed=number)
            window.add(totals, taken, 0.0)
            if number % LOG_EVERY == 0:
                rates = window.take()
                log.write("train", {"loss": rates.mlm_loss, "sample_hash": digest})

    return loop


MAKERS: dict[str, Callable[[BertConfig, Sequence[MaskedLMBatch], ExitStack], Loop]] = {
    "transformers": _transformers,
    "as_it_comes": _transformers,
    "plain": _plain,
    "engine": _engine,
    "trainer": _trainer,
}


if __name__ == "__main__":
    main()
