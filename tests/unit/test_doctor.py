"""The doctor over a fake ssh: what hosts differ in is found, named, and has its fix."""

import json
import os
import runpy
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from deepspeed.launcher import runner

from data_prep.shard_format import Manifest, ShardEntry, file_sha256, write_manifest
from stacking.config_loading import load_recipe
from stacking.doctor import Examination, Request, examine
from stacking.doctor_findings import Finding
from stacking.doctor_hosts import Limits, Settings, Ssh, ask_hosts
from stacking.errors import ShardError
from stacking.run_data import RunData

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch/recipes/demo.json"
FAKE = Path(__file__).with_name("fake_ssh.py")
PATIENT = Limits(answer=120, first_host=100)
NOTHING = Settings(packages=(), data=None, run_dir=None, nonce=None, port=0, master_addr="")
ASKED: dict[str, dict[str, Any]] = {
    "first": {"machine": {"addresses": ["127.0.0.1", "127.0.0.2"]}},
    "old": {"packages": {"torch": "2.12.0", "mpi4py": ""}, "machine": {"python": "3.10.2"}},
    "stale": {"code": {"stacking/engine.py": "0" * 64}},
    "elsewhere": {"data": {"manifest": "f" * 64}, "machine": {"is_in_folder": False}},
    "unmounted": {"run_dir": {"sees_nonce": False}, "data": {"is_folder": False, "manifest": ""}},
    "twin": {"machine": {"boot": "first", "addresses": ["127.0.0.1", "127.0.0.2"]}},
    "walled": {"reached": ["127.0.0.2"]},
    "broken": {"devices": {"error": "ImportError: libcudart.so.13"}},
}
OTHERS = {
    "locked": {"exit": 255, "says": "u@locked: Permission denied (publickey)."},
    "bare": {"exit": 127, "says": "sh: 1: exec: /env/bin/python: not found"},
    "muted": {"exit": 0, "says": ""},
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def make_data(folder: Path) -> None:
    """One shard a split, such as the demo recipe wants."""
    shards = {}
    for split in ("training", "validation"):
        path = folder / f"{split}_00000.hdf5"
        with h5py.File(path, "w") as file:
            file["input_ids"] = np.full((2, 128), 9, "u2")
            file["segment_ids"] = np.zeros((2, 128), "i1")
        shards[split] = (ShardEntry(path.name, 2, file_sha256(path)),)
    manifest = Manifest(
        format_version=1, dialect="unmasked", max_seq_length=128, max_predictions_per_seq=0,
        vocab_size=8192, tokenizer_sha256="", has_next_sentence_labels=False, seed=1,
        special_token_ids={"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, num_documents={},
        training=shards["training"], validation=shards["validation"],
    )  # fmt: skip
    write_manifest(folder, manifest)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with hosts that a fake ssh reaches, data and a home of its own."""
    folder = tmp_path_factory.mktemp("doctor")
    for name in ("bin", "home", "plans", "data", "work"):
        (folder / name).mkdir()
    make_data(folder / "data")
    for host, changes in ASKED.items():
        machine = {"boot": host, "own_address": "10.0.0.1", **changes.get("machine", {})}
        plan = {"answers": {**changes, "machine": machine}}
        (folder / f"plans/{host}.json").write_text(json.dumps(plan))
    for host, way in {**OTHERS, "hangs": {"hangs": True}, "hangs2": {"hangs": True}}.items():
        (folder / f"plans/{host}.json").write_text(json.dumps(way))
    for name, line in (("ssh", f'exec {sys.executable} {FAKE} "$@"'), ("pdsh", "exit 1")):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("FAKE_SSH", str(folder / "plans"))
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("WANDB_API_KEY", "a-secret")
        for name in ("PDSH_SSH_ARGS_APPEND", "DS_ENV_FILE", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.chdir(folder / "work")
        yield folder


@pytest.fixture(scope="module")
def seen(world: Path) -> Examination:
    """One examination of hosts that each have something else, and of a `.deepspeed_env`."""
    hosts = [*ASKED, *OTHERS, "unknown"]
    hostfile = world / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in hosts) + "nonsense\n")
    (world / "home/.deepspeed_env").write_text("A=1\n\n# note\n# B=2\nC D=3\nexport E=4\n")
    try:
        return examine(
            Request(hostfile, RECIPE, ("checkpoint.keep_last=3",), data=world / "data",
                    run_dir=world / "run", master_port=free_port()),
            PATIENT,
        )  # fmt: skip
    finally:
        (world / "home/.deepspeed_env").unlink()


def about(seen: Examination, check: str, where: str = "") -> Finding:
    (found,) = [f for f in seen.findings if f.check == check and f.where == where]
    return found


@pytest.mark.parametrize(
    ("check", "host", "word", "fix"),
    [
        ("packages", "old", "Python 3.10.2 (here ", "same versions"),
        ("packages", "old", "torch 2.12.0 (here ", "constraints.txt"),
        ("packages", "old", "mpi4py missing (here ", "every host"),
        ("code", "stale", "files differ or are missing: stacking/engine.py", "git pull"),
        ("data", "elsewhere", "another manifest.json than on first", "rsync"),
        ("folder", "elsewhere", "work is not there", "same path"),
        ("data", "unmounted", "no such folder", "share"),
        ("run-dir", "unmounted", "a file that this machine wrote", "mount"),
        ("hostfile", "twin", "is the same machine as first", "one line"),
        ("master-port", "walled", "127.0.0.1:", "--master_addr 127.0.0.2"),
        ("devices", "broken", "libcudart", "LD_LIBRARY_PATH"),
        ("ssh", "locked", "Permission denied", "ssh-copy-id locked"),
        ("answer", "bare", "cannot be run there", "same path"),
        ("answer", "muted", "printed nothing", "start files"),
        ("names", "unknown", "the name is not known", "/etc/hosts"),
        ("batch", "", "cannot be shared equally by a world of 12 ranks", "8 or 16 or 32 ranks"),
        ("variables", "", "WANDB_API_KEY", ".deepspeed_env"),
        ("hostfile", "", "line 13: 'nonsense' is no entry", "HOST slots=N"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_host_and_fix(
    seen: Examination, check: str, host: str, word: str, fix: str
) -> None:
    found = about(seen, check, host)
    assert found.status == ("warn" if check == "variables" else "fail")
    assert word in found.found
    if check != "batch":
        assert fix in found.fix


def test_each_fault_has_a_fix_and_no_host_is_blamed_for_anothers(seen: Examination) -> None:
    assert all(finding.fix for finding in seen.findings if finding.status != "ok")
    blamed = {finding.where for finding in seen.findings if finding.status == "fail"}
    assert blamed == {*ASKED, *OTHERS, "unknown", ""} - {"first"}
    assert about(seen, "disk", "first").status == "ok"


def test_every_line_of_deepspeed_env_at_which_a_launch_goes_wrong_is_told(
    seen: Examination,
) -> None:
    lines = [f.found.split("line ")[1] for f in seen.findings if f.check == "env-file"]
    assert [line.split(":")[0] for line in lines] == ["2", "3", "4", "5", "6"]
    assert "crashes" in lines[0]
    assert "crashes" in lines[1]
    assert "leaves out the whole job" in lines[2]


def test_secrets_are_not_shown(seen: Examination) -> None:
    assert "a-secret" not in repr(seen)


def test_nothing_is_left_in_the_run_folder_or_above(seen: Examination, world: Path) -> None:
    assert seen.seconds > 0
    assert not list(world.glob(".doctor*"))
    assert not (world / "run").exists()


def test_hosts_that_hang_are_left_after_the_limit_all_at_once(world: Path) -> None:
    began = time.monotonic()
    limits = Limits(answer=0.5, first_host=0.5, closing=0.2)
    hosts = ["hangs", "hangs2"]
    ssh = Ssh("", None)
    answers = ask_hosts(hosts, NOTHING, ssh, limits)
    assert time.monotonic() - began < 20
    assert {host: (a.trouble, a.code) for host, a in answers.items()} == dict.fromkeys(
        hosts, ("ssh", None)
    )


def doctor(
    *words: object, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """launch/doctor.py: exit code and what it prints."""
    patch.setattr(sys, "argv", ["doctor.py", *map(str, words)])
    code = runpy.run_path(str(ROOT / "launch/doctor.py"))["main"]()
    return code, capsys.readouterr().out


def test_two_hosts_that_agree_give_exit_code_0_and_one_line_of_json(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "plans/second.json").write_text(
        json.dumps({"answers": {"machine": {"boot": "second", "own_address": "10.0.0.2"}}})
    )
    (world / "hostfile2").write_text("first slots=1\nsecond slots=1\n")
    code, printed = doctor(
        "--hostfile", world / "hostfile2", "--recipe", RECIPE, "--data", world / "data",
        "--run-dir", world / "run", "--master-port", free_port(), "--json",
        capsys=capsys, patch=monkeypatch,
    )  # fmt: skip
    (line,) = printed.splitlines()
    values = json.loads(line)
    assert [f for f in values["findings"] if f["status"] == "fail"] == []
    assert code == 0
    assert (values["ok"], values["fails"], values["world_size"]) == (True, 0, 2)
    assert values["hosts"] == ["first", "second"]
    assert set(values["findings"][0]) == {"check", "status", "found", "fix", "where"}
    checked = {finding["check"] for finding in values["findings"]}
    assert checked >= {"hostfile", "ssh", "code", "packages", "data", "run-dir", "master-port",
                       "devices", "launcher", "env-file", "variables", "deepspeed_config",
                       "recipe", "batch", "precision", "disk"}  # fmt: skip
    reach = next(f for f in values["findings"] if f["check"] == "master-port")
    assert "1 of 1 other hosts reach it" in reach["found"]


def test_a_table_with_a_fault_gives_exit_code_2_and_needs_no_host(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, printed = doctor(
        "--hostfile", world / "none", "--recipe", RECIPE, "--set", "stages.0.steps=-1",
        capsys=capsys, patch=monkeypatch,
    )  # fmt: skip
    assert code == 2
    for word in ("no such file", "stages.0.steps: got -1", "fix:", "not checked: data: give --data",
                 "to mend before"):  # fmt: skip
        assert word in " ".join(printed.split())


@pytest.mark.slow
def test_without_a_hostfile_this_machine_is_examined_alone(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("", 0)) as busy:
        code, printed = doctor(
            "--json", "--num-gpus", 2, "--master-port", busy.getsockname()[1],
            capsys=capsys, patch=monkeypatch,
        )  # fmt: skip
    values = json.loads(printed)
    fails = [finding for finding in values["findings"] if finding["status"] == "fail"]
    assert [finding["check"] for finding in fails] == ["master-port"]
    assert (code, values["hosts"], values["world_size"]) == (2, [], 2)
    assert "other hosts" in values["left_out"][0]


def test_data_that_do_not_fit_the_recipe_are_told_in_a_runs_words(world: Path) -> None:
    words = ["model.vocab_size=5000", "data.max_seq_length=64"]
    recipe = load_recipe(RECIPE, words)
    with pytest.raises(ShardError) as refused:
        RunData(recipe, world / "data")
    request = Request(None, RECIPE, tuple(words), data=world / "data", master_port=free_port())
    seen = examine(request, PATIENT)
    (found,) = [finding for finding in seen.findings if finding.status == "fail"]
    assert (found.check, found.found) == ("data", str(refused.value))
    assert "model.vocab_size is 5000" in found.found
    assert "64" in found.found


def test_what_is_not_here_is_not_compared_with_the_recipe(world: Path) -> None:
    request = Request(None, RECIPE, data=world / "nowhere", master_port=free_port())
    assert any("fit the recipe" in line for line in examine(request, PATIENT).left_out)


@pytest.mark.parametrize("spelling", ["-", "_"])
def test_the_launchers_own_spellings_are_taken(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-H", "f", "--num_gpus", "2", "--ssh_port", "22", "--master_addr", "a",
             "--master_port", "65535"]  # fmt: skip
    runner.parse_args([*words, "train.py"])
    spelt = [word.replace("_", spelling) for word in words]
    monkeypatch.setattr(sys, "argv", ["doctor.py", *spelt])
    given = runpy.run_path(str(ROOT / "launch/doctor.py"))["parse_arguments"]()
    assert (given.hostfile, given.num_gpus, given.ssh_port) == (Path("f"), 2, 22)
    assert (given.master_addr, given.master_port) == ("a", 65535)


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "9" * 5000])
def test_a_port_out_of_range_says_what_is_allowed(
    port: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="2"):
        doctor(f"--master_port={port}", capsys=capsys, patch=monkeypatch)
    assert f"{port!r} is not a number from 1 to 65535" in capsys.readouterr().err
