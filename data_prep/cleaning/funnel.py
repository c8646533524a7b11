"""What came in, what each cleaning rule removed or changed, and what was kept."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Literal, NamedTuple

from data_prep.errors import DataError

Kind = Literal["skipped", "changed", "removed"]

# Every rule in the order in which it applies: (name, kind, words for people).
_RULES: tuple[tuple[str, Kind, str], ...] = (
    ("broken_record", "skipped", "skipped: broken records"),
    ("redirect", "skipped", "skipped: redirects"),
    ("other_page", "skipped", "skipped: pages that are no articles"),
    ("white_space", "changed", "changed: white space, line ends, invisible characters"),
    ("empty", "removed", "removed: empty documents"),
    ("punctuation", "changed", "changed: punctuation"),
    ("joined", "changed", "joined: broken lines"),
    ("short_line", "removed", "removed: line too short"),
    ("long_line", "removed", "removed: line too long"),
    ("few_letters", "removed", "removed: line with too few letters"),
    ("letter_share", "removed", "removed: line with too small a share of letters"),
    ("slashes", "removed", "removed: line with too many slashes"),
    ("backslashes", "removed", "removed: line with too many backslashes"),
    ("pipes", "removed", "removed: line with too many pipes"),
    ("pipe_start", "removed", "removed: line that begins with a pipe"),
    ("duplicate_paragraph", "removed", "removed: exact duplicate paragraphs"),
    ("no_line_left", "removed", "removed: documents without a line left"),
    ("duplicate_document", "removed", "removed: exact duplicate documents"),
    ("near_duplicate", "removed", "removed: near-duplicate documents"),
)
RULES: tuple[str, ...] = ("read", *(name for name, _, _ in _RULES))
_SKIPPED = tuple(name for name, kind, _ in _RULES if kind == "skipped")


@dataclass(frozen=True)
class Counts:
    """Three counts that go together; negative where a rule made text longer."""

    documents: int = 0
    paragraphs: int = 0
    characters: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Add column by column."""
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Counts") -> "Counts":
        """Subtract column by column."""
        return Counts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Row(NamedTuple):
    """A line of the funnel's table."""

    label: str
    documents: int
    paragraphs: int
    characters: int


@dataclass
class Funnel:
    """Counts by rule; in each column, read less all the rules is kept.

    Paragraphs are lines that are not blank. Characters are code points: with all white space as
    read, without line ends once cleaned (the difference is the rule `white_space`).
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    """By name in RULES. "read" counts documents as parsed; skipped records are not in it."""

    def add(self, rule: str, documents: int = 0, paragraphs: int = 0, characters: int = 0) -> None:
        """Count what `rule`, one of RULES, took away; "read" counts what came in."""
        assert rule in RULES, f"rule {rule!r} is not one of {', '.join(RULES)}"
        more = Counts(documents, paragraphs, characters)
        self.counts[rule] = self.counts.get(rule, Counts()) + more

    def merge(self, other: "Funnel") -> None:
        """Add the counts of another funnel, of a worker or of a block."""
        for rule, counts in other.counts.items():
            self.add(rule, *astuple(counts))

    @property
    def read(self) -> Counts:
        """All that came in: the documents read and the records that were skipped."""
        return sum((self._of(rule) for rule in ("read", *_SKIPPED)), Counts())

    @property
    def kept(self) -> Counts:
        """What no rule took away."""
        kept = self._of("read")
        for rule, kind, _ in _RULES:
            if kind != "skipped":
                kept -= self._of(rule)
        return kept

    def rows(self) -> list[Row]:
        """Return the table: read, the rules that did something, in their order, and kept."""
        rows = [Row("read", *astuple(self.read))]
        rows += [
            Row(f"  {label}", *astuple(self._of(rule)))
            for rule, _, label in _RULES
            if self._of(rule) != Counts()
        ]
        return [*rows, Row("kept", *astuple(self.kept))]

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts for JSON in the order of RULES; "kept" is added for readers."""
        counts = {rule: self._of(rule) for rule in RULES if rule in self.counts}
        return {
            rule: {"documents": c.documents, "paragraphs": c.paragraphs, "characters": c.characters}
            for rule, c in {**counts, "kept": self.kept}.items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, int]]) -> "Funnel":
        """Read what as_dict wrote; raise DataError for anything else."""
        funnel = cls()
        try:
            for rule in [name for name in data if name != "kept"]:
                if rule not in RULES:
                    raise KeyError(rule)
                funnel.add(rule, **{key: int(value) for key, value in data[rule].items()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"these are not the counts of a funnel: {data!r:.200}") from error
        return funnel

    def _of(self, rule: str) -> Counts:
        return self.counts.get(rule, Counts())
