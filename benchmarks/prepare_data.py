"""How fast raw text becomes shards, beside NVIDIA's create_pretraining_data.py in the same run.

    python benchmarks/prepare_data.py TEXT... --vocab vocab.txt --peer create_pretraining_data.py
    python benchmarks/prepare_data.py TEXT... --vocab vocab.txt --scaling 200
    python benchmarks/prepare_data.py TEXT... --vocab vocab.txt --memory 200 2000

TEXT is anything that `prepare_data.py shards` reads. The comparison is of whole processes, one
worker, static masks, sentence pairs, the same vocabulary, on the same file of one sentence a line
with a blank line between documents. The peer is not part of this repository; it needs its own
packages (boto3, requests, six, tqdm) in this environment. Each result ends with one JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import psutil

from data_prep.cleaning.clean import CleaningRules, clean_documents
from data_prep.cleaning.funnel import Funnel
from data_prep.sources.blocks import SourceOptions, find_files, parse_block, read_blocks
from data_prep.tokens.sentences import split_document

ROOT = Path(__file__).resolve().parents[1]
SIZES = ("--max-seq-length", "128", "--max-predictions-per-seq", "20", "--static-masks")
PEER_SIZES = ("--max_seq_length", "128", "--max_predictions_per_seq", "20", "--dupe_factor", "1")


def main() -> None:
    """Make the text, run what was asked for, print tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--vocab", type=Path, required=True, help="vocab.txt, for both")
    parser.add_argument("--peer", type=Path, help="path of create_pretraining_data.py")
    parser.add_argument("--megabytes", type=int, default=20, help="text of the comparison (20)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, alternating (3)")
    parser.add_argument("--scaling", type=int, metavar="MB", help="1 against 2 workers on this")
    parser.add_argument("--memory", type=int, nargs="+", default=[], metavar="MB", help="peak of")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if arguments.peer:
            _compare(arguments, work)
        if arguments.scaling:
            _scale(arguments, work)
        for megabytes in arguments.memory:
            _measure_memory(arguments, work, megabytes)


def _compare(arguments: argparse.Namespace, work: Path) -> None:
    text = work / "text.txt"
    size = _write_sentences(arguments.text, text, arguments.megabytes * 10**6)
    ours, peers, report = [], [], {}
    for _ in range(arguments.rounds):
        report, seconds = _run_ours(text, arguments.vocab, work / "ours", 1, ("--no-page",))
        ours.append(seconds)
        peers.append(_run_peer(arguments.peer, text, arguments.vocab, work / "peer.hdf5"))
    _print_schemas(work / "ours/training_00000.hdf5", work / "peer.hdf5")
    mine, theirs = statistics.median(ours), statistics.median(peers)
    print(f"{'':<10}{'seconds (median, min, max)':>34}{'MB/s':>8}")
    for name, values in (("ours", ours), ("peer", peers)):
        median = statistics.median(values)
        shown = f"{median:.2f}, {min(values):.2f}, {max(values):.2f}"
        print(f"{name:<10}{shown:>34}{size / 1e6 / median:>8.2f}")
    _print_parts(report)
    result = {"megabytes": size / 1e6, "ours_seconds": mine, "peer_seconds": theirs}
    print(json.dumps({"benchmark": "prepare_data", **result, "ratio": theirs / mine}))


def _scale(arguments: argparse.Namespace, work: Path) -> None:
    text = work / "scaling.txt"
    size = _write_changed(arguments.text, text, arguments.scaling * 10**6)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    machine: list[float] = []
    for _ in range(arguments.rounds):
        for workers in seconds:
            report, taken = _run_ours(text, arguments.vocab, work / "ours", workers, ("--no-page",))
            seconds[workers].append(taken)
            _print_parts(report)
        machine.append(_machine_scaling())
    medians = {workers: statistics.median(values) for workers, values in seconds.items()}
    ratio, limit = medians[1] / medians[2], statistics.median(machine)
    print(f"1 worker {medians[1]:.2f} s, 2 workers {medians[2]:.2f} s, {size / 1e6:.0f} MB")
    print(f"{ratio:.2f} times as fast; two processes that only sort here, now: {limit:.2f}")
    result = {"megabytes": size / 1e6, "seconds": medians, "ratio": ratio, "machine": limit}
    print(json.dumps({"benchmark": "prepare_data_scaling", **result}))


def _machine_scaling() -> float:
    """How much more two processes get done than one: what any program can hope for here."""
    code = (
        "import time, numpy as np; a = np.random.default_rng(0).integers(0, 1 << 60, 1 << 21);"
        "t = time.perf_counter(); [np.sort(a) for _ in range(20)]; print(time.perf_counter() - t)"
    )
    alone, *both = (
        statistics.fmean(
            float(process.communicate()[0])
            for process in [
                subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
                for _ in range(count)
            ]
        )
        for count in (1, 2)
    )
    return 2 * alone / both[0]


def _measure_memory(arguments: argparse.Namespace, work: Path, megabytes: int) -> None:
    text = work / "memory.txt"
    size = _write_changed(arguments.text, text, megabytes * 10**6)
    for workers in (1, 2):
        report, seconds = _run_ours(text, arguments.vocab, work / "ours", workers, ("--no-page",))
        result = {
            "megabytes": size / 1e6,
            "workers": workers,
            "peak_mebibytes": report["peak_bytes"] / 2**20,
            "megabytes_per_second": size / 1e6 / seconds,
        }
        print(json.dumps({"benchmark": "prepare_data_memory", **result}))
    text.unlink()


def _run_ours(
    text: Path, vocab: Path, out: Path, workers: int, more: tuple[str, ...]
) -> tuple[dict, float]:
    """Run the command; its JSON with `peak_bytes` of all its processes, and seconds."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, str(ROOT / "launch/prepare_data.py"), "shards", str(text), "--json",
        "--out", str(out), "--tokenizer", str(vocab), "--workers", str(workers), "--pairs", "nsp",
        "--sentences", "lines", *SIZES, *more,
    ]  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, env=_environment())
        peak = _watch(process)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"prepare_data.py ended with {process.returncode}")
        output.seek(0)
        return {**json.load(output), "peak_bytes": peak}, seconds


def _watch(process: subprocess.Popen) -> int:
    """Wait for a process; return the largest sum of what it and its children held, in bytes."""
    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [root, *root.children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in family))
        except psutil.NoSuchProcess:
            pass
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    return peak


def _run_peer(peer: Path, text: Path, vocab: Path, out: Path) -> float:
    out.unlink(missing_ok=True)
    command = [
        sys.executable, str(peer), "--vocab_file", str(vocab), "--input_file", str(text),
        "--output_file", str(out), *PEER_SIZES,
    ]  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the peer ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def _environment() -> dict[str, str]:
    """One thread everywhere: the comparison is of a core."""
    one = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **one, "PYTHONPATH": path}


def _write_sentences(inputs: list[Path], path: Path, num_bytes: int) -> int:
    """Write about `num_bytes` of documents, a sentence a line, a blank line behind each."""
    written = 0
    with path.open("wb") as stream:
        for text in _texts(inputs):
            written += stream.write(("\n".join(split_document(text)) + "\n\n").encode())
            if written >= num_bytes:
                return written
    return written


def _write_changed(inputs: list[Path], path: Path, num_bytes: int) -> int:
    """Write the text over and over until it fills `num_bytes`; no paragraph stands there twice."""
    written = round_number = 0
    with path.open("wb") as stream:
        while written < num_bytes:
            for text in _texts(inputs):
                lines = text.split("\n")
                if round_number:
                    lines = [f"{line} {round_number} times." for line in lines]
                written += stream.write(("\n".join(lines) + "\n\n").encode())
                if written >= num_bytes:
                    return written
            round_number += 1
    return written


def _texts(inputs: list[Path]) -> Iterator[str]:
    """Clean documents, long ones in parts of 60 paragraphs, as the peer holds all in memory."""
    options = SourceOptions()
    for block in read_blocks(find_files(inputs), options):
        for text in clean_documents(parse_block(block, options)[0], CleaningRules(), Funnel()):
            paragraphs = text.split("\n")
            for start in range(0, len(paragraphs), 60):
                yield "\n".join(paragraphs[start : start + 60])


def _print_schemas(ours: Path, peers: Path) -> None:
    """Show that both wrote the same datasets."""
    print(f"{'dataset':<24}{'ours':>24}{'peer':>24}")
    with h5py.File(ours) as mine, h5py.File(peers) as theirs:
        for name in sorted(set(mine) | set(theirs)):
            cells = [
                f"{file[name].dtype} {list(file[name].shape)} {file[name].compression}"
                if name in file
                else "-"
                for file in (mine, theirs)
            ]
            print(f"{name:<24}{cells[0]:>24}{cells[1]:>24}")


def _print_parts(report: dict) -> None:
    steps = ", ".join(f"{name} {value:.2f} s" for name, value in report["seconds"].items())
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in report["worker_seconds"].items())
    print(f"our steps: {steps}\nour parts: {parts}")


if __name__ == "__main__":
    main()
