"""Asking hosts what they are: one ssh a host, all at the same time, with an end to each.

Each runs doctor_probe.py under the environment that the launcher would give it there, and answers
in lines of JSON. The first host listens on the master port until the others have tried to reach it.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import BaseModel, ValidationError

from stacking import doctor_probe
from stacking.config_loading import JsonObject

MOST_ADDRESSES = 4  # of the first host, each of which the others try


@dataclass(frozen=True)
class Limits:
    """Seconds; together they end the doctor within a minute."""

    resolve: float = 6.0  # a name
    connect: float = 10.0  # ssh's ConnectTimeout
    answer: float = 45.0  # from the beginning until a host has said all
    first_host: float = 20.0  # until the others stop waiting for its addresses
    closing: float = 4.0  # more for the first host, which ends after all others


class Machine(BaseModel):
    """Section `machine` of an answer."""

    hostname: str
    addresses: list[str]
    own_address: str
    boot: str
    is_in_folder: bool
    python: str
    interfaces: list[str]
    variables: dict[str, str]  # those that name interfaces, as a rank there would see them
    cores: int
    port_fault: str


class Data(BaseModel):
    """Section `data`."""

    is_folder: bool
    manifest: str
    listing: str
    missing: list[str]


class RunDir(BaseModel):
    """Section `run_dir`."""

    sees_nonce: bool
    is_writable: bool
    free_bytes: int
    held_bytes: int


class Devices(BaseModel):
    """Section `devices`."""

    error: str = ""
    torch_cuda: str = ""
    gpus: list[str] = []
    smi: list[list[str]] = []  # name, driver, MiB used, MiB in all
    nccl: str = ""
    supports_fp16: bool = False
    supports_bf16: bool = False
    cuda_home: str = ""
    nvcc: str = ""
    has_ninja: bool = False
    has_compiler: bool = False
    prebuilt: list[str] = []


class Facts(BaseModel):
    """What a host has answered; a section that did not come is None."""

    machine: Machine | None = None
    code: dict[str, str] | None = None
    packages: dict[str, str] | None = None
    data: Data | None = None
    run_dir: RunDir | None = None
    devices: Devices | None = None
    reached: list[str] | None = None
    ready: bool = False


Trouble = Literal["", "name", "ssh", "answer"]


@dataclass(frozen=True)
class Answer:
    """One host's facts, or why there are none, or not all."""

    facts: Facts = field(default_factory=Facts)
    trouble: Trouble = ""  # what failed: its name, ssh to it, or the probe there
    said: str = ""  # the last lines of the complaint
    code: int | None = 0  # of ssh or of the probe; None: stopped after `Limits.answer`


@dataclass(frozen=True)
class Settings:
    """What is asked of every host."""

    packages: tuple[str, ...]
    data: Path | None
    run_dir: Path | None
    nonce: Path | None
    port: int
    master_addr: str  # "": one of the first host's own

    def line(self, *, listens: bool, devices: bool) -> str:
        """The probe's first line."""
        folders = {"data": str(self.data or ""), "run_dir": str(self.run_dir or ""),
                   "nonce": str(self.nonce or "")}  # fmt: skip
        asked: JsonObject = {"packages": list(self.packages), "port": self.port, **folders}
        asked["folder"] = str(Path.cwd())
        return json.dumps(asked | {"listens": listens, "devices": devices})


@dataclass(frozen=True)
class Ssh:
    """How to get to the hosts."""

    prefix: str  # of the remote command: the launcher's exports and its `cd`
    port: int | None = None
    options: tuple[str, ...] = ()  # those of PDSH_SSH_ARGS_APPEND

    def to(self, host: str, command: str, limits: Limits) -> list[str]:
        """An ssh that asks nothing."""
        port = [] if self.port is None else ["-p", str(self.port)]
        quiet = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={limits.connect:.0f}"]
        return ["ssh", *quiet, *self.options, *port, host, command]


@dataclass
class _Meeting:
    """What the conversations wait for from each other."""

    first: "Future[Machine | None]" = field(default_factory=lambda: Future())
    others_done: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)

    def left(self, seconds: float) -> float:
        """Of so many since the beginning."""
        return max(0.1, self.began + seconds - time.monotonic())


def ask_here(settings: Settings, limits: Limits, *, listens: bool, devices: bool) -> Answer:
    """What this machine says of itself, in the environment of this process."""
    meeting = _Meeting()
    meeting.others_done.set()
    line = settings.line(listens=listens, devices=devices)
    return _Conversation(_probe(), settings, line, limits, meeting).hold(is_first=True)


def ask_hosts(
    hosts: Sequence[str], settings: Settings, ssh: Ssh, limits: Limits
) -> dict[str, Answer]:
    """Every host's answer, by name; the first listens, the others try to reach it."""
    meeting = _Meeting()

    def ask(host: str) -> Answer:
        is_first = host == hosts[0]
        try:
            if complaint := _name_fault(host, ssh, limits):
                return Answer(trouble="name", said=complaint)
            line = settings.line(listens=is_first, devices=True)
            command = ssh.to(host, ssh.prefix + "exec " + shlex.join(_probe()), limits)
            talk = _Conversation(command, settings, line, limits, meeting)
            return talk.hold(is_first=is_first)
        finally:
            if is_first:
                _settle(meeting.first)

    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        asked = {host: pool.submit(ask, host) for host in hosts}
        wait([asked[host] for host in hosts[1:]])
        meeting.others_done.set()
        return {host: future.result() for host, future in asked.items()}


def can_ssh_plainly(host: str, port: int | None, limits: Limits) -> bool:
    """Whether the launcher's own check of its first host passes: ssh without pdsh's options."""
    command = Ssh("", port).to(host, "hostname", limits)
    try:
        done = subprocess.run(command, timeout=limits.connect + 5, check=False,
                              stdin=subprocess.DEVNULL, capture_output=True)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _probe() -> list[str]:
    return [sys.executable, "-u", "-c", Path(doctor_probe.__file__).read_text()]


def _settle(first: "Future[Machine | None]", machine: Machine | None = None) -> None:
    if not first.done():
        first.set_result(machine)


class _Conversation:
    """One process that runs the probe, here or behind ssh."""

    def __init__(
        self, command: list[str], settings: Settings, line: str, limits: Limits, meeting: _Meeting
    ) -> None:
        self._command = command
        self._settings = settings
        self._line = line
        self._limits = limits
        self._meeting = meeting
        self._found: JsonObject = {}

    def hold(self, *, is_first: bool) -> Answer:
        """All of it; never raises for what a host does."""
        limits = self._limits
        limit = self._meeting.left(limits.answer + (limits.closing if is_first else 0))
        with tempfile.TemporaryFile("w+") as complaints:
            try:
                process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    stderr=complaints, errors="replace", start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                return Answer(trouble="ssh", said=str(error))
            with _stopped_after(limit, process) as was_stopped:
                self._talk(process, is_first)
                code = process.wait()
            complaints.seek(0)
            said = " ".join(complaints.read()[-2000:].split("\n")[-4:]).strip()
        return self._answer(None if was_stopped.is_set() else code, said)

    def _talk(self, process: "subprocess.Popen[str]", is_first: bool) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError, ValueError):  # the process has ended
            _say(process.stdin, self._line)
            self._listen(process.stdout, until="ready", is_first=is_first)
            if is_first:
                self._meeting.others_done.wait(self._meeting.left(self._limits.answer))
            elif addresses := self._first_addresses():
                _say(process.stdin, json.dumps(addresses))
                self._listen(process.stdout, until="reached", is_first=False)
        with suppress(BrokenPipeError):
            process.stdin.close()
        with suppress(ValueError):
            process.stdout.read()

    def _listen(self, output: IO[str], until: str, is_first: bool) -> None:
        for line in output:
            start = line.find(doctor_probe.MARK)
            with suppress(ValueError):
                section = json.loads(line[start + len(doctor_probe.MARK) :]) if start >= 0 else {}
                self._found.update(section if isinstance(section, dict) else {})
            if is_first and "machine" in self._found:
                _settle(self._meeting.first, self._facts().machine)
            if until in self._found:
                return

    def _first_addresses(self) -> list[str]:
        """To try to reach; empty where the first host did not answer, or has no free port."""
        try:
            machine = self._meeting.first.result(timeout=self._limits.first_host)
        except TimeoutError:
            return []
        if machine is None or machine.port_fault:
            return []
        given = self._settings.master_addr
        return [*([given] if given else []), *machine.addresses][:MOST_ADDRESSES]

    def _facts(self) -> Facts:
        try:
            return Facts.model_validate(self._found)
        except ValidationError:
            return Facts()

    def _answer(self, code: int | None, said: str) -> Answer:
        facts = self._facts()
        if facts.ready and code == 0:
            return Answer(facts)
        is_sshs = code == 255 or (code is None and facts.machine is None)
        if self._command[0] == "ssh" and is_sshs:
            return Answer(facts, "ssh", said, code)
        return Answer(facts, "answer", said, code)


def _say(stream: IO[str], line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


@contextmanager
def _stopped_after(seconds: float, process: "subprocess.Popen[str]") -> Iterator[threading.Event]:
    """End the process and its children after so long; the event says that it was done."""
    was_stopped = threading.Event()

    def stop() -> None:
        was_stopped.set()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield was_stopped
    finally:
        timer.cancel()


def _name_fault(host: str, ssh: Ssh, limits: Limits) -> str:
    """Why ssh would not know the host's address; "": it would, or leaves it to a jump host."""
    port = [] if ssh.port is None else ["-p", str(ssh.port)]
    try:
        printed = subprocess.run(
            ["ssh", "-G", *ssh.options, *port, host], capture_output=True, text=True,
            timeout=limits.resolve, check=False, stdin=subprocess.DEVNULL,
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        printed = ""
    if re.search(r"^proxy(command|jump) (?!none)", printed, re.M):
        return ""
    alias = re.search(r"^hostname (\S+)$", printed, re.M)
    return _unresolved(alias[1] if alias else host.rpartition("@")[2], limits.resolve)


def _unresolved(name: str, seconds: float) -> str:
    """The resolver's complaint; it may hang for minutes and cannot be stopped, only left."""
    complaint = [f"{name}: no answer from the resolver within {seconds:.0f} s"]

    def resolve() -> None:
        try:
            socket.getaddrinfo(name, None)
            complaint[0] = ""
        except (OSError, UnicodeError) as error:
            complaint[0] = f"{name}: {error}"

    thread = threading.Thread(target=resolve, daemon=True)
    thread.start()
    thread.join(seconds)
    return complaint[0]
