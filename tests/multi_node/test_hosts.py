"""The two hosts: separate, and gone without a trace; ranks that watch each other there."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import environment
from two_hosts import ADDRESSES, INTERFACE, NAMES, Host, obstacle, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.multi_node]

MADE_ELSEWHERE = """
import sys, time
from two_hosts import two_hosts
with two_hosts() as hosts:
    hosts[1].start("sleep", "1234")
    print(*hosts[0].processes(), *hosts[1].processes(), flush=True)
    time.sleep(600)
"""


def test_each_host_has_a_name_an_address_and_processes_of_its_own(hosts: tuple[Host, Host]) -> None:
    sleeping = hosts[1].start("sleep", "1234")
    for host, name, address in zip(hosts, NAMES, ADDRESSES, strict=True):
        assert host.run("hostname").stdout.strip() == name
        assert f"inet {address}/24" in host.run("ip", "addr", "show", INTERFACE).stdout
    said = hosts[0].run("pdsh", "-S", "-R", "ssh", "-w", ",".join(NAMES), "hostname").stdout
    assert {"node1: node1", "node2: node2"} <= set(said.splitlines())
    assert not hosts[0].processes("sleep 1234")
    hosts[1].kill_all()
    assert sleeping.wait(timeout=10) != 0
    assert hosts[0].run("ssh", "node2", "hostname").stdout.strip() == "node2"


def broken_off() -> list[int]:
    """The processes of hosts whose test fails."""
    started = []
    with contextlib.suppress(ZeroDivisionError), two_hosts() as hosts:
        started += [*hosts[0].processes(), *hosts[1].processes()]
        raise ZeroDivisionError
    assert not hosts[0].home.parent.exists()
    return started


def killed_off() -> list[int]:
    """The processes of hosts whose test is killed."""
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    maker = subprocess.Popen(
        [sys.executable, "-c", MADE_ELSEWHERE], env={**environment(), **paths},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert maker.stdout is not None
    started = list(map(int, maker.stdout.readline().split()))
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    return started


@pytest.mark.parametrize("end", [broken_off, killed_off])
def test_nothing_is_left_of_hosts_whose_test_ends(end: Callable[[], list[int]]) -> None:
    if reason := obstacle():
        pytest.skip(reason)
    links = os.listdir("/sys/class/net")
    started = end()
    assert len(started) >= 2
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, started)):
        assert time.monotonic() < deadline, started
        time.sleep(0.05)
    assert os.listdir("/sys/class/net") == links


def test_a_main_host_that_loses_its_address_ends_like_the_other(hosts: tuple[Host, Host]) -> None:
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500",
               "GLOO_SOCKET_IFNAME": INTERFACE}  # fmt: skip
    rank = Path(__file__).with_name("watched_rank.py")
    processes = [
        host.start("python", rank, variables={**meeting, "RANK": str(number)})
        for number, host in enumerate(hosts)
    ]
    for process in processes:
        assert process.stdout is not None
        assert any(line == "begun\n" for line in process.stdout)
    hosts[0].lose_address()
    began = time.monotonic()
    for number, process in enumerate(processes):
        said = process.communicate(timeout=100)[0]
        assert time.monotonic() - began < 60
        assert process.returncode == 4, said
        assert f"rank {1 - number} (host {NAMES[1 - number]}" in said
