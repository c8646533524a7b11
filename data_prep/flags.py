"""A settings field that is a command-line flag too: its default, type and help in one place."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal


def flag(
    text: str,
    default: Any = MISSING,
    *,
    kind: type | None = None,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    positional: Literal["", "one", "many"] = "",
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
            "positional": positional,
        },
    )  # fmt: skip


def arguments(settings: type[Any], for_vocab: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Return name and options of each field for argparse's add_argument."""
    return [_argument(one) for one in fields(settings) if one.metadata["vocab"] or not for_vocab]


def _argument(setting: Field[Any]) -> tuple[str, dict[str, Any]]:
    data, default = setting.metadata, setting.default
    options: dict[str, Any] = {"help": data["text"]}
    if default is False:
        return _name(setting), {**options, "action": "store_true"}
    if default not in (MISSING, (), None, ""):
        options["help"] += f" ({default})"
    options["type"] = data["kind"] or (str if default == () else type(default))
    if isinstance(default, tuple) or data["positional"] == "many":
        options["nargs"] = "+"
    if data["choices"]:
        options["choices"] = tuple(data["choices"])
    elif data["metavar"]:
        options["metavar"] = data["metavar"]
    if data["positional"]:
        return setting.name, options
    return _name(setting), {
        **options,
        **({"required": True} if default is MISSING else {"default": default}),
    }


def _name(setting: Field[Any]) -> str:
    return f"--{setting.name.replace('_', '-')}"
