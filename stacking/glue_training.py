"""Fine-tune one task with one seed: a job in; scores, predictions and submission files out.

OUT/seed_1/CoLA.json         the result, written last: what has it is done
OUT/seed_1/dev/CoLA.tsv      predictions for dev, as `glue.py score` reads them
OUT/seed_1/test/CoLA.tsv     for test, in the leaderboard's form; the folder is a submission
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from stacking.deepspeed_config import load_deepspeed_config
from stacking.fine_tuning import FineTuner, Rows, Setting
from stacking.fine_tuning_batch import LabelledBatch
from stacking.fine_tuning_jobs import Start, naming, read_done, tell_once, teller, write_result
from stacking.fine_tuning_models import BertForSequenceClassification
from stacking.glue_data import GlueSet, find_file, read_glue
from stacking.glue_features import GlueFeatures, glue_features, symmetric_swaps
from stacking.glue_metrics import Scores, score_rows
from stacking.glue_predictions import Doubles, predict, submission_file, write_submission
from stacking.glue_tasks import BY_NAME, SPLITS, GlueTask
from stacking.pretrained import Pretrained


@dataclass(frozen=True)
class GlueJob:
    """All that decides a result, and where it is written."""

    task: str
    seed: int
    setting: Setting
    folder: Path
    """OUT/seed_N, or OUT/grid/SETTING."""
    start: Start
    glue: Path
    max_seq_length: int = 384
    predicts_test: bool = True
    label: str = ""
    """What tells it from the task's others; "": its seed."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.task} {self.label or f'seed {self.seed}'}"

    @property
    def result(self) -> Path:
        """The file whose existence says that the job is done."""
        return self.folder / f"{self.task}.json"

    def tested(self) -> list[GlueTask]:
        """Whose test file the model predicts: the task's, and AX with MNLI-m's."""
        if not self.predicts_test:
            return []
        tasks = [task for task in BY_NAME.values() if self.task in (task.name, task.predicted_by)]
        return [task for task in tasks if find_file(self.glue, task, "test") is not None]

    def files(self) -> list[Path]:
        """The predictions that are written before the result."""
        tested = [self.folder / "test" / submission_file(task) for task in self.tested()]
        return [self.folder / "dev" / submission_file(BY_NAME[self.task]), *tested]

    def conditions(self) -> dict[str, object]:
        """What a finished result must have had to be this job's."""
        own, others = BY_NAME[self.task], [one for one in self.tested() if one.name != self.task]
        paths: dict[str, Path | None] = {split: find_file(self.glue, own, split)
                                         for split in SPLITS}  # fmt: skip
        paths |= {f"test of {task.name}": find_file(self.glue, task, "test") for task in others}
        files = {split: path for split, path in paths.items() if path is not None}
        longest = min(self.max_seq_length, self.start.load().config.max_position_embeddings)
        return {
            **self.start.conditions(self.setting, self.seed, files), "max_seq_length": longest
        }  # fmt: skip


@dataclass(frozen=True)
class GlueResult:
    """What a job came to."""

    job: GlueJob
    scores: Scores
    """Dev metrics in per cent."""
    seconds: float


def read_result(job: GlueJob) -> GlueResult | None:
    """The finished result; None if it is not done; ConfigError if it is of another job."""
    found = read_done(job.name, job.result, job.files(), job.conditions())
    return None if found is None else GlueResult(job, *found)


def run_job(job: GlueJob) -> GlueResult:
    """Fine-tune, predict, score and write; nothing counts until the result is written."""
    began = time.monotonic()
    task, start, conditions = BY_NAME[job.task], job.start.load(), job.conditions()
    dev, train = read_glue(job.glue, task, "dev"), read_glue(job.glue, task, "train")
    tests = [read_glue(job.glue, one, "test") for one in job.tested()]
    rows = GlueRows.of(train, start, job.max_seq_length)
    make = partial(BertForSequenceClassification, kind=task.kind, num_logits=task.num_logits)
    tuner = FineTuner(
        start, make, job.setting, load_deepspeed_config(job.start.deepspeed_config),
        num_rows=len(rows), seed=job.seed, strict_precision=job.start.strict_precision,
    )  # fmt: skip
    for notice in tuner.notices:
        tell_once(notice)
    with tuner, naming(job.name):
        tuner.train(partial(rows.epoch, seed=job.seed), teller(job.name))
        said = _predict(job, tuner, dev, start)
        for test in tests:
            _predict(job, tuner, test, start)
    result = GlueResult(job, score_rows(dev, said), time.monotonic() - began)
    write_result(
        job.result, start, tuner, scores=result.scores, seconds=result.seconds,
        conditions=conditions, notes=[*train.notes(), *dev.notes()],
    )  # fmt: skip
    return result


def _predict(job: GlueJob, tuner: FineTuner, part: GlueSet, start: Pretrained) -> Doubles:
    """Predict a file's rows and write them as a submission."""
    logits = np.empty((len(part.examples), part.task.num_logits), np.float32)
    for rows, found in tuner.predict(GlueRows.of(part, start, job.max_seq_length)):
        logits[rows] = found
    said = predict(part.task, logits)
    write_submission(job.folder / part.split, part.task, part.examples, said)
    return said


@dataclass(frozen=True, eq=False)
class GlueRows:
    """A file's rows as the fine-tuner takes them."""

    features: GlueFeatures
    is_symmetric: bool

    @classmethod
    def of(cls, part: GlueSet, start: Pretrained, max_seq_length: int) -> "GlueRows":
        """Tokenised by the model's own tokenizer, no longer than the model takes."""
        longest = min(max_seq_length, start.config.max_position_embeddings)
        found = glue_features(part.examples, part.task, start.tokenizer, longest)
        recipe = part.task.recipe
        return cls(found, recipe is not None and recipe.is_symmetric)

    def __len__(self) -> int:
        """N."""
        return len(self.features)

    def lengths(self) -> Rows:
        """Tokens of each row, [N]."""
        return self.features.lengths()

    def epoch(self, number: int, seed: int) -> "GlueRows":
        """The rows to train on; of a symmetric task with half of the pairs swapped."""
        if not self.is_symmetric:
            return self
        swaps = symmetric_swaps(len(self), np.random.default_rng((seed, number, 1)))
        return GlueRows(self.features.swapped(swaps), self.is_symmetric)

    def labelled_batch(self, rows: Rows) -> LabelledBatch:
        """The rows [B], padded to the longest of them."""
        found = self.features.batch(rows)
        return LabelledBatch.of_rows(
            found.input_ids, found.segment_ids, found.input_mask, found.targets
        )
