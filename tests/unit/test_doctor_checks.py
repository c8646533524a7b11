"""Devices, compilers, network and disk, from answers made up: each fault has its place and fix."""

import contextlib
import errno
import importlib
import importlib.metadata
import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stacking import doctor_probe
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.config import Freeze
from stacking.config_loading import load_recipe
from stacking.cost import checkpoint_bytes
from stacking.deepspeed_schema import EngineSettings
from stacking.doctor_devices import (
    accelerator_of,
    compiler_findings,
    device_findings,
    device_kind,
)
from stacking.doctor_findings import Finding
from stacking.doctor_hosts import Answer, Devices, Facts, Machine, RunDir
from stacking.doctor_network import interface_findings, loopback_findings, port_findings
from stacking.doctor_recipe import batch_findings, read_plan
from stacking.doctor_storage import disk_findings, nonce_in, planned_bytes, shared_findings
from stacking.modeling import BertForPreTraining
from stacking.snapshot import Snapshot

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch/recipes"
GPU = Devices(
    torch_cuda="13.0", gpus=["H100", "H100"], nccl="2.28.9", supports_fp16=True, supports_bf16=True,
    smi=[["H100", "580.1", "4", "81559"]] * 2, cuda_home="/cuda", nvcc="13.1", has_ninja=True,
    has_compiler=True,
)  # fmt: skip
FUSED = EngineSettings.model_validate({})


def hosts(**changes: dict[str, object]) -> dict[str, Facts]:
    """Two like hosts, and one for each change."""
    told = {"a": GPU, "b": GPU}
    told |= {name: GPU.model_copy(update=change) for name, change in changes.items()}
    return {name: Facts(devices=devices) for name, devices in told.items()}


def test_the_probe_asks_torch_and_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = {
        "is_available": lambda: True, "device_count": lambda: 2, "get_device_name": "GPU{}".format,
        "get_device_capability": lambda index: (6, 1) if index else (9, 0),
        "is_bf16_supported": lambda: True,
    }  # fmt: skip
    stub = SimpleNamespace(cuda=SimpleNamespace(**cuda), version=SimpleNamespace(cuda="13.0"))
    cpp = SimpleNamespace(CUDA_HOME=str(tmp_path), get_cxx_compiler=lambda: "no-such-compiler")
    nccl = SimpleNamespace(version=lambda: (2, 28, 9))
    stubs = {"torch": stub, "torch.utils.cpp_extension": cpp, "torch.cuda.nccl": nccl}
    monkeypatch.setattr(importlib, "import_module", stubs.__getitem__)
    tools = {"nvcc": "echo Cuda tools, release 13.1, V13.1.80", "ninja": "exit 1",
             "nvidia-smi": "echo H100, 580.1, 4, 81559"}  # fmt: skip
    (tmp_path / "bin").mkdir()
    for name, line in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    found = Devices.model_validate(doctor_probe.devices())
    assert (found.gpus, found.nccl, found.nvcc) == (["GPU0", "GPU1"], "2.28.9", "13.1")
    assert (found.supports_fp16, found.supports_bf16) == (False, True)
    assert (found.has_ninja, found.has_compiler) == (False, False)
    assert found.smi == [["H100", "580.1", "4", "81559"]]


def faults(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.status, finding.where) for finding in found if finding.status != "ok"]


def test_like_hosts_are_one_line() -> None:
    (found,) = device_findings(hosts(), {"a": 2, "b": 2}, "cuda")
    assert found.found == "4 x H100; driver 580.1, NCCL 2.28.9"


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"gpus": []}, "fail", "torch sees no GPU, other hosts have some: nvidia-smi shows 2"),
        ({"gpus": ["H100"]}, "fail", "2 ranks are asked for, torch sees 1 GPU"),
        ({"nccl": "2.20.5"}, "fail", "NCCL 2.20.5, most hosts have 2.28.9"),
        ({"smi": [["H100", "550.9", "4", "81559"]]}, "warn", "driver 550.9"),
        ({"gpus": ["A100", "A100"]}, "warn", "GPUs A100"),
        ({"smi": [["H100", "580.1", "60000", "81559"]]}, "warn", "GPU 0 (60,000 of 81559 MiB)"),
        ({"error": "OSError: libnccl.so.2"}, "fail", "libnccl"),
    ],
)  # fmt: skip
def test_a_host_with_other_devices_is_named(
    change: dict[str, object], status: str, word: str
) -> None:
    slots = dict.fromkeys("abc", 2)
    found = device_findings(hosts(c=change), slots, "cuda")
    assert (status, "c") in faults(found)
    assert any(word in finding.found for finding in found if finding.where == "c")
    assert all(finding.fix for finding in found if finding.status != "ok")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"has_ninja": False}, "no ninja"),
        ({"has_compiler": False}, "no C++ compiler"),
        ({"nvcc": "12.4"}, "refuses nvcc 12.4 with a torch for CUDA 13.0"),
        ({"cuda_home": "", "nvcc": ""}, "no nvcc for fused_adam, which other hosts have"),
    ],
)
def test_a_host_that_cannot_build_the_kernel_is_named(change: dict[str, object], word: str) -> None:
    (found,) = compiler_findings(hosts(c=change), FUSED, "cuda")
    assert (found.status, found.where) == ("fail", "c")
    assert word in found.found


def test_a_kernel_is_not_needed_built_in_or_replaced() -> None:
    bare: dict[str, object] = {"cuda_home": "", "nvcc": ""}
    torchs = EngineSettings.model_validate({"optimizer": {"params": {"torch_adam": True}}})
    assert compiler_findings(hosts(c=bare), torchs, "cuda") == []
    assert compiler_findings(hosts(c=bare), FUSED, "cpu") == []
    built = {**bare, "prebuilt": ["fused_adam"]}
    (found,) = compiler_findings(hosts(c=built), FUSED, "cuda")
    assert found.status == "ok"
    (found,) = compiler_findings(hosts(a=bare, b=bare), FUSED, "cuda")
    assert found.status == "warn"


def test_the_accelerator_is_what_all_hosts_can() -> None:
    weak = hosts(c={"supports_bf16": False, "cuda_home": ""})
    found = accelerator_of(weak, device_kind(weak, {}))
    assert found is not None
    assert (found.kind, found.supports_fp16, found.supports_bf16) == ("cuda", True, False)
    assert not found.fused_adam
    assert device_kind(weak, {"DS_ACCELERATOR": "cpu"}) == "cpu"
    assert accelerator_of({"a": Facts()}, "cpu") is None


def machine(**changes: object) -> Facts:
    known: dict[str, object] = {
        "hostname": "n", "addresses": ["10.0.0.1", "10.0.1.1"], "own_address": "127.0.1.1",
        "boot": "", "is_in_folder": True, "python": "3.11.7", "interfaces": ["eth0"], "cores": 8,
        "port_fault": "", "variables": {},
    }  # fmt: skip
    return Facts(machine=Machine.model_validate(known | changes))


@pytest.mark.parametrize(
    ("first", "reached", "status", "word"),
    [
        ({}, ["10.0.0.1"], "ok", "1 of 1 other hosts reach it"),
        ({}, ["10.0.1.1"], "fail", "--master_addr 10.0.1.1"),
        ({}, [], "fail", "firewall"),
        ({"port_fault": "Address already in use"}, [], "fail", "another --master_port"),
        ({"addresses": []}, [], "fail", "--master_addr"),
    ],
)  # fmt: skip
def test_the_master_port_is_free_and_reached(
    first: dict[str, object], reached: list[str], status: str, word: str
) -> None:
    other = machine().model_copy(update={"reached": reached})
    (found,) = port_findings({"a": Answer(machine(**first)), "b": Answer(other)}, 29500, "")
    assert found.status == status
    assert word in found.found + found.fix


def test_a_loopback_name_stops_gloo_unless_an_interface_is_named() -> None:
    told = {"a": machine(), "b": machine()}
    (found,) = loopback_findings(told, "cpu")
    assert (found.status, "GLOO_SOCKET_IFNAME=<interface> (eth0)" in found.fix) == ("fail", True)
    assert "/etc/hosts" in found.fix
    (found,) = loopback_findings(told, "cuda")
    assert found.status == "warn"
    (found,) = loopback_findings({**told, "b": machine(interfaces=["lo", "eno1"])}, "cpu")
    assert "GLOO" not in found.fix
    named = machine(variables={"GLOO_SOCKET_IFNAME": "eth0"})
    assert loopback_findings({"a": named, "b": named}, "cpu") == []
    (found,) = loopback_findings({"a": named, "b": machine()}, "cpu")
    assert "address on b:" in found.found
    assert loopback_findings({"a": machine()}, "cpu") == []


@pytest.mark.parametrize(
    ("name", "value", "kind", "statuses"),
    [
        ("GLOO", "eth7", "cpu", ["fail", "fail"]),
        ("GLOO", "eno1", "cpu", ["fail"]),
        ("GLOO", "lo,eth0", "cpu", ["fail", "fail"]),
        ("GLOO", "eth", "cuda", ["warn", "warn"]),
        ("GLOO", "ib0", "cpu", []),
        ("GLOO", "", "cpu", []),
        ("NCCL", "eth7", "cpu", []),
        ("NCCL", "eth", "cuda", ["fail"]),
        ("NCCL", "eth,eno", "cuda", []),
        ("NCCL", "lo", "cuda", ["fail", "fail"]),
        ("NCCL", "=eth", "cuda", ["fail", "fail"]),
        ("NCCL", "=eth0", "cuda", ["fail"]),
        ("NCCL", "^lo,eth,ib", "cuda", ["fail"]),
        ("NCCL", "^=eth", "cuda", []),
        ("NCCL", "", "cuda", []),
    ],
)  # fmt: skip
def test_a_host_without_the_named_interface_is_told_and_one_that_all_have(
    name: str, value: str, kind: str, statuses: list[str]
) -> None:
    variables = {f"{name}_SOCKET_IFNAME": value}
    told = {
        host: machine(interfaces=["lo", own, "ib0"], variables=variables)
        for host, own in (("a", "eth0"), ("b", "eno1"))
    }
    found = interface_findings(told, kind)
    assert [finding.status for finding in found] == statuses
    for finding in found:
        assert finding.fix == "name one that all hosts have: ib0"


@pytest.mark.parametrize(("name", "way"), [("GLOO", "/etc/hosts"), ("NCCL", "may name several")])
def test_hosts_without_a_common_interface_are_told_another_way(name: str, way: str) -> None:
    variables = {f"{name}_SOCKET_IFNAME": "eth0"}
    told = {"a": machine(variables=variables),
            "b": machine(interfaces=["lo", "eno1"], variables=variables)}  # fmt: skip
    (found,) = interface_findings(told, "cpu" if name == "GLOO" else "cuda")
    assert found.where == "b"
    assert "this host has eno1" in found.fix
    assert way in found.fix


def test_one_host_may_use_its_loopback_interface() -> None:
    told = {"a": machine(interfaces=["lo"], variables={"GLOO_SOCKET_IFNAME": "lo"})}
    assert interface_findings(told, "cpu") == []


def test_the_probe_tells_all_interfaces_and_what_names_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    with contextlib.ExitStack() as until_the_end:
        told = Machine.model_validate(doctor_probe.machine(".", 0, until_the_end))
    assert told.interfaces == [name for _, name in socket.if_nameindex()]
    assert told.variables == {"GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": ""}


def test_the_probe_tells_of_a_package_that_shadows_the_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor_probe.version_of("torch") == importlib.metadata.version("torch")
    assert doctor_probe.version_of("no_such_package") == ""
    for name in ("rich", "made_up"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("rich", "made_up"):
        assert doctor_probe.version_of(name) == f"from {tmp_path}"


@pytest.mark.parametrize(("share", "status"), [(0.99, "fail"), (1.05, "warn"), (1.2, "ok")])
def test_the_disk_must_hold_the_planned_checkpoints(share: float, status: str) -> None:
    recipe = load_recipe(RECIPES / "demo.json")
    needed = planned_bytes(recipe)
    seen = RunDir(sees_nonce=True, is_writable=True, free_bytes=int(share * needed), held_bytes=0)
    (found,) = disk_findings(Path("run"), recipe, "a", seen)
    assert found.status == status
    half = seen.model_copy(update={"free_bytes": int(0.6 * needed), "held_bytes": needed // 2})
    (found,) = disk_findings(Path("run"), recipe, "a", half)
    assert found.status == "ok"


def test_planned_checkpoints_are_those_that_stay_and_one_under_way() -> None:
    stages = json.dumps([{"steps": 150, "num_hidden_layers": n} for n in (2, 4)])
    words = [f"stages={stages}", "model.num_hidden_layers=4", "checkpoint.every_steps=50"]
    recipe = load_recipe(RECIPES / "demo.json", words)
    small, large = (checkpoint_bytes(recipe.stage_model(index)) for index in (0, 1))
    # stage 1's end; stage 2's beginning and end; two periodic ones; the one being written
    assert planned_bytes(recipe) == small + 2 * large + 2 * large + large


def test_a_checkpoint_has_the_bytes_that_are_counted(tmp_path: Path) -> None:
    config = load_recipe(RECIPES / "demo.json").stage_model(0)
    weights = {name: p.detach() for name, p in BertForPreTraining(config).named_parameters()}
    moments = {key: {name: torch.zeros_like(p) for name, p in weights.items()}
               for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    snapshot = Snapshot(weights, moments, dict.fromkeys(weights, 1))
    state = TrainState(global_step=1, stage=0, num_hidden_layers=config.num_hidden_layers,
                       loader={}, recipe_sha256="")  # fmt: skip
    CheckpointManager(tmp_path).save("step_00000001", snapshot, state)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    counted = checkpoint_bytes(config)
    assert counted <= written < 1.01 * counted
    assert checkpoint_bytes(config, Freeze(layers=1)) < counted


def test_the_nonce_lies_in_the_nearest_folder_and_goes_away(tmp_path: Path) -> None:
    with nonce_in(tmp_path / "runs/first") as (nonce, complaint):
        assert nonce is not None
        assert (nonce.parent, complaint) == (tmp_path, "")
        assert nonce.read_text() == nonce.name
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with nonce_in(tmp_path / "file") as (nonce, complaint):
        assert nonce is None
    (found,) = shared_findings(tmp_path / "file", None, complaint, {})
    assert "Not a directory" in found.found


def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(path: Path, text: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_up)
    with nonce_in(tmp_path) as (nonce, complaint):
        assert nonce is None
        assert "No space left" in complaint
    assert list(tmp_path.iterdir()) == []


def test_every_fault_of_the_json_and_the_recipe_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"amp": {}, "gradient_cliping": 1, "fp16": {"enable": true}}')
    words = ["stages.0.steps=0", "seed=x"]
    plan = read_plan(RECIPES / "demo.json", words, tmp_path / "c.json")
    assert [finding.check for finding in plan.findings].count("deepspeed_config") == 3
    assert [finding.check for finding in plan.findings].count("recipe") == 2
    assert all(finding.status == "fail" and finding.fix for finding in plan.findings)


def test_the_batch_and_the_precision_are_those_of_the_ranks_and_the_device() -> None:
    plan = read_plan(RECIPES / "demo.json", [], None)
    cpu = accelerator_of({"a": Facts(devices=Devices(supports_bf16=True))}, "cpu")
    assert cpu is not None
    found = batch_findings(plan, 4, cpu, None)
    assert [finding.status for finding in found] == ["ok", "warn"]
    assert "4 ranks = 32" in found[0].found
    assert "fp16 asked, which is for GPUs: running bf16" in found[1].found
    (fault,) = batch_findings(plan, 7, cpu, None)
    assert "world of 7 ranks" in fault.found
    assert fault.fix.startswith("allowed: ")
