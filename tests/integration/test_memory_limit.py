"""A model whose training state is too large for one process trains with ZeRO-3 over four.

A process's limit on its data (RLIMIT_DATA) stands for the device's memory: on a CPU they are the
same, which is why offload to the CPU is dropped there. n: parameters of the last stage. In fp32

    one rank under ZeRO-0    12 n  weights, moments       + 12 n  the copy to save = 24 n
    one rank under ZeRO-1    16 n  masters, too           + 12 n                   = 28 n
    main rank of 4, ZeRO-3    4 n  its part of all that   + 12 n                   = 16 n
    each of the others        4 n

and in a step 4 n of gradients, or a quarter of that, which are freed before a save; so a limit of
22 n above what a process of the same job with a tiny model has refuses the first two and leaves
the others room, also while a copy is written and training goes on. The one full copy on the main
rank is the host's, not the device's; a process has one limit for both, and what the others need
shows in their own peaks.
"""

import contextlib
import json
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT, deepspeed_command, environment, of_session, rows
from test_one_copy import status_bytes

from stacking.config_loading import load_recipe
from stacking.growth.contract import parameter_shapes

BYTES_PER_PARAMETER = 22
TINY, LARGE = 16, 512  # hidden sizes
RECIPE = ROOT / "launch" / "recipes" / "tiny_test.json"
STAGES = [{"num_hidden_layers": 4, "steps": 3}, {"num_hidden_layers": 8, "steps": 2}]
# What is freed leaves the process at once, as on a device, and threads share one heap.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def changes(hidden_size: int) -> list[str]:
    """What the job changes in the recipe: 8 layers so wide, one growth."""
    return [
        "model.vocab_size=400", "model.type_vocab_size=2", "model.num_nsp_labels=2",
        "model.pooler=true", f"model.hidden_size={hidden_size}", "model.num_attention_heads=8",
        f"model.intermediate_size={4 * hidden_size}", "model.num_hidden_layers=8",
        "global_batch_size=8", f"stages={json.dumps(STAGES)}",
    ]  # fmt: skip


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


@pytest.fixture(scope="module")
def limit(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of data that each process may have."""
    model = load_recipe(RECIPE, changes(LARGE)).stage_model(1)
    num_parameters = sum(shape.numel() for shape in parameter_shapes(model).values())
    tiny = command(4, 3, tiny_data, tmp_path_factory.mktemp("limit") / "run", TINY)
    return int(largest_data(tiny) + BYTES_PER_PARAMETER * num_parameters)


def largest_data(job: list[str]) -> int:
    """The most data, in bytes, that a process of `job` ever had, looked at every 10 ms."""
    largest = 0
    process = subprocess.Popen(
        job, env=environment() | ALLOCATOR, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while process.poll() is None:
        for pid in of_session(process.pid):
            # A process that has ended has no line of its data, and soon no file.
            with contextlib.suppress(OSError, AssertionError):
                largest = max(largest, int(status_bytes("VmData", pid)))
        time.sleep(0.01)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return largest


def command(ranks: int, zero_stage: int, data: Path, run_dir: Path, hidden_size: int) -> list[str]:
    """The real job by the real launcher."""
    config = run_dir.with_suffix(".json")
    config.write_text(json.dumps(document(zero_stage)))
    words = [word for change in changes(hidden_size) for word in ("--set", change)]
    return deepspeed_command(
        ranks, "--recipe", RECIPE, "--data", data, "--run-dir", run_dir,
        "--deepspeed_config", config, *words,
    )  # fmt: skip


def pretrain(
    ranks: int, zero_stage: int, data: Path, run_dir: Path, limit: int
) -> subprocess.CompletedProcess[str]:
    """The job, each of whose processes may have `limit` bytes of data."""
    return subprocess.run(
        command(ranks, zero_stage, data, run_dir, LARGE),
        env=environment() | ALLOCATOR, capture_output=True, text=True, timeout=400, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
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
