"""A real Slurm of the two hosts: munged and slurmd on each, slurmctld on the first.

Both hosts have their own /run, so the daemons' own ports and sockets will do; they end with the
hosts' processes.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from two_hosts import NAMES, Host

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_STARTS_WITHIN = 30.0
# CPUs, of which a test needs more than this machine may have, are not counted by slurmd.
# A requeued job waits for as long as a job's credentials hold: 5 s instead of 2 minutes.
_CONF = """
ClusterName=tests
SlurmctldHost={names[0]}
SlurmUser=root
AuthInfo=cred_expire=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName={nodes} CPUs=4
PartitionName=all Nodes=ALL Default=YES
"""


def obstacle() -> str:
    """Why there is no Slurm here; "" where there is one."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    return f"needs Slurm; missing: {', '.join(missing)} (Debian: slurm-wlm)" if missing else ""


class Slurm:
    """The cluster of two nodes, and its jobs by their numbers."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        """Start the daemons; `folder`: empty, for what they write. RuntimeError if they fail."""
        self._hosts = hosts
        self._folder = folder
        self._variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        (folder / "state").mkdir()
        for name in NAMES:
            (folder / f"spool_{name}").mkdir()
        (folder / "slurm.conf").write_text(
            _CONF.format(folder=folder, names=NAMES, nodes=",".join(NAMES))
        )
        for host in hosts:
            self._start_munge(host)
        self._start(hosts[0], "slurmctld", "-c")
        for host in hosts:
            self._start(host, "slurmd")
        self._await_nodes()

    def run(self, *words: object) -> str:
        """What a command on the first node says; AssertionError if it fails."""
        done = self._hosts[0].run(*words, variables=self._variables)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def submit(self, *words: object, variables: dict[str, str] | None = None) -> str:
        """The number of the job that `sbatch WORDS` makes; what it says goes to `said(number)`."""
        told = [f"{name}={value}" for name, value in (variables or {}).items()]
        output = f"--output={self._folder}/job_%j.txt"
        return self.run("env", *told, "sbatch", "--parsable", output, *words)

    def said(self, job: str) -> str:
        """Everything that the job printed, in all of its starts."""
        path = self._folder / f"job_{job}.txt"
        return path.read_text() if path.exists() else ""

    def state(self, job: str) -> dict[str, str]:
        """What scontrol knows of the job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, is_so: Callable[[], object], job: str, seconds: float) -> None:
        """AssertionError with all that the job and the daemons said where it takes longer."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.state(job)}\n{self.said(job)}\n{self._logs()}")
            time.sleep(0.05)

    def wait_for(self, job: str, state: str, seconds: float) -> dict[str, str]:
        """What scontrol knows of the job once its JobState is `state`."""
        self.wait_until(lambda: self.state(job)["JobState"] == state, job, seconds)
        return self.state(job)

    def _start_munge(self, host: Host) -> None:
        """With the key that both have."""
        key = self._folder / "munge.key"
        if not key.exists():
            key.write_bytes(os.urandom(128))
            key.chmod(0o400)
        seed, log = (self._folder / f"munge_{host.name}.{end}" for end in ("seed", "log"))
        host.run("mkdir", "-p", "/run/munge")
        files = (f"--key-file={key}", f"--seed-file={seed}", f"--log-file={log}")
        self._start(host, "munged", "--force", *files)

    def _start(self, host: Host, *words: str) -> None:
        """A daemon, which goes into the background once it works."""
        done = host.run(*words, timeout=_STARTS_WITHIN, variables=self._variables)
        if done.returncode:
            raise RuntimeError(f"{words[0]} does not start: {done.stdout}\n{self._logs()}")

    def _await_nodes(self) -> None:
        deadline = time.monotonic() + _STARTS_WITHIN
        while True:
            said = self._hosts[0].run("sinfo", "--noheader", "--Node", "--format=%T",
                                      variables=self._variables).stdout  # fmt: skip
            if said.split() == ["idle"] * len(NAMES):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"Slurm does not start: {said}\n{self._logs()}")
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("*.log")))
