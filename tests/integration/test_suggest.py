"""launch/plan.py --suggest with real engines: depths timed here, and pilots that were trained."""

import io
import json
import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from launching import LAUNCH, ROOT, script
from ranks import run_on_ranks

from stacking import stage_plan_timing
from stacking.config_loading import load_recipe
from stacking.deepspeed_checks import check_document
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import ConfigError

RECIPE = ROOT / "launch" / "recipes" / "tiny_test.json"
FP32 = ROOT / "deepspeed_configs" / "cpu_fp32.json"
CPU = ROOT / "deepspeed_configs" / "cpu_bf16.json"  # with TensorBoard, which must write nothing
ONE = ("--set", "model.vocab_size=400", "--set", "evaluation.every_steps=10")


def suggest_by_timing(folder: Path) -> tuple[int, str, str]:
    """The command in this process: exit code, what it prints, and a JSON that cannot run here."""
    words = [
        "--recipe", RECIPE, "--suggest", "--budget", "10m", "--measure", 4, 1, "--json",
        "--deepspeed_config", CPU, "--set", "model.hidden_size=96",
        "--set", "model.num_hidden_layers=16",
        "--set", 'stages=[{"num_hidden_layers": 16, "steps": 20}]',
    ]  # fmt: skip
    os.chdir(folder)
    settings = load_deepspeed_config(CPU)
    bad = {**settings.document, "train_micro_batch_size_per_gpu": 5}
    with pytest.raises(ConfigError) as refused:
        stage_plan_timing.step_seconds(
            load_recipe(RECIPE), [1, 4], check_document(bad, source="my.json", prefix="my.json: ")
        )
    assert not torch.distributed.is_initialized()
    sys.argv = ["plan.py", *map(str, words)]
    with (
        patch.object(stage_plan_timing, "ENOUGH_SECONDS", 0.5),
        redirect_stdout(io.StringIO()) as printed,
    ):
        code = runpy.run_path(str(LAUNCH / "plan.py"))["main"]()
    return int(code), printed.getvalue(), str(refused.value)


@pytest.mark.slow
def test_depths_without_a_run_are_timed_here_and_give_bounds(tmp_path: Path) -> None:
    (found,) = run_on_ranks(suggest_by_timing, 1, tmp_path)
    assert isinstance(found, tuple)
    code, printed, refused = found
    assert code == 0
    (line,) = printed.splitlines()
    values = json.loads(line)
    one, two = values["candidates"]
    assert (one["num_hidden_layers"], two["num_hidden_layers"]) == (1, 4)
    # Sizes so far apart that a busy machine does not swap them.
    assert 0 < one["step_seconds"] < two["step_seconds"] < values["target"]["step_seconds"] < 5
    assert {one["timed"], two["timed"], values["target"]["timed"]} == {"timed here"}
    assert (values["verdict"], one["t_mix"], one["t_mix_is_known"]) == ("scratch", 0, False)
    assert one["ceiling"] > two["ceiling"] > 1
    assert list(tmp_path.iterdir()) == []
    assert "train_micro_batch_size_per_gpu: got 5" in refused


def train(data: Path, run_dir: Path, stages: list[dict[str, int]]) -> Path:
    """One rank; the last fifth of the steps decays."""
    depth, steps = stages[-1]["num_hidden_layers"], sum(stage["steps"] for stage in stages)
    decay = f"learning_rate.decay_steps={steps // 5}"
    done = script(
        "pretrain.py", "--recipe", RECIPE, "--data", data, "--run-dir", run_dir,
        "--deepspeed_config", FP32, *ONE, "--set", f"stages={json.dumps(stages)}",
        "--set", f"model.num_hidden_layers={depth}", "--set", decay,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
def test_pilots_that_were_trained_give_a_recipe_that_trains(
    tiny_data: Path, tmp_path: Path
) -> None:
    pilots = [
        train(tiny_data, tmp_path / "scratch", [{"num_hidden_layers": 4, "steps": 150}]),
        train(tiny_data, tmp_path / "small", [{"num_hidden_layers": 1, "steps": 300}]),
        train(
            tiny_data, tmp_path / "grown",
            [{"num_hidden_layers": 1, "steps": 50}, {"num_hidden_layers": 4, "steps": 100}],
        ),
    ]  # fmt: skip
    out = tmp_path / "best.json"
    words = ["--recipe", RECIPE, *ONE, "--deepspeed_config", FP32, "--suggest", "--budget", "10s"]
    done = script("plan.py", *words, "--pilot", *pilots, "--json", "--out", out)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    (candidate,) = values["candidates"]
    # Nobody knows whether models as small as these mix, or when.
    assert candidate["control"]["nats"] is not None
    assert candidate["step_seconds"] < values["target"]["step_seconds"]
    assert values["switch_seconds"] > 0
    assert load_recipe(out).total_steps >= values["scratch_steps"]
    shorter = [word for stage in range(len(load_recipe(out).stages))
               for word in ("--set", f"stages.{stage}.steps=4")]  # fmt: skip
    rate = ["--set", "learning_rate.warmup_steps=1", "--set", "learning_rate.decay_steps=1"]
    done = script("pretrain.py", "--recipe", out, "--data", tiny_data, "--run-dir",
                  tmp_path / "run", "--deepspeed_config", FP32, *shorter, *rate)  # fmt: skip
    assert done.returncode == 0, done.stderr
