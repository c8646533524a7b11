"""Environment variables that reach the other hosts: those that the launcher forwards, and files.

`deepspeed/launcher/runner.py` 0.19.8 sends what begins with EXPORT_PREFIXES and with the
accelerator's own prefixes, then each line `KEY=VALUE` of `.deepspeed_env` in the home folder and in
the working folder. It cuts every line at the first `=`, the blank ones too, and stops where there
is none; `# a=b` becomes `export # a=b; cd ...`, after which the remote shell does nothing more.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.plain_files import read_plain
from stacking.doctor_findings import Finding, counted, fail, listed, ok, warn

EXPORT_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX")  # the launcher's EXPORT_ENVS
ACCELERATOR_PREFIXES = {"cuda": ("NCCL",), "cpu": ()}  # of its accelerators' export_envs()
EXCLUDED = {"AISC_JOB_NAME": ("NCCL_IB_HCA", "UCX_NET_DEVICES")}  # its EXCLUDE_ENVS
FILE_NAME = ".deepspeed_env"  # unless DS_ENV_FILE names another one
_PLAIN = re.compile(r"[^\w@%+=:,./-]")  # the launcher puts other values between double quotes
_KEY = re.compile(r"[A-Za-z_]\w*", re.ASCII)

# Of libraries that a training job uses; what the launcher sets itself is not among them.
_MATTER = ("COMET_", "CUBLAS_", "DS_", "FI_", "GLOO_", "HF_", "HUGGINGFACE_", "LD_", "MALLOC_",
           "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_",
           "WANDB_")  # fmt: skip
_NOT = ("DS_ENV_FILE", "OMPI_", "PYTORCH_NVML_BASED_CUDA_CHECK")  # DeepSpeed sets the last itself
_FORM = "lines KEY=VALUE only"


@dataclass
class EnvFile:
    """What `.deepspeed_env` files say, and what is wrong with them."""

    names: list[Path] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    faults: list[Finding] = field(default_factory=list)


def read_env_files(folders: Sequence[Path], name: str) -> EnvFile:
    """Those that are there; a later one changes what an earlier one says."""
    result = EnvFile()
    for path in (folder / name for folder in folders):
        if not path.is_file():
            continue
        result.names.append(path)
        try:
            text = read_plain(path).decode()
        except (OSError, UnicodeDecodeError) as error:
            fault = fail("env-file", f"{path}: cannot be read: {error}", f"a text file, {_FORM}")
            result.faults.append(fault)
            continue
        for number, line in enumerate(_lines(text), 1):
            fault_of_line = _fault(f"{path.name} in {path.parent}, line {number}: ", line)
            result.faults += fault_of_line
            if not any(fault.status == "fail" for fault in fault_of_line):
                key, _, value = line.partition("=")
                result.values[key.strip()] = value.strip()
    return result


def _lines(text: str) -> list[str]:
    """As `readlines` cuts them: the last line's end begins no other one."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _fault(place: str, line: str) -> list[Finding]:
    """What a line does to the launch. Values may be secrets and are not shown."""
    key, equals, value = (part.strip() for part in line.partition("="))
    if not line.strip():
        return [fail("env-file", f"{place}is blank, at which the launcher crashes",
                     "take the line away")]  # fmt: skip
    if line.lstrip().startswith("#"):
        does = (
            "the remote shell then leaves out the whole job" if equals else "the launcher crashes"
        )
        return [fail("env-file", f"{place}is a comment: {does}", "take the line away")]
    if not equals:
        return [fail("env-file", f"{place}has no =, at which the launcher crashes",
                     f"{_FORM}; take it away or complete it")]  # fmt: skip
    if not _KEY.fullmatch(key):
        word = key.split()[0] if key.startswith("export ") else "the name"
        return [fail("env-file", f"{place}{_shown(key)} is no name that a shell can export",
                     f"{_FORM}, without {word!r}" if word == "export" else
                     "letters, digits and _ in the name")]  # fmt: skip
    if '"' in value:
        return [warn("env-file", f"{place}the value of {key} has double quotes, and the launcher "
                     "adds its own", "write the value without quotes")]  # fmt: skip
    return []


def _shown(key: str) -> str:
    return repr(key if len(key) <= 40 else key[:40] + "...")


def env_file_findings(files: EnvFile, name: str, *, kind: str, num_hosts: int) -> list[Finding]:
    """All faults; on one machine the launcher reads no such file."""
    if num_hosts < 2:
        return []
    if not files.names:
        sent = ", ".join(f"{prefix}*" for prefix in _prefixes(kind))
        return [ok("env-file", f"no {name}: the other hosts get {sent} alone")]
    if files.faults:
        return files.faults
    where = listed(str(path) for path in files.names)
    return [ok("env-file", f"{where}: {counted(len(files.values), 'variable')}")]


def _prefixes(kind: str) -> tuple[str, ...]:
    return (*EXPORT_PREFIXES, *ACCELERATOR_PREFIXES.get(kind, ()))


def forwarded(environment: Mapping[str, str], kind: str) -> dict[str, str]:
    """What the launcher sends of this environment; `kind`: of its accelerator, cuda or cpu."""
    kept = {name for marker, names in EXCLUDED.items() if marker in environment for name in names}
    prefixes = _prefixes(kind)
    return {name: value for name, value in environment.items()
            if name.startswith(prefixes) and name not in kept}  # fmt: skip


def variable_findings(
    environment: Mapping[str, str], files: EnvFile, *, kind: str, num_hosts: int
) -> list[Finding]:
    """Variables that are set here and not on the other hosts; only names, as some are secrets."""
    if num_hosts < 2:
        return []
    sent = {**forwarded(environment, kind), **files.values}
    left = sorted(
        name for name in environment
        if name.startswith(_MATTER) and not name.startswith(_NOT) and name not in sent
    )  # fmt: skip
    if not left:
        return [ok("variables", "all that matter here reach the other hosts")]
    found = f"set here, not sent to the other hosts: {listed(left, 12)}"
    fix = (
        f"put those that the job needs into {FILE_NAME}, {_FORM}, and let others not read the file"
    )
    return [warn("variables", found, fix)]


def exports(environment: Mapping[str, str], files: EnvFile, kind: str, folder: Path) -> str:
    """The beginning of the launcher's remote command: `export A=b; ... cd FOLDER; `."""
    paths = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
    sent = {**forwarded(environment, kind), "PYTHONPATH": ":".join(paths), **files.values}
    return "".join(f"export {line}; " for line in _assignments(sent)) + f"cd {folder}; "


def _assignments(values: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        text = value.strip()
        yield f'{name}="{text}"' if _PLAIN.search(text) else f"{name}={text}"
