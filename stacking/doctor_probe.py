"""What one host can say of itself: settings in by stdin, lines of JSON out. Runs by itself.

The doctor sends this file's text to `python -c` on each host, so it needs nothing but the standard
library, also of an older Python than this trainer's, and looks for torch only at the end. Each line
begins with MARK, as a login shell may print what it likes. The first line of stdin holds the
settings. A second one names addresses to connect to; the end of stdin is also that of the probe,
which until then listens on the port.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

MARK = "doctor "
CONNECT_SECONDS = 3.0  # for each address
TOOL_SECONDS = 10.0  # for nvidia-smi and the like
PARTS = ("stacking", "data_prep")
SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def main() -> None:
    """Answer all that the settings ask for."""
    settings = json.loads(sys.stdin.readline())
    with contextlib.ExitStack() as until_the_end:
        port = settings["port"] if settings["listens"] else 0
        tell("machine", machine(settings["folder"], port, until_the_end))
        tell("code", code())
        tell("packages", {name: version_of(name) for name in settings["packages"]})
        if settings["data"]:
            tell("data", data(Path(settings["data"])))
        if settings["run_dir"]:
            tell("run_dir", run_dir(Path(settings["run_dir"]), settings["nonce"]))
        if settings["devices"]:
            tell("devices", devices())
        tell("ready", True)
        asked = sys.stdin.readline()
        if asked:
            tell("reached", [a for a in json.loads(asked) if is_reached(a, settings["port"])])
            sys.stdin.readline()


def tell(name: str, value: object) -> None:
    """One line to the doctor."""
    sys.stdout.write(MARK + json.dumps({name: value}) + "\n")
    sys.stdout.flush()


def output_of(*command: str) -> str:
    """What a program prints; "" where it is missing or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_SECONDS, stdin=subprocess.DEVNULL,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine(folder: str, port: int, until_the_end: contextlib.ExitStack) -> dict[str, object]:
    """Who this is. `port` is listened on until the end; 0: none is."""
    fault = ""
    if port:
        try:
            until_the_end.enter_context(socket.create_server(("", port), backlog=1024))
        except OSError as error:
            fault = str(error)
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = ""
    return {
        "hostname": socket.gethostname(),
        "addresses": output_of("hostname", "-I").split(),
        "own_address": own,
        "boot": text_of("/proc/sys/kernel/random/boot_id"),
        "is_in_folder": os.path.isdir(folder) and os.path.samefile(folder, os.getcwd()),
        "python": platform.python_version(),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "variables": {name: os.environ.get(name, "") for name in SOCKETS},
        "cores": os.cpu_count() or 1,
        "port_fault": fault,
    }


def text_of(path: str) -> str:
    """A small file's text; "" where it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def code() -> dict[str, str]:
    """Python file -> sha256, of the packages that Python would import here and the launch scripts.

    Compiled files and folders that begin with a dot do not count.
    """
    found = {}
    for part in PARTS:
        spec = importlib.util.find_spec(part)
        for place in (spec.submodule_search_locations or []) if spec else []:
            folder = Path(place)
            found.update(digests(folder.parent, sorted(folder.rglob("*.py"))))
            if (folder.parent / "launch/pretrain.py").is_file():
                found.update(digests(folder.parent, (folder.parent / "launch").glob("*.py")))
    return found


def digests(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Name below `root` -> sha256."""
    return {str(path.relative_to(root)): sha256(path) for path in paths}


def sha256(path: Path) -> str:
    """Of a whole file; "unreadable" where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


def version_of(name: str) -> str:
    """Of the package that Python would import; "" where it is missing.

    One that shadows the installed one, by PYTHONPATH say, tells of no version: its folder is given.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        return ""
    folder = Path(spec.origin).parent.parent
    try:
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return f"from {folder}"
    is_it = os.path.realpath(str(installed.locate_file(""))) == os.path.realpath(str(folder))
    return installed.version if is_it else f"from {folder}"


def data(folder: Path) -> dict[str, object]:
    """The manifest's digest, names and sizes of shards, and which the manifest misses here."""
    manifest = folder / "manifest.json"
    names: list[str] = []
    entries: list[str] = []
    if folder.is_dir():
        names = sorted(p.name for p in folder.iterdir() if p.suffix in (".hdf5", ".h5"))
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        content = json.loads(manifest.read_text())
        entries = [entry["file"] for split in ("training", "validation")
                   for entry in content[split]]  # fmt: skip
    listing = hashlib.sha256()
    for name in names:
        with contextlib.suppress(OSError):
            listing.update(f"{name} {(folder / name).stat().st_size}\n".encode())
    return {
        "is_folder": folder.is_dir(),
        "manifest": sha256(manifest) if manifest.exists() else "",
        "listing": listing.hexdigest() if names else "",
        "missing": [name for name in entries if not (folder / name).is_file()],
    }


def run_dir(folder: Path, nonce: str) -> dict[str, object]:
    """Whether the doctor's file is seen here, and the room for checkpoints."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    held = 0
    for path in (folder / "checkpoints").rglob("*.safetensors"):
        with contextlib.suppress(OSError):
            held += path.stat().st_size
    return {
        "sees_nonce": bool(nonce) and text_of(nonce) == Path(nonce).name,
        "is_writable": os.access(str(there), os.W_OK | os.X_OK),
        "free_bytes": shutil.disk_usage(str(there)).free,
        "held_bytes": held,
    }


def devices() -> dict[str, object]:
    """What torch sees, and what DeepSpeed would need to build its kernels."""
    try:
        torch = importlib.import_module("torch")
        extensions = importlib.import_module("torch.utils.cpp_extension")
    except (ImportError, OSError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    found: dict[str, object] = {
        "torch_cuda": torch.version.cuda or "",
        "cuda_home": extensions.CUDA_HOME or "",
        "nvcc": nvcc_release(extensions.CUDA_HOME),
        "has_ninja": bool(output_of("ninja", "--version")),
        "has_compiler": bool(shutil.which(extensions.get_cxx_compiler())),
        "prebuilt": prebuilt(),
    }
    smi = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.used,memory.total",
                    "--format=csv,noheader,nounits")  # fmt: skip
    rows = [[part.strip() for part in line.split(",")] for line in smi.splitlines()]
    found["smi"] = [row for row in rows if len(row) == 4]
    try:
        has_gpus = torch.cuda.is_available()
        found.update(gpus(torch) if has_gpus else {"gpus": [], "supports_bf16": True})
    except (RuntimeError, AssertionError, AttributeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return found


def gpus(torch: ModuleType) -> dict[str, object]:
    """Of CUDA."""
    count = torch.cuda.device_count()
    capabilities = [torch.cuda.get_device_capability(index) for index in range(count)]
    return {
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
        "nccl": nccl_version(),
        "supports_fp16": all(major >= 7 for major, _ in capabilities),
        "supports_bf16": bool(torch.cuda.is_bf16_supported()),
    }


def nccl_version() -> str:
    """Of the library that torch has; "" where it was built without."""
    try:
        return ".".join(map(str, importlib.import_module("torch.cuda.nccl").version()))
    except AttributeError:
        return ""


def nvcc_release(home: str | None) -> str:
    """Of the CUDA toolkit; "" where there is none."""
    printed = output_of(str(Path(home) / "bin/nvcc"), "--version") if home else ""
    release = re.search(r"release (\d+\.\d+)", printed)
    return release.group(1) if release else ""


def prebuilt() -> list[str]:
    """DeepSpeed's kernels that were built when it was installed."""
    spec = importlib.util.find_spec("deepspeed")
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place) / "git_version_info_installed.py"
        if path.is_file():
            built = runpy.run_path(str(path)).get("installed_ops", {})
            return sorted(name for name, is_built in built.items() if is_built)
    return []


def is_reached(address: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
