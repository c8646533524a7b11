"""metrics.jsonl survives kills; window sums, FLOPs and the unigram baseline match closed forms."""

import json
import math
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from stacking import cost
from stacking.config import BertConfig, DataConfig
from stacking.dataset import MaskedLMBatch
from stacking.errors import UserError
from stacking.metrics import (
    MetricsLog,
    Window,
    WindowRates,
    device_name,
    last_row,
    model_flops,
    unigram_loss,
)


def batch(ids: list[list[int]], num_real_tokens: int = 5) -> MaskedLMBatch:
    labels = torch.tensor(ids)
    inputs = torch.zeros(len(ids), 7, dtype=torch.long)
    return MaskedLMBatch(
        input_ids=inputs,
        token_type_ids=inputs,
        attention_mask=inputs == 0,
        masked_lm_positions=torch.zeros_like(labels),
        masked_lm_ids=labels,
        next_sentence_labels=None,
        sample_indices=np.arange(len(ids)),
        num_masked=int((labels >= 0).sum()),
        num_real_tokens=num_real_tokens,
    )


def test_a_torn_last_line_is_cut_off_before_appending(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "global_step": 1}\n{"event": "tra')
    log = MetricsLog(path)
    log.write("train", {"global_step": 2})
    log.close()
    assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == [1, 2]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    log.write("train", {"loss": math.nan, "grad_norm": math.inf, "rms": [1.5, math.nan]})
    log.close()
    row = last_row(tmp_path / "m", "train")
    assert row is not None
    assert row["loss"] is None
    assert row["grad_norm"] is None
    assert row["rms"] == [1.5, None]


def test_last_row_is_the_newest_of_its_kind(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    for step in (1, 2):
        log.write("evaluation", {"global_step": step})
    log.write("train", {"global_step": 3})
    log.close()
    row = last_row(tmp_path / "m", "evaluation")
    assert row is not None
    assert row["global_step"] == 2
    assert last_row(tmp_path / "m", "run_end") is None
    assert last_row(tmp_path / "absent", "train") is None


def test_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "train", "global_step": 1}\n\x00\xff junk\n[1]\n"a"\n{}\n')
    assert last_row(path) == {"event": "train", "global_step": 1}
    path.write_bytes(b"\x00\xff\n")
    assert last_row(path) is None


def test_window_means_are_over_tokens_not_over_batches() -> None:
    window = Window(torch.device("cpu"))
    window.add(torch.tensor([6.0, 0.0, 1.0]), [batch([[3, -100]])], 0.5)
    window.add(torch.tensor([3.0, 0.0, 2.0]), [batch([[3, 4]]), batch([[5, -100]])], 0.25)
    rates = window.take()
    assert rates.mlm_loss == pytest.approx(9.0 / 4)
    assert rates.mlm_accuracy == pytest.approx(3 / 4)
    assert (rates.tokens, rates.real_tokens, rates.steps) == (21, 15, 2)
    assert rates.data_wait_seconds == pytest.approx(0.75)
    assert window.steps == 0
    window.add(torch.tensor([2.0, 0.0, 1.0]), [batch([[3, 4]])], 0.0)
    window.restart()
    window.add(torch.tensor([5.0, 0.0, 1.0]), [batch([[3, 4]])], 0.0)
    rates = window.take()
    assert (rates.mlm_loss, rates.tokens, rates.real_tokens) == (2.5, 7, 5)


def test_padding_costs_no_model_flops() -> None:
    config = BertConfig(
        vocab_size=50,
        hidden_size=12,
        num_attention_heads=2,
        num_hidden_layers=3,
        intermediate_size=20,
    )
    data = DataConfig(max_seq_length=8, max_predictions_per_seq=2)
    rates = WindowRates(1.0, 0.0, 0.0, 80, 40, 1.0, 0.0, 5)
    assert model_flops(config, data, rates) == pytest.approx(
        cost.training_flops(config, 10, 8, 2) / 2
    )


def test_the_unigram_loss_is_the_cross_entropy_of_smoothed_frequencies() -> None:
    counts = np.array([0, 2, 5])
    smoothed = np.array([1, 3, 6]) / 10
    expected = -(np.log(smoothed[1]) + 2 * np.log(smoothed[2])) / 3
    assert unigram_loss([batch([[1, -100]]), batch([[2, 2]])], counts) == pytest.approx(expected)


def test_a_cpu_has_the_name_that_linux_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("processor: 0\nmodel name\t: A Chip @ 3 GHz\nmodel name\t: Another\n")
    monkeypatch.setattr("stacking.metrics._CPU_INFO", told)
    assert device_name(torch.device("cpu")) == "A Chip @ 3 GHz"
    told.unlink()
    assert device_name(torch.device("cpu")) == platform.machine()


def test_a_pipe_in_place_of_the_file_is_told_and_waited_for_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    log = MetricsLog(tmp_path / "m")
    log.write("train", {})
    with pytest.raises(UserError, match="no plain file"):
        log.settle()
