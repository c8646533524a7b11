"""Two hosts on one machine, joined by a cable, with ssh between them and one home folder.

A host is a set of namespaces: network, host name, process table, mounts. Its first process is an
sshd; when that ends the kernel ends all others and takes interfaces and mounts away, and it ends
with the process that made it. So nothing is left over, and every test process has its own pair.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from launching import ROOT, environment

NAMES = ("node1", "node2")
ADDRESSES = ("10.99.0.1", "10.99.0.2")
INTERFACE = "eth0"
EXAMPLES = ROOT / "launch" / "multi_node"
_PROGRAMS = ("ip", "mount", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "sshd", "pdsh")
_PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_FRESH = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc")
_EVERYTHING = ("--net", "--uts", "--mount", "--pid")
# sshd and OpenMPI keep what is a host's own in these.
_PRIVATE = ("/run", "/dev/shm")
_START = 30.0  # seconds for a host to answer
# Debian's way: a host's own name is an address that nobody else reaches.
_HOSTS = "127.0.0.1 localhost\n127.0.1.1 {own}\n{others}\n"
_USERS = "root:x:0:0::{home}:/bin/sh\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n"
_SSHD = (
    "HostKey {home}/.ssh/id_ed25519\nPidFile none\nPermitRootLogin prohibit-password\n"
    "PasswordAuthentication no\nUsePAM no\nStrictModes no\nUseDNS no\n"
    "SetEnv DS_ACCELERATOR=cpu OMP_NUM_THREADS=1\n"
)


def obstacle() -> str:
    """Why this machine cannot be two hosts; "" where it can."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"two hosts need {', '.join(missing)} (Debian: openssh-server, pdsh, iproute2)"
    if os.geteuid():
        return "two hosts need root, for namespaces and sshd"
    lines = f"ip link add {INTERFACE} type veth peer name other; mount -t tmpfs none /run"
    tried = _done([*_FRESH, "sh", "-ec", lines])
    if tried.returncode == 0:
        return ""
    return f"two hosts need namespaces, veth and mounts, forbidden here: {tried.stderr.strip()}"


class Host:
    """One of the two; commands run as on a machine of its own, in the checkout's folder."""

    def __init__(self, name: str, address: str, home: Path) -> None:
        """Make its namespaces; no cable and no sshd yet. `home`: everybody's `~` there."""
        self.name, self.address, self.home = name, address, home
        self._log = home.with_name(f"{name}.log")
        # The maker's end, however it comes, ends the host.
        with self._log.open("w") as log:
            self._maker = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *_FRESH, "--kill-child", "sh", "-es"],
                env={**os.environ, "PATH": _PATH}, stdin=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._pid = self._first_process()
        self._enter = ["nsenter", "--target", str(self._pid), *_EVERYTHING]

    def _first_process(self) -> int:
        """As the outer process table calls it."""
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and self._maker.poll() is None:
            for child in psutil.Process(self._maker.pid).children():
                return int(child.pid)
            time.sleep(0.01)
        raise AssertionError(f"{self.name} does not start")

    def wire(self, other: "Host") -> None:
        """Lay the cable to `other`."""
        words = f"link add {INTERFACE} type veth peer name {INTERFACE} netns {other._pid}"
        _check(["nsenter", "--target", str(self._pid), "--net", "ip", *words.split()])

    def boot(self) -> None:
        """Name, addresses, files of its own; the first process becomes sshd."""
        etc = self.home.with_name(f"etc_{self.name}")
        etc.mkdir()
        others = "\n".join(map(" ".join, zip(ADDRESSES, NAMES, strict=True)))
        (etc / "hosts").write_text(_HOSTS.format(own=self.name, others=others))
        (etc / "sshd").write_text(_SSHD.format(home=self.home))
        (etc / "passwd").write_text(_USERS.format(home=self.home))
        lines = [
            f"hostname {self.name}",
            f"mount --bind {etc}/hosts /etc/hosts",
            f"mount --bind {etc}/passwd /etc/passwd",
            *(f"mount -t tmpfs none {folder}" for folder in _PRIVATE),
            "mkdir /run/sshd",
            "ip link set lo up",
            f"ip addr add {self.address}/24 dev {INTERFACE}",
            f"ip link set {INTERFACE} up",
            f"exec {shutil.which('sshd', path=_PATH)} -De -f {etc}/sshd",
        ]
        assert self._maker.stdin is not None
        self._maker.stdin.write("\n".join(lines) + "\n")
        self._maker.stdin.close()

    def await_ssh(self, other: "Host") -> None:
        """Until a command on `other` can be given here."""
        deadline = time.monotonic() + _START
        while (done := self.run("ssh", other.name, "hostname")).returncode:
            said = f"{done.stdout}\n{other._log.read_text()}"
            assert time.monotonic() < deadline, f"{other.name} does not answer: {said}"
            time.sleep(0.1)
        assert done.stdout.split()[-1] == other.name, done.stdout

    def start(
        self, *words: object, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Run a command there; stdout and stderr come in one pipe."""
        given = {**environment(), **(variables or {}), "HOME": str(self.home), "PATH": _PATH}
        return subprocess.Popen(
            [*self._enter, "env", f"--chdir={ROOT}", *map(str, words)], env=given, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(
        self, *words: object, timeout: float = 420, variables: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there and wait; its `stdout` has all that it said."""
        process = self.start(*words, variables=variables)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill_all()
            said, _ = process.communicate()
            raise AssertionError(f"{words} did not end within {timeout} s:\n{said}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, said)

    def processes(self, *words: str) -> dict[int, str]:
        """Command lines there that hold all `words`, by the outer process table's number."""
        space = os.readlink(f"/proc/{self._pid}/ns/pid")
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile
                line = shlex.join(process.cmdline())
                is_here = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if is_here and all(word in line for word in words):
                    found[process.pid] = line
        return found

    def ranks(self) -> list[int]:
        """Processes of pretrain.py itself, not of its launchers."""
        return sorted(self.processes("pretrain.py --local_rank="))

    def kill_all(self) -> None:
        """SIGKILL for every process there but the first, so that its connections are closed."""
        _done([*self._enter, "sh", "-c", "kill -9 -1"])

    def pull_cable(self) -> None:
        """No carrier on the other host, an interface that is down on this one; nobody is told."""
        _check([*self._enter, "ip", "link", "set", INTERFACE, "down"])

    def lose_address(self) -> None:
        """As with a cable that was pulled where DHCP gave the address."""
        _check([*self._enter, "ip", "addr", "flush", "dev", INTERFACE])

    def plug_in(self) -> None:
        """The cable is back, and the address."""
        _check([*self._enter, "ip", "link", "set", INTERFACE, "up"])
        _check([*self._enter, "ip", "addr", "replace", f"{self.address}/24", "dev", INTERFACE])

    def end(self) -> None:
        """Switch it off: the kernel clears up."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._maker.wait()


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """node1 and node2, on which the examples' ssh settings, hostfile and variables hold."""
    with tempfile.TemporaryDirectory(prefix="hosts_") as folder, contextlib.ExitStack() as power:
        home = Path(folder) / "home"
        _make_home(home)
        hosts = []
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            hosts.append(Host(name, address, home))
            power.callback(hosts[-1].end)
        hosts[0].wire(hosts[1])
        for host in hosts:
            host.boot()
        for here in hosts:
            for there in hosts:
                here.await_ssh(there)
        yield hosts[0], hosts[1]


def _make_home(home: Path) -> None:
    """Keys that open both hosts, and the settings that a user is told to have."""
    keys = home / ".ssh"
    keys.mkdir(parents=True, mode=0o700)
    key = keys / "id_ed25519"
    _check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)])
    shutil.copy(keys / "id_ed25519.pub", keys / "authorized_keys")
    shutil.copy(EXAMPLES / "ssh_config", keys / "config")
    shutil.copy(EXAMPLES / "deepspeed_env", home / ".deepspeed_env")


def _done(command: list[str]) -> subprocess.CompletedProcess[str]:
    paths = {**os.environ, "PATH": _PATH}
    return subprocess.run(command, env=paths, capture_output=True, text=True, check=False)


def _check(command: list[str]) -> None:
    done = _done(command)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
