"""What the doctor found: one fact with its status, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from stacking.errors import ConfigError

Status = Literal["ok", "warn", "fail"]
_SHOWN = 3  # names of a longer list that a message repeats


@dataclass(frozen=True)
class Finding:
    """One row of the table; only what is ok may be without a fix."""

    check: str  # which one, a word for scripts
    status: Status
    found: str
    fix: str = ""
    where: str = ""  # a host; "": this machine, or no machine

    def __post_init__(self) -> None:
        """Hold each fault to its fix."""
        assert self.fix or self.status == "ok", f"{self.check} says not what to do: {self.found}"


def ok(check: str, found: str, where: str = "") -> Finding:
    """As it should be."""
    return Finding(check, "ok", found, where=where)


def warn(check: str, found: str, fix: str, where: str = "") -> Finding:
    """The job starts, and may not do what was meant."""
    return Finding(check, "warn", found, fix, where)


def fail(check: str, found: str, fix: str, where: str = "") -> Finding:
    """The job would not start, or hang, or train something else."""
    return Finding(check, "fail", found, fix, where)


def config_fails(check: str, error: ConfigError, fix: str) -> list[Finding]:
    """One finding a fault; `fix` is for those that do not say what is allowed."""
    found = []
    for fault in error.faults:
        what, allowed, rest = fault.partition("; allowed")
        found.append(fail(check, what, f"allowed{rest}" if allowed else fix))
    return found


def listed(names: Iterable[str], shown: int = _SHOWN) -> str:
    """`a, b, c and 4 more`."""
    every = list(names)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more


def counted(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
