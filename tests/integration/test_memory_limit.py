"""A model whose training state is too large for one process trains with ZeRO-3 over four.

A process's limit on its data (RLIMIT_DATA) stands for the device's memory: on a CPU they are the
same, which is why offload to the CPU is dropped there. n: parameters of the last stage. In fp32

    one rank under ZeRO-0    16 n  weights, gradients, moments   + 12 n  the copy to save = 28 n
    one rank under ZeRO-1    20 n  masters, too                  + 12 n                   = 32 n
    main rank of 4, ZeRO-3    5 n  its part of all that          + 12 n                   = 17 n
    each of the others        5 n

so a limit of 25 n above what an idle process has refuses the first two and leaves the others room
for activations and messages, also while a copy is written and training goes on. The one full copy
on the main rank is the host's, not the device's; a process has one limit for both, and what the
others need shows in their own peaks.
"""

import json
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest
from engines import build, fresh_weights, train
from launching import ROOT, deepspeed_command, environment, rows
from ranks import run_on_ranks
from test_one_copy import status_bytes

from stacking import distributed, engine
from stacking.config_loading import load_recipe
from stacking.growth.contract import parameter_shapes
from stacking.snapshot import Snapshot

BYTES_PER_PARAMETER = 25
RECIPE = ROOT / "launch" / "recipes" / "tiny_test.json"
STAGES = [{"num_hidden_layers": 4, "steps": 3}, {"num_hidden_layers": 8, "steps": 2}]
CHANGES = [
    "model.vocab_size=400", "model.type_vocab_size=2", "model.num_nsp_labels=2",
    "model.pooler=true", "model.hidden_size=512", "model.num_attention_heads=8",
    "model.intermediate_size=2048", "model.num_hidden_layers=8", "global_batch_size=8",
    f"stages={json.dumps(STAGES)}",
]  # fmt: skip
# What is freed leaves the process at once, as on a device, and threads share one heap.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def document(zero_stage: int) -> dict[str, object]:
    """A DeepSpeed JSON whose buckets are small beside the model."""
    zero: dict[str, object] = {
        "stage": zero_stage,
        "reduce_bucket_size": 1_000_000,
        "allgather_bucket_size": 1_000_000,
        "stage3_prefetch_bucket_size": 1_000_000,
        "stage3_max_live_parameters": 3_000_000,
        "stage3_max_reuse_distance": 1_000_000,
        "stage3_param_persistence_threshold": 10_000,
    }
    if zero_stage == 3:
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    adam = {"type": "AdamW"}
    return {"optimizer": adam, "zero_optimization": zero, "steps_per_print": 1}


def idle_bytes() -> float:
    """The data of a process with everything imported and an engine of a tiny model."""
    engine.start()
    tiny = build(3, "fp32", Snapshot(fresh_weights()))
    train(tiny, range(1))
    data = status_bytes("VmData")
    tiny.destroy()
    distributed.shut_down()
    return data


@pytest.fixture(scope="module")
def limit() -> int:
    """Bytes of data that each process may have."""
    model = load_recipe(RECIPE, CHANGES).stage_model(1)
    num_parameters = sum(shape.numel() for shape in parameter_shapes(model).values())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALLOCATOR.items():
            patch.setenv(name, value)
        idle = run_on_ranks(idle_bytes, 1)[0]
    return int(idle + BYTES_PER_PARAMETER * num_parameters)  # type: ignore[operator]


def pretrain(
    ranks: int, zero_stage: int, data: Path, run_dir: Path, limit: int
) -> subprocess.CompletedProcess[str]:
    """The real job, each of whose processes may have `limit` bytes of data."""
    config = run_dir.with_suffix(".json")
    config.write_text(json.dumps(document(zero_stage)))
    changes = [word for change in CHANGES for word in ("--set", change)]
    command = deepspeed_command(
        ranks, "--recipe", RECIPE, "--data", data, "--run-dir", run_dir,
        "--deepspeed_config", config, *changes,
    )  # fmt: skip
    return subprocess.run(
        command, env=environment() | ALLOCATOR, capture_output=True, text=True, timeout=400,
        check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_on_one_rank_it_ends_for_want_of_memory(
    zero_stage: int, tiny_data: Path, tmp_path: Path, limit: int
) -> None:
    began = time.monotonic()
    done = pretrain(1, zero_stage, tiny_data, tmp_path / "run", limit)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rank 0 has not enough memory" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 200


@pytest.mark.slow
def test_zero_3_over_four_ranks_trains_switches_and_saves(
    tiny_data: Path, tmp_path: Path, limit: int
) -> None:
    run_dir = tmp_path / "run"
    done = pretrain(4, 3, tiny_data, run_dir, limit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["global_step"] for row in rows(run_dir, "train")] == [1, 2, 3, 4, 5]
    assert len(rows(run_dir, "stage_switch")) == 1
    end = run_dir / "checkpoints" / "stage2_end"
    assert (end / "COMMITTED").is_file()
    assert os.path.getsize(end / "moments.safetensors") > 8 * 20_000_000
