"""An interface made slow by `tc`, and the bytes that it has sent. Linux, root."""

import shlex
import subprocess
from dataclasses import dataclass

import psutil

_BURST = 256 * 1024  # bytes that may go at once: more than one packet of 64 KiB
_QUEUE = "200ms"  # of packets at that rate; what comes on top is dropped, and TCP sends it again
_PACKETS = 100_000  # that the delay may hold


@dataclass(frozen=True)
class Network:
    """What every packet of an interface goes through on its way out; 0: nothing of that kind."""

    megabits: float  # a second
    delay_ms: float = 0.0

    def __str__(self) -> str:
        """Such as 100 Mbit/s, 5 ms each way."""
        rate = f"{self.megabits:,g} Mbit/s" if self.megabits else "no limit"
        return rate + (f", {self.delay_ms:g} ms each way" if self.delay_ms else "")

    def commands(self, interface: str) -> list[str]:
        """Those of `tc`, for an interface that has nothing of the kind yet."""
        found, parent = [], "root"
        if self.delay_ms:
            found.append(f"root handle 1: netem delay {self.delay_ms:g}ms limit {_PACKETS}")
            parent = "parent 1:1"
        if self.megabits:
            rate = f"rate {self.megabits * 1e6:.0f}bit burst {_BURST} latency {_QUEUE}"
            found.append(f"{parent} handle 10: tbf {rate}")
        return [f"tc qdisc add dev {interface} {words}" for words in found]


def limit(interface: str, network: Network) -> str:
    """Put `interface` behind `network`, whatever was there; "", or what `tc` said against it."""
    # Fails where there was nothing.
    subprocess.run(["tc", "qdisc", "del", "dev", interface, "root"], capture_output=True)
    for command in network.commands(interface):
        done = subprocess.run(shlex.split(command), capture_output=True, text=True)
        if done.returncode:
            return f"{command}: {' '.join(done.stderr.split())}"
    return ""


def sent_bytes(interface: str) -> int:
    """By the kernel's counter: headers, and what TCP had to send again, are in it."""
    return int(psutil.net_io_counters(pernic=True)[interface].bytes_sent)
