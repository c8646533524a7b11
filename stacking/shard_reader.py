"""The shards of one data folder, checked and opened; rows by global number out. `dataset` makes
batches of them.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from data_prep.masking import IntArray
from data_prep.shard_format import (
    HDF5_ERRORS,
    IN_PROGRESS,
    SPECIAL_NAMES,
    VOCABULARY,
    Manifest,
    ShardInfo,
    Split,
    file_sha256,
    find_shards,
    inspect_shard,
    load_vocabulary,
    read_manifest,
)
from stacking.config import BertConfig, DataConfig
from stacking.errors import ShardError
from stacking.sample_order import BLOCK_ROWS, GROUP_BLOCKS
from stacking.truncation import SHORTEST_PAIR


@dataclass(frozen=True, eq=False)
class ShardSet:
    """The shards of one split in name order; a row's global number counts over all of them."""

    data_dir: Path
    split: Split
    shards: tuple[ShardInfo, ...]
    manifest: Manifest | None
    _verified: set[Path] = field(default_factory=set)

    @property
    def num_rows(self) -> int:
        """Rows N over all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def max_seq_length(self) -> int:
        """Tokens S in a row."""
        return self.shards[0].max_seq_length

    @property
    def max_predictions_per_seq(self) -> int:
        """Masked positions P of the static masks; 0: the rows are unmasked."""
        return self.shards[0].max_predictions_per_seq

    def verify(self, shard: ShardInfo) -> None:
        """Compare a shard with the manifest's sha256, once; ShardError if it was changed.

        About 0.7 s a GiB, which the reader thread spends when it first reads of the shard: nobody
        would see a flipped bit in a token id later.
        """
        if self.manifest is None or shard.path in self._verified:
            return
        entries = self.manifest.entries(self.split)
        expected = next(entry.sha256 for entry in entries if entry.file == shard.path.name)
        try:
            is_same = file_sha256(shard.path) == expected
        except OSError as error:
            raise ShardError(f"{shard.path}: cannot be read: {error}") from error
        if not is_same:
            raise ShardError(
                f"{shard.path}: its sha256 is not the manifest's; the file was changed after it "
                "was made; copy it again, or prepare the data again"
            )
        self._verified.add(shard.path)

    def holding(self, first: IntArray, last: IntArray) -> list[str]:
        """Return the file names of shards with any of the rows first[i] ... last[i]."""
        ends = np.cumsum([shard.num_rows for shard in self.shards])
        steps = np.zeros(len(ends) + 1, np.int64)
        np.add.at(steps, np.searchsorted(ends, first, side="right"), 1)
        np.add.at(steps, np.searchsorted(ends, last, side="right") + 1, -1)
        touched = np.cumsum(steps)[:-1] > 0
        return [shard.path.name for shard, held in zip(self.shards, touched, strict=True) if held]

    @property
    def fingerprint(self) -> int:
        """Short hash of file names, rows and, with a manifest, contents: whether a resume sees the
        same data.
        """
        digest = hashlib.sha256()
        sums = (
            {entry.file: entry.sha256 for entry in self.manifest.entries(self.split)}
            if self.manifest
            else {}
        )
        for shard in self.shards:
            digest.update(
                f"{shard.path.name} {shard.num_rows} {sums.get(shard.path.name, '')}\n".encode()
            )
        return int(digest.hexdigest()[:13], 16)  # 52 bits: exact in JSON


def open_shards(data_dir: Path, split: Split) -> ShardSet:
    """Open the shards of one split; without a manifest, all files whose name tells the split, as
    they are.
    """
    if not data_dir.is_dir():
        raise ShardError(
            f"{data_dir}: no such folder; make it with launch/prepare_data.py shards ... --out "
            f"{data_dir}"
        )
    manifest = read_manifest(data_dir)
    if manifest is None and (data_dir / IN_PROGRESS).exists():
        raise ShardError(
            f"{data_dir}: its preparation was not finished; run the same prepare_data.py "
            "command again"
        )
    if manifest is None:
        paths = find_shards(data_dir, split)
    else:
        paths = [data_dir / entry.file for entry in manifest.entries(split)]
    if not paths:
        raise ShardError(
            f"{data_dir}: holds no {split} shards; files are told by train, part_, valid or "
            "test in their name"
        )
    shards = ShardSet(data_dir, split, tuple(inspect_shard(path) for path in paths), manifest)
    _check_alike(shards)
    if manifest is not None and (data_dir / VOCABULARY).exists():
        _check_vocabulary(data_dir, manifest)
    return shards


def check_compatible(
    shards: ShardSet, config: BertConfig, data: DataConfig, *, may_cut: bool = False
) -> None:
    """Raise one ShardError that lists all in which shards, model and data settings disagree.

    `may_cut`: whether sequences may be shorter than the shards', which is for a stage's model and
    data. The recipe's own must be as long: a default would drop most of the text unasked.
    """
    faults = layout_faults(shards, data, may_cut=may_cut)
    manifest = shards.manifest
    if manifest is not None and manifest.vocab_size > config.vocab_size:
        faults.append(
            f"the shards' vocabulary has {manifest.vocab_size} pieces, model.vocab_size is "
            f"{config.vocab_size}; "
            f"raise it to {manifest.vocab_size} or more"
        )
    if manifest is not None and manifest.special_token_ids["pad"] != config.pad_token_id:
        faults.append(
            f"[PAD] is {manifest.special_token_ids['pad']} in the shards, model.pad_token_id "
            f"is {config.pad_token_id}"
        )
    if manifest is not None:
        faults += [
            f"the manifest's [{name.upper()}] is {number}, outside its vocabulary of "
            f"{manifest.vocab_size} pieces"
            for name, number in manifest.special_token_ids.items()
            if not 0 <= number < manifest.vocab_size
        ]
    if config.num_nsp_labels > 0 and not _has_labels(shards):
        faults.append(
            f"model.num_nsp_labels is {config.num_nsp_labels}, but the shards hold no sentence "
            "pairs; "
            "prepare them with --pairs nsp, or set model.num_nsp_labels to 0"
        )
    needs_segments = config.num_nsp_labels > 0 or config.type_vocab_size == 1
    if _has_labels(shards) and needs_segments and config.type_vocab_size < 2:
        faults.append(
            "sentence pairs have segments 0 and 1, model.type_vocab_size is "
            f"{config.type_vocab_size}; set it to 2"
        )
    if data.max_seq_length > config.max_position_embeddings:
        faults.append(
            f"data.max_seq_length {data.max_seq_length} exceeds model.max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    if faults:
        raise ShardError(
            "\n".join(
                [
                    f"{shards.data_dir} ({shards.split}) does not fit the recipe:",
                    *(f"  - {f}" for f in faults),
                ]
            )
        )


class RowReader:
    """Reads rows by global number as int64; contiguous datasets are mapped, others read block-wise
    into a bounded cache.

    No HDF5 handle outlives a call, so none is ever shared with a forked process.
    """

    # The blocks of two groups of the sample order: no block is read twice while its group lasts.
    _BLOCKS_KEPT = 2 * GROUP_BLOCKS

    def __init__(self, shards: ShardSet) -> None:
        """Plan the reading; no file is opened before its first row is asked for."""
        self._set, self._shards = shards, shards.shards
        self._starts = np.cumsum([0, *(shard.num_rows for shard in shards.shards)])
        self._names = sorted(set.intersection(*(set(shard.dtypes) for shard in shards.shards)))
        if shards.manifest is not None and not shards.manifest.has_next_sentence_labels:
            # NVIDIA's dialect has the labels always: zeros that mean nothing where no pairs were
            # made.
            self._names = [name for name in self._names if name != "next_sentence_labels"]
        self._is_mapped = all(
            shard.offsets[name] is not None for shard in shards.shards for name in self._names
        )
        self._maps: dict[tuple[int, str], npt.NDArray[np.generic]] = {}
        self._blocks: OrderedDict[int, dict[str, npt.NDArray[np.generic]]] = OrderedDict()

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file and the row in it of a global row."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._shards[shard].path, row - int(self._starts[shard])

    def read(self, rows: IntArray) -> dict[str, IntArray]:
        """Return each dataset's rows [n, ...] in the order asked."""
        owners = (
            np.searchsorted(self._starts, rows, side="right") - 1
            if self._is_mapped
            else rows // BLOCK_ROWS
        )
        widths = {
            name: () if name == "next_sentence_labels" else (self._width(name),)
            for name in self._names
        }
        result = {name: np.empty((rows.size, *widths[name]), np.int64) for name in self._names}
        for owner in np.unique(owners).tolist():
            chosen = np.nonzero(owners == owner)[0]
            for name in self._names:
                if self._is_mapped:
                    result[name][chosen] = self._mapped(owner, name)[
                        rows[chosen] - self._starts[owner]
                    ]
                else:
                    result[name][chosen] = self._block(owner)[name][
                        rows[chosen] - owner * BLOCK_ROWS
                    ]
        return result

    def _width(self, name: str) -> int:
        info = self._shards[0]
        return info.max_predictions_per_seq if name.startswith("masked_lm") else info.max_seq_length

    def _mapped(self, shard: int, name: str) -> npt.NDArray[np.generic]:
        if (shard, name) not in self._maps:
            info = self._shards[shard]
            self._set.verify(info)
            offset = info.offsets[name]
            assert offset is not None, "only contiguous datasets are mapped"
            shape = (
                (info.num_rows,)
                if name == "next_sentence_labels"
                else (info.num_rows, self._width(name))
            )
            try:
                self._maps[shard, name] = np.memmap(
                    info.path, info.dtypes[name], "r", offset, shape
                )
            except (OSError, ValueError) as error:
                raise ShardError(
                    f"{info.path}: dataset {name} {list(shape)} cannot be mapped; truncated? "
                    f"{error}"
                ) from error
        return self._maps[shard, name]

    def _block(self, block: int) -> dict[str, npt.NDArray[np.generic]]:
        if block not in self._blocks:
            self._blocks[block] = self._read_block(block)
            if len(self._blocks) > self._BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _read_block(self, block: int) -> dict[str, npt.NDArray[np.generic]]:
        """Read 4096 consecutive global rows, from as many files as they lie in, in the files' own
        types.
        """
        start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, int(self._starts[-1]))
        parts: dict[str, list[npt.NDArray[np.generic]]] = {name: [] for name in self._names}
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        for shard in range(int(first), int(last) + 1):
            base = int(self._starts[shard])
            path = self._shards[shard].path
            self._set.verify(self._shards[shard])
            try:
                with h5py.File(path, "r") as file:
                    for name in self._names:
                        parts[name].append(file[name][max(start - base, 0) : stop - base])
            except HDF5_ERRORS as error:
                raise ShardError(
                    f"{path}: rows from {max(start - base, 0)} cannot be read; corrupt? {error}"
                ) from error
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def layout_faults(shards: ShardSet, data: DataConfig, *, may_cut: bool) -> list[str]:
    """Return what forbids reading these shards with these settings, whatever the model."""
    faults = _length_faults(shards, data, may_cut)
    static = shards.max_predictions_per_seq
    if data.masking == "static" and not static:
        faults.append(
            'data.masking is "static", but the shards are unmasked; use "dynamic", or prepare '
            "them with --static-masks"
        )
    if data.masking == "static" and static > data.max_predictions_per_seq:
        faults.append(
            f"static masks have up to {static} positions, data.max_predictions_per_seq is "
            f"{data.max_predictions_per_seq}; set it to {static}"
        )
    if data.masking == "static" and data.whole_word:
        faults.append(
            "data.whole_word works with dynamic masks only; static masks are what the shards hold"
        )
    if data.masking == "dynamic" and shards.manifest is None:
        faults.append(
            'data.masking is "dynamic", but without a manifest.json the ids of [MASK] and '
            '[PAD] are unknown; use "static"'
        )
    return faults


def _length_faults(shards: ShardSet, data: DataConfig, may_cut: bool) -> list[str]:
    """Sequences that are longer than the shards', or shorter where they must not or cannot be."""
    own, wanted = shards.max_seq_length, data.max_seq_length
    if wanted == own:
        return []
    fault = f"sequences have {own} tokens, data.max_seq_length is {wanted}; set it to {own}"
    if wanted > own:
        return [fault]
    if not may_cut:
        return [fault + f"; single stages may be shorter: set stages.N.max_seq_length to {wanted}"]
    if data.masking == "static":
        return [
            f"sequences of {own} tokens cannot be cut to {wanted} with data.masking "
            '"static", whose masks are those of whole sequences; use "dynamic"'
        ]
    if _has_labels(shards) and wanted < SHORTEST_PAIR:
        return [
            f"sentence pairs cannot be cut to {wanted} tokens; give max_seq_length "
            f"{SHORTEST_PAIR} or more, so that both texts keep a token"
        ]
    return []


def _check_alike(shards: ShardSet) -> None:
    """Refuse shards of different S, P or labels, or that the manifest contradicts."""
    first = shards.shards[0]
    for shard in shards.shards:
        if (shard.max_seq_length, shard.max_predictions_per_seq) != (
            first.max_seq_length,
            first.max_predictions_per_seq,
        ):
            raise ShardError(
                f"{shard.path}: S, P are {shard.max_seq_length}, {shard.max_predictions_per_seq}; "
                f"{first.path.name} has {first.max_seq_length}, "
                f"{first.max_predictions_per_seq}; all shards must be alike"
            )
        if set(shard.dtypes) != set(first.dtypes):
            differing = ", ".join(sorted(set(shard.dtypes) ^ set(first.dtypes)))
            raise ShardError(
                f"{shard.path}: dataset {differing} is in only one of it and "
                f"{first.path.name}; all shards must be alike"
            )
    if shards.manifest is None:
        return
    for shard, entry in zip(shards.shards, shards.manifest.entries(shards.split), strict=True):
        if shard.num_rows != entry.rows or shard.max_seq_length != shards.manifest.max_seq_length:
            raise ShardError(
                f"{shard.path}: dataset input_ids is [{shard.num_rows}, "
                f"{shard.max_seq_length}]; the manifest says "
                f"[{entry.rows}, {shards.manifest.max_seq_length}]; prepare the data again"
            )


def _check_vocabulary(data_dir: Path, manifest: Manifest) -> None:
    """Refuse a manifest whose numbers of pieces or special ids are not those of vocab.txt."""
    pieces = load_vocabulary(data_dir)
    found = {name: f"[{name.upper()}]" for name in SPECIAL_NAMES}
    wrong = [
        f"{piece} is {manifest.special_token_ids[name]}, not {pieces.index(piece)}"
        for name, piece in found.items()
        if piece in pieces and pieces.index(piece) != manifest.special_token_ids[name]
    ]
    if len(pieces) != manifest.vocab_size:
        wrong.append(f"the vocabulary has {manifest.vocab_size} pieces, not {len(pieces)}")
    if wrong:
        raise ShardError(
            f"{data_dir}: the manifest does not fit {VOCABULARY}: {'; '.join(wrong)}; one of them "
            "is of other data, or was edited"
        )


def _has_labels(shards: ShardSet) -> bool:
    if shards.manifest is not None:
        return shards.manifest.has_next_sentence_labels
    return "next_sentence_labels" in shards.shards[0].dtypes
