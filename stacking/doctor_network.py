"""The port on which ranks meet; addresses and interfaces by which hosts find each other."""

from collections.abc import Iterable, Mapping, Sequence

from stacking.doctor_findings import Finding, fail, listed, ok, warn
from stacking.doctor_hosts import Answer, Facts, Machine

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_LOOPBACK = "lo"
_ADDRESS_FIX = "give each host's name its real address in its /etc/hosts"


def port_findings(hosts: Mapping[str, Answer], port: int, master_addr: str) -> list[Finding]:
    """Whether the first host's port is free, and the others reach it. `hosts` begins with it."""
    first, answer = next(iter(hosts.items()))
    machine = answer.facts.machine
    if machine is None:
        return []  # which is a finding already
    if machine.port_fault:
        found = f"port {port} cannot be listened on: {machine.port_fault}"
        fix = "end what uses it (ss -ltnp), or give another --master_port"
        return [fail("master-port", found, fix, first)]
    others = {host: answer.facts for host, answer in list(hosts.items())[1:]}
    if not others:
        return [ok("master-port", f"{port} is free", first)]
    address = master_addr or next(iter(machine.addresses), "")
    if not address:
        return [fail("master-port", "`hostname -I` prints no address there",
                     "give the launcher its address: --master_addr", first)]  # fmt: skip
    return _reach_findings(first, address, port, others)


def _reach_findings(
    first: str, address: str, port: int, others: Mapping[str, Facts]
) -> list[Finding]:
    asked = {host: facts.reached for host, facts in others.items() if facts.reached is not None}
    if not asked:
        return []  # none of them answered
    deaf = [host for host, reached in asked.items() if address not in reached]
    if not deaf:
        return [ok("master-port", f"{address}:{port} is free, and {len(asked)} of {len(others)} "
                   "other hosts reach it", first)]  # fmt: skip
    common = set.intersection(*(set(reached) for reached in asked.values()))
    fix = f"open port {port} (ranks use others, too) between the hosts in their firewall"
    if common:
        fix = f"give the launcher --master_addr {min(common)}, which all of them reach"
    found = f"{address}:{port} of {first} is not reached"
    return [fail("master-port", found, fix, host) for host in deaf]


def loopback_findings(hosts: Mapping[str, Facts], kind: str) -> list[Finding]:
    """Hosts whose own name is a loopback address, which gloo tells the other hosts."""
    told = _machines(hosts)
    looped = [
        host for host, machine in told.items()
        if machine.own_address.startswith("127.") and not machine.variables.get(_GLOO)
    ]  # fmt: skip
    if len(hosts) < 2 or not looped:
        return []
    fix = _ADDRESS_FIX
    if common := _common(told.values()):
        fix = f"put {_GLOO}=<interface> ({listed(common, 6)}) into .deepspeed_env, or {fix}"
    found = f"own name is a loopback address on {listed(looped)}: "
    if kind == "cpu":
        return [fail("network", found + "gloo would connect to nobody and hang", fix)]
    return [warn("network", found + "what goes through gloo would hang", fix)]


def interface_findings(hosts: Mapping[str, Facts], kind: str) -> list[Finding]:
    """Hosts without an interface that gloo or NCCL is told to use."""
    found: list[Finding] = []
    told = _machines(hosts)
    common = _common(told.values())
    all_have = f"name one that all hosts have: {listed(common, 6)}"
    for host, machine in told.items():
        gloo, nccl = (machine.variables.get(name, "") for name in (_GLOO, _NCCL))
        outward = [name for name in machine.interfaces if name != _LOOPBACK]
        usable = outward if len(told) > 1 else machine.interfaces
        here = f"no interface is common to all; this host has {listed(outward, 6)}"
        if lacking := [ascii(name) for name in gloo.split(",") if gloo and name not in usable]:
            fix = all_have if common else f"{here}: leave {_GLOO} out, and {_ADDRESS_FIX}"
            text = f"{_GLOO} names {listed(lacking)}, by which this host is not reached"
            judge = fail if kind == "cpu" else warn  # with GPUs only what goes through gloo
            found.append(judge("network", text, fix, host))
        if kind != "cpu" and not _has_nccl(nccl, usable):
            fix = all_have if common else f"{here}: {_NCCL} may name several, with commas"
            found.append(fail("network", f"{_NCCL}={nccl} leaves no interface there", fix, host))
    return found


def _machines(hosts: Mapping[str, Facts]) -> dict[str, Machine]:
    return {host: facts.machine for host, facts in hosts.items() if facts.machine}


def _common(machines: Iterable[Machine]) -> list[str]:
    """Interfaces, by name, of all of them."""
    names = [set(machine.interfaces) - {_LOOPBACK} for machine in machines]
    return sorted(set.intersection(*names)) if names else []


def _has_nccl(value: str, names: Sequence[str]) -> bool:
    """Whether NCCL finds one: prefixes, after `=` exact names, after `^` those to leave out."""
    if len(value) < 2:  # which NCCL does not read
        return True
    is_excluding = value.startswith("^")
    value = value.removeprefix("^")
    is_exact = value.startswith("=")
    asked = [name.partition(":")[0] for name in value.removeprefix("=").split(",") if name]
    matches = (any(name == a if is_exact else name.startswith(a) for a in asked) for name in names)
    return any(matched != is_excluding for matched in matches)
