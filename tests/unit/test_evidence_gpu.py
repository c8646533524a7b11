"""benchmarks/evidence_gpu.sh as far as a CPU goes: its recipes load, and it goes on in pieces."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stacking.branches import branch_faults
from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.deepspeed_config import load_deepspeed_config
from stacking.growth.legality import recipe_faults
from stacking.schedule import learning_rate
from stacking.study import Run

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["scratch", "grown_3", "grown_1", "best", "alone_3", "alone_1"]
BRANCHES = {"scratch": ["0.4", "0.5", "0.6", "0.77"], "grown_3": ["at_50"], "grown_1": ["at_50"],
            "best": [], "alone_3": ["0.45", "0.56"], "alone_1": ["0.46"]}  # fmt: skip
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit "$NO_GPU"
for word; do
    case "$before" in --run-dir) folder="$word";; esac
    before="$word"
done
echo "$*" >> "$LOG"
case "$1" in *compare.py) exit 0;; esac
mkdir -p "$folder"
[ "$(wc -l < "$LOG")" = "$STOPPED_RUN" ] && exit 3
for place in . $(eval "echo \\$${folder##*/}"); do
    mkdir -p "$folder/$place"
    echo '{"event": "run_end", "global_step": 1}' > "$folder/$place/metrics.jsonl"
done
"""


def script(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    path = variables.pop("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "evidence_gpu.sh"), *map(str, arguments)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **variables, "PATH": path},
    )  # fmt: skip


def values(words: list[str], flag: str) -> list[str]:
    """What follows each `flag`."""
    return [words[i + 1] for i, word in enumerate(words) if word == flag]


def commands(**variables: str) -> list[list[str]]:
    done = script("DATA", "O UT", DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def recipe_of(words: list[str]) -> Recipe:
    (recipe,) = values(words, "--recipe")
    return load_recipe(Path(recipe), values(words, "--set"))


def runs_of(words: list[str]) -> dict[str, Recipe]:
    """The command's run and its branches, by folder."""
    recipe = recipe_of(words)
    return {run.folder.name: run.recipe for run in Run(recipe, Path(recipe.name)).with_branches()}


def test_every_printed_command_has_a_recipe_that_loads_and_can_grow() -> None:
    *trained, compared = commands()
    assert [recipe_of(words).name for words in trained] == NAMES
    for name, words in zip(NAMES, trained, strict=True):
        runs = runs_of(words)
        assert list(runs) == [name, *BRANCHES[name]]
        assert [recipe_faults(recipe) for recipe in runs.values()] == [[]] * len(runs)
        assert branch_faults(runs[name]) == []
        assert values(words, "--run-dir") == [f"O UT/{name}"]
        assert values(words, "--data") == ["DATA"]
        load_deepspeed_config(Path(values(words, "--deepspeed_config")[0]))
        assert Path(words[1]).samefile(ROOT / "launch" / "pretrain.py")
        assert "--time-limit" not in words
    assert compared[2:] == [*(f"O UT/{name}" for name in NAMES), "--out", "O UT/comparison"]


def test_the_runs_are_of_one_model_and_data_but_for_depth() -> None:
    recipes = [recipe for words in commands()[:-1] for recipe in runs_of(words).values()]
    differ = {"name", "stages", "learning_rate", "branches", "growth_branches"}
    shared = [
        {**recipe.model_dump(exclude=differ),
         "model": recipe.stage_model(0).model_dump(exclude={"num_hidden_layers"})}
        for recipe in recipes
    ]  # fmt: skip
    assert shared == shared[:1] * 15
    peaks = [(r.learning_rate.peak, r.learning_rate.warmup_steps) for r in recipes]
    assert peaks == [(1e-3, 125)] * 15
    assert recipes[0].stage_model(0).hidden_size == 512
    assert recipes[0].data.max_seq_length == 128


def test_depths_and_lengths_are_those_of_the_comparison() -> None:
    found = {
        f"{words_of_run} {name}": [(stage.num_hidden_layers, stage.steps) for stage in run.stages]
        for words_of_run, words in zip(NAMES, commands()[:-1], strict=True)
        for name, run in runs_of(words).items()
    }
    assert found == {
        "scratch scratch": [(12, 3250)], "scratch 0.4": [(12, 1300)], "scratch 0.5": [(12, 1625)],
        "scratch 0.6": [(12, 1950)], "scratch 0.77": [(12, 2502)],
        "grown_3 grown_3": [(3, 1750), (12, 750)], "grown_3 at_50": [(3, 1250), (12, 1250)],
        "grown_1 grown_1": [(1, 1750), (12, 750)], "grown_1 at_50": [(1, 1250), (12, 1250)],
        "best best": [(1, 434), (3, 1739), (12, 327)],
        "alone_3 alone_3": [(3, 6250)], "alone_3 0.56": [(3, 3500)],
        "alone_3 0.45": [(3, 2812)],
        "alone_1 alone_1": [(1, 12000)], "alone_1 0.46": [(1, 5520)],
    }  # fmt: skip


def test_every_run_ends_decayed_over_its_last_fifth_or_what_the_best_has_and_grows_before() -> None:
    for words in commands()[:-1]:
        for name, recipe in runs_of(words).items():
            rate, total = recipe.learning_rate, recipe.total_steps
            share = 1500 / 13800 if name == "best" else 1 / 5
            assert rate.decay_steps == pytest.approx(share * total, abs=1)
            assert learning_rate(total - 1, rate, total) < 0.01 * rate.peak
            grown_at = total - recipe.stages[-1].steps if len(recipe.stages) > 1 else 200
            assert learning_rate(grown_at, rate, total) == rate.peak


def test_the_best_is_the_recipe_of_the_study() -> None:
    found = runs_of(commands(STEPS="13800", ONLY="best")[0])["best"]
    measured = load_recipe(ROOT / "launch" / "recipes" / "best_12x64.json")
    assert [stage.model_dump() for stage in found.stages] == [
        stage.model_dump() for stage in measured.stages]  # fmt: skip
    assert found.learning_rate.decay_steps == measured.learning_rate.decay_steps


def test_variables_change_the_runs() -> None:
    *trained, _ = commands(STEPS="500", PEAK="5e-4", SEED="4", VOCAB="9000")
    recipe = recipe_of(trained[1])
    assert [stage.steps for stage in recipe.stages] == [350, 150]
    assert (recipe.learning_rate.peak, recipe.seed, recipe.model.vocab_size) == (5e-4, 4, 9000)
    only = commands(ONLY="scratch alone_1")
    assert [recipe_of(words).name for words in only] == ["scratch", "alone_1"]


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), {}, "usage: "),
        (("DATA",), {}, "usage: "),
        (("DATA", "--out"), {}, "usage: "),
        (("DATA", "OUT"), {"STEPS": "many", "DRY_RUN": "1"}, "STEPS: got 'many'"),
        (("DATA", "OUT"), {"STEPS": "9", "DRY_RUN": "1"}, "STEPS: got 9"),
        (("DATA", "OUT"), {"PIECE_MINUTES": "2h", "DRY_RUN": "1"}, "PIECE_MINUTES: got '2h'"),
        (("DATA", "OUT"), {"PEAK": "abc", "DRY_RUN": "1"}, "PEAK: got 'abc'"),
        (("DATA", "OUT"), {"ONLY": "scrtch", "DRY_RUN": "1"}, "ONLY: got 'scrtch'; allowed: scr"),
        (("DATA", "OUT"), {"CUDA_VISIBLE_DEVICES": ""}, "no GPU here"),
    ],
)
def test_mistakes_and_a_missing_gpu_are_told(
    arguments: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    done = script(*arguments, **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_no_mistake() -> None:
    done = script("--help")
    assert done.returncode == 0
    assert "PIECE_MINUTES" in done.stdout


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """A python that has a GPU and trains nothing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "data").mkdir()
    return {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LOG": str(tmp_path / "log"),
            "NO_GPU": "0", "STOPPED_RUN": "0",
            **{name: " ".join(f"branches/{branch}" for branch in branches)
               for name, branches in BRANCHES.items()}}  # fmt: skip


def logged(fake: dict[str, str]) -> list[str]:
    """What python was asked for: names of runs, or "compare"."""
    lines = Path(fake["LOG"]).read_text().splitlines()
    return ["compare" if "compare.py" in line else line.split("--run-dir ")[1].split()[0].split(
        "/")[-1] for line in lines]  # fmt: skip


def test_a_stopped_piece_goes_on_where_it_was(tmp_path: Path, fake: dict[str, str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    first = script(data, out, **{**fake, "STOPPED_RUN": "3", "PIECE_MINUTES": "10"})
    assert first.returncode == 3, first.stderr
    assert "the same command" in first.stderr
    assert logged(fake) == NAMES[:3]
    limits = [line.split("--time-limit ")[1].split()[0]
              for line in Path(fake["LOG"]).read_text().splitlines()]  # fmt: skip
    assert all(500 <= int(limit.removesuffix("s")) <= 540 for limit in limits)
    second = script(data, out, **fake)
    assert second.returncode == 0, second.stderr
    assert logged(fake) == [*NAMES[:3], *NAMES[2:], "compare"]
    assert second.stderr.count("already done") == 2


def test_a_piece_too_short_for_a_run_begins_none(tmp_path: Path, fake: dict[str, str]) -> None:
    done = script(tmp_path / "data", tmp_path / "out", **{**fake, "PIECE_MINUTES": "1"})
    assert done.returncode == 3
    assert not Path(fake["LOG"]).exists()


def test_a_folder_without_data_is_told_before_anything_runs(
    tmp_path: Path, fake: dict[str, str]
) -> None:
    done = script(tmp_path / "nothing", tmp_path / "out", **fake)
    assert done.returncode == 2
    assert "there is no folder" in done.stderr
    assert not Path(fake["LOG"]).exists()


def test_a_run_whose_branch_is_missing_is_not_done(tmp_path: Path, fake: dict[str, str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    assert script(data, out, **fake).returncode == 0
    (out / "alone_3" / "branches" / "0.56" / "metrics.jsonl").unlink()
    (out / "grown_1" / "metrics.jsonl").write_text('{"event": "train"}')
    assert script(data, out, **fake).returncode == 0
    assert logged(fake) == [*NAMES, "compare", "grown_1", "alone_3", "compare"]
