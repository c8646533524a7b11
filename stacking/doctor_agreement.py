"""Hosts' answers in; which of them cannot be asked, and in what they differ, out."""

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from stacking.doctor_findings import Finding, counted, fail, listed, ok, warn
from stacking.doctor_hosts import Answer, Data, Facts

PACKAGES = ("torch", "deepspeed", "numpy", "h5py", "safetensors", "pydantic", "tokenizers",
            "transformers", "rich", "psutil", "mpi4py")  # fmt: skip
_COPY = "share the folder, or copy it to every host (rsync -a)"
_SSH_FIXES = (
    ("verification failed", "ssh to it once by hand and accept its key, or add the key with "
     "ssh-keyscan to ~/.ssh/known_hosts"),
    ("IDENTIFICATION HAS CHANGED", "if the host was installed anew: ssh-keygen -R HOST, then ssh "
     "to it once by hand"),
    ("Permission denied", "ssh-copy-id HOST; the job must get there without a password"),
    ("resolve hostname", "mend the name in the hostfile, /etc/hosts or the ssh config"),
    ("Connection refused", "start sshd there, or give its port with --ssh-port (to the launcher: "
     "--ssh_port)"),
    ("timed out", "is the host up, and port 22 (or --ssh-port) open in the firewall?"),
    ("No route", "is the host up, and in this network?"),
)  # fmt: skip


def talk_findings(hosts: Mapping[str, Answer], limit: float) -> list[Finding]:
    """Hosts without a known name, that ssh does not reach, or that cannot run the probe."""
    faults = [_talk_fault(host, answer, limit) for host, answer in hosts.items() if answer.trouble]
    if faults:
        return faults
    return [ok("ssh", f"{len(hosts)} answered, without a password")]


def _talk_fault(host: str, answer: Answer, limit: float) -> Finding:
    if answer.trouble == "name":
        fix = "mend the hostfile, or name the host in DNS, /etc/hosts or ~/.ssh/config (HostName)"
        return fail("names", f"the name is not known: {answer.said}", fix, host)
    if answer.trouble == "ssh":
        return _ssh_fault(host, answer, limit)
    if answer.code is None:
        found = f"did not finish within {limit:.0f} s; {_how_far(answer.facts)}"
        fix = (
            "log in and look what is slow there: a folder of a dead server, a loaded disk, the GPU"
        )
        return fail("answer", found, fix, host)
    if answer.code in (126, 127):
        found = f"{sys.executable} cannot be run there: {answer.said}"
        fix = "make the same environment at the same path on every host, or share it"
        return fail("answer", found, fix, host)
    fix = "look what `ssh HOST python -V` prints; shell start files must let commands through"
    said = answer.said or "it printed nothing"
    return fail("answer", f"the probe ended with code {answer.code}: {said}", fix, host)


def _ssh_fault(host: str, answer: Answer, limit: float) -> Finding:
    name = host.rpartition("@")[2]
    if answer.code is None:
        found = f"ssh got no answer within {limit:.0f} s"
        return fail("ssh", found, "is the host up and not overloaded? log in by hand", host)
    fixes = (fix for text, fix in _SSH_FIXES if text in answer.said)
    fix = next(fixes, "make `ssh -o BatchMode=yes HOST true` work").replace("HOST", name)
    return fail("ssh", answer.said or f"ssh ended with code {answer.code}", fix, host)


def _how_far(facts: Facts) -> str:
    came = [name for name, section in facts if section not in (None, False)]
    if not came:
        return "nothing came"
    return f"it told of {', '.join(came)}"


def machine_findings(hosts: Mapping[str, Facts], folder: Path) -> list[Finding]:
    """One machine under two names, and hosts without this folder."""
    found: list[Finding] = []
    first: dict[tuple[str, tuple[str, ...]], str] = {}
    for host, facts in hosts.items():
        machine = facts.machine
        if machine is None:
            continue
        identity = (machine.boot, tuple(sorted(machine.addresses)))
        other = first.setdefault(identity, host)
        if other != host and machine.boot:
            text = f"is the same machine as {other}: its GPUs would be used twice"
            fix = "keep one line a machine, with all its slots"
            found.append(fail("hostfile", text, fix, host))
        if not machine.is_in_folder:
            text = f"{folder} is not there; the launcher starts each rank in it"
            fix = "put the checkout at the same path on every host, or share it"
            found.append(fail("folder", text, fix, host))
    return found


def code_findings(here: Facts, hosts: Mapping[str, Facts]) -> list[Finding]:
    """Python files of the trainer that differ from those here."""
    if not here.code:
        return [fail("code", "this machine does not find the package `stacking`",
                     "run the doctor in the checkout, or pip install -e .")]  # fmt: skip
    found = []
    for host, facts in _told(hosts, "code"):
        theirs = facts.code or {}
        differ = sorted(name for name, sha in here.code.items() if theirs.get(name) != sha)
        extra = sorted(set(theirs) - set(here.code))
        fix = "bring all hosts to one version: git pull or rsync, or a shared checkout"
        if not theirs:
            found.append(fail("code", "the package `stacking` is not found there", fix, host))
        elif differ:
            text = (
                f"{len(differ)} of {len(here.code)} files differ or are missing: {listed(differ)}"
            )
            found.append(fail("code", text, fix, host))
        elif extra:
            found.append(warn("code", f"has files that are not here: {listed(extra)}", fix, host))
    return found or [ok("code", f"{counted(len(here.code), 'Python file')}{_alike(hosts)}")]


def package_findings(here: Facts, hosts: Mapping[str, Facts]) -> list[Finding]:
    """Python and packages of another version than here."""
    ours, found = _versions(here), []
    for host, facts in _told(hosts, "packages"):
        theirs = _versions(facts)
        differ = [
            f"{name} {theirs.get(name) or 'missing'} (here {ours.get(name) or 'missing'})"
            for name in ours if theirs.get(name) != ours[name]
        ]  # fmt: skip
        if differ:
            fix = "install the same versions (constraints.txt) on every host"
            if any(version.startswith("from ") for version in (*ours.values(), *theirs.values())):
                fix += "; a folder comes before what is installed: take it out of PYTHONPATH"
            found.append(fail("packages", listed(differ, 6), fix, host))
    versions = ", ".join(f"{name} {ours.get(name)}" for name in ("Python", "torch", "deepspeed"))
    lacking = [name for name in ("torch", "deepspeed") if not ours.get(name)]
    if lacking:
        found.append(fail("packages", f"not installed here: {', '.join(lacking)}",
                          "pip install -e . in the checkout"))  # fmt: skip
    return found or [ok("packages", versions + _alike(hosts))]


def _versions(facts: Facts) -> dict[str, str]:
    python = {"Python": facts.machine.python} if facts.machine else {}
    return python | (facts.packages or {})


def data_findings(folder: Path, hosts: Mapping[str, Facts]) -> list[Finding]:
    """Data that are missing on a host, or other ones than on most."""
    told = {host: facts.data for host, facts in hosts.items() if facts.data}
    if not told:
        return []
    kept = {host: _identity(data) for host, data in told.items() if _identity(data)}
    most = Counter(kept.values()).most_common(1)  # of equals the first
    usual = next((host for host, identity in kept.items() if identity == most[0][0]), "")
    found = []
    for host, data in told.items():
        if fault := _data_fault(folder, data, host):
            found.append(fault)
        elif kept[host] != kept[usual]:
            text = f"{folder}: {'another manifest.json' if data.manifest else 'other shards'} than"
            found.append(fail("data", f"{text} on {usual}", _COPY, host))
    if found:
        return found
    by = "manifest.json" if any(data.manifest for data in told.values()) else "no manifest"
    return [ok("data", f"{folder}, {by}{_alike(told)}")]


def _identity(data: Data) -> str:
    return data.manifest or data.listing


def _data_fault(folder: Path, data: Data, host: str) -> Finding | None:
    """What is wrong with the folder on one host alone."""
    if not data.is_folder:
        return fail("data", f"{folder}: no such folder", _COPY, host)
    if not _identity(data):
        fix = f"{_COPY}; launch/prepare_data.py makes shards"
        return fail("data", f"{folder}: holds no shards", fix, host)
    if data.missing:
        text = f"{folder}: shards of the manifest are missing: {listed(data.missing)}"
        return fail("data", text, _COPY, host)
    return None


def _told(hosts: Mapping[str, Facts], section: str) -> list[tuple[str, Facts]]:
    return [item for item in hosts.items() if getattr(item[1], section) is not None]


def _alike(hosts: Mapping[str, object]) -> str:
    """Who has been compared."""
    if not any(hosts):
        return ""  # this machine alone
    return f", the same on {counted(len(hosts), 'host')}"
