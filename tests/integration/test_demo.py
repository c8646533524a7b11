"""The whole story, `bash launch/demo.sh`, killed at a random moment and started again."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launching import ROOT, environment
from transformers import AutoModelForMaskedLM, AutoTokenizer

UNSEEN = (
    "Elizabeth was [MASK] to see him so much altered.",
    "The river flows through the [MASK] of France.",
)


def demo(out: Path) -> subprocess.Popen[str]:
    """Start the demo in a process group of its own."""
    command = ["bash", str(ROOT / "launch" / "demo.sh"), str(out)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_survives_a_kill_learns_and_exports_a_model_that_transformers_loads(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    first = demo(out)
    deadline = time.monotonic() + 300
    while not (out / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(random.uniform(1, 90))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    output, _ = demo(out).communicate(timeout=1200)
    assert (out / "run" / "report.html").stat().st_size > 10_000, output
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    end = next(row for row in map(json.loads, lines) if row["event"] == "run_end")
    assert end["val_mlm_loss"] <= end["unigram_loss"] - 1.0

    model = AutoModelForMaskedLM.from_pretrained(out / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    for text in UNSEEN:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits
        assert logits.shape[-1] == len(tokenizer)
        assert torch.isfinite(logits).all()
        where = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()
        assert len(where) == 1

    again, _ = demo(out).communicate(timeout=120)
    assert len(re.findall("already done", again)) == 3
