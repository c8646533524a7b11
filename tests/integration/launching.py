"""Helpers of the integration tests: commands as a user types them, and what they leave behind."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"


def environment() -> dict[str, str]:
    """This process's environment with one thread a rank and nothing left by another launcher."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    return {**kept, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def script(name: str, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run `python launch/NAME ARGUMENTS`."""
    command = [sys.executable, str(LAUNCH / name), *map(str, arguments)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def deepspeed_command(ranks: int, *arguments: object) -> list[str]:
    """`deepspeed --num_accelerators RANKS launch/pretrain.py ARGUMENTS` by the real launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    options = [f"--num_accelerators={ranks}", f"--master_port={free_port()}"]
    return [
        sys.executable, str(launcher), *options, str(LAUNCH / "pretrain.py"), *map(str, arguments)
    ]  # fmt: skip


def pretrain(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Train with the real launcher and wait."""
    return alone(deepspeed_command(ranks, *arguments))


def alone(
    command: list[str], variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run in a session of its own and wait; AssertionError if a process of it is left over."""
    process = subprocess.Popen(
        command, env={**environment(), **(variables or {})}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=300)
        left = of_session(process.pid)
    finally:
        for pid in [process.pid, *of_session(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not left, f"left over: {left}\n{output}{errors}"
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def of_session(leader: int) -> dict[int, list[str]]:
    """Living processes of the session that `leader` leads, itself left out, and their words."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != leader:
            try:
                words = (entry / "cmdline").read_text().split("\0")
                if os.getsid(int(entry.name)) == leader and words != [""]:  # no zombie
                    found[int(entry.name)] = words
            except (OSError, UnicodeDecodeError):
                continue
    return found


def ranks_of_session(leader: int) -> list[int]:
    """Processes of pretrain.py itself, not of its launchers."""
    named = of_session(leader).items()
    return sorted(pid for pid, w in named if len(w) > 2 and w[2].endswith("pretrain.py"))


def rows(run_dir: Path, event: str) -> list[dict[str, object]]:
    """Rows of one kind of a run's metrics.jsonl; after a resume the later row of a step counts."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["event"] == event]
    return list({row.get("global_step"): row for row in found}.values())
