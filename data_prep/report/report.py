"""What a run did, for people (a table, a page with figures) and for scripts (JSON)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.clean_step import CleanBlock
from data_prep.cleaning.funnel import Funnel
from data_prep.row_step import ChunkRows
from data_prep.shard_format import SPLITS, Manifest

MAX_MESSAGES = 5


@dataclass
class PrepareReport:
    """Filled while the steps run."""

    out: Path
    funnel: Funnel
    num_workers: int = 1
    manifest: Manifest | None = None
    is_old: bool = False
    """The folder was finished before; nothing was done."""
    num_input_bytes: int = 0
    """Decompressed."""
    merged: dict[str, int] = field(default_factory=dict)
    """Sentences that each rule of the short-sentence merge took out."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of the result."""
    cut_documents: int = 0
    broken_files: int = 0
    messages: list[str] = field(default_factory=list)
    """The first faults that were skipped, `file:line: what`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each step."""
    worker_seconds: dict[str, float] = field(default_factory=dict)
    """Time of each part, summed over the workers."""
    row_lengths: list[int] = field(default_factory=list)
    """Training rows of i tokens, [S + 1]."""
    document_lengths: list[int] = field(default_factory=list)
    """Training documents of 2^i to 2^(i + 1) - 1 tokens."""

    @classmethod
    def of_finished(cls, out: Path, manifest: Manifest | None) -> "PrepareReport":
        """Report on a folder that was finished before."""
        return cls(out, Funnel(), manifest=manifest, is_old=True)

    def add_block(self, block: CleanBlock) -> None:
        """Count what a block of input held."""
        self.funnel.merge(Funnel.from_dict(block.funnel))
        self.num_input_bytes += block.num_input_bytes
        self.cut_documents += block.cut_documents
        self.broken_files += block.broken_files
        self.messages = (self.messages + block.messages)[:MAX_MESSAGES]
        self.add_seconds(block.seconds)

    def add_chunk(self, chunk: ChunkRows) -> None:
        """Count what became of a chunk."""
        for rule, count in chunk.merged.items():
            if count:
                self.merged[rule] = self.merged.get(rule, 0) + count
        self.add_seconds(chunk.seconds)

    def add_seconds(self, seconds: dict[str, float]) -> None:
        """Add a job's time of each part."""
        for part, value in seconds.items():
            self.worker_seconds[part] = self.worker_seconds.get(part, 0.0) + value

    def finish(self, manifest: Manifest, seconds: dict[str, float]) -> None:
        """Take the last facts."""
        self.manifest = manifest
        self.seconds = dict(seconds)

    @property
    def megabytes_per_second(self) -> float:
        """Decompressed input per second of wall time, 10^6 bytes."""
        return self.num_input_bytes / 1e6 / max(sum(self.seconds.values()), 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {
            "out": str(self.out),
            "already_done": self.is_old,
            "manifest": asdict(self.manifest) if self.manifest else None,
            "funnel": {**self.funnel.as_dict(), "read": asdict(self.funnel.read)},
            "notes": self.notes,
            "input_bytes": self.num_input_bytes,
            "megabytes_per_second": round(self.megabytes_per_second, 3),
            "workers": self.num_workers,
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
            "worker_seconds": {key: round(value, 3) for key, value in self.worker_seconds.items()},
            "merged_sentences": self.merged,
            "skipped": self.messages,
            "cut_documents": self.cut_documents,
            "broken_files": self.broken_files,
            "row_lengths": self.row_lengths,
            "document_lengths": self.document_lengths,
        }

    def text(self) -> str:
        """Return the summary tables."""
        if self.is_old:
            return f"{self.out}: already done with these settings; nothing to do"
        manifest = self.manifest
        assert manifest is not None, "text is asked for at the end"
        lines = [f"{'':<52}{'documents':>12}{'paragraphs':>13}{'characters':>15}"]
        lines += [
            f"{row.label:<52}{row.documents:>12,}{row.paragraphs:>13,}{row.characters:>15,}"
            for row in self.funnel.rows()
        ]
        if self.merged:
            parts = (f"{name.replace('_', ' ')} {count:,}" for name, count in self.merged.items())
            lines.append(f"short-sentence merge took out sentences: {', '.join(parts)}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"skipped  {message}" for message in self.messages]
        if self.cut_documents:
            lines.append(f"{self.cut_documents:,} times a very long document was cut in two")
        return "\n".join([*lines, "", splits_table(manifest), "", *self._times()])

    def _times(self) -> list[str]:
        total, of_workers = sum(self.seconds.values()), sum(self.worker_seconds.values())
        parts = sorted(self.worker_seconds.items(), key=lambda part: -part[1])
        return [
            "steps       " + ", ".join(f"{k} {v:.1f} s" for k, v in self.seconds.items()),
            "inside      "
            + ", ".join(f"{k} {v / max(of_workers, 1e-9):.0%}" for k, v in parts if v >= 0.005),
            f"{self.num_input_bytes / 1e6:,.1f} MB of input in {total:.1f} s, "
            f"{self.megabytes_per_second:.1f} MB/s with {self.num_workers} worker"
            f"{'s' * (self.num_workers > 1)}; vocabulary of {self.manifest.vocab_size:,}"  # type: ignore[union-attr]
            f"; {self.out}",
        ]


def splits_table(manifest: Manifest) -> str:
    """Return sequences, shards, tokens and padding of both splits."""
    facts = manifest.statistics
    lines = [f"{'':<12}{'sequences':>12}{'shards':>9}{'tokens':>15}{'padding':>10}"]
    for split in SPLITS:
        entries = manifest.entries(split)
        lines.append(
            f"{split:<12}{sum(entry.rows for entry in entries):>12,}{len(entries):>9,}"
            f"{facts[f'{split}_tokens']:>15,.0f}{facts[f'{split}_padding_share']:>10.1%}"
        )
    return "\n".join(lines)
