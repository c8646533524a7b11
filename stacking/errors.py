"""Errors of training; the class says who must act. A UserError ends a command with exit code 2."""

from collections.abc import Sequence
from typing import TypeVar

from data_prep.errors import ShardError, UserError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "GrowthError",
    "NonFiniteError",
    "ShardError",
    "UserError",
    "everybodys",
    "is_users",
]


_Error = TypeVar("_Error", bound=UserError)


class ConfigError(UserError):
    """Faults in a recipe, a DeepSpeed JSON or the command line: all at once, one line each."""

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        count = len(self.faults)
        head = f"{count} fault{'s' if count != 1 else ''} in the configuration:"
        super().__init__("\n".join([head, *(f"  - {fault}" for fault in self.faults)]))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        """Pickled by its faults: from another process it comes with the same message."""
        return type(self), (self.faults,)


class CheckpointError(UserError):
    """A checkpoint that is missing, uncommitted, corrupt or of another model."""


class GrowthError(UserError):
    """A growth step that is illegal, or that broke its promise to preserve the function."""


class NonFiniteError(UserError):
    """A loss or a gradient that is no number, or infinite; raised before it changes a weight."""


def everybodys(error: _Error) -> _Error:
    """The same error, which all ranks raise at this place."""
    error.is_everybodys = True
    return error


def is_users(error: Exception) -> bool:
    """Whether the user has to act: a mistake, or a file that cannot be read or written."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and bool(error.filename))
