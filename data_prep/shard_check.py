"""A data folder in, its faults out, one line each: ours against its manifest, anybody's by itself.

Files are read once, in blocks: memory stays flat. Every kind of fault is told once a file, with the
first row that has it and the number of rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_prep.errors import DataError, ShardError
from data_prep.flags import flag
from data_prep.foreign.dialects import ShardHead, inspect_foreign, read_rows
from data_prep.foreign.files import find_files
from data_prep.foreign.row_checks import KnownIds, count_masks, infer_ids, known_ids, row_faults
from data_prep.isolated import Isolated, crash_message, patience
from data_prep.shard_format import (
    IN_PROGRESS,
    NVIDIA_DATASETS,
    SPLITS,
    TOKEN_COUNTS,
    VOCABULARY,
    Manifest,
    ShardEntry,
    ShardInfo,
    Split,
    file_sha256,
    find_shards,
    inspect_shard,
    load_token_counts,
    load_vocabulary,
    read_manifest,
    split_of,
)
from data_prep.tokens.tokenizer import load_tokenizer

_MOST_FAULTS = 20  # lines a file
# [MASK] stands at 80 % of the masked positions; below half of that the positions belong elsewhere.
_LEAST_MASK_SHARE = 0.4
_LEAST_MASKS = 100
# [MASK] where nothing is masked is a literal "[MASK]" of the text, and rare.
_MOST_STRAY_SHARE = 0.01
_OF_VOCABULARY = ("tokenizer_sha256", "the id of [CLS]", "the id of [SEP]")

_Job = tuple[ShardHead, KnownIds | None]
_Result = tuple[list[str], dict[str, object]]


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What `check` was asked for."""

    data_dir: Path = flag("folder of shards", kind=Path, metavar="DIR", positional="one")
    tokenizer: Path | None = flag(
        "vocabulary of shards without manifest", None, kind=Path, metavar="FILE"
    )


def check_folder(data_dir: Path, vocabulary: Path | None = None) -> list[str]:
    """Return every fault of a data folder, one line each.

    Without manifest the shards alone are checked, against `vocabulary` or one that lies in the
    folder; with neither, ids have no upper bound.
    """
    if not data_dir.is_dir():
        return [f"{data_dir}: no such folder"]
    try:
        manifest = read_manifest(data_dir)
        paths = _shards(data_dir, manifest)
    except OSError as error:
        return [f"{data_dir}: cannot be read: {error.strerror or error}"]
    except ShardError as error:
        return [str(error)]
    faults = []
    if (data_dir / IN_PROGRESS).exists():
        faults.append(
            f"{data_dir}: not finished: a run is still writing here, or was killed; run the same "
            "prepare_data.py command again"
        )
    if not paths:
        faults.append(
            f"{data_dir}: holds no shard (an HDF5 file with train, part_, valid or test in its "
            "name)"
        )
    ids = None
    if manifest is None:
        ids, told = _ids_of_vocabulary(data_dir, vocabulary)
        faults += told
    else:
        ids = known_ids(manifest.vocab_size, manifest.special_token_ids)
        faults += _check_manifest(data_dir, manifest) + _check_tokenizer(data_dir, manifest)
    seen: dict[str, tuple[Path, object]] = {}
    with Isolated(_check_rows) as isolated:
        for path, split in paths:
            told, signature = _check_file(path, ids, isolated)
            faults += told
            if manifest is None:
                faults += _differences(path, split, signature, seen)
    return faults


def _ids_of_vocabulary(
    data_dir: Path, vocabulary: Path | None
) -> tuple[KnownIds | None, list[str]]:
    """Return what is known of a manifest-less folder's ids, and a broken vocabulary's fault."""
    names = ("tokenizer.json", VOCABULARY)
    if vocabulary is None and any((data_dir / name).is_file() for name in names):
        vocabulary = data_dir
    if vocabulary is None:
        return None, []
    try:
        tokenizer = load_tokenizer(vocabulary)
    except DataError as error:
        return None, [str(error)]
    return known_ids(tokenizer.vocab_size, tokenizer.special_token_ids), []


def check_shard(path: Path, vocab_size: int | None = None) -> list[str]:
    """Return every fault of one file; `vocab_size` None: ids have no upper bound."""
    with Isolated(_check_rows) as isolated:
        faults, _ = _check_file(path, KnownIds(vocab_size=vocab_size), isolated)
    return faults


def _shards(data_dir: Path, manifest: Manifest | None) -> list[tuple[Path, Split]]:
    """Return the files to check: ours by name, anybody's at any depth, as `convert` finds them."""
    if manifest is not None:
        return [(path, split) for split in SPLITS for path in find_shards(data_dir, split)]
    try:
        return find_files([data_dir])
    except DataError:
        return []


@dataclass
class _Faults:
    """The kinds of faults of one file: how the first was told, where, and how many there are."""

    path: Path
    texts: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, row: int, text: str, count: int) -> None:
        if kind not in self.texts:
            self.texts[kind] = f"{self.path}: row {row}: {text}"
        self.counts[kind] = self.counts.get(kind, 0) + count

    def lines(self) -> list[str]:
        return [
            text if self.counts[kind] == 1 else f"{text} ({self.counts[kind]:,} such rows)"
            for kind, text in self.texts.items()
        ]


def _check_file(path: Path, ids: KnownIds | None, isolated: Isolated[_Job, _Result]) -> _Result:
    """Return the faults of a file's values and what it has in common with its neighbours."""
    try:
        head = inspect_foreign(path)
        if head.max_seq_length:
            return _check_rows((head, ids))
        seconds = patience(path)
    except ShardError as error:
        return [str(error)], {}
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror or error}"], {}
    # Damaged variable-length rows crash the library, or never end.
    return isolated.run((head, ids), seconds) or ([crash_message(path)], {})


def _check_rows(job: _Job) -> _Result:
    """Return the faults of a file's values; special ids that are not known are guessed."""
    head, known = job
    path, faults = head.path, _Faults(head.path)
    broken: list[str] = []
    counts = np.zeros(3, np.int64)
    ids = known if known is not None and known.mask is not None else None
    try:
        for block in read_rows(head):
            if ids is None:
                ids = replace(infer_ids(block), vocab_size=known.vocab_size if known else None)
            for fault in row_faults(block, ids):
                first = int(np.flatnonzero(fault.is_bad)[0])
                count = int(np.count_nonzero(fault.is_bad))
                faults.add(fault.kind, int(block.rows[first]), fault.describe(first), count)
            if ids.mask is not None and head.has_masks:
                counts += count_masks(block, ids.mask)
    except ShardError as error:
        broken = [str(error)]
    if ids is not None:
        broken += _mask_share_faults(path, ids, *counts.tolist())
    return (broken + faults.lines())[:_MOST_FAULTS], _signature(head, ids)


def _mask_share_faults(
    path: Path, ids: KnownIds, masked: int, hidden: int, anywhere: int
) -> list[str]:
    """Judge how often [MASK] stands at masked positions (`hidden` of `masked`), and elsewhere."""
    if masked >= _LEAST_MASKS and hidden < _LEAST_MASK_SHARE * masked:
        return [
            f"{path}: [MASK] ({ids.mask}) stands at {hidden:,} of {masked:,} masked positions; "
            "about 80 % is BERT's rule: the positions do not belong to these rows"
        ]
    if anywhere - hidden > max(_LEAST_MASKS, _MOST_STRAY_SHARE * hidden):
        return [
            f"{path}: [MASK] ({ids.mask}) stands {anywhere - hidden:,} times where "
            "masked_lm_positions points nowhere: masks were lost"
        ]
    return []


def _signature(head: ShardHead, ids: KnownIds | None) -> dict[str, object]:
    """Return what shards of one folder have in common."""
    signature: dict[str, object] = {
        "the dialect": head.dialect,
        "S": head.max_seq_length,
        "P": head.max_predictions_per_seq,
        "next_sentence_labels": "there" if head.has_labels else "missing",
        "tokenizer_sha256": head.tokenizer_sha256,
        **{f"the type of {name}": kind for name, kind in head.types},
    }
    if ids is not None:
        signature |= {"the id of [CLS]": ids.cls, "the id of [SEP]": ids.sep}
    return signature


def _differences(
    path: Path,
    split: Split,
    signature: Mapping[str, object],
    seen: dict[str, tuple[Path, object]],
) -> list[str]:
    """Return in what a shard differs from the first of its folder; `seen` is filled."""
    faults = []
    for what, value in signature.items():
        # MLPerf packs its training rows only: splits may differ in form, not in vocabulary.
        key = what if what in _OF_VOCABULARY else f"{split} {what}"
        first, expected = seen.setdefault(key, (path, value))
        if value != expected:
            faults.append(
                f"{path}: {what} is {value} here and {expected} in {first.name}: these shards were "
                "not made together"
            )
    return faults


def _check_manifest(data_dir: Path, manifest: Manifest) -> list[str]:
    """Return where files and manifest disagree."""
    listed = {entry.file for entry in manifest.training + manifest.validation}
    present = {path.name for path in data_dir.iterdir() if split_of(path.name)}
    faults = [f"{data_dir / name}: not in the manifest" for name in sorted(present - listed)]
    for split in SPLITS:
        rows = [entry.rows for entry in manifest.entries(split)]
        if not rows or max(rows) - min(rows) > 1:
            faults.append(f"{data_dir}: {split} shards are not equal to within one row: {rows[:8]}")
        for entry in manifest.entries(split):
            faults += _check_entry(data_dir / entry.file, entry, manifest)
    if any(not 0 <= one < manifest.vocab_size for one in manifest.special_token_ids.values()):
        faults.append(
            f"{data_dir}: the manifest's special ids {manifest.special_token_ids} lie outside its "
            f"vocabulary of {manifest.vocab_size}"
        )
    return faults


def _check_entry(path: Path, entry: ShardEntry, manifest: Manifest) -> list[str]:
    try:
        info = inspect_shard(path)
        digest = file_sha256(path)
    except ShardError:
        # A file that is there but unreadable is reported with its rows.
        return [] if path.exists() else [f"{path}: listed in the manifest, but missing"]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror or error}"]
    faults = []
    expected = (entry.rows, manifest.max_seq_length, manifest.max_predictions_per_seq)
    got = (info.num_rows, info.max_seq_length, info.max_predictions_per_seq)
    if got != expected:
        faults.append(f"{path}: rows, S, P are {got}; the manifest says {expected}")
    faults += _check_types(info, manifest)
    if info.tokenizer_sha256 not in (None, manifest.tokenizer_sha256):
        faults.append(
            f"{path}: made with another tokenizer ({str(info.tokenizer_sha256)[:12]}..., the "
            f"manifest says {manifest.tokenizer_sha256[:12]}...)"
        )
    if digest != entry.sha256:
        faults.append(
            f"{path}: its sha256 is not the manifest's; the file was changed after it was made"
        )
    return faults


def _check_types(info: ShardInfo, manifest: Manifest) -> list[str]:
    """Compare the datasets with the contract's table."""
    ids = "u2" if manifest.vocab_size <= 65_535 else "u4"
    if manifest.dialect == "nvidia":
        expected = {name: "i4" for name in ("input_ids", "masked_lm_positions", "masked_lm_ids")}
        expected |= {name: "i1" for name in NVIDIA_DATASETS if name not in expected}
    else:
        expected = {"input_ids": ids, "segment_ids": "i1"}
        if manifest.has_next_sentence_labels:
            expected["next_sentence_labels"] = "i1"
    faults = [
        f"{info.path}: dataset {name} is missing; the manifest promises it"
        for name in expected
        if name not in info.dtypes
    ]
    return faults + [
        f"{info.path}: dataset {name} is {info.dtypes[name]}; a folder of dialect "
        f"{manifest.dialect} has {np.dtype(dtype)}"
        for name, dtype in expected.items()
        if name in info.dtypes and info.dtypes[name] != np.dtype(dtype)
    ]


def _check_tokenizer(data_dir: Path, manifest: Manifest) -> list[str]:
    """Return where the vocabulary's files and the manifest disagree."""
    faults = []
    path = data_dir / "tokenizer.json"
    if not path.is_file():
        return [f"{path}: missing; the shards' vocabulary belongs to them"]
    try:
        tokens = load_vocabulary(data_dir)
        tokenizer = load_tokenizer(path)
        if manifest.tokenizer_sha256 != tokenizer.sha256 or tokens != tokenizer.tokens:
            faults.append(
                f"{data_dir / VOCABULARY}: not the vocabulary of the manifest; the shards have "
                "other ids"
            )
        elif tokenizer.special_token_ids != manifest.special_token_ids:
            faults.append(
                f"{data_dir}: special ids are {manifest.special_token_ids} in the manifest, "
                f"{tokenizer.special_token_ids} in the vocabulary"
            )
        counts = load_token_counts(data_dir)
        if counts is None or len(counts) != manifest.vocab_size:
            faults.append(f"{data_dir / TOKEN_COUNTS}: missing, or not one count a word piece")
    except DataError as error:
        faults.append(str(error))
    return faults
