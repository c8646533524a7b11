"""The run that the tests of hosts train, as a command line, and what is seen of it on its way."""

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from same_run import arguments, engine_json

WHOLE = ("model.hidden_dropout_prob=0.0", "model.attention_probs_dropout_prob=0.0")
"""12 steps, two switches; without dropout, which is seeded by rank, as ranks come and go."""
STARTS_WITHIN = 400.0  # seconds until training is under way, on two busy cores


def command_line(data: Path, run_dir: Path, changes: Sequence[str], *more: object) -> list[object]:
    """Of pretrain.py: micro batch 3, so that two ranks accumulate twice and one four times."""
    return [*arguments(data, run_dir, engine_json(run_dir.parent, 1), changes), *more]


def wait_until(is_so: Callable[[], object], process: subprocess.Popen[str], seconds: float) -> None:
    """AssertionError with all that `process` said if it ends before, or does not get so far."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.01)


def steps_of(run_dir: Path) -> list[int]:
    """Trained steps, from 0."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return [0]
    return [0, *map(int, re.findall(r'"event": "train", "global_step": (\d+)', path.read_text()))]
