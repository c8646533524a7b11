"""A folder of anybody's shards in, a finished data folder of ours out; `dialects` names whose.

Rows stream through twice: checked and spooled to disk, then written shuffled as equal shards. The
temporary copy under --out is as large as the result uncompressed; memory stays flat.
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.errors import DataError, ShardError
from data_prep.flags import flag
from data_prep.foreign.dialects import LABELS, read_rows
from data_prep.foreign.files import ForeignFolder, longest_rows, open_folder
from data_prep.foreign.row_spool import RowSpool, in_groups
from data_prep.foreign.rows import ForeignRows, LabelPolarity, RowTarget
from data_prep.masking import MaskingPolicy, hash_chain
from data_prep.progress import Advance, Steps
from data_prep.shard_format import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_ATTRIBUTE,
    Dialect,
    Manifest,
    ShardEntry,
    Split,
    read_manifest,
    write_manifest,
    write_token_counts,
)
from data_prep.shard_writer import (
    SHUFFLE_STREAM,
    WORK,
    ShardLayout,
    exclusive_folder,
    fill_nvidia,
    shard_sizes,
    write_file,
    write_shard,
)
from data_prep.tokens.tokenizer import SubwordTokenizer, load_tokenizer

# 199:1, as StackingBERT's split.py and our own preparation.
VALIDATION_SHARE = 0.005
_KEPT = ("input_ids", "segment_ids", "masked_lm_positions", "masked_lm_ids")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Everything that `convert` was asked for."""

    inputs: tuple[Path, ...] = flag(
        "HDF5 files, or folders of them at any depth",
        kind=Path,
        metavar="INPUT",
        positional="many",
    )
    out: Path = flag("folder to write", kind=Path, metavar="DIR")
    tokenizer: Path = flag("vocabulary behind the ids", kind=Path, metavar="FILE")
    dialect: Dialect = flag(
        "unmasked: originals restored, masks drawn at load time; nvidia: static masks",
        "unmasked",
        choices=("unmasked", "nvidia"),
    )
    remask: bool = flag("nvidia: draw the static masks anew over the originals", False)
    labels: LabelPolarity = flag(
        "whose label 1: nvidia random next, stackingbert real next, megatron swapped",
        "nvidia",
        choices=("nvidia", "stackingbert", "megatron"),
    )
    max_seq_length: int = flag("tokens a row; 0: the longest", 0, metavar="S")
    truncate: bool = flag("cut longer rows instead of refusing them", False)
    validation_share: float = flag(
        "held out where no file is told by its name", VALIDATION_SHARE, metavar="SHARE"
    )
    keep_order: bool = flag("do not shuffle", False)
    masked_lm_prob: float = flag("share masked by --remask", 0.15, metavar="P")
    max_predictions_per_seq: int = flag("of --remask; 0: by share", 0, metavar="P")
    rows_per_shard: int = flag("most sequences a file", 65_536, metavar="N")
    seed: int = flag("of order and masks", 1, metavar="N")

    def check(self) -> None:
        """Raise one DataError that lists every impossible value."""
        length, share = self.max_seq_length, self.validation_share
        faults = [
            (length != 0 and length < 8, f"--max-seq-length {length}: 0, or at least 8"),
            (self.rows_per_shard < 1, f"--rows-per-shard {self.rows_per_shard}: at least 1"),
            (not 0 <= self.seed < 1 << 63, f"--seed {self.seed}: 0 to 2^63 - 1"),
            (not 0 < share <= 0.5, f"--validation-share {share}: above 0, at most 0.5"),
            (
                not 0 < self.masked_lm_prob < 1,
                f"--masked-lm-prob {self.masked_lm_prob}: between 0 and 1",
            ),
            (
                self.max_predictions_per_seq < 0,
                f"--max-predictions-per-seq {self.max_predictions_per_seq}: at least 0",
            ),
            (
                self.max_predictions_per_seq > 0 and not self.remask,
                "--max-predictions-per-seq: only with --remask; kept masks have their own number",
            ),
            (
                self.remask and self.dialect != "nvidia",
                "--remask: only with --dialect nvidia; unmasked rows get masks at load time",
            ),
            (self.truncate and not length, "--truncate: only with --max-seq-length"),
        ]
        if any(is_so for is_so, _ in faults):
            raise DataError("; ".join(text for is_so, text in faults if is_so))


def convert_folder(settings: ConvertSettings, steps: Steps | None = None) -> Manifest:
    """Turn foreign shards into a finished folder of ours; `steps` draw bars.

    A DataError names file and row, and nothing is left behind. A folder finished with the same
    settings is left alone.
    """
    settings.check()
    tokenizer = load_tokenizer(settings.tokenizer)
    folder = open_folder(settings.inputs, settings.out, settings.validation_share)
    wanted = _fingerprint(settings, tokenizer, folder)
    finished = read_manifest(settings.out) if settings.out.is_dir() else None
    if finished is not None:
        if finished.settings != wanted:
            raise ShardError(
                f"{settings.out}: holds shards made with other settings; choose another --out, or "
                "remove this folder"
            )
        return finished
    target = _target(settings, folder)
    with exclusive_folder(settings.out):
        tokenizer.save(settings.out)
        conversion = _Conversion(settings, tokenizer, target, steps or Steps(is_live=False))
        entries = conversion.write(folder)
        write_token_counts(settings.out, conversion.counts, tokenizer.special_token_ids)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dialect=settings.dialect,
            max_seq_length=target.max_seq_length,
            max_predictions_per_seq=conversion.num_predictions,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            special_token_ids=tokenizer.special_token_ids,
            has_next_sentence_labels=target.has_labels,
            seed=settings.seed,
            num_documents=dict.fromkeys(SPLITS, 0),
            settings=wanted,
            statistics=conversion.statistics(),
            training=entries["training"],
            validation=entries["validation"],
        )
        write_manifest(settings.out, manifest)
    return manifest


class _Conversion:
    """The two passes over the rows, and what is counted on the way."""

    def __init__(
        self,
        settings: ConvertSettings,
        tokenizer: SubwordTokenizer,
        target: RowTarget,
        steps: Steps,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.target = target
        self.num_predictions = target.max_predictions_per_seq
        if settings.remask:
            wanted = ceil(target.max_seq_length * settings.masked_lm_prob)
            self.num_predictions = settings.max_predictions_per_seq or wanted
        self._steps = steps
        self._rows = ForeignRows(tokenizer, target)
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._tokens = dict.fromkeys(SPLITS, 0)
        self._real = dict.fromkeys(SPLITS, 0)

    def write(self, folder: ForeignFolder) -> dict[Split, tuple[ShardEntry, ...]]:
        """Spool all rows, judge the vocabulary, write the shards."""
        work = self.settings.out / WORK
        expected = sum(head.num_rows for head in folder.heads)
        with ExitStack() as stack:
            spools = {
                split: stack.enter_context(
                    RowSpool(
                        work / split,
                        self._rows.dtype,
                        expected_rows=expected,
                        is_sorted=not self.settings.keep_order,
                    )
                )
                for split in SPLITS
            }
            with self._steps.step("reading", expected, "rows") as advance:
                self._spool(folder, spools, advance)
            self._rows.finish()
            for split, spool in spools.items():
                if not spool.num_rows:
                    raise DataError(
                        f"no {split} row among {expected:,}: raise --validation-share "
                        f"{self.settings.validation_share}, or name test files as such"
                    )
            with self._steps.step("shards", expected, "rows") as advance:
                return {
                    split: self._write_split(split, spool, advance)
                    for split, spool in spools.items()
                }

    def _spool(
        self, folder: ForeignFolder, spools: dict[Split, RowSpool], advance: Advance
    ) -> None:
        num_seen = 0
        for head, split in folder.files:
            for block in read_rows(head):
                records = self._rows.records(head.path, block)
                numbers = np.arange(num_seen, num_seen + len(records))
                num_seen += len(records)
                every = folder.held_out_every
                is_held_out = numbers % every == every - 1 if every else numbers < 0
                self._add(split, spools[split], records[~is_held_out])
                self._add("validation", spools["validation"], records[is_held_out])
                advance(len(np.unique(block.rows)))

    def _add(self, split: Split, spool: RowSpool, records: npt.NDArray[np.void]) -> None:
        """Count records and spool them, for a shuffle under a hash of their numbers."""
        numbers = np.arange(spool.num_rows, spool.num_rows + len(records))
        stream = SHUFFLE_STREAM[split]
        is_kept = self.settings.keep_order
        spool.add(records, None if is_kept else hash_chain(self.settings.seed, stream, numbers))
        ids = records["input_ids"]
        pad = self.tokenizer.special_token_ids["pad"]
        self._tokens[split] += ids.size
        self._real[split] += int(np.count_nonzero(ids != pad))
        if split == "training":
            self.counts += np.bincount(_originals(records).ravel(), minlength=self.counts.size)

    def _write_split(
        self, split: Split, spool: RowSpool, advance: Advance
    ) -> tuple[ShardEntry, ...]:
        settings = self.settings
        special = self.tokenizer.special_token_ids
        policy = MaskingPolicy(
            vocab_size=self.tokenizer.vocab_size,
            special_token_ids=special,
            masked_lm_prob=settings.masked_lm_prob,
            max_predictions_per_seq=self.num_predictions,
        )
        layout = ShardLayout(
            rows_per_shard=settings.rows_per_shard,
            seed=settings.seed,
            pad_id=special["pad"],
            attributes={
                "format_version": FORMAT_VERSION,
                TOKENIZER_ATTRIBUTE: self.tokenizer.sha256,
                "seed": settings.seed,
            },
            masking=policy if settings.remask else None,
        )
        entries: list[ShardEntry] = []
        first = 0
        groups = in_groups(spool.read(), shard_sizes(spool.num_rows, settings.rows_per_shard))
        for index, records in enumerate(groups):
            path = settings.out / f"{split}_{index:05d}.hdf5"
            if self.target.max_predictions_per_seq:
                entries.append(_write_kept(path, records, layout.attributes))
            else:
                entries.append(write_shard(path, records, first, layout))
            first += len(records)
            advance(len(records))
        return tuple(entries)

    def statistics(self) -> dict[str, float]:
        """Return the tokens, special ones included, and the share of padding in each split."""
        real = {f"{split}_tokens": float(self._real[split]) for split in SPLITS}
        return real | {
            f"{split}_padding_share": round(1 - self._real[split] / self._tokens[split], 6)
            for split in SPLITS
        }


def _target(settings: ConvertSettings, folder: ForeignFolder) -> RowTarget:
    """Choose S and P that hold every row, or as asked."""
    keeps_masks = settings.dialect == "nvidia" and not settings.remask
    if keeps_masks and not folder.heads[0].has_masks:
        raise DataError(
            f"{folder.heads[0].path}: has no static masks to keep; draw them with --remask"
        )
    longest, most_masks = longest_rows(folder.heads)
    length = settings.max_seq_length or longest
    return RowTarget(
        max_seq_length=length,
        max_predictions_per_seq=max(1, min(most_masks, length)) if keeps_masks else 0,
        has_labels=folder.heads[0].has_labels,
        labels=settings.labels,
        may_truncate=settings.truncate,
    )


def _fingerprint(
    settings: ConvertSettings, tokenizer: SubwordTokenizer, folder: ForeignFolder
) -> dict[str, object]:
    """Return what decides the bytes of the shards: names and sizes instead of paths."""
    left_out = ("inputs", "out", "tokenizer")
    wanted: dict[str, object] = {
        key: value for key, value in asdict(settings).items() if key not in left_out
    }
    return wanted | {
        "command": "convert",
        "tokenizer": tokenizer.sha256,
        "source_dialects": sorted({head.dialect for head in folder.heads}),
        "inputs": [[head.path.name, head.path.stat().st_size] for head in folder.heads],
    }


def _originals(records: npt.NDArray[np.void]) -> npt.NDArray[np.unsignedinteger]:
    """Return the ids of records with kept masks undone, [n, S]."""
    ids = records["input_ids"]
    if "masked_lm_positions" not in (records.dtype.names or ()):
        return ids
    ids = ids.copy()
    rows, slots = np.nonzero(records["masked_lm_positions"])
    ids[rows, records["masked_lm_positions"][rows, slots]] = records["masked_lm_ids"][rows, slots]
    return ids


def _write_kept(
    path: Path, records: npt.NDArray[np.void], attributes: dict[str, int | str]
) -> ShardEntry:
    """Write records with their own masks in NVIDIA's schema."""
    length = records["input_ids"].shape[1]
    has_pairs = LABELS in (records.dtype.names or ())

    def block_of(start: int, stop: int) -> dict[str, npt.NDArray[np.generic]]:
        block = records[start:stop]
        return {
            **{name: block[name] for name in _KEPT},
            "input_mask": np.arange(length) < block["num_tokens"][:, None],
            LABELS: block[LABELS] if has_pairs else np.zeros(stop - start, "i1"),
        }

    return write_file(
        path, len(records), attributes, lambda file: fill_nvidia(file, len(records), block_of)
    )
