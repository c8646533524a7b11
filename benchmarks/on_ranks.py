"""What the engine's benchmarks share: gloo ranks, an engine of random weights, steps to time."""

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

import torch

from stacking import distributed
from stacking.config import BertConfig
from stacking.dataset import MaskedLMBatch
from stacking.deepspeed_config import ResolvedEngine
from stacking.engine import TrainEngine
from stacking.modeling import BertForPreTraining, init_weights
from stacking.snapshot import Snapshot

PREDICTIONS_SHARE = 0.15
_Arguments = TypeVar("_Arguments")
_Answer = TypeVar("_Answer")


def on_ranks(
    task: Callable[[_Arguments], _Answer], ranks: int, arguments: _Arguments, threads: int = 1
) -> _Answer:
    """`task(arguments)` in `ranks` processes with `threads` each; what rank 0 returned."""
    context = multiprocessing.get_context("spawn")
    answers: SimpleQueue[_Answer] = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      LOCAL_SIZE=str(ranks), OMP_NUM_THREADS=str(threads),
                      DS_ACCELERATOR="cpu")  # fmt: skip
    processes = []
    for rank in range(ranks):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))  # a child inherits it
        processes.append(context.Process(target=_child, args=(task, arguments, answers)))
        processes[-1].start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
    return answers.get()


def _child(
    task: Callable[[_Arguments], _Answer],
    arguments: _Arguments,
    answers: "SimpleQueue[_Answer]",
) -> None:
    answer = task(arguments)
    if os.environ["RANK"] == "0":
        answers.put(answer)


def first_state(config: BertConfig) -> Snapshot:
    """Random weights, the same on all ranks."""
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(1))
    return Snapshot({name: p.detach().clone() for name, p in model.named_parameters()})


def predictions(seq_length: int) -> int:
    """Masked positions of a sequence."""
    return int(PREDICTIONS_SHARE * seq_length)


def random_batch(
    config: BertConfig,
    sequences: int,
    seq_length: int,
    number: int,
    num_predictions: int | None = None,
) -> MaskedLMBatch:
    """The micro batch of one rank and step, without padding."""
    generator = torch.Generator().manual_seed(1000 * number + distributed.rank())
    ids = torch.randint(5, config.vocab_size, (sequences, seq_length), generator=generator)
    masked = predictions(seq_length) if num_predictions is None else num_predictions
    return MaskedLMBatch.whole(ids, masked)


def step(
    built: TrainEngine, sequences: int, seq_length: int, number: int, rate: float = 1e-4
) -> float:
    """One optimizer step of one micro batch a rank; its MLM loss, mean over tokens."""
    batch = random_batch(built.config, sequences, seq_length, number)
    counts = torch.tensor([float(batch.num_masked), float(sequences)]) * distributed.world_size()
    totals = built.train_step([batch], learning_rate=rate, counts=counts, seed=number)
    return float(distributed.sum_over_ranks(totals.clone())[0] / counts[0])


def resolved(zero_stage: int, precision: str, sequences: int) -> ResolvedEngine:
    """An engine's settings for `sequences` a rank."""
    adam = {"lr": 0.0, "torch_adam": True, "fused": True}
    document: dict[str, object] = {
        "train_batch_size": sequences * distributed.world_size(),
        "train_micro_batch_size_per_gpu": sequences,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": 5_000_000},
    }
    if precision == "bf16" and zero_stage == 1:  # as in deepspeed_configs/cpu_bf16.json
        document["data_types"] = {"grad_accum_dtype": "fp32"}
    if precision == "bf16_autocast":
        document["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return ResolvedEngine(
        deepspeed=document,
        precision=precision,  # type: ignore[arg-type]
        zero_stage=zero_stage,
        micro_batch_size=sequences,
        gradient_accumulation_steps=1,
        log_every=1,
        apex_layer_norm=False,
    )


def tensor_bytes() -> int:
    """Bytes of all tensors of this process; a storage counts once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
