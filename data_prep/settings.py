"""What `shards` and `vocab` were asked for, checked as a whole, and what of it decides the bytes.

Each field is a command-line flag: launch/prepare_data.py is made of them.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil
from pathlib import Path
from typing import Literal

from data_prep.cleaning.clean import PRESETS, CleaningRules, rules_from
from data_prep.errors import DataError, ShardError
from data_prep.flags import flag
from data_prep.instances import Pairs
from data_prep.shard_format import file_sha256, inspect_shard, read_manifest
from data_prep.sources.blocks import SourceOptions, find_files
from data_prep.tokens.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Everything that `shards` was asked for."""

    inputs: tuple[Path, ...] = flag(
        ".jsonl, .txt, MediaWiki's .xml, each also with .gz, .bz2, .xz, .zst; .parquet; folders",
        kind=Path,
        metavar="INPUT",
        positional="many",
        vocab=True,
    )
    out: Path = flag("folder to write", kind=Path, metavar="DIR", vocab=True)
    validation: tuple[Path, ...] = flag(
        "held-out files (every 200th document)", (), kind=Path, metavar="FILE", vocab=True
    )
    field: str = flag("key of the text in JSON lines and Parquet", "text", vocab=True)
    documents: Literal["blank-line", "file", "line"] = flag(
        "what ends a document of plain text",
        "blank-line",
        choices=("blank-line", "file", "line"),
        vocab=True,
    )
    skip_bad: bool = flag("skip broken lines and files, and count them", False, vocab=True)
    clean: str = flag(
        "rules of cleaning: 2019 are StackingBERT's", "none", choices=tuple(PRESETS), vocab=True
    )
    clean_set: tuple[str, ...] = flag(
        "change rules, such as min_line_chars=30", (), metavar="RULE=VALUE", vocab=True
    )
    dedup: Literal["none", "document", "paragraph"] = flag(
        "what is kept once", "document", choices=("none", "document", "paragraph"), vocab=True
    )
    near_dedup: float = flag(
        "drop documents this alike: MinHash, 0.5 to 1; 0: off", 0.0, metavar="JACCARD", vocab=True
    )
    tokenizer: Path | None = flag(
        "vocab.txt or tokenizer.json (train one)", None, kind=Path, metavar="FILE"
    )
    vocab_size: int = flag("pieces to train", 8192, metavar="N", vocab=True)
    tokenizer_kind: Literal["wordpiece", "bpe"] = flag(
        "what to train", "wordpiece", choices=("wordpiece", "bpe"), vocab=True
    )
    max_seq_length: int = flag("tokens a sequence", 128, metavar="S")
    sentences: Literal["rules", "lines"] = flag(
        "lines: each line of the text is a sentence", "rules", choices=("rules", "lines")
    )
    merge_short: bool = flag("join sentences of under 5 words, as StackingBERT", False)
    pairs: Pairs = flag(
        "nsp: BERT's; lines: StackingBERT's; sop: ALBERT's",
        "none",
        choices=("none", "nsp", "lines", "sop"),
    )
    short_seq_prob: float = flag("share of documents with shorter pairs", 0.1, metavar="P")
    dupe_factor: int = flag("times that the text is used, with other masks", 1, metavar="N")
    static_masks: bool = flag("masks in the files: NVIDIA's dialect", False)
    whole_word: bool = flag("static masks hide whole words", False)
    masked_lm_prob: float = flag("static masks' share", 0.15, metavar="P")
    max_predictions_per_seq: int = flag("static masks a sequence; 0: by share", 0, metavar="P")
    rows_per_shard: int = flag("most sequences a file", 65_536, metavar="N")
    seed: int = flag("of pairs, static masks and order", 1, metavar="N")
    workers: int = flag(
        "processes; same bytes for any", os.cpu_count() or 1, metavar="N", vocab=True
    )
    mpi: bool = flag("workers are the ranks of mpirun", False)
    no_page: bool = flag("draw no report.html", False)

    @property
    def num_predictions(self) -> int:
        """Masked positions P of one static row."""
        return self.max_predictions_per_seq or ceil(self.max_seq_length * self.masked_lm_prob)

    @property
    def rules(self) -> CleaningRules:
        """The cleaning rules; raises DataError for an unknown one."""
        return rules_from(self.clean, self.clean_set)

    @property
    def source_options(self) -> SourceOptions:
        """How inputs are read."""
        return SourceOptions(field=self.field, documents=self.documents, skip_bad=self.skip_bad)

    def check(self) -> None:
        """Raise one DataError that lists every impossible value."""
        limits: list[tuple[bool, str]] = [
            (self.max_seq_length >= 8, f"--max-seq-length {self.max_seq_length}: at least 8"),
            (self.workers >= 1, f"--workers {self.workers}: at least 1"),
            (self.dupe_factor >= 1, f"--dupe-factor {self.dupe_factor}: at least 1"),
            (self.rows_per_shard >= 1, f"--rows-per-shard {self.rows_per_shard}: at least 1"),
            (0 <= self.seed < 1 << 63, f"--seed {self.seed}: 0 to 2^63 - 1"),
            (
                0 < self.masked_lm_prob < 1,
                f"--masked-lm-prob {self.masked_lm_prob}: between 0 and 1",
            ),
            (0 <= self.short_seq_prob <= 1, f"--short-seq-prob {self.short_seq_prob}: 0 to 1"),
            (
                self.near_dedup == 0 or 0.5 <= self.near_dedup <= 1,
                f"--near-dedup {self.near_dedup}: 0 (off), or 0.5 to 1",
            ),
            (
                0 <= self.max_predictions_per_seq <= self.max_seq_length,
                f"--max-predictions-per-seq {self.max_predictions_per_seq}: 0 to --max-seq-length",
            ),
            (
                self.static_masks or self.pairs != "none" or self.dupe_factor == 1,
                "--dupe-factor: without --static-masks or --pairs the copies would be equal",
            ),
        ]
        faults = [text for is_right, text in limits if not is_right] + self._idle_flags()
        try:
            _ = self.rules
        except DataError as error:
            faults.append(str(error))
        if faults:
            raise DataError("; ".join(faults))

    def _idle_flags(self) -> list[str]:
        """Name flags that were changed but have no effect beside the others."""
        needs: dict[str, tuple[bool, tuple[str, ...]]] = {
            "--static-masks": (
                self.static_masks,
                ("whole_word", "masked_lm_prob", "max_predictions_per_seq"),
            ),
            "--pairs nsp or sop": (self.pairs in ("nsp", "sop"), ("short_seq_prob",)),
            "no --tokenizer, which brings its own": (
                self.tokenizer is None,
                ("vocab_size", "tokenizer_kind"),
            ),
        }
        defaults = {one.name: one.default for one in fields(self)}
        return [
            f"--{name.replace('_', '-')}: has an effect only with {condition}"
            for condition, (holds, names) in needs.items()
            for name in names
            if not holds and getattr(self, name) != defaults[name]
        ]


_NOT_IN_BYTES = (
    "inputs", "validation", "out", "tokenizer", "workers", "mpi", "no_page", "clean", "clean_set",
)  # fmt: skip


def fingerprint(settings: PrepareSettings) -> dict[str, object]:
    """Return what decides the bytes of the shards: names and hashes instead of paths, and not the
    workers.
    """
    wanted: dict[str, object] = {
        key: value for key, value in asdict(settings).items() if key not in _NOT_IN_BYTES
    }
    wanted["rules"] = asdict(settings.rules)
    wanted["inputs"] = _hashes(settings.inputs)
    wanted["validation"] = _hashes(settings.validation)
    wanted["tokenizer"] = (
        load_tokenizer(settings.tokenizer).sha256 if settings.tokenizer else "trained"
    )
    wanted["max_predictions_per_seq"] = settings.num_predictions if settings.static_masks else 0
    if settings.tokenizer:
        del wanted["vocab_size"], wanted["tokenizer_kind"]
    return wanted


def _hashes(paths: Sequence[Path]) -> list[list[str]]:
    return [[path.name, file_sha256(path)] for path in find_files(paths)] if paths else []


def is_finished(out: Path, settings: dict[str, object]) -> bool:
    """Say whether `out` already holds what `settings` would make; a ShardError if it holds
    something else.
    """
    manifest = read_manifest(out)
    if manifest is None:
        return False
    there = manifest.settings
    asked: dict[str, object] = json.loads(json.dumps(settings))
    differing = sorted(
        key for key in asked.keys() | there.keys() if asked.get(key) != there.get(key)
    )
    if differing:
        changes = "; ".join(
            f"{key}: {_short(there.get(key))} there, {_short(asked.get(key))} asked"
            for key in differing
        )
        raise ShardError(
            f"{out}: holds shards made with other settings ({changes}); choose another --out, "
            "or remove this folder"
        )
    for entry in manifest.training + manifest.validation:
        try:
            is_whole = inspect_shard(out / entry.file).num_rows == entry.rows
        except ShardError:
            is_whole = False
        if not is_whole:
            raise ShardError(
                f"{out}: finished once, but {entry.file} is gone or damaged; remove the folder "
                "and prepare it again (`check` says more)"
            )
    return True


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
