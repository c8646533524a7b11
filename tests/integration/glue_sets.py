"""What tests of GLUE share: a tiny folder in the official layout, with the columns of each file."""

from pathlib import Path

# MNLI's other columns: parses, and opinions of single annotators.
_MNLI_HEAD = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse",
              "sentence2_binary_parse", "sentence1_parse", "sentence2_parse", "sentence1",
              "sentence2"]  # fmt: skip
_MNLI_ROW = ["7", "77c", "77", "fiction", "( a )", "( b )", "(ROOT a)", "(ROOT b)"]
_STS_HEAD = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
             "sentence2"]  # fmt: skip
_STS_ROW = ["main-news", "MSRvid", "2012test", "0001", "none", "none"]

Rows = list[list[str]]


def _mnli(labels: list[list[str]]) -> Rows:
    """Texts "The lamp is lit." and the number of the row; last the columns of labels."""
    texts = ["The lamp is lit.", "It is dusk "]
    return [[str(n), *_MNLI_ROW[1:], texts[0], f"{texts[1]}{n}", *own]
            for n, own in enumerate(labels)]  # fmt: skip


def _labelled(first: str, second: str, name: str, labels: list[str]) -> Rows:
    rows = [[str(n), f'The "lamp {n}', f"is lit at {n}", own] for n, own in enumerate(labels)]
    return [["index", first, second, name], *rows]


def _unlabelled(first: str, second: str | None, index: str = "index", count: int = 3) -> Rows:
    texts = [first] if second is None else [first, second]
    rows = [[str(n), *(f"{name} {n}" for name in texts)] for n in range(count)]
    return [[index, *texts], *rows]


def _sts(scores: list[str]) -> Rows:
    rows = [[str(n), *_STS_ROW, f"a lamp {n}", "a mill", own] for n, own in enumerate(scores)]
    return [[*_STS_HEAD, "score"], *rows]


_NLI = ["entailment", "not_entailment", "entailment", "not_entailment"]
_MRPC_HEAD = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
_MRPC = [[own, "12", "34", 'He said " so .', f"She said {n} ."] for n, own in enumerate("1011")]
_QQP_HEAD = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
_QQP = [[f"9{n}", "5", "6", "When is it lit?", f"Is it {n}?", own] for n, own in enumerate("0110")]
_COLA = [["gj04", own, "*" if own == "0" else "", f"The mill {n}."] for n, own in enumerate("1101")]
_SST = [["sentence", "label"], ["a large lamp ", "1"], ["the mill ", "0"], ["blue ", "1"]]
_WNLI = _labelled("sentence1", "sentence2", "label", list("0110"))
_MATCHED = [["entailment"] * 5 + ["neutral"], ["neutral"] * 5 + ["contradiction"],
            ["neutral"] * 5 + ["entailment"], ["neutral"] * 5 + ["neutral"]]  # fmt: skip
_FIVE = [f"label{n}" for n in range(1, 6)]

FILES: dict[str, Rows] = {
    "CoLA/train.tsv": _COLA,
    "CoLA/dev.tsv": _COLA,
    "CoLA/test.tsv": _unlabelled("sentence", None),
    "SST-2/train.tsv": _SST,
    "SST-2/dev.tsv": _SST,
    "SST-2/test.tsv": _unlabelled("sentence", None),
    "MRPC/train.tsv": [_MRPC_HEAD, *_MRPC],
    "MRPC/dev.tsv": [_MRPC_HEAD, *_MRPC],
    "MRPC/test.tsv": [["index", *_MRPC_HEAD[1:]], *([str(n), *row[1:]] for n, row in
                                                   enumerate(_MRPC))],
    "STS-B/train.tsv": _sts(["5.000", "0.400", "2.250"]),
    "STS-B/dev.tsv": _sts(["5.000", "0.400", "2.250"]),
    "STS-B/test.tsv": [row[:-1] for row in _sts(["", "", ""])],
    "QQP/train.tsv": [_QQP_HEAD, *_QQP],
    "QQP/dev.tsv": [_QQP_HEAD, *_QQP],
    "QQP/test.tsv": _unlabelled("question1", "question2", "id"),
    "MNLI/train.tsv": [[*_MNLI_HEAD, "label1", "gold_label"],
                       *_mnli([["entailment", "neutral"], ["neutral", "contradiction"]])],
    "MNLI/dev_matched.tsv": [[*_MNLI_HEAD, *_FIVE, "gold_label"], *_mnli(_MATCHED)],
    "MNLI/dev_mismatched.tsv": [[*_MNLI_HEAD, *_FIVE, "gold_label"], *_mnli(_MATCHED[::-1])],
    "MNLI/test_matched.tsv": [_MNLI_HEAD, *_mnli([[], [], []])],
    "MNLI/test_mismatched.tsv": [_MNLI_HEAD, *_mnli([[], [], []])],
    "QNLI/train.tsv": _labelled("question", "sentence", "label", _NLI),
    "QNLI/dev.tsv": _labelled("question", "sentence", "label", _NLI),
    "QNLI/test.tsv": _unlabelled("question", "sentence"),
    "RTE/train.tsv": _labelled("sentence1", "sentence2", "label", _NLI),
    "RTE/dev.tsv": _labelled("sentence1", "sentence2", "label", _NLI),
    "RTE/test.tsv": _unlabelled("sentence1", "sentence2"),
    "WNLI/train.tsv": _WNLI,
    "WNLI/dev.tsv": _WNLI,
    "WNLI/test.tsv": _unlabelled("sentence1", "sentence2"),
    "diagnostic/diagnostic.tsv": _unlabelled("sentence1", "sentence2"),
}  # fmt: skip


def write_rows(path: Path, rows: Rows, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(row) + end for row in rows).encode())


def write_glue(folder: Path) -> Path:
    """The folder with all files in it."""
    for name, rows in FILES.items():
        write_rows(folder / name, rows)
    return folder
