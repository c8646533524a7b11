"""GLUE's nine tasks and its diagnostics as data: files, columns, labels, metrics, recipes.

The recipes are those of the StackingBERT paper (Gong et al., ICML 2019; reproduce_glue.sh): found
on dev with its baseline and kept for all models. MNLI is two tasks of one training file, as the
2019 code trains it twice; they differ in dev and test only.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

Kind = Literal["classes", "one_logit", "regression"]
Metric = Literal["matthews", "accuracy", "f1", "pearson", "spearman"]
Split = Literal["train", "dev", "test"]

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Columns:
    """Where a file has what: names of its header, or numbers of columns where it has none."""

    first: str | int
    second: str | int | None = None
    """None: a task of single sentences."""
    label: str | int | None = None
    """None in test files, whose labels are GLUE's secret."""
    index: str | None = None
    """What a submission calls the row; None: rows are numbered from 0."""

    @property
    def has_header(self) -> bool:
        """Whether the file's first line names its columns."""
        return isinstance(self.first, str)


@dataclass(frozen=True)
class GlueFile:
    """One file of the official layout."""

    path: str
    """Below the GLUE folder."""
    num_rows: int
    """Of the official file, its header left out."""
    columns: Columns


@dataclass(frozen=True)
class GlueRecipe:
    """How a task is fine-tuned; Adam's weight decay is decoupled, the rate falls linearly to 0."""

    num_epochs: int
    batch_size: int
    learning_rate: float
    is_symmetric: bool = False
    """Swap the two sentences of a pair in training with probability 1/2."""
    warmup_share: float = 0.1
    """Of the updates."""
    weight_decay: float = 0.01
    max_seq_length: int = 384
    """Tokens, special ones included."""


@dataclass(frozen=True)
class GlueTask:
    """A line of the leaderboard."""

    name: str
    """As the leaderboard and its submission files call it."""
    kind: Kind
    labels: tuple[str, ...]
    """As in files and submissions, in the order of the class numbers; none for a regression."""
    metrics: tuple[Metric, ...]
    dev: GlueFile | None
    test: GlueFile
    train: GlueFile | None
    recipe: GlueRecipe | None
    """None: not trained, `predicted_by` or `constant` says what is submitted."""
    predicted_by: str | None = None
    """The task whose model predicts this one."""
    constant: str | None = None
    """The label that the recipe submits for every row."""

    @property
    def is_pair(self) -> bool:
        """Whether rows have two sentences."""
        return self.test.columns.second is not None

    @property
    def num_logits(self) -> int:
        """Width of the classifier's output."""
        return len(self.labels) if self.kind == "classes" else 1

    def file(self, split: Split) -> GlueFile | None:
        """The file of a split; None: the task has none."""
        files: dict[Split, GlueFile | None] = {
            "train": self.train, "dev": self.dev, "test": self.test
        }  # fmt: skip
        return files[split]


STS_B_RANGE = (0.0, 5.0)
STS_B_CENTRE, STS_B_HALF = 3.0, 2.0  # what is trained on is (score - 3) / 2, as in 2019

# The BERT paper's grid (Devlin et al. 2019, appendix A.3, without its 2 epochs), which the
# StackingBERT paper searches on dev.
GRID_BATCH_SIZES = (16, 32)
GRID_LEARNING_RATES = (5e-5, 3e-5, 2e-5)
GRID_EPOCHS = (3, 4)


@dataclass(frozen=True)
class GridPoint:
    """One of the settings that are tried on dev."""

    batch_size: int
    learning_rate: float
    num_epochs: int

    def __str__(self) -> str:
        """For people."""
        return f"batch {self.batch_size}, rate {self.learning_rate:g}, {self.num_epochs} epochs"


def grid() -> list[GridPoint]:
    """The paper's 12 settings, in an order that never changes."""
    return [GridPoint(*one) for one in product(GRID_BATCH_SIZES, GRID_LEARNING_RATES, GRID_EPOCHS)]


_BINARY = ("0", "1")
_ENTAILED = ("entailment", "not_entailment")
_NLI = ("contradiction", "entailment", "neutral")

_COLA = Columns(3, label=1)  # source, label, the author's mark, sentence; no header
_MRPC = Columns("#1 String", "#2 String", "Quality")
_QNLI = Columns("question", "sentence", "label")
_QQP = Columns("question1", "question2", "is_duplicate")
_PAIR = Columns("sentence1", "sentence2", "label")
_STS_B = Columns("sentence1", "sentence2", "score")
_MNLI = Columns("sentence1", "sentence2", "gold_label")  # label1 is one annotator's opinion
_PAIR_TEST = Columns("sentence1", "sentence2", index="index")


def _mnli(name: str, part: str, num_dev: int, num_test: int) -> GlueTask:
    return GlueTask(
        name, "classes", _NLI, ("accuracy",),
        dev=GlueFile(f"MNLI/dev_{part}.tsv", num_dev, _MNLI),
        test=GlueFile(f"MNLI/test_{part}.tsv", num_test, _PAIR_TEST),
        train=GlueFile("MNLI/train.tsv", 392_702, _MNLI),
        recipe=GlueRecipe(3, 16, 5e-5),
    )  # fmt: skip


TASKS: tuple[GlueTask, ...] = (
    GlueTask(
        "CoLA", "one_logit", _BINARY, ("matthews",),
        dev=GlueFile("CoLA/dev.tsv", 1043, _COLA),
        test=GlueFile("CoLA/test.tsv", 1063, Columns("sentence", index="index")),
        train=GlueFile("CoLA/train.tsv", 8551, _COLA),
        recipe=GlueRecipe(3, 16, 5e-5),
    ),
    GlueTask(
        "SST-2", "classes", _BINARY, ("accuracy",),
        dev=GlueFile("SST-2/dev.tsv", 872, Columns("sentence", label="label")),
        test=GlueFile("SST-2/test.tsv", 1821, Columns("sentence", index="index")),
        train=GlueFile(
            "SST-2/train.tsv", 67_349, Columns("sentence", label="label")),
        recipe=GlueRecipe(3, 16, 5e-5),
    ),
    GlueTask(
        "MRPC", "one_logit", _BINARY, ("f1", "accuracy"),
        dev=GlueFile("MRPC/dev.tsv", 408, _MRPC),
        test=GlueFile("MRPC/test.tsv", 1725, Columns("#1 String", "#2 String", index="index")),
        train=GlueFile("MRPC/train.tsv", 3668, _MRPC),
        recipe=GlueRecipe(3, 16, 5e-5, is_symmetric=True),
    ),
    GlueTask(
        "STS-B", "regression", (), ("pearson", "spearman"),
        dev=GlueFile("STS-B/dev.tsv", 1500, _STS_B),
        test=GlueFile("STS-B/test.tsv", 1379, _PAIR_TEST),
        train=GlueFile("STS-B/train.tsv", 5749, _STS_B),
        recipe=GlueRecipe(4, 32, 5e-5, is_symmetric=True),
    ),
    GlueTask(
        "QQP", "one_logit", _BINARY, ("f1", "accuracy"),
        dev=GlueFile("QQP/dev.tsv", 40_430, _QQP),
        test=GlueFile("QQP/test.tsv", 390_965, Columns("question1", "question2", index="id")),
        train=GlueFile("QQP/train.tsv", 363_849, _QQP),
        recipe=GlueRecipe(4, 32, 5e-5, is_symmetric=True),
    ),
    _mnli("MNLI-m", "matched", 9815, 9796),
    _mnli("MNLI-mm", "mismatched", 9832, 9847),
    GlueTask(
        "QNLI", "classes", _ENTAILED, ("accuracy",),
        dev=GlueFile("QNLI/dev.tsv", 5463, _QNLI),
        test=GlueFile("QNLI/test.tsv", 5463, Columns("question", "sentence", index="index")),
        train=GlueFile("QNLI/train.tsv", 104_743, _QNLI),
        recipe=GlueRecipe(3, 32, 5e-5),
    ),
    GlueTask(
        "RTE", "classes", _ENTAILED, ("accuracy",),
        dev=GlueFile("RTE/dev.tsv", 277, _PAIR),
        test=GlueFile("RTE/test.tsv", 3000, _PAIR_TEST),
        train=GlueFile("RTE/train.tsv", 2490, _PAIR),
        recipe=GlueRecipe(4, 16, 3e-5),
    ),
    # Training and development pairs contradict each other: the most frequent label is submitted.
    GlueTask(
        "WNLI", "classes", _BINARY, ("accuracy",),
        dev=GlueFile("WNLI/dev.tsv", 71, _PAIR),
        test=GlueFile("WNLI/test.tsv", 146, _PAIR_TEST),
        train=GlueFile("WNLI/train.tsv", 635, _PAIR),
        recipe=None,
        constant="0",
    ),
    GlueTask(
        "AX", "classes", _NLI, ("matthews",),
        dev=None,
        test=GlueFile("diagnostic/diagnostic.tsv", 1104, _PAIR_TEST),
        train=None,
        recipe=None,
        predicted_by="MNLI-m",
    ),
)  # fmt: skip

BY_NAME = {task.name: task for task in TASKS}
