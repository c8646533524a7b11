"""GPUs, drivers, NCCL and compilers of the hosts on which ranks will run."""

from collections import Counter
from collections.abc import Callable, Mapping

from stacking.deepspeed_config import Accelerator
from stacking.deepspeed_schema import EngineSettings
from stacking.doctor_findings import Finding, counted, fail, listed, ok, warn
from stacking.doctor_hosts import Devices, Facts

_MOST_USED_MIB = 2048  # of a GPU's memory by others
_PATH_FIX = "install it there, or put PATH=... with its folder into .deepspeed_env"


def device_findings(
    hosts: Mapping[str, Facts], slots: Mapping[str, int], kind: str
) -> list[Finding]:
    """What torch sees, against the ranks asked for; `kind`: cuda, or cpu."""
    told = _told(hosts)
    found = [
        fail("devices", f"torch cannot be loaded: {devices.error}",
             "mend the environment there; LD_LIBRARY_PATH is sent by .deepspeed_env alone", host)
        for host, devices in told.items() if devices.error
    ]  # fmt: skip
    whole = {host: devices for host, devices in told.items() if not devices.error}
    if not whole:
        return found
    for host, devices in whole.items():
        found += _slot_findings(host, devices, slots.get(host, 0), kind, hosts[host])
        found += _busy_findings(host, devices)
    if kind == "cuda":
        found += _differences(whole)
    if any(finding.status == "fail" for finding in found):
        return found
    return [ok("devices", _summary(whole, kind)), *found]


def _told(hosts: Mapping[str, Facts]) -> dict[str, Devices]:
    return {host: facts.devices for host, facts in hosts.items() if facts.devices}


def _slot_findings(
    host: str, devices: Devices, slots: int, kind: str, facts: Facts
) -> list[Finding]:
    count = len(devices.gpus)
    if kind == "cpu":
        cores = facts.machine.cores if facts.machine else slots
        if slots > cores:
            return [warn("devices", f"{counted(slots, 'rank')} on {counted(cores, 'core')}",
                         "give it fewer slots", host)]  # fmt: skip
        return []
    if not count:
        seen = f"nvidia-smi shows {len(devices.smi)}" if devices.smi else "there is no GPU"
        hint = "torch has no CUDA" if not devices.torch_cuda else f"torch for {devices.torch_cuda}"
        return [fail("devices", f"torch sees no GPU, other hosts have some: {seen}, {hint}",
                     "mend driver or torch there, or take the host away", host)]  # fmt: skip
    if slots > count:
        return [fail("devices", f"{slots} ranks are asked for, torch sees {counted(count, 'GPU')}",
                     f"slots={count} in the hostfile, or --num_gpus {count}", host)]  # fmt: skip
    return []


def _busy_findings(host: str, devices: Devices) -> list[Finding]:
    used = [
        f"{index} ({int(row[2]):,} of {row[3]} MiB)" for index, row in enumerate(devices.smi)
        if row[2].isdecimal() and int(row[2]) > _MOST_USED_MIB
    ]  # fmt: skip
    if not used:
        return []
    fix = "end what runs there (nvidia-smi), or choose others with --include"
    return [warn("devices", f"memory of GPU {listed(used)} is in use already", fix, host)]


def _differences(whole: Mapping[str, Devices]) -> list[Finding]:
    """What should be equal on all hosts."""
    views: list[tuple[str, Callable[[Devices], str], str]] = [
        ("NCCL", lambda d: d.nccl, "install the same torch on every host; ranks would hang"),
        ("CUDA of torch", lambda d: d.torch_cuda, "install the same torch on every host"),
        ("driver", lambda d: ", ".join(sorted({row[1] for row in d.smi})),
         "the same driver is safest; then expect no more than the oldest can"),
        ("GPUs", lambda d: ", ".join(sorted(set(d.gpus))),
         "the slowest sets the pace, the smallest memory the micro batch"),
    ]  # fmt: skip
    found = []
    for name, view, fix in views:
        values = {host: view(devices) for host, devices in whole.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        for host, value in values.items():
            if value != usual:
                make = fail if name == "NCCL" else warn
                text = f"{name} {value or 'unknown'}, most hosts have {usual or 'none'}"
                found.append(make("devices", text, fix, host))
    return found


def _summary(whole: Mapping[str, Devices], kind: str) -> str:
    first = next(iter(whole.values()))
    if kind == "cpu":
        return "no GPU: ranks run on the CPU"
    drivers = sorted({row[1] for devices in whole.values() for row in devices.smi})
    count = sum(len(devices.gpus) for devices in whole.values())
    return f"{count} x {first.gpus[0]}; driver {listed(drivers)}, NCCL {first.nccl}"


def device_kind(hosts: Mapping[str, Facts], environment: Mapping[str, str]) -> str:
    """`cuda` if a host has a GPU, unless DS_ACCELERATOR names another device."""
    has_gpus = any(devices.gpus or devices.smi for devices in _told(hosts).values())
    return environment.get("DS_ACCELERATOR", "cuda" if has_gpus else "cpu")


def accelerator_of(hosts: Mapping[str, Facts], kind: str) -> Accelerator | None:
    """What all hosts can do; None where none has answered."""
    told = [devices for devices in _told(hosts).values() if not devices.error]
    if not told:
        return None
    if kind == "cpu":
        return Accelerator("cpu", supports_fp16=False, supports_bf16=True, fused_adam=False)
    return Accelerator(
        "cuda",
        supports_fp16=all(devices.supports_fp16 for devices in told),
        supports_bf16=all(devices.supports_bf16 for devices in told),
        fused_adam=all(_has_kernel(devices, "fused_adam") for devices in told),
        fused_lamb=all(_has_kernel(devices, "fused_lamb") for devices in told),
    )


def _has_kernel(devices: Devices, name: str) -> bool:
    return name in devices.prebuilt or bool(devices.cuda_home)


def compiler_findings(
    hosts: Mapping[str, Facts], settings: EngineSettings, kind: str
) -> list[Finding]:
    """Whether DeepSpeed can build the kernel that the JSON asks for, on every host or on none."""
    name = {"Lamb": "fused_lamb", "Adam": "fused_adam", "AdamW": "fused_adam"}.get(
        settings.optimizer.type, ""
    )
    if kind != "cuda" or not name or settings.optimizer.params.torch_adam:
        return []
    told = {host: d for host, d in _told(hosts).items() if not d.error}
    building = {host: d for host, d in told.items() if name not in d.prebuilt}
    have = [host for host, devices in building.items() if devices.cuda_home]
    found = [fault for host in have for fault in _build_faults(host, building[host], name)]
    if have and len(have) < len(building):
        lacking = [host for host in building if host not in have]
        fix = "install the CUDA toolkit on all of them, or set optimizer.params.torch_adam true"
        found += [
            fail("compiler", f"no nvcc for {name}, which other hosts have", fix, host)
            for host in lacking
        ]
    if found or not told:
        return found
    if building and not have:
        text = f"no nvcc to build {name}: torch's own AdamW takes its place"
        fix = "install the CUDA toolkit, or set optimizer.params.torch_adam true"
        return [warn("compiler", text, fix)] if name == "fused_adam" else []
    return [ok("compiler", f"{name} is built in, or nvcc, ninja and a C++ compiler are there")]


def _build_faults(host: str, devices: Devices, name: str) -> list[Finding]:
    found = []
    if not devices.has_ninja:
        found.append(fail("compiler", f"no ninja on the PATH to build {name}", _PATH_FIX, host))
    if not devices.has_compiler:
        found.append(fail("compiler", f"no C++ compiler to build {name}", _PATH_FIX, host))
    toolkit, torchs = devices.nvcc.split(".")[0], devices.torch_cuda.split(".")[0]
    if not toolkit:
        found.append(fail("compiler", f"nvcc in {devices.cuda_home} does not run", _PATH_FIX, host))
    elif torchs and toolkit != torchs:
        text = f"DeepSpeed refuses nvcc {devices.nvcc} with a torch for CUDA {devices.torch_cuda}"
        fix = (
            f"install a toolkit {torchs}.x and set CUDA_HOME in .deepspeed_env, or torch_adam true"
        )
        found.append(fail("compiler", text, fix, host))
    return found
