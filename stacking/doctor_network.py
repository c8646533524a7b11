"""The port on which ranks meet; addresses and interfaces by which hosts find each other."""

from collections.abc import Mapping, Sequence

from stacking.doctor_findings import Finding, fail, listed, ok, warn
from stacking.doctor_hosts import Answer, Facts


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


def loopback_findings(
    hosts: Mapping[str, Facts], kind: str, sent: Mapping[str, str]
) -> list[Finding]:
    """Hosts whose own name is a loopback address, which gloo tells the other hosts."""
    looped = [
        host for host, facts in hosts.items()
        if facts.machine and facts.machine.own_address.startswith("127.")
    ]  # fmt: skip
    if len(hosts) < 2 or not looped or sent.get("GLOO_SOCKET_IFNAME"):
        return []
    names = {name for host in looped if (machine := hosts[host].machine)
             for name in machine.interfaces if name != "lo"}  # fmt: skip
    seen = f" ({listed(sorted(names), 6)})" if names else ""
    fix = (
        f"put GLOO_SOCKET_IFNAME=<interface>{seen} into .deepspeed_env, or give the host's name "
        "its real address in /etc/hosts"
    )
    found = f"own name is a loopback address on {listed(looped)}: "
    if kind == "cpu":
        return [fail("network", found + "gloo would connect to nobody and hang", fix)]
    return [warn("network", found + "what goes through gloo would hang", fix)]


def interface_findings(
    hosts: Mapping[str, Facts], kind: str, sent: Mapping[str, str]
) -> list[Finding]:
    """Hosts without an interface that gloo or NCCL is told to use; `sent`: their variables."""
    found: list[Finding] = []
    gloo, nccl = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
    for host, facts in hosts.items():
        if facts.machine is None:
            continue
        names = facts.machine.interfaces
        fix = f"name an interface of that host: {listed(names, 6)} (see `ip address`)"
        if lacking := _glooless(sent.get(gloo, ""), names):
            text = f"{gloo} names {listed(lacking)}, which is no interface there"
            judge = fail if kind == "cpu" else warn  # with GPUs only what goes through gloo
            found.append(judge("network", text, fix, host))
        if kind != "cpu" and not _has_nccl(sent.get(nccl, ""), names):
            text = f"{nccl}={_plain(sent[nccl])} leaves no interface there"
            found.append(fail("network", text, fix, host))
    return found


def _glooless(value: str, names: Sequence[str]) -> list[str]:
    """Those of gloo's list, exact names, that are none: it opens each of them."""
    value = _plain(value)
    return [ascii(name) for name in value.split(",") if name not in names] if value else []


def _has_nccl(value: str, names: Sequence[str]) -> bool:
    """Whether NCCL finds one: prefixes, after `=` exact names, after `^` those to leave out."""
    value = _plain(value)
    if len(value) < 2:  # which NCCL does not read
        return True
    is_excluding = value.startswith("^")
    value = value.removeprefix("^")
    is_exact = value.startswith("=")
    asked = [name.partition(":")[0] for name in value.removeprefix("=").split(",") if name]
    matches = (any(name == a if is_exact else name.startswith(a) for a in asked) for name in names)
    return any(matched != is_excluding for matched in matches)


def _plain(value: str) -> str:
    """As the remote shell leaves it."""
    return value.strip().strip('"')
