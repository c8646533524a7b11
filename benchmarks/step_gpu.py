"""Model FLOPs utilisation of a whole training step on one GPU, beside Hugging Face transformers.

    python benchmarks/step_gpu.py [--sizes 12x768 24x1024] [--lengths 128 512]
        [--precisions fp16 bf16] [--micro-tokens 16384 32768 65536] [--short-documents]
        [--only engine compiled transformers] [--rounds 5] [--json FILE]

Loops take turns with random batches of 16-bit training, dropout, sentence pairs and clipping:

    transformers   BertForPreTraining with SDPA under torch.autocast, torch's fused AdamW
    engine         this project's TrainEngine: DeepSpeed at ZeRO 1, FusedAdam where it can be built
    compiled       the same with its layers compiled, as the JSON block `compile` asks

Each takes the fastest of the micro batches that fit; give one, and all have the same. Nothing is
recomputed. Medians over the rounds, of real tokens: padding counts neither as tokens nor as FLOPs.
`of peak`: the FLOPs that this project's model needs (stacking/cost.py) for each sequence at its own
length, in a second, over the GPU's own rate of 16-bit products, measured in every round; `usual`:
the same by the usual formula, which counts all rows of the last layer. `peak` memory is a loop's
own, with its state. `waits`: the lines at which the host waits for the GPU in a step, all in the
JSON line that ends each case. Without a CUDA device it says so and ends.
"""

import argparse
import gc
import json
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from on_ranks import first_state, predictions, random_batch
from torch import Tensor, nn

from stacking import distributed, engine, engine_options, metrics
from stacking.batch import MaskedLMBatch
from stacking.config import BertConfig, OptimizerConfig
from stacking.cost import training_flops
from stacking.deepspeed_config import ResolvedEngine
from stacking.deepspeed_schema import Compile
from stacking.engine import TrainEngine
from stacking.masked_lm_loss import IGNORED_LABEL

RATE, DECAY, CLIP = 1e-4, 0.01, 1.0
NUM_BATCHES = 4  # that take turns, in pinned memory
SHORTEST = 1 / 16  # of a short document, as a share of the length; the longest fills it
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Step = Callable[[MaskedLMBatch], None]


@dataclass(frozen=True)
class Case:
    """What all loops of one table have in common."""

    config: BertConfig
    length: int
    precision: str
    is_short: bool
    device: torch.device
    has_fused_adam: bool


@dataclass
class Runner:
    """One loop, built and tuned."""

    step: Step
    batches: Sequence[MaskedLMBatch]
    peak_bytes: int = 0  # its own
    steps: int = 0  # of a turn
    waits: Counter[str] = field(default_factory=Counter)  # of the host, by line
    seconds: list[float] = field(default_factory=list)  # a step, of each turn


def main(given: Sequence[str] | None = None) -> None:
    """Measure each case; print the tables and the JSON lines."""
    arguments = _parser().parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("step_gpu: this machine has no CUDA device; nothing was measured")
        return
    if arguments.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    accelerator = engine.start()
    rows = []
    for size in arguments.sizes:
        config = _config(arguments.vocab_size, *map(int, size.split("x")))
        for length in arguments.lengths:
            for precision in arguments.precisions:
                case = Case(
                    config, length, precision, arguments.short_documents,
                    engine.current_device(), accelerator.fused_adam,
                )  # fmt: skip
                rows.append(_measure(case, arguments))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    distributed.shut_down()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", default=["12x768", "24x1024"], help="LAYERSxHIDDEN")
    add("--lengths", nargs="+", type=int, default=[128, 512])
    add("--precisions", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add("--micro-tokens", nargs="+", type=int, default=[16_384, 32_768, 65_536],
        help="tokens of a micro batch, with padding, to choose from")  # fmt: skip
    add("--short-documents", action="store_true",
        help="lengths from 1/16 to all of the sequence, mean 0.53")  # fmt: skip
    add("--only", nargs="+", choices=list(MAKERS), default=list(MAKERS), metavar="LOOP")
    add("--vocab-size", type=int, default=30_528)
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=2.0, help="about, of each turn")
    add("--json", type=Path, default=None, metavar="FILE", help="all results")
    add("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: to test this script
    return parser


def _config(vocab_size: int, layers: int, hidden: int) -> BertConfig:
    return BertConfig(
        vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), intermediate_size=4 * hidden,
        max_position_embeddings=512,
    )  # fmt: skip


# -- batches, and what they need -------------------------------------------------------------------


def make_batches(case: Case, sequences: int) -> list[MaskedLMBatch]:
    """Random micro batches for `case`, in pinned memory where the device is a GPU."""
    whole = [
        random_batch(case.config, sequences, case.length, number) for number in range(NUM_BATCHES)
    ]
    batches = [_shortened(batch, number) if case.is_short else batch
               for number, batch in enumerate(whole)]  # fmt: skip
    return [batch.pinned() for batch in batches] if case.device.type == "cuda" else batches


def _shortened(batch: MaskedLMBatch, seed: int) -> MaskedLMBatch:
    """The batch with sequences of their own lengths, uniform from SHORTEST to all of it."""
    sequences, length = batch.input_ids.shape
    generator = torch.Generator().manual_seed(seed)
    shortest = max(2, round(SHORTEST * length))
    lengths = torch.randint(shortest, length + 1, (sequences, 1), generator=generator)
    mask = torch.arange(length) < lengths
    slots = torch.arange(batch.masked_lm_ids.shape[1])
    is_used = slots < (predictions(length) * lengths / length).clamp(min=1)
    return replace(
        batch,
        input_ids=batch.input_ids * mask,
        attention_mask=mask,
        masked_lm_positions=batch.masked_lm_positions * is_used,
        masked_lm_ids=batch.masked_lm_ids.where(is_used, torch.tensor(IGNORED_LABEL)),
        num_masked=int(is_used.sum()),
        num_real_tokens=int(mask.sum()),
    )


def needed_flops(config: BertConfig, batch: MaskedLMBatch, *, all_rows: bool = False) -> int:
    """FLOPs of a step on the batch's real tokens, each sequence at its own length."""
    lengths = batch.attention_mask.sum(1).tolist()
    masked = (batch.masked_lm_ids != IGNORED_LABEL).sum(1).tolist()
    kinds = Counter(zip(lengths, masked, strict=True))
    return sum(
        training_flops(config, count, *kind, all_rows=all_rows) for kind, count in kinds.items()
    )


# -- the loops -------------------------------------------------------------------------------------


def _transformers(case: Case, _: ExitStack) -> Step:
    """The peer, as its users train it."""
    import transformers  # noqa: PLC0415  its import takes seconds

    torch.manual_seed(1)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "max_position_embeddings")  # fmt: skip
    sizes = {name: getattr(case.config, name) for name in names}
    config = transformers.BertConfig(**sizes, attn_implementation="sdpa")
    model = transformers.BertForPreTraining(config).to(case.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    scaler = torch.amp.GradScaler(case.device.type, enabled=case.precision == "fp16")

    def step(batch: MaskedLMBatch) -> None:
        with torch.autocast(case.device.type, DTYPES[case.precision]):
            loss = model(**_their_inputs(batch, case.device)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def _their_inputs(batch: MaskedLMBatch, device: torch.device) -> dict[str, Tensor]:
    """A batch as transformers' BertForPreTraining takes it; without a mask where nothing is padded,
    which is faster."""
    there = batch.to(device)
    labels = torch.full_like(there.input_ids, IGNORED_LABEL)
    # Filling points at [CLS], which is never predicted: the true labels are written elsewhere.
    labels.scatter_(1, there.masked_lm_positions, there.masked_lm_ids)
    assert there.next_sentence_labels is not None
    inputs = {"input_ids": there.input_ids, "token_type_ids": there.token_type_ids,
              "labels": labels, "next_sentence_label": there.next_sentence_labels}  # fmt: skip
    if batch.num_real_tokens != batch.input_ids.numel():
        inputs["attention_mask"] = there.attention_mask
    return inputs


def _engine(case: Case, stack: ExitStack, compiled: Compile | None = None) -> Step:
    """This project's engine."""
    settings = engine_options.settle([_resolved(case, compiled)], case.device)[0]
    for notice in settings.notices:
        print(f"  {notice}")
    built = TrainEngine(case.config, OptimizerConfig(), settings, first_state(case.config))
    stack.callback(built.destroy)

    def step(batch: MaskedLMBatch) -> None:
        counts = torch.tensor([batch.num_masked, len(batch.input_ids)], dtype=torch.float32)
        if case.device.type == "cuda":
            counts = counts.pin_memory().to(case.device, non_blocking=True)
        built.train_step([batch], learning_rate=RATE, counts=counts, seed=1)

    return step


def _compiled(case: Case, stack: ExitStack) -> Step:
    """The same, compiled."""
    return _engine(case, stack, Compile(enabled=True))


def _resolved(case: Case, compiled: Compile | None) -> ResolvedEngine:
    """ZeRO 1, the lowest that DeepSpeed trains 16-bit weights at."""
    adam = {} if case.has_fused_adam else {"torch_adam": True, "fused": True}
    document: dict[str, object] = {
        "train_batch_size": 1,  # DeepSpeed looks at the accumulation that follows from it only
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, **adam}},
        case.precision: {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    return ResolvedEngine(
        deepspeed=document, precision=case.precision,  # type: ignore[arg-type]
        zero_stage=1, micro_batch_size=1, gradient_accumulation_steps=1, log_every=1,
        apex_layer_norm=False, compile=compiled,
    )  # fmt: skip


MAKERS: dict[str, Callable[[Case, ExitStack], Step]] = {
    "transformers": _transformers,
    "engine": _engine,
    "compiled": _compiled,
}


# -- measuring -------------------------------------------------------------------------------------


def _measure(case: Case, arguments: argparse.Namespace) -> dict[str, object]:
    """All loops in turn, and the device's rate between them; the case's JSON line."""
    rates: list[float] = []
    with ExitStack() as stack:
        runners = {name: _tuned(case, MAKERS[name], arguments, stack) for name in arguments.only}
        for _ in range(arguments.rounds):
            rates.append(metrics.measure_matmul_flops(case.device, DTYPES[case.precision]))
            for runner in runners.values():
                free_unused(case.device)
                runner.step(runner.batches[0])
                runner.seconds.append(_seconds_a_step(runner, runner.steps))
        row = _report(case, runners, rates)
        runners.clear()
    free_unused(case.device)
    return row


def _tuned(
    case: Case,
    make: Callable[[Case, ExitStack], Step],
    arguments: argparse.Namespace,
    stack: ExitStack,
) -> Runner:
    """The loop with its fastest micro batch, built anew: one that ran out of memory is broken."""
    free_unused(case.device)
    choices = sorted({max(1, tokens // case.length) for tokens in arguments.micro_tokens})
    chosen = choices[0] if len(choices) == 1 else _fastest(case, make, choices)
    free_unused(case.device)
    others = _allocated(case.device)
    step, batches = make(case, stack), make_batches(case, chosen)
    runner = Runner(step, batches)
    _seconds_a_step(runner, 2)
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds_a_step(runner, 1)
    if case.device.type == "cuda":
        runner.peak_bytes = torch.cuda.max_memory_allocated() - others
        runner.waits = host_waits(runner)
    runner.steps = max(1, round(arguments.seconds / seconds))
    return runner


def _fastest(case: Case, make: Callable[[Case, ExitStack], Step], choices: Iterable[int]) -> int:
    """The number of sequences with the most real tokens a second, of those that fit."""
    tokens_a_second: dict[int, float] = {}
    with ExitStack() as stack:
        step = make(case, stack)
        for sequences in choices:
            runner = Runner(step, make_batches(case, sequences))
            try:
                _seconds_a_step(runner, 3)
                seconds = _seconds_a_step(runner, NUM_BATCHES)
            except torch.OutOfMemoryError:
                break
            tokens_a_second[sequences] = _mean_real_tokens(runner) / seconds
    if not tokens_a_second:
        raise SystemExit("step_gpu: not even the smallest of --micro-tokens fits; give smaller")
    return max(tokens_a_second, key=lambda sequences: tokens_a_second[sequences])


def _seconds_a_step(runner: Runner, steps: int) -> float:
    engine.synchronize()
    began = time.perf_counter()
    for number in range(steps):
        runner.step(runner.batches[number % len(runner.batches)])
    engine.synchronize()
    return (time.perf_counter() - began) / steps


def host_waits(runner: Runner) -> Counter[str]:
    """Where the host waits for the GPU in one step: "file:line" and how often."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            runner.step(runner.batches[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [wait for wait in seen if "synchroniz" in str(wait.message)]
    return Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in told)


def _mean_real_tokens(runner: Runner) -> float:
    return statistics.mean(batch.num_real_tokens for batch in runner.batches)


def free_unused(device: torch.device) -> None:
    """Give one loop's unused memory to the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _report(case: Case, runners: dict[str, Runner], rates: Sequence[float]) -> dict[str, object]:
    """Print the case's table and its JSON line."""
    config, rate = case.config, statistics.median(rates)
    figures = {name: figures_of(case, runner, rate) for name, runner in runners.items()}
    kind = "short documents" if case.is_short else "full sequences"
    print(f"{config.num_hidden_layers}x{config.hidden_size}, {kind} of {case.length}, "
          f"{case.precision}; {rate / 1e12:,.1f} TFLOP/s of its products")  # fmt: skip
    peer = figures.get("transformers")
    for name, found in figures.items():
        speed = found["real_tokens_per_second"]
        times = f"{speed / peer['real_tokens_per_second']:5.2f} x" if peer else ""
        print(f"  {name:<13}{found['micro_batch']:>5.0f} sequences {speed:11,.0f} tokens/s "
              f"{times:>8}   of peak {found['of_peak']:6.1%} (usual {found['of_peak_usual']:6.1%})"
              f"   {found['peak_bytes'] / 2**30:6.1f} GiB   "
              f"{runners[name].waits.total()} waits")  # fmt: skip
    row: dict[str, object] = {
        "benchmark": "step_gpu", "layers": config.num_hidden_layers, "hidden": config.hidden_size,
        "vocab_size": config.vocab_size, "length": case.length, "precision": case.precision,
        "short_documents": case.is_short, "fused_adam": case.has_fused_adam,
        "device": torch.cuda.get_device_name() if case.device.type == "cuda" else "cpu",
        "matmul_flops_per_second": rates, "loops": figures,
        "step_seconds": {name: runner.seconds for name, runner in runners.items()},
        "host_waits": {name: runner.waits for name, runner in runners.items()},
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def figures_of(case: Case, runner: Runner, rate: float) -> dict[str, float]:
    """One loop's medians; `rate`: the device's FLOPs a second in matrix products."""
    seconds = statistics.median(runner.seconds)

    def of_peak(all_rows: bool) -> float:
        flops = [needed_flops(case.config, b, all_rows=all_rows) for b in runner.batches]
        return statistics.mean(flops) / seconds / rate

    return {
        "micro_batch": len(runner.batches[0].input_ids),
        "real_tokens_per_second": _mean_real_tokens(runner) / seconds,
        "of_peak": of_peak(all_rows=False),
        "of_peak_usual": of_peak(all_rows=True),
        "peak_bytes": runner.peak_bytes,
    }


if __name__ == "__main__":
    main()
