"""A hostfile as DeepSpeed 0.19.8's launcher reads it, but with all its faults at once.

`deepspeed/launcher/runner.py` takes lines `HOST slots=N`; whatever follows the number is ignored,
blank lines and those that begin with # are left out. It stops at the first other line, at a host
that comes twice, and where no host is left.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.plain_files import read_plain
from stacking.doctor_findings import Finding, counted, fail, ok, warn

DEFAULT_HOSTFILE = Path("/job/hostfile")  # the launcher's
_ENTRY = re.compile(r"^(\S+)\s+slots=(\d+)")  # the launcher's
_NAME = re.compile(r"([\w.+-]+@)?[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_NAME_FIX = (
    "write a host name, an IPv4 address or an alias of the ssh config, where a port goes, too "
    "(or --ssh_port)"
)
_FORM = "one line a host: HOST slots=N"
_BYTE_ORDER_MARK = "\ufeff"
_LONGEST = 60  # characters of a line that a message repeats
_MOST_SLOTS = 1024  # of a host; beyond it a number is a typing error


@dataclass
class Hostfile:
    """Hosts with their slots in the file's order, and what is wrong."""

    slots: dict[str, int] = field(default_factory=dict)
    refused: list[Finding] = field(default_factory=list)  # at which the launcher stops
    doubts: list[Finding] = field(default_factory=list)  # which it takes, and should not be

    @property
    def findings(self) -> list[Finding]:
        """All faults, or that there are none."""
        faults = sorted(self.refused + self.doubts, key=_line_of)
        if any(finding.status == "fail" for finding in faults):
            return faults
        return [ok("hostfile", _summary(self.slots)), *faults]


def read_hostfile(path: Path) -> Hostfile:
    """Read one; a file that cannot be read is a finding, too."""
    try:
        text = read_plain(path).decode()
    except FileNotFoundError:
        found = f"{path}: no such file; the launcher would go on, on this machine alone"
        return Hostfile(refused=[fail("hostfile", found, "give the hostfile's path")])
    except (OSError, UnicodeDecodeError) as error:
        found = f"{path}: cannot be read: {error}"
        return Hostfile(refused=[fail("hostfile", found, f"give a text file, {_FORM}")])
    return parse_hostfile(text)


def _line_of(finding: Finding) -> float:
    """The line that a fault is about; those about the whole file come last."""
    match = re.match(r"line (\d+): ", finding.found)
    return int(match[1]) if match else math.inf


def parse_hostfile(text: str) -> Hostfile:
    """All hosts that can be read, and every fault with the number of its line."""
    result, seen = Hostfile(), dict[str, int]()
    if text.startswith(_BYTE_ORDER_MARK):
        found = "line 1: begins with a byte-order mark, which is read as part of the name"
        result.doubts.append(fail("hostfile", found, "save the file as UTF-8 without it"))
    text = text.removeprefix(_BYTE_ORDER_MARK)
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for number, line in enumerate((raw.strip() for raw in lines), 1):
        if not line or line.startswith("#"):
            continue
        match, place = _ENTRY.search(line), f"line {number}: "
        slots = _number(match[2]) if match else None
        if match is None or slots is None:
            found = f"{place}{line[:_LONGEST]!r} is no entry"
            result.refused.append(fail("hostfile", found, f"write {_entry_for(line)}"))
            continue
        host = match[1]
        if host in seen:
            found = f"{place}{host} comes again, after line {seen[host]}"
            fix = "keep one line a host, with all its slots"
            result.refused.append(fail("hostfile", found, fix))
            continue
        seen[host] = number
        result.slots[host] = slots
        result.doubts += _doubts(place, host, slots, line[match.end() :])
    if not result.slots:
        found = "no host is left" if result.refused else "is empty"
        result.refused.append(fail("hostfile", found, f"write {_FORM}, such as node1 slots=8"))
    result.doubts += _doubts_between(seen)
    return result


def _number(digits: str) -> int | None:
    """None where Python, and with it the launcher, refuses a number of thousands of digits."""
    try:
        return int(digits)
    except ValueError:
        return None


def _entry_for(line: str) -> str:
    """What the author may have meant."""
    host = re.match(r"\w[\w.@-]*", line)
    if host is None or host[0].lower() == "slots":
        return _FORM
    rest = re.sub(r"max_slots\s*=\s*\d+", "", line[host.end() :])
    if re.match(r"\s*,\s*[A-Za-z]", rest):
        return _FORM  # names side by side
    count = re.search(r"\bslots\s*=\s*(\d+)", rest) or re.search(r"(?<![\w.-])(\d+)\b", rest)
    if count is None:
        return _FORM
    return f"{host[0]} slots={count[1]}"


def _doubts(place: str, host: str, slots: int, rest: str) -> list[Finding]:
    """What the launcher reads and the job dies of, in one entry."""
    found = []
    if not 1 <= slots <= _MOST_SLOTS:
        found.append(
            fail("hostfile", f"{place}{host} has slots={str(slots)[:_LONGEST]}",
                 "give the number of its GPUs, 1 or more, or take the line away", host)
        )  # fmt: skip
    if not _NAME.fullmatch(host):
        found.append(
            fail("hostfile", f"{place}{host!r} is no name for ssh and pdsh, which read , : [ ] "
                 "in another way", "a line each: HOST slots=N" if "," in host else _NAME_FIX,
                 ascii(host))
        )  # fmt: skip
    if rest and not rest[0].isspace():
        found.append(
            fail("hostfile", f"{place}slots={slots}{rest[:_LONGEST]} is read as {slots}",
                 f"write {host} slots={slots}", host)
        )  # fmt: skip
    elif rest.strip() and not rest.lstrip().startswith("#"):
        found.append(
            warn("hostfile", f"{place}{rest.strip()[:_LONGEST]!r} is not read",
                 f"write {host} slots={slots}", host)
        )  # fmt: skip
    return found


def _doubts_between(seen: Mapping[str, int]) -> list[Finding]:
    """Two names of one machine, and names that mean another one on each host."""
    found, first = [], dict[str, str]()
    for host, number in seen.items():
        other = first.setdefault(host.lower(), host)
        if other != host:
            found.append(
                fail("hostfile", f"line {number}: {host} is {other} of line {seen[other]}",
                     "keep one line a host", host)
            )  # fmt: skip
        if len(seen) > 1 and _is_loopback(host):
            found.append(
                fail("hostfile", f"line {number}: {host} means another machine on each host",
                     "write the name by which the others reach it", host)
            )  # fmt: skip
    return found


def _is_loopback(host: str) -> bool:
    name = host.rpartition("@")[2].lower()
    return name == "localhost" or name.startswith("127.")


def usable_names(slots: Mapping[str, int]) -> list[str]:
    """Hosts whose names can be given to ssh."""
    return [host for host in slots if _NAME.fullmatch(host)]


def _summary(slots: Mapping[str, int]) -> str:
    return f"{counted(len(slots), 'host')}, {counted(sum(slots.values()), 'slot')}"
