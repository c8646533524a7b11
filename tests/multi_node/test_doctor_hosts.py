"""The doctor over real ssh: a hostfile with ten faults, and hosts that differ; then none."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from two_hosts import EXAMPLES, Host

pytestmark = [pytest.mark.slow, pytest.mark.multi_node]

FAULTY = """node1 slots=1
node2 slots=1
node1 slots=2
node3 slots=1
node4
localhost slots=1
node2:22 slots=1
Node1 slots=1
10.99.0.2 slots=1
node5 slots=0
node6 slots=2,
"""
FAULTS = {
    ("hostfile", ""): ["line 3: node1 comes again", "line 5: 'node4' is no entry"],
    ("hostfile", "localhost"): ["line 6: localhost means another machine"],
    ("hostfile", "'node2:22'"): ["line 7: 'node2:22' is no name"],
    ("hostfile", "Node1"): ["line 8: Node1 is node1", "is the same machine as node1"],
    ("hostfile", "node5"): ["line 10: node5 has slots=0"],
    ("hostfile", "node6"): ["line 11: slots=2, is read as 2"],
    ("names", "node3"): ["the name is not known"],
    ("ssh", "10.99.0.2"): ["Host key verification failed"],
    ("run-dir", "node2"): ["is not there"],
    ("env-file", ""): ["line 1: is a comment"],
    ("batch", ""): ["cannot be shared equally by a world of 9 ranks"],
}


def asked(host: Host, *words: object) -> tuple[int, dict[str, Any]]:
    """The doctor's exit code and answer."""
    recipe = "launch/recipes/demo.json"
    done = host.run("python", "launch/doctor.py", "--json", "--recipe", recipe,
                    "--deepspeed_config", "deepspeed_configs/cpu_fp32.json", *words)  # fmt: skip
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_every_fault_of_a_hostfile_and_its_hosts_is_told_with_its_fix(
    hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text(FAULTY)
    settings = hosts[0].home / ".deepspeed_env"
    settings.write_text("# note\nGLOO_SOCKET_IFNAME=eth0\n")
    try:
        own = "/dev/shm/run"  # a file system of each host's own
        code, seen = asked(hosts[0], "--hostfile", tmp_path / "hostfile", "--run-dir", own)
    finally:
        shutil.copy(EXAMPLES / "deepspeed_env", settings)
    assert code == 2
    fails = [finding for finding in seen["findings"] if finding["status"] == "fail"]
    for (check, where), texts in FAULTS.items():
        found = [one["found"] for one in fails if (one["check"], one["where"]) == (check, where)]
        for text in texts:
            assert any(text in line for line in found), (text, fails)
    assert all(finding["fix"] for finding in fails)
    assert seen["fails"] == len(fails)


def test_two_hosts_in_order_have_no_fault(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    code, seen = asked(hosts[0], "--hostfile", EXAMPLES / "hostfile", "--run-dir", tmp_path / "run")
    assert (code, seen["fails"], seen["world_size"]) == (0, 0, 2), seen
