"""The benchmarks of switches, stages and scaling run, at toy size, and end with their JSON line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from two_hosts import obstacle

from stacking.cluster_time import load_cluster
from stacking.config_loading import load_recipe
from stacking.cost import trained_parameters

ROOT = Path(__file__).resolve().parents[2]
TOY = ("--vocab-size", "512", "--seq-length", "16")


def run(name: str, *arguments: str) -> tuple[str, dict[str, object]]:
    """The text and the last line's object."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text, _, line = done.stdout.strip().rpartition("\n")
    values = json.loads(line)
    assert values["benchmark"] == name
    return text, values


@pytest.mark.slow
def test_a_switch_is_split_by_part_and_the_parts_are_the_whole(tmp_path: Path) -> None:
    text, values = run(
        "switch", "--sizes", "2x64", *TOY, "--switches", "1", "--folder", str(tmp_path)
    )
    assert isinstance(values["results"], list)
    assert [one["ranks"] for one in values["results"]] == [1, 2]
    for one in values["results"]:
        seconds = one["seconds"]
        apart = {"switch", "in_the_thread", "step"}
        parts = sum(value for key, value in seconds.items() if key not in apart)
        assert 0.8 * seconds["switch"] < parts <= seconds["switch"]
    assert "gather new" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_each_stage_is_measured_beside_its_flops() -> None:
    text, values = run(
        "stages", "--recipes", "mslt_tiny", "compoundgrow_tiny", "--rounds", "1",
        "--seconds", "0.1", "--threads", "1",
    )  # fmt: skip
    assert isinstance(values["results"], dict)
    for rows in values["results"].values():
        assert rows[-1]["measured"] == rows[-1]["by_flops"] == 1.0
        assert all(0 < row["update"] < row["seconds"] for row in rows)
    assert "frozen" in text


@pytest.mark.slow
def test_two_ranks_send_what_the_formula_says_and_leave_a_file_for_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    _, values = run(
        "scaling", "--size", "2x64", *TOY, "--batch", "4", "--rounds", "1", "--steps", "2",
        "--write", str(path),
    )  # fmt: skip
    assert load_cluster(str(path)).model_dump() == values["cluster"]
    assert isinstance(values["two_ranks"], dict)
    assert values["two_ranks"]["plain_bytes"] == pytest.approx(values["formula_bytes"], rel=0.01)


@pytest.mark.slow
def test_a_step_is_measured_beside_transformers_and_the_plain_loop() -> None:
    text, values = run(
        "step_cpu", "--sizes", "2x64", *TOY, "--batch", "4", "--rounds", "1", "--seconds", "0.1",
        "--threads", "1",
    )  # fmt: skip
    assert isinstance(values["step_seconds"], dict)
    loops = ["transformers", "as_it_comes", "plain", "engine", "trainer"]
    assert list(values["step_seconds"]) == loops
    assert "of peak" in text
    assert "MA " not in text


@pytest.mark.slow
def test_padding_is_measured_with_and_without() -> None:
    _, values = run(
        "padding", "--size", "2x64", *TOY, "--means", "4", "--batch", "4", "--rounds", "1",
        "--precision", "fp32", "--threads", "1",
    )  # fmt: skip
    assert isinstance(values["results"], list)
    assert values["results"][0]["limit"] > 1


@pytest.mark.slow
@pytest.mark.multi_node
def test_what_stages_and_knobs_send_between_two_hosts_is_what_the_formula_says() -> None:
    if reason := obstacle():
        pytest.skip(reason)
    _, values = run(
        "network", "--recipe", "mslt_tiny", "--megabits", "20", "--delay-ms", "0", "20",
        "--batch", "8", "--steps", "1", "--rounds", "1",
    )  # fmt: skip
    assert isinstance(values["networks"], list)
    fast, *slow = values["networks"]
    assert fast["megabits_reached"] < 30
    recipe = load_recipe(ROOT / "launch" / "recipes" / "mslt_tiny.json")
    costs = fast["costs"]
    for index, stage in enumerate(recipe.stages):
        (sent,) = [
            cost["bytes"] for name, cost in costs.items()
            if name.startswith(f"{index + 1}: ") and "all" not in name
        ]  # fmt: skip
        trained = trained_parameters(recipe.stage_model(index), stage.freeze)
        # Two ranks: half of three passes over 16 bits; on top small sums, headers, and on a busy
        # machine what TCP sends again. The whole model would be 60,000 bytes.
        assert 3 * trained < sent < 3 * trained + 12_000
    one = costs["ZeRO 1"]["bytes"]
    # Passes over 16 bits in four micro steps, instead of 3: 9, 5, and of ZeRO 3 4 for weights and
    # 8 for gradients, as gloo's reduce-scatter sends what its all-reduce does.
    passes = {"ZeRO 2": 3, "ZeRO 1, fp32 travels": 5 / 3, "ZeRO 3": 4}
    for name, times in passes.items():
        assert costs[name]["bytes"] == pytest.approx(times * one, rel=0.05)
    if slow:
        assert slow[0]["message_seconds"] > 0.04 > fast["message_seconds"]
    else:
        assert "netem" in str(values["left_out"])
