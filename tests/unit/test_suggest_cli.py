"""launch/plan.py --suggest as a user runs it: text, JSON, the written recipe, exit codes."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pilot_folders import (
    T_MIX,
    grown_loss,
    scratch_loss,
    small_law,
    target_law,
    write_pilot,
    write_pilots,
)

from stacking.config import Recipe
from stacking.config_loading import load_recipe
from stacking.config_stage import DATA_FIELDS, MODEL_FIELDS
from stacking.deepspeed_config import DeepSpeedConfig

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "launch" / "plan.py"


@pytest.fixture(scope="module")
def pilots(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_pilots(tmp_path_factory.mktemp("pilots"))


def plan(pilots: list[Path], *words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command in this process, for the recipe of the first pilot; its exit code."""
    recipe = pilots[0] / "recipe.json"
    monkeypatch.setattr(sys, "argv", ["plan.py", "--recipe", str(recipe), *map(str, words)])
    code = runpy.run_path(str(PLAN))["main"]()
    assert isinstance(code, int)
    return code


def test_the_command_proposes_stages_and_says_why(
    pilots: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words = ["--suggest", "--budget", "1000s", "--pilot", *pilots]
    assert plan(pilots, *words, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert 80 < max(map(len, printed.splitlines())) <= 100
    text = " ".join(printed.split())
    for told in (
        "2 layers * 200 3,480 4,600 1,000 2.30x", "scratch 2,000 1,000 1.00x",
        "200 steps after the switch it is 0.000 nats ahead of scratch", "still learns",
        "never grown, it is undecided at equal time",
        "Grow from 2 layers to 8 layers at step 3,480 of 4,600: at most 2.30x faster",
    ):  # fmt: skip
        assert told in text


def test_json_is_one_line_and_the_recipe_is_one_that_plan_takes(
    pilots: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" / "best.json"
    words = ["--suggest", "--budget", "1000s", "--pilot", *pilots, pilots[0], "--json"]
    assert plan(pilots, *words, "--out", out, monkeypatch=monkeypatch) == 0
    (line,) = capsys.readouterr().out.splitlines()
    values = json.loads(line)
    assert (values["verdict"], values["from"], values["ceiling"]) == ("grow", "2 layers", 2.3)
    (candidate,) = values["candidates"]
    assert (candidate["t_mix"], candidate["switch_step"]) == (T_MIX, 3480)
    assert load_recipe(out).model_dump(mode="json") == values["recipe"]
    assert plan([out.parent], "--recipe", out, "--json", monkeypatch=monkeypatch) == 0
    ceiling = json.loads(capsys.readouterr().out)["ceiling"]["ratio"]
    assert ceiling == pytest.approx(2.3, rel=0.2)  # by FLOPs; a step's time has other parts, too


def test_a_pilot_that_states_the_sizes_it_shares_is_named_by_what_is_smaller(
    pilots: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the branches of a trunk state all of them."""
    full = load_recipe(pilots[0] / "recipe.json")
    shared = full.model.model_dump() | full.data.model_dump()
    sizes = {name: shared[name] for name in ("hidden_size", "pooling", "max_seq_length")}
    stages = [{"num_hidden_layers": layers, "steps": steps, **sizes}
              for layers, steps in ((2, 300), (8, 700))]  # fmt: skip
    grown = write_pilot(tmp_path / "grown", [(2, 300), (8, 700)], grown_loss(300),
                        changes={"stages": stages})  # fmt: skip
    words = ["--suggest", "--budget", "1000s", "--json", "--pilot", pilots[0], grown]
    assert plan(pilots, *words, monkeypatch=monkeypatch) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["from"] == values["candidates"][0]["model"] == "2 layers"
    stated = [stage.changes(MODEL_FIELDS + DATA_FIELDS) for stage in
              Recipe.model_validate(values["recipe"]).stages]  # fmt: skip
    assert stated == [{"num_hidden_layers": 2}, {"num_hidden_layers": 8}]


def test_a_refusal_to_promise_is_no_fault_and_writes_the_recipe_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {2: 0.46, 8: 0.5}
    pilots = [
        write_pilot(tmp_path / "scratch", [(8, 1000)], target_law, seconds=seconds),
        write_pilot(tmp_path / "grown", [(2, 300), (8, 700)], grown_loss(300), seconds=seconds),
    ]
    out = tmp_path / "best.json"
    words = ["--suggest", "--budget", "1000s", "--pilot", *pilots, "--out", out]
    assert plan(pilots, *words, monkeypatch=monkeypatch) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Train 8 layers from scratch: 2,000 steps fit the budget. No growth is promised" in text
    assert [stage.num_hidden_layers for stage in load_recipe(out).stages] == [8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--suggest --pilot {0}", "--suggest: needs --budget, the time to train in, such as"),
        ("--suggest --budget 2h", "--suggest: needs --pilot RUN..., run folders"),
        ("--suggest --budget 2h --measure 3 8", "--measure: got 3; allowed: depths of which 8 is"),
        ("--suggest --budget 2h --pilot {0} --tolerance 0", "--tolerance: got 0.0; allowed"),
        ("--suggest --budget 2h --pilot {0} --out {0}", "exists already; give another name"),
        ("--suggest --budget soon --pilot {0}", "--budget: got 'soon'; allowed: days, hours"),
        ("--suggest --budget 0s --pilot {0}", "--budget: got 0 s, less than one step"),
        ("--suggest --budget 2h --pilot {0}/no", "metrics.jsonl"),
        ("--suggest --budget 2h --pilot {1}", "--out /proc/no/such.json: cannot be written"),
        ("--suggest --budget 2h --pilot {0} --nodes 2", "--nodes and --suggest: give one of them"),
        ("--suggest --budget 2h --pilot {0} --set global_batch_size=2", "2 in the recipe; 4 in"),
        ("--suggest --budget 2h --pilot {0} --world-size 3", "a world of 3 ranks"),
        ("--suggest --budget 2h --pilot {0} --set learning_rate.schedule=cosine "
         "--set learning_rate.decay_steps=0", "learning_rate.schedule: got 'cosine'"),
        ("--budget 2h", "--tolerance, --out: need --suggest"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_message_and_exit_code_2(
    words: str,
    message: str,
    pilots: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unwritable = f"{pilots[0]} --out /proc/no/such.json"
    given = words.format(pilots[0], unwritable).split()
    assert plan(pilots, *given, monkeypatch=monkeypatch) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert plan(pilots, *given, "--json", monkeypatch=monkeypatch) == 2
    assert message in json.loads(capsys.readouterr().err)["error"]


@pytest.mark.parametrize(("tolerance", "t_mix"), [(0.02, 400), (0.11, 300), (0.31, 100)])
def test_a_wider_tolerance_mixes_sooner(
    tolerance: float,
    t_mix: int,
    pilots: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def law(stage: int, step: int) -> float:
        """Behind scratch by 1 nat, then by 0.4, which melts by 0.1 in 100 steps."""
        return scratch_loss(step) + (max(0.0, 0.7 - step / 1000) if stage else 1.0)

    grown = write_pilot(tmp_path / "grown", [(2, 300), (8, 700)], law)
    words = ["--suggest", "--budget", "1000s", "--json", "--tolerance", tolerance]
    assert plan(pilots, *words, "--pilot", pilots[0], grown, monkeypatch=monkeypatch) == 0
    (candidate,) = json.loads(capsys.readouterr().out)["candidates"]
    assert candidate["t_mix"] == t_mix


def test_a_pilots_branches_are_pilots_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small, scratch = tmp_path / "small", tmp_path / "small" / "branches" / "scratch"
    write_pilot(small, [(2, 1000)], small_law)
    write_pilot(small / "branches" / "at_300", [(2, 300), (8, 700)], grown_loss(300))
    write_pilot(scratch, [(8, 1000)], target_law)
    words = ["--suggest", "--budget", "1000s", "--json", "--pilot", small]
    assert plan([scratch], *words, monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["ceiling"] == 2.3


def test_only_depths_that_no_pilot_has_are_timed_and_the_target_with_them(
    pilots: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def step_seconds(recipe: Recipe, depths: list[int], settings: DeepSpeedConfig) -> object:
        asked.append((recipe.global_batch_size, depths, settings.source))
        return {1: 0.2, 4: 0.8, 8: 1.6}

    room = SimpleNamespace(step_seconds=step_seconds)
    monkeypatch.setitem(sys.modules, "stacking.stage_plan_timing", room)
    words = ["--suggest", "--budget", "1000s", "--pilot", *pilots, "--json", "--measure"]
    assert plan(pilots, *words, 4, 2, 1, monkeypatch=monkeypatch) == 0
    assert asked == [(4, [1, 4, 8], "fp16_fused_adam.json")]
    found = json.loads(capsys.readouterr().out)["candidates"]
    assert [one["step_seconds"] for one in found] == pytest.approx([0.0625, 0.125, 0.25])
    assert plan(pilots, *words, 2, monkeypatch=monkeypatch) == 0
    assert len(asked) == 1
