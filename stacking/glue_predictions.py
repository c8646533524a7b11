"""A model's logits in; predictions and submission files in GLUE's official form out, and back.

The 2019 code took the argmax over the logits of every task, which is 0 wherever there is one logit:
here one logit says class 1 above 0, and a regression's value is scaled back to a score.
N rows, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.shard_format import write_atomically
from stacking.errors import NonFiniteError
from stacking.glue_data import GlueError, GlueExample, label_number, read_rows
from stacking.glue_tasks import STS_B_CENTRE, STS_B_HALF, STS_B_RANGE, GlueTask

Doubles = npt.NDArray[np.float64]

HEADER = ("index", "prediction")


def predict(task: GlueTask, logits: npt.NDArray[np.floating]) -> Doubles:
    """Class numbers or scores in 0 to 5, [N]; logits are [N, C], or [N, 1] where a task has one.

    The first of equally likely classes is taken, and a single logit of 0 is class 0.
    NonFiniteError if a logit is no number.
    """
    assert logits.shape == (len(logits), task.num_logits), (logits.shape, task.name)
    if not np.isfinite(logits).all():
        raise NonFiniteError(
            f"{task.name}: the model's logits hold NaN or infinity; nothing can be predicted "
            "with it"
        )
    if task.kind == "classes":
        best: Doubles = logits.argmax(axis=1).astype(np.float64)
        return best
    if task.kind == "one_logit":
        return (logits[:, 0] > 0).astype(np.float64)
    scores = logits[:, 0].astype(np.float64) * STS_B_HALF + STS_B_CENTRE
    clipped: Doubles = np.clip(scores, *STS_B_RANGE)
    return clipped


def constant_predictions(task: GlueTask, num_rows: int) -> Doubles:
    """What the recipe submits for a task that it does not train (WNLI), [N]."""
    assert task.constant is not None, f"{task.name} is predicted by a model"
    return np.full(num_rows, float(task.labels.index(task.constant)))


def submission_file(task: GlueTask) -> str:
    """The official name, as in CoLA.tsv."""
    return f"{task.name}.tsv"


def write_submission(
    folder: Path, task: GlueTask, examples: Sequence[GlueExample], predictions: Doubles
) -> Path:
    """Write the predictions [N] of the examples in their order; return the file."""
    assert len(examples) == len(predictions), "the predictions are of other examples"
    rows = zip(examples, predictions.tolist(), strict=True)
    lines = [HEADER, *((str(one.index), _written(task, value)) for one, value in rows)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / submission_file(task)
    write_atomically(path, "".join("\t".join(line) + "\n" for line in lines).encode())
    return path


def read_submission(path: Path, task: GlueTask) -> dict[int, float]:
    """Read a submission file, ours or anybody's: index -> class number or score.

    GlueError with the line of the first fault.
    """
    rows = read_rows(path)
    if tuple(cell.strip() for cell in rows[0]) != HEADER:
        raise GlueError(f"{path}: line 1: allowed: the header {' TAB '.join(HEADER)}")
    found: dict[int, float] = {}
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != 2 or not row[0].strip().isdecimal():
            raise GlueError(f"{path}: line {line}: allowed: an index, a tab and a prediction")
        index, value = int(row[0]), label_number(task, row[1].strip())
        if value is None:
            raise GlueError(
                f"{path}: line {line}: got {row[1].strip()[:40]!r}; allowed: {_allowed(task)}"
            )
        if index in found:
            raise GlueError(f"{path}: line {line}: index {index} has a prediction already")
        found[index] = value
    return found


def _written(task: GlueTask, value: float) -> str:
    return f"{value:.6f}" if task.kind == "regression" else task.labels[int(value)]


def _allowed(task: GlueTask) -> str:
    if task.kind == "regression":
        return f"a number from {STS_B_RANGE[0]:g} to {STS_B_RANGE[1]:g}"
    return " or ".join(task.labels)
