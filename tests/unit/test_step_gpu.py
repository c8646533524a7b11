"""benchmarks/step_gpu.py as far as a CPU goes: it skips itself, and its arithmetic is right."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from stacking.config import BertConfig
from stacking.cost import training_flops
from stacking.modeling import BertForPreTraining

ROOT = Path(__file__).resolve().parents[2]
SIZE = BertConfig(
    vocab_size=57, hidden_size=32, num_hidden_layers=2, num_attention_heads=1,
    intermediate_size=128, max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture
def step_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("step_gpu")


def case(step_gpu: Any, *, is_short: bool) -> Any:
    return step_gpu.Case(SIZE, 64, "bf16", is_short, torch.device("cpu"), False)


def test_it_skips_itself_in_one_line(step_gpu: Any, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step_gpu.main([])
    assert capsys.readouterr().out == (
        "step_gpu: this machine has no CUDA device; nothing was measured\n"
    )


def test_an_unknown_loop_is_refused(step_gpu: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        step_gpu.main(["--only", "megatron"])
    assert ended.value.code == 2


def test_padding_is_neither_tokens_nor_flops(step_gpu: Any) -> None:
    whole, short = (step_gpu.make_batches(case(step_gpu, is_short=s), 6)[0] for s in (False, True))
    assert whole.num_real_tokens == 6 * 64
    assert "attention_mask" not in whole.inputs()
    assert step_gpu.needed_flops(SIZE, whole) == training_flops(SIZE, 6, 64, 9)
    usual = training_flops(SIZE, 6, 64, 9, all_rows=True)
    assert step_gpu.needed_flops(SIZE, whole, all_rows=True) == usual
    lengths = short.attention_mask.sum(1).tolist()
    masked = (short.masked_lm_ids >= 0).sum(1).tolist()
    assert len(set(lengths)) > 3
    assert min(lengths) >= 4
    assert short.num_real_tokens == sum(lengths)
    assert short.num_masked == sum(masked)
    assert all(abs(m - 9 * n / 64) < 1 for m, n in zip(masked, lengths, strict=True))
    each = [training_flops(SIZE, 1, n, m) for n, m in zip(lengths, masked, strict=True)]
    assert step_gpu.needed_flops(SIZE, short) == sum(each)
    # Every place that is predicted is a real token behind [CLS].
    is_asked = short.masked_lm_ids >= 0
    assert bool(short.attention_mask.gather(1, short.masked_lm_positions)[is_asked].all())
    assert bool((short.masked_lm_positions[is_asked] > 0).all())


def test_figures_are_medians_over_real_tokens(step_gpu: Any) -> None:
    toy = case(step_gpu, is_short=True)
    batches = step_gpu.make_batches(toy, 6)
    runner = step_gpu.Runner(lambda batch: None, batches, 7, seconds=[2.0, 9.0, 0.5])
    figures = step_gpu.figures_of(toy, runner, 1e6)
    tokens = sum(batch.num_real_tokens for batch in batches) / len(batches)
    flops = sum(step_gpu.needed_flops(SIZE, batch) for batch in batches) / len(batches)
    assert figures["real_tokens_per_second"] == pytest.approx(tokens / 2.0)
    assert figures["of_peak"] == pytest.approx(flops / 2.0 / 1e6)
    assert figures["of_peak_usual"] > figures["of_peak"]
    assert (figures["micro_batch"], figures["peak_bytes"]) == (6, 7)


def test_the_fastest_micro_batch_is_taken_and_one_that_does_not_fit_ends_the_search(
    step_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {2: 2.0, 4: 3.0, 8: 9.0}  # a step

    def a_step(runner: Any, steps: int) -> float:
        sequences = len(runner.batches[0].input_ids)
        if sequences == 16:
            raise torch.OutOfMemoryError
        return seconds[sequences]

    monkeypatch.setattr(step_gpu, "_seconds_a_step", a_step)
    toy = case(step_gpu, is_short=False)
    assert step_gpu._fastest(toy, lambda case, stack: None, [2, 4, 8, 16, 32]) == 4
    with pytest.raises(SystemExit, match="give smaller"):
        step_gpu._fastest(toy, lambda case, stack: None, [16])


def test_waits_of_the_host_are_counted_by_line(
    step_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step(batch: object) -> None:
        for number in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn(f"something else {number}", stacklevel=1)

    waits = step_gpu.host_waits(step_gpu.Runner(step, [None]))
    assert list(waits.values()) == [3]
    assert next(iter(waits)).startswith("unit/test_step_gpu.py:")
    assert modes == ["warn", "default"]


@pytest.mark.parametrize("is_short", [False, True])
def test_the_peer_learns_from_the_very_labels_that_ours_does(step_gpu: Any, is_short: bool) -> None:
    batch = step_gpu.make_batches(case(step_gpu, is_short=is_short), 3)[0]
    inputs = step_gpu._their_inputs(batch, torch.device("cpu"))
    labels = inputs["labels"]
    assert int((labels >= 0).sum()) == batch.num_masked
    rows, places = torch.nonzero(labels >= 0, as_tuple=True)
    assert torch.equal(labels[rows, places], batch.input_ids[rows, places])
    assert ("attention_mask" in inputs) == is_short
    model = BertForPreTraining(SIZE).eval()  # all weights 0: the loss is that of guessing
    found = model(**batch.inputs())["mlm_loss_sum"]
    assert float(found.detach()) == pytest.approx(
        batch.num_masked * float(torch.tensor(57.0).log()), 1e-5
    )


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/step_gpu.py", "--device", "cpu", "--sizes", "2x64",
               "--lengths", "32", "--precisions", "bf16", "--micro-tokens", "64", "128",
               "--vocab-size", "99", "--rounds", "2", "--seconds", "0.02", "--short-documents",
               "--only", "transformers", "engine", "--json", str(tmp_path / "r.json")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "r.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == row
    assert set(row["loops"]) == {"transformers", "engine"}
    for figures in row["loops"].values():
        assert figures["micro_batch"] in (2, 4)
        assert figures["real_tokens_per_second"] > 0
        assert 0 < figures["of_peak"] < 1
