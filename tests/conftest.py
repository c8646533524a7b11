"""What every test runs under: offline, one thread a process, the CPU where there is no GPU."""

import json
import lzma
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from host_runs import WHOLE, command_line
from launching import ROOT, pretrain, script
from two_hosts import Host, obstacle, two_hosts

SAMPLE = ROOT / "data_prep" / "sample"

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)
# A shell's background jobs ignore Ctrl-C, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests under tests/gpu skip themselves, and say so, where there is no GPU."""
    for item in items:
        if "gpu" in item.path.parent.parts[-1:]:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 training and 40 validation documents, vocabulary 400, S = 32, sentence pairs."""
    folder = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 300), ("valid", 40)):
        with lzma.open(SAMPLE / f"wiki_intros_{split}.cc-by-sa-4.0.jsonl.xz", "rt") as lines:
            texts = [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
    done = script(
        "prepare_data.py", "shards", folder / "train.jsonl", "--validation", folder / "valid.jsonl",
        "--out", folder / "shards", "--vocab-size", 400, "--max-seq-length", 32, "--pairs", "nsp",
        "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "shards"


@pytest.fixture(scope="session")
def one_host(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run of two ranks on one host, which nothing disturbed: for tests/multi_node."""
    folder = tmp_path_factory.mktemp("one_host")
    done = pretrain(2, *command_line(tiny_data, folder / "run", WHOLE))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def pair() -> Iterator[tuple[Host, Host]]:
    """node1 and node2, made once; where they cannot be, their tests skip and say why."""
    if reason := obstacle():
        pytest.skip(reason)
    with two_hosts() as found:
        yield found


@pytest.fixture
def hosts(pair: tuple[Host, Host]) -> Iterator[tuple[Host, Host]]:
    """The same, with nothing running and the cable plugged in, whatever the last test did."""
    yield pair
    for host in pair:
        host.plug_in()
        host.kill_all()
