"""What would keep a job from running, before it is started: a request in, findings out.

One machine, or all hosts of a hostfile, each asked by one ssh at the same time. Nothing is changed
but for one file that is written into the run folder and removed. It ends within a minute.
"""

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from stacking import distributed
from stacking.deepspeed_config import Accelerator
from stacking.doctor_agreement import (
    PACKAGES,
    code_findings,
    data_findings,
    machine_findings,
    package_findings,
    talk_findings,
)
from stacking.doctor_devices import (
    accelerator_of,
    compiler_findings,
    device_findings,
    device_kind,
)
from stacking.doctor_findings import Finding, Status, fail, ok, warn
from stacking.doctor_hostfile import DEFAULT_HOSTFILE, Hostfile, read_hostfile, usable_names
from stacking.doctor_hosts import (
    Answer,
    Facts,
    Limits,
    Settings,
    Ssh,
    ask_here,
    ask_hosts,
    can_ssh_plainly,
)
from stacking.doctor_network import interface_findings, loopback_findings, port_findings
from stacking.doctor_recipe import Plan, batch_findings, fit_findings, read_plan
from stacking.doctor_storage import disk_findings, nonce_in, shared_findings
from stacking.doctor_variables import (
    FILE_NAME,
    EnvFile,
    env_file_findings,
    exports,
    read_env_files,
    variable_findings,
)

DEFAULT_PORT = 29500  # the launcher's
_ANY_GPU = Accelerator("cuda", supports_fp16=True, supports_bf16=True, fused_adam=True)
_HERE = ""  # the name under which this machine answers, where there is no hostfile


@dataclass(frozen=True)
class Request:
    """What would be started, and with which of the launcher's flags."""

    hostfile: Path | None = None
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    deepspeed_config: Path | None = None
    data: Path | None = None
    run_dir: Path | None = None
    ssh_port: int | None = None
    num_gpus: int | None = None  # ranks on each host, whatever the hostfile says
    master_addr: str = ""
    master_port: int = DEFAULT_PORT


@dataclass(frozen=True)
class Examination:
    """All that was found."""

    findings: tuple[Finding, ...]
    left_out: tuple[str, ...]  # what was not checked, and what it would need
    hosts: tuple[str, ...]  # of the hostfile; none: this machine alone
    world_size: int
    seconds: float

    def count(self, status: Status) -> int:
        """How many findings are so."""
        return sum(finding.status == status for finding in self.findings)


@dataclass
class _Case:
    """What is known of one examination."""

    request: Request
    limits: Limits
    environment: Mapping[str, str]
    files: EnvFile
    plan: Plan
    hostfile: Hostfile | None
    answers: dict[str, Answer] = field(default_factory=dict)  # of the hosts, or of this machine
    here: Answer = field(default_factory=Answer)
    nonce: tuple[Path | None, str] = (None, "")

    @property
    def facts(self) -> dict[str, Facts]:
        return {host: answer.facts for host, answer in self.answers.items()}

    @property
    def num_hosts(self) -> int:
        return len(self.hostfile.slots) if self.hostfile else 1

    @property
    def kind(self) -> str:
        return device_kind(self.facts, self.environment)

    @property
    def slots(self) -> dict[str, int]:
        """Ranks by host."""
        asked = self.request.num_gpus
        if self.hostfile is not None:
            return {host: asked or slots for host, slots in self.hostfile.slots.items()}
        devices = self.here.facts.devices
        gpus = len(devices.gpus) if devices and self.kind == "cuda" else 0
        return {_HERE: asked or gpus or 1}


def examine(request: Request, limits: Limits | None = None) -> Examination:
    """Look at everything; what is wrong is a finding and never an error."""
    began = time.monotonic()
    environment = distributed.environment()
    path = request.hostfile or (DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.is_file() else None)
    name = environment.get("DS_ENV_FILE", FILE_NAME)
    case = _Case(
        request,
        limits or Limits(),
        environment,
        read_env_files([Path.home(), Path.cwd()], name),
        read_plan(request.recipe, request.overrides, request.deepspeed_config),
        None if path is None else read_hostfile(path),
    )
    launcher = _ask(case)
    findings = [
        *(case.hostfile.findings if case.hostfile else []),
        *launcher,
        *_host_findings(case),
        *_launch_findings(case, name),
        *case.plan.findings,
        *_plan_findings(case),
    ]
    hosts = tuple(case.hostfile.slots) if case.hostfile else ()
    world_size = sum(case.slots.values())
    seconds = time.monotonic() - began
    return Examination(tuple(findings), tuple(_left_out(case)), hosts, world_size, seconds)


def _ask(case: _Case) -> list[Finding]:
    """Ask all hosts and this machine; findings about the launcher's own ways to them."""
    request, limits = case.request, case.limits
    names = usable_names(case.hostfile.slots) if case.hostfile else []
    options = tuple(case.environment.get("PDSH_SSH_ARGS_APPEND", "").split())  # as pdsh does
    alone = case.hostfile is None
    with nonce_in(request.run_dir) as case.nonce, ThreadPoolExecutor(max_workers=2) as pool:
        settings = Settings(
            PACKAGES, _absolute(request.data), _absolute(request.run_dir),
            _absolute(case.nonce[0]), request.master_port, request.master_addr,
        )  # fmt: skip
        here = pool.submit(ask_here, settings, limits, listens=alone, devices=alone)
        plainly = None
        if names and options:
            plainly = pool.submit(can_ssh_plainly, names[0], request.ssh_port, limits)
        if names:
            prefix = exports(case.environment, case.files, _own_kind(case), Path.cwd())
            ssh = Ssh(prefix, request.ssh_port, options)
            case.answers = ask_hosts(names, settings, ssh, limits)
        case.here = here.result()
        if alone:
            case.answers = {_HERE: case.here}
        if plainly is None or plainly.result():
            return []
    return [warn("launcher", "it tests its first host by ssh without PDSH_SSH_ARGS_APPEND, which "
                 "fails", "put the options into ~/.ssh/config, or give the launcher --no_ssh_check "
                 "and --master_addr", names[0])]  # fmt: skip


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _own_kind(case: _Case) -> str:
    """The accelerator of the launcher's process, which decides what it forwards."""
    has_gpu = shutil.which("nvidia-smi") is not None
    return case.environment.get("DS_ACCELERATOR", "cuda" if has_gpu else "cpu")


def _host_findings(case: _Case) -> list[Finding]:
    """Of the answers; nothing about the others where none has come."""
    request, facts = case.request, case.facts
    found: list[Finding] = []
    if case.hostfile is None:
        if case.here.trouble:
            found.append(fail("answer", f"the probe ended with code {case.here.code}: "
                              f"{case.here.said}", "mend the Python environment"))  # fmt: skip
    elif case.answers:
        found += talk_findings(case.answers, case.limits.answer)
        found += machine_findings(facts, Path.cwd())
    reached = {host: told for host, told in facts.items() if told.machine}
    if not reached:
        return found
    found += code_findings(case.here.facts, reached)
    found += package_findings(case.here.facts, reached)
    if request.data is not None:
        found += data_findings(request.data.absolute(), reached)
    if request.run_dir is not None:
        found += shared_findings(request.run_dir, *case.nonce, reached)
    found += port_findings(case.answers, request.master_port, request.master_addr)
    # The ranks of one host are started from here, without ssh.
    nodes = reached if case.num_hosts > 1 else {next(iter(reached)): case.here.facts}
    found += interface_findings(nodes, case.kind)
    found += loopback_findings(nodes, case.kind)
    return found + device_findings(reached, case.slots, case.kind)


def _launch_findings(case: _Case, env_file: str) -> list[Finding]:
    """What the launcher itself needs, and what it does not send."""
    if case.hostfile is None:
        return []
    found: list[Finding] = []
    if case.num_hosts > 1 and shutil.which("pdsh") is None:
        fix = "install pdsh, or give the launcher --launcher openmpi, mpich or slurm"
        text = "pdsh, the launcher's default, is not installed here"
        found.append(fail("launcher", text, fix))
    elif case.num_hosts > 1:
        found.append(ok("launcher", "pdsh is here"))
    found += _alone_findings(case)
    kind, count = _own_kind(case), case.num_hosts
    found += env_file_findings(case.files, env_file, kind=kind, num_hosts=count)
    return found + variable_findings(case.environment, case.files, kind=kind, num_hosts=count)


def _alone_findings(case: _Case) -> list[Finding]:
    """One host in the hostfile: the launcher starts the ranks on the machine that it runs on."""
    ours = case.here.facts.machine
    if case.num_hosts != 1 or ours is None:
        return []
    for host, facts in case.facts.items():
        theirs = facts.machine
        if theirs and (theirs.hostname, theirs.addresses) != (ours.hostname, ours.addresses):
            return [warn("launcher", "the only host, and not this machine: the launcher would run "
                         "here", "give the launcher --force_multi", host)]  # fmt: skip
    return []


def _plan_findings(case: _Case) -> list[Finding]:
    """What the recipe makes of the hosts."""
    accelerator = accelerator_of(case.facts, case.kind) or _ANY_GPU
    world_size = sum(case.slots.values())
    run_dir, recipe = case.request.run_dir, case.plan.recipe
    found = []
    if world_size:
        found += batch_findings(case.plan, world_size, accelerator, run_dir)
    if case.plan.engine is not None:
        found += compiler_findings(case.facts, case.plan.engine.settings, case.kind)
    if recipe is not None and case.request.data is not None and _has_data(case):
        found += fit_findings(recipe, case.request.data)
    first = next(iter(case.facts.items()), None)
    if recipe is not None and run_dir is not None and first and first[1].run_dir:
        found += disk_findings(run_dir, recipe, first[0], first[1].run_dir)
    return found


def _has_data(case: _Case) -> bool:
    """Whether this machine has the data, and has told so in time: its disk does not hang."""
    data = case.here.facts.data
    return data is not None and data.is_folder and not data.missing


def _left_out(case: _Case) -> list[str]:
    """What was not looked at, and what it would take."""
    request, lines = case.request, []
    if case.hostfile is None:
        lines.append("other hosts: without --hostfile the launcher uses this machine alone")
    else:
        lines.append("--include and --exclude: the launcher checks them itself")
        odd = set(case.hostfile.slots) - set(case.answers)
        lines += [f"{ascii(host)}: ssh would take its name for something else" for host in odd]
        first = next(iter(case.answers.values()), None)
        if first is None or first.facts.machine is None:
            lines.append("master port and disk: the first host has not answered")
    if case.plan.recipe is None and request.recipe is None:
        lines.append("batch, precision and growth: give --recipe")
    if request.data is None:
        lines.append("data: give --data")
    elif case.plan.recipe and not _has_data(case):
        lines.append("whether the data fit the recipe: this machine does not have all of them")
    if request.run_dir is None:
        lines.append("run folder: give --run-dir")
    elif case.plan.recipe is None:
        lines.append("disk: its checkpoints are counted from --recipe")
    if case.plan.recipe and accelerator_of(case.facts, case.kind) is None:
        lines.append(
            "devices: no host has told of any; the batch is that of GPUs with fp16 and bf16"
        )
    return lines
