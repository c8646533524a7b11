"""How fast one process turns shards into masked batches, beside the usual dataset of others.

    python benchmarks/loader.py [--sequences 200000] [--max-seq-length 128] [--shards 8 32]

The peer has the shape that most HDF5-fed trainers share (NVIDIA's pretraining_dataset in its HDF5
years, bing_bert, academic-budget-bert): a file is read whole, a sample is indexed and each of its
arrays becomes a tensor, labels are built from static masks, a DataLoader in this process collates.
Ours reads the unmasked dialect and draws the masks anew. Both make batches of the same size; rows
are synthetic, in a temporary folder. Ends with one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from data_prep.instances import row_type
from data_prep.masking import MaskingPolicy
from data_prep.shard_format import FORMAT_VERSION, Manifest, write_manifest
from data_prep.shard_writer import ShardLayout, shard_sizes, write_shard
from stacking.config import DataConfig
from stacking.dataset import PretrainingLoader
from stacking.shard_reader import open_shards

VOCAB_SIZE, BATCH = 30_522, 64
SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}


def main() -> None:
    """Make both folders of shards, time both readers in turn, watch the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=204_800, help="a multiple of 512")
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, nargs="+", default=[4, 16, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = random_rows(arguments.sequences, arguments.max_seq_length)
    num_tokens = int(np.count_nonzero(rows["input_ids"]))
    with tempfile.TemporaryDirectory() as folder:
        ours, peers = Path(folder, "ours"), Path(folder, "peer")
        write_shards(ours, rows, 8, static=False)
        write_shards(peers, rows, 8, static=True)
        speeds: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(arguments.rounds):
            for name, batches in (("ours", _our_batches(ours)), ("peer", _peer_batches(peers))):
                start = time.perf_counter()
                count = sum(1 for _ in batches)
                assert count == arguments.sequences // BATCH, count
                speeds[name].append(num_tokens / (time.perf_counter() - start))
        for name, values in speeds.items():
            print(f"{name:<6}{statistics.median(values) / 1e6:>8.2f} M real tokens/s")
        grown = _memory(Path(folder), rows, arguments.shards)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    result = {f"{name}_tokens_per_second": round(value) for name, value in medians.items()}
    ratio = medians["ours"] / medians["peer"]
    print(json.dumps({"benchmark": "loader", **result, "ratio": ratio, "memory_mib": grown}))


def _memory(folder: Path, rows: np.ndarray, counts: list[int]) -> dict[int, float]:
    """Read growing numbers of shards once each; return the private memory after it, in MiB."""
    process = psutil.Process()
    used = {}
    part = rows[: len(rows) // 4]
    for count in counts:
        data = folder / f"shards_{count}"
        write_shards(data, np.concatenate([part] * max(1, count // 8)), count, static=False)
        for _ in _our_batches(data):
            pass
        used[count] = round(process.memory_full_info().uss / 2**20, 1)
        print(f"{count:>4} shards: {used[count]:.0f} MiB private memory, {_handles()} open shards")
    return used


def _handles() -> int:
    return sum(".hdf5" in one.path for one in psutil.Process().open_files())


def _our_batches(folder: Path) -> Iterator[object]:
    shards = open_shards(folder, "training")
    loader = PretrainingLoader(
        shards,
        DataConfig(max_seq_length=shards.max_seq_length, max_predictions_per_seq=20),
        seed=1,
        global_batch_size=BATCH,
        model_vocab_size=VOCAB_SIZE,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
    )
    with loader:
        for _ in range(shards.num_rows // BATCH):
            yield next(loader)


class _PeerDataset(Dataset):
    """One file, read whole; the lifted shape described above, written anew."""

    def __init__(self, path: Path) -> None:
        names = (
            "input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids",
            "next_sentence_labels",
        )  # fmt: skip
        with h5py.File(path, "r") as file:
            self.arrays = [np.asarray(file[name][:]) for name in names]

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        ids, mask, segments, positions, masked, label = (
            torch.as_tensor(array[index].astype(np.int64)) for array in self.arrays
        )
        labels = torch.full_like(ids, -1)
        padding = (positions == 0).nonzero()
        end = int(padding[0]) if len(padding) else len(positions)
        labels[positions[:end]] = masked[:end]
        return [ids, segments, mask, labels, label]


def _peer_batches(folder: Path) -> Iterator[object]:
    for path in sorted(folder.glob("training*")):
        yield from DataLoader(_PeerDataset(path), batch_size=BATCH, shuffle=True)


def random_rows(
    count: int, length: int, vocab_size: int = VOCAB_SIZE, *, padded: bool = True
) -> np.ndarray:
    """Rows of random ids; `padded`: one in four has half of them."""
    generator = np.random.default_rng(1)
    rows = np.zeros(count, row_type(length, vocab_size, has_pairs=True))
    rows["input_ids"] = generator.integers(
        1 + max(SPECIAL.values()), vocab_size, (count, length), np.int32
    )
    rows["input_ids"][:, 0] = SPECIAL["cls"]
    if padded:
        rows["input_ids"][::4, length // 2 :] = 0
    rows["next_sentence_labels"] = generator.integers(0, 2, count)
    return rows


def write_shards(
    folder: Path,
    rows: np.ndarray,
    num_shards: int,
    static: bool = False,
    vocab_size: int = VOCAB_SIZE,
) -> None:
    """A data folder of `rows`; `static`: with NVIDIA's masks."""
    folder.mkdir()
    policy = MaskingPolicy(vocab_size=vocab_size, special_token_ids=SPECIAL)
    per_shard = len(rows) // num_shards // BATCH * BATCH
    layout = ShardLayout(rows_per_shard=per_shard, seed=1, pad_id=0, attributes={})
    if static:
        layout = replace(layout, masking=policy)
    entries, first = [], 0
    for index, size in enumerate(shard_sizes(per_shard * num_shards, per_shard)):
        path = folder / f"training_{index:05d}.hdf5"
        entries.append(write_shard(path, rows[first : first + size], first, layout))
        first += size
    write_manifest(
        folder,
        Manifest(
            format_version=FORMAT_VERSION,
            dialect="nvidia" if static else "unmasked",
            max_seq_length=rows.dtype["input_ids"].shape[0],
            max_predictions_per_seq=20 if static else 0,
            vocab_size=vocab_size,
            tokenizer_sha256="",
            special_token_ids=SPECIAL,
            has_next_sentence_labels=True,
            seed=1,
            num_documents={},
            training=tuple(entries),
        ),
    )


if __name__ == "__main__":
    main()
