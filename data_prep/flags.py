"""A settings field that is a command-line flag too: its default, type and help in one place."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, field
from typing import Any


def flag(
    text: str,
    default: Any = MISSING,
    *,
    kind: type | None = None,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    vocab: bool = False,
) -> Any:
    """Return a dataclass field; without `default` it must be given.

    `kind` is the type of a value that its default does not tell; `vocab`: the subcommand `vocab`
    has the flag, too.
    """
    return field(
        default=default,
        metadata={
            "text": text, "kind": kind, "choices": choices, "metavar": metavar, "vocab": vocab,
        },
    )  # fmt: skip


def argument(setting: Field[Any]) -> tuple[str, dict[str, Any]]:
    """Return name and options of a field for argparse's add_argument."""
    data, default = setting.metadata, setting.default
    is_needed = default is MISSING
    options: dict[str, Any] = {"help": data["text"]}
    if default is False:
        return _name(setting), {**options, "action": "store_true"}
    many = isinstance(default, tuple) or setting.name == "inputs"
    if setting.name == "inputs":
        options.update(nargs="+", metavar="INPUT", type=data["kind"])
        return setting.name, options
    if not is_needed and default not in ((), None, ""):
        options["help"] += f" ({default})"
    options["type"] = data["kind"] or (type(default) if default not in ((), None) else str)
    options.update({"required": True} if is_needed else {"default": default})
    if data["choices"]:
        options["choices"] = tuple(data["choices"])
    elif data["metavar"]:
        options["metavar"] = data["metavar"]
    return _name(setting), {**options, **({"nargs": "+"} if many else {})}


def _name(setting: Field[Any]) -> str:
    return f"--{setting.name.replace('_', '-')}"
