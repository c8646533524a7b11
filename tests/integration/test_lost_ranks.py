"""A job whose rank dies or freezes ends on all others, in time and with its name; then goes on.

The ranks are started by hand: DeepSpeed's launcher would kill its own host's others, and knows
nothing of other hosts'.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import LAUNCH, ROOT, environment, free_port, pretrain, rows

RECIPE = ROOT / "launch" / "recipes" / "tiny_test.json"
DEAD_AFTER = 30.0  # seconds; rank_ledger.WatchLimits
CHANGES = ["model.vocab_size=400", "stages.0.steps=100000", "checkpoint.every_steps=5"]
STARTED_ROWS = 3


def arguments(data: Path, run_dir: Path, changes: list[str]) -> list[object]:
    words = [word for change in changes for word in ("--set", change)]
    config = ROOT / "deepspeed_configs" / "cpu_fp32.json"
    return ["--recipe", RECIPE, "--data", data, "--run-dir", run_dir,
            "--deepspeed_config", config, *words]  # fmt: skip


def start_ranks(ranks: int, data: Path, run_dir: Path) -> list[subprocess.Popen[str]]:
    """A job in full training, a process a rank."""
    address = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free_port())}  # fmt: skip
    command = [sys.executable, str(LAUNCH / "pretrain.py")]
    command += map(str, arguments(data, run_dir, CHANGES))
    started = [
        subprocess.Popen(
            command,
            env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b'"save"') >= STARTED_ROWS:
            return started
        if any(process.poll() is not None for process in started):
            break
        time.sleep(0.1)
    for process in started:
        process.kill()
    raise AssertionError("\n".join(process.communicate()[1] for process in started))


@pytest.mark.parametrize(
    ("ranks", "lost", "how", "within"),
    [
        pytest.param(2, 1, signal.SIGKILL, 15.0, marks=pytest.mark.slow),
        pytest.param(4, 0, signal.SIGKILL, 25.0, marks=pytest.mark.slow),
        pytest.param(2, 1, signal.SIGSTOP, DEAD_AFTER + 15.0, marks=pytest.mark.slow),
    ],
)
def test_the_others_end_with_code_4_and_the_lost_ranks_name(
    tiny_data: Path, tmp_path: Path, ranks: int, lost: int, how: signal.Signals, within: float
) -> None:
    run_dir = tmp_path / "run"
    started = start_ranks(ranks, tiny_data, run_dir)
    try:
        started[lost].send_signal(how)
        began = time.monotonic()
        for rank, process in enumerate(started):
            if rank == lost:
                continue
            _, said = process.communicate(timeout=within + 15)
            assert time.monotonic() - began < within
            assert process.returncode == 4, said
            assert f"rank {lost} (host " in said
            assert f"pid {started[lost].pid})" in said
            assert "the same command continues" in said
            assert "Traceback" not in said
    finally:
        for process in started:
            process.kill()
            process.wait()
    steps = max(int(str(row["global_step"])) for row in rows(run_dir, "save"))
    goes_on = arguments(tiny_data, run_dir, CHANGES)
    done = pretrain(2, *goes_on, "--max-steps", steps + 3)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "resuming from step_" in done.stdout


def test_ranks_with_different_recipes_are_refused_by_name(tiny_data: Path, tmp_path: Path) -> None:
    address = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free_port())}  # fmt: skip
    started = []
    for rank in range(2):
        words = arguments(
            tiny_data, tmp_path / "run", [*CHANGES, f"learning_rate.peak=0.00{rank + 1}"]
        )
        started.append(
            subprocess.Popen(
                [sys.executable, str(LAUNCH / "pretrain.py"), *map(str, words)],
                env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "the ranks do not agree" in said[0]
    assert "the recipe: rank 0 (host" in said[0]
    assert "Traceback" not in "".join(said)
