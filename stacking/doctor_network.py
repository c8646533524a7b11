"""The port on which ranks meet, and the addresses by which hosts find each other."""

from collections.abc import Mapping

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
    if len(hosts) < 2 or not looped or "GLOO_SOCKET_IFNAME" in sent:
        return []
    names = {name for host in looped if (machine := hosts[host].machine)
             for name in machine.interfaces}  # fmt: skip
    seen = f" ({listed(sorted(names), 6)})" if names else ""
    fix = (
        f"put GLOO_SOCKET_IFNAME=<interface>{seen} into .deepspeed_env, or give the host's name "
        "its real address in /etc/hosts"
    )
    found = f"own name is a loopback address on {listed(looped)}: "
    if kind == "cpu":
        return [fail("network", found + "gloo would connect to nobody and hang", fix)]
    return [warn("network", found + "what goes through gloo would hang", fix)]
