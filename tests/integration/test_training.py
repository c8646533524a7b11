"""launch/pretrain.py on two CPU ranks by the real launcher: stages, switch, run folder, resume."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launching import (
    ROOT,
    deepspeed_command,
    environment,
    pretrain,
    ranks_of_session,
    rows,
    script,
)

from stacking.checkpoint import CheckpointManager
from stacking.comparison_costs import curve, missing_switches, reference_step_seconds
from stacking.comparison_runs import read_runs
from stacking.config_loading import load_recipe
from stacking.dataset import open_shards, validation_batches
from stacking.metrics import device_name
from stacking.modeling import BertForPreTraining
from stacking.schedule import learning_rate

RECIPE = ROOT / "launch" / "recipes" / "tiny_test.json"
# The tiny recipe with sentence pairs, and long enough to learn something.
CHANGES = [
    "model.vocab_size=400", "model.type_vocab_size=2", "model.num_nsp_labels=2",
    "model.pooler=true", "model.position=learned", "learning_rate.peak=0.01",
    "stages.0.steps=20", "stages.1.steps=9", "stages.2.steps=7",
]  # fmt: skip
FP32 = ROOT / "deepspeed_configs" / "cpu_fp32.json"
GOLDEN = ROOT / "tests" / "golden" / "tiny_fp32_two_ranks.json"


def arguments(data: Path, run_dir: Path, config: Path = FP32) -> list[object]:
    changes = [word for change in CHANGES for word in ("--set", change)]
    places = ["--recipe", RECIPE, "--data", data, "--run-dir", run_dir]
    return [*places, "--deepspeed_config", config, *changes]


@pytest.fixture(scope="module")
def whole_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed: fp32, two ranks."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = pretrain(2, *arguments(tiny_data, run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_all_stages_are_trained_to_their_last_step(whole_run: Path) -> None:
    recipe = load_recipe(RECIPE, CHANGES)
    depth_at = {
        int(str(row["global_step"])): row["num_hidden_layers"] for row in rows(whole_run, "train")
    }
    end = 0
    for stage in recipe.stages:
        end += stage.steps
        assert depth_at[end] == stage.num_hidden_layers
    assert max(depth_at) == recipe.total_steps


def test_the_learning_rate_is_the_schedules_at_every_step_across_switches(whole_run: Path) -> None:
    recipe = load_recipe(RECIPE, CHANGES)
    for row in rows(whole_run, "train"):
        step = int(str(row["global_step"])) - 1
        expected = learning_rate(step, recipe.learning_rate, recipe.total_steps)
        assert row["lr"] == pytest.approx(expected, rel=1e-12)


def test_the_model_learns(whole_run: Path) -> None:
    losses = [float(str(row["val_mlm_loss"])) for row in rows(whole_run, "evaluation")]
    assert losses[-1] < losses[0] - 0.1


def test_each_switch_is_logged_with_its_loss_before_and_after(whole_run: Path) -> None:
    recipe = load_recipe(RECIPE, CHANGES)
    switches = rows(whole_run, "stage_switch")
    assert len(switches) == len(recipe.stages) - 1
    for index, row in enumerate(switches):
        assert row["from_num_hidden_layers"] == recipe.stages[index].num_hidden_layers
        assert row["to_num_hidden_layers"] == recipe.stages[index + 1].num_hidden_layers
        assert row["loss_before"] != row["loss_after"]
        assert float(str(row["max_logit_difference"])) > 0


def test_moments_are_fresh_after_a_switch(whole_run: Path) -> None:
    for folder in (whole_run / "checkpoints").glob("stage*_begin"):
        cohorts = json.loads((folder / "state.json").read_text())["cohorts"]
        assert all(cohort["optimizer_steps"] == 0 for cohort in cohorts)
        assert not (folder / "moments.safetensors").exists()


def test_the_run_folder_is_as_the_readme_says(whole_run: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert {"recipe.json", "deepspeed.json", "metrics.jsonl", "checkpoints", "log.txt"} <= names
    tags = {path.name for path in (whole_run / "checkpoints").iterdir()}
    assert {"stage1_end", "stage2_begin", "stage2_end", "stage3_begin", "stage3_end"} <= tags
    keys = (
        "global_step stage num_hidden_layers lr loss tokens real_tokens step_seconds "
        "tokens_per_second model_flops mfu data_wait_seconds elapsed_seconds loss_scale grad_norm"
    )
    for row in rows(whole_run, "train"):
        assert set(keys.split()) <= set(row)
    end = rows(whole_run, "run_end")[0]
    assert float(str(end["val_mlm_loss"])) > 0
    assert float(str(end["unigram_loss"])) > 0


def sizes(row: dict[str, object], key: str) -> list[float]:
    found = row[key]
    assert isinstance(found, list)
    return found


def test_growth_leaves_its_telemetry(whole_run: Path, tiny_data: Path) -> None:
    for switch in rows(whole_run, "stage_switch"):
        for when, layers in (
            ("before", "from_num_hidden_layers"),
            ("after", "to_num_hidden_layers"),
        ):
            assert len(sizes(switch, f"residual_rms_{when}")) == 1 + int(str(switch[layers]))
    for row in rows(whole_run, "evaluation"):
        assert len(sizes(row, "residual_rms")) == 1 + int(str(row["num_hidden_layers"]))
    for row in rows(whole_run, "train"):
        is_told = row["stage"] != 0 and int(str(row["global_step"])) % 10 == 0
        assert ("grad_norm_new" in row) == ("grad_norm_old" in row) == is_told
        if is_told:
            parts = (float(str(row[f"grad_norm_{age}"])) for age in ("old", "new"))
            assert math.hypot(*parts) == pytest.approx(float(str(row["grad_norm"])), rel=1e-3)
    assert rows(whole_run, "train")[-1]["global_step"] == 36  # step 30 is told of


def test_the_hidden_states_sizes_are_those_of_the_saved_model(
    whole_run: Path, tiny_data: Path
) -> None:
    """Of the first validation batch of rank 0, through a model made from the last checkpoint."""
    recipe = load_recipe(RECIPE, CHANGES)
    model = BertForPreTraining(recipe.stage_model(2)).eval()
    saved = CheckpointManager(whole_run / "checkpoints", keep_last=1).load("stage3_end")
    model.load_state_dict(saved.snapshot().weights)
    given = next(validation_batches(
        open_shards(tiny_data, "validation"), recipe.stage_data(2), seed=recipe.seed,
        max_sequences=recipe.evaluation.max_sequences, batch_size=recipe.evaluation.batch_size,
        rank=0, world_size=2,
    ))  # fmt: skip
    seen: list[torch.Tensor] = []
    model.embeddings.register_forward_hook(lambda m, args, out: seen.append(out))
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    model(given.input_ids, given.token_type_ids, given.attention_mask)
    read = torch.zeros_like(given.attention_mask).scatter_(1, given.masked_lm_positions, True)
    read[:, 0] = True
    kept = [given.attention_mask] * 4 + [given.attention_mask & read]
    expected = [float(states[mask].detach().square().mean().sqrt())
             for states, mask in zip(seen, kept, strict=True)]  # fmt: skip
    assert rows(whole_run, "evaluation")[-1]["residual_rms"] == pytest.approx(expected, rel=1e-4)


def test_what_a_run_folder_is_charged_for_is_what_was_trained(whole_run: Path) -> None:
    """As launch/compare.py reads it."""
    runs = read_runs([whole_run])
    start, end = runs[0].metrics.start, curve(runs[0], reference_step_seconds(runs))[-1]
    assert start.data_fingerprint != start.validation_fingerprint
    assert None not in (start.data_fingerprint, start.validation_fingerprint)
    assert start.device_name == device_name(torch.device("cpu"))
    assert start.matmul_flops_per_second > 0
    trained = rows(whole_run, "train")[-1]
    assert end.costs["steps"] == trained["global_step"]
    assert end.costs["tokens"] == trained["tokens"]
    assert end.costs["reference_seconds"] > 0
    assert end.loss == rows(whole_run, "run_end")[0]["val_mlm_loss"]
    assert missing_switches(runs[0]) == 0


def test_a_second_start_says_done_and_changes_nothing(whole_run: Path, tiny_data: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_bytes()
    again = pretrain(2, *arguments(tiny_data, whole_run))
    assert again.returncode == 0
    assert "done: " in again.stdout
    assert (whole_run / "metrics.jsonl").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused(whole_run: Path, tiny_data: Path) -> None:
    done = pretrain(1, *arguments(tiny_data, whole_run), "--set", "seed=99")
    assert done.returncode == 2
    assert '"seed": 99' in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_ranks(
    whole_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    done = pretrain(1, *arguments(tiny_data, tmp_path / "one"))
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, theirs in zip(rows(tmp_path / "one", "train"), rows(whole_run, "train"), strict=True):
        assert ours["sample_hash"] == theirs["sample_hash"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)


@pytest.mark.slow
def test_a_run_continues_on_other_ranks_from_a_named_tag(
    whole_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "moved"
    shutil.copytree(whole_run, run_dir)
    tags = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    for tag in (tags[-1], "stage2_end"):  # one with moments inside a stage, one before a switch
        done = pretrain(1, *arguments(tiny_data, run_dir), "--resume", tag)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"resuming from {tag}" in done.stdout
        for ours, theirs in zip(rows(run_dir, "train"), rows(whole_run, "train"), strict=True):
            assert ours["sample_hash"] == theirs["sample_hash"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kill_after_rows", [1, 4])
def test_a_killed_run_continues_with_the_losses_of_the_undisturbed_one(
    whole_run: Path, tiny_data: Path, tmp_path: Path, kill_after_rows: int
) -> None:
    run_dir = tmp_path / "killed"
    command = deepspeed_command(2, *arguments(tiny_data, run_dir))
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run_dir / "metrics.jsonl"
        if metrics.exists() and metrics.read_bytes().count(b'"event": "train"') >= kill_after_rows:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = pretrain(2, *arguments(tiny_data, run_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, theirs in zip(rows(run_dir, "train"), rows(whole_run, "train"), strict=True):
        for key in ("global_step", "loss", "lr", "sample_hash", "num_hidden_layers"):
            assert ours[key] == theirs[key]


def test_sigterm_finishes_the_step_saves_and_exits_with_3(tiny_data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    long = ["--set", "stages.0.steps=100000"]
    command = deepspeed_command(1, *arguments(tiny_data, run_dir), *long)
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(2)
    for pid in ranks_of_session(process.pid):
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 3, output
    assert "the same command continues" in output
    assert any((run_dir / "checkpoints").glob("step_*/COMMITTED"))


@pytest.mark.slow
def test_limits_stop_a_run_which_then_goes_on_as_if_it_had_not(
    whole_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "limited"
    recipe = load_recipe(RECIPE, CHANGES)
    first_stage = recipe.stages[0].steps
    for steps in (first_stage - 3, first_stage):  # inside a stage, and at its end
        done = pretrain(2, *arguments(tiny_data, run_dir), "--max-steps", steps)
        assert done.returncode == 3, done.stdout + done.stderr
        assert f"stopped after step {steps}, everything is saved" in done.stdout
        assert rows(run_dir, "train")[-1]["global_step"] == steps
        assert not rows(run_dir, "stage_switch")
    done = pretrain(2, *arguments(tiny_data, run_dir), "--max-steps", 10**6, "--time-limit", "2h")
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = {row["global_step"]: row for row in rows(whole_run, "train")}
    ours = {row["global_step"]: row for row in rows(run_dir, "train")}
    assert ours.keys() >= theirs.keys()
    for step, row in theirs.items():
        assert ours[step]["sample_hash"] == row["sample_hash"]
    for after in (row for row in rows(run_dir, "evaluation")):
        same = [row for row in rows(whole_run, "evaluation")
                if row["global_step"] == after["global_step"]]  # fmt: skip
        assert [row["val_loss"] for row in same] == [after["val_loss"]] * len(same)


@pytest.mark.slow
def test_the_default_json_runs_in_bf16_on_a_cpu_and_says_so(
    tiny_data: Path, tmp_path: Path
) -> None:
    config = ROOT / "deepspeed_configs" / "fp16_fused_adam.json"
    done = pretrain(2, *arguments(tiny_data, tmp_path / "run", config))
    assert done.returncode == 0, done.stdout + done.stderr
    notices = [line for line in done.stdout.splitlines() if "bf16" in line]
    assert len(notices) == 1
    strict = pretrain(2, *arguments(tiny_data, tmp_path / "strict", config), "--strict-precision")
    assert strict.returncode == 2
    assert "Traceback" not in strict.stdout + strict.stderr


def test_a_finished_run_is_reported_and_exported(whole_run: Path, tmp_path: Path) -> None:
    reported = script("report.py", whole_run)
    assert reported.returncode == 0, reported.stderr
    assert (whole_run / "report.html").stat().st_size > 5_000
    exported = script("export.py", whole_run, "--out", tmp_path / "hf", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["max_logit_difference"] < 1e-4
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_the_loss_curve_is_the_golden_one(whole_run: Path) -> None:
    """fp32, two ranks; a change meant to be neutral must not move it. To renew it: see the file."""
    golden = json.loads(GOLDEN.read_text())
    curve = {str(row["global_step"]): row["loss"] for row in rows(whole_run, "train")}
    assert curve == pytest.approx(golden["loss"], abs=2e-3), json.dumps(curve)
