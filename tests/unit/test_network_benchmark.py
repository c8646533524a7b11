"""benchmarks/network.py without two hosts: its words for `tc`, its arithmetic, how it skips."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from stacking.config_loading import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("network")


def test_a_rate_goes_below_a_delay(network: Any) -> None:
    assert network.Network(0).commands("eth0") == []
    (delay,) = network.Network(0, 2.5).commands("eth0")
    assert delay.startswith("tc qdisc add dev eth0 root handle 1: netem delay 2.5ms ")
    (rate,) = network.Network(100).commands("eth0")
    assert rate.startswith("tc qdisc add dev eth0 root handle 10: tbf rate 100000000bit ")
    both = network.Network(100, 2.5)
    assert both.commands("eth0") == [delay, rate.replace("root", "parent 1:1")]
    assert str(both) == "100 Mbit/s, 2.5 ms each way"


def test_what_a_recipe_saves_is_weighted_by_its_steps(network: Any) -> None:
    recipe = load_recipe(ROOT / "launch" / "recipes" / "mslt_tiny.json")
    assert [stage.steps for stage in recipe.stages] == [3, 2, 2, 2, 3]
    costs = [1.0, 2.0, 3.0, 4.0, 10.0]
    assert network._saved(costs, recipe) == pytest.approx(120 / (3 + 4 + 6 + 8 + 30))


def test_where_namespaces_are_forbidden_it_says_so_in_its_last_line(
    network: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "obstacle", lambda: "two hosts need root")
    monkeypatch.setattr("sys.argv", ["network.py"])
    network.main()
    text, line = capsys.readouterr().out.splitlines()
    assert text == "skipped: two hosts need root"
    assert json.loads(line) == {"benchmark": "network", "skipped": "two hosts need root"}
