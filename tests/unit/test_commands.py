"""How every command ends: its own code, or one message with 2 or 3; a fault of ours is raised."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from stacking.commands import exit_code
from stacking.errors import ConfigError, UserError

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
COMMANDS = {
    "attention_maps": "run --out figures",
    "compare": "run --out page",
    "doctor": "",
    "export": "run --out folder",
    "glue": "score gold predictions",
    "grow": "--model folder --to hidden_size=64 --out new",
    "plan": "--recipe recipe.json",
    "report": "run",
    "squad": "score gold predictions",
}
OWN_ENDS = {"pretrain", "prepare_data"}  # with checkpoints, and with MPI's ranks


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raising(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UserError("no such folder"), 2, "no such folder"),
        (ConfigError("x: got 1"), 2, "1 fault in the configuration:\n  - x: got 1"),
        (PermissionError(13, "Permission denied", "out"), 2, "[Errno 13] Permission denied: 'out'"),
        (KeyboardInterrupt(), 3, "stopped"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_a_mistake_is_2_and_ctrl_c_is_3(
    error: BaseException, code: int, told: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(lambda: raising(error), as_json=as_json, stopped="stopped") == code
    said = capsys.readouterr()
    assert said.out == ""
    assert (json.loads(said.err) if as_json else said.err) == (
        {"error": told} if as_json else f"error: {told}\n"
    )


@pytest.mark.parametrize("error", [OSError("ours"), ValueError("ours"), AssertionError()])
def test_a_fault_of_ours_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        exit_code(lambda: raising(error), as_json=False, stopped="")


def test_what_is_done_has_its_own_code() -> None:
    for code in (0, 2):
        assert exit_code(partial(int, code), as_json=False, stopped="") == code


def test_no_command_is_left_out() -> None:
    assert {path.stem for path in LAUNCH.glob("*.py")} == {*COMMANDS, *OWN_ENDS}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_ctrl_c_ends_each_command_with_3(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = loaded(name)
    monkeypatch.setattr(
        module, "score" if name == "glue" else "run", lambda _: raising(KeyboardInterrupt())
    )
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *COMMANDS[name].split(), "--json"])
    assert module.main() == 3
    assert json.loads(capsys.readouterr().err)["error"].startswith("stopped")
