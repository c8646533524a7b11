"""Fine-tune for SQuAD with one seed: a job in; answers and official scores out.

OUT/seed_1/result.json             written last: what has it is done
OUT/seed_1/predictions.json, nbest_predictions.json, null_odds.json    as the original script's
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stacking.config import BertConfig
from stacking.deepspeed_config import load_deepspeed_config
from stacking.errors import ConfigError
from stacking.fine_tuning import FineTuner, Rows, Setting
from stacking.fine_tuning_batch import LabelledBatch
from stacking.fine_tuning_jobs import Start, naming, tell_once, teller, write_result
from stacking.fine_tuning_models import BertForQuestionAnswering
from stacking.squad_data import SquadError, SquadSet, read_squad, some_ids, training_set
from stacking.squad_features import NUM_SPECIAL, SquadFeatures, WindowSettings, squad_features
from stacking.squad_metrics import Scores, score_version_1, score_version_2
from stacking.squad_predictions import (
    NBEST,
    NULL_ODDS,
    PREDICTIONS,
    AnswerSettings,
    predict,
    write_predictions,
)

# Devlin et al. 2019, sections 4.2 and 4.3.
SETTING_1 = Setting(num_epochs=3, batch_size=32, learning_rate=5e-5)
SETTING_2 = Setting(num_epochs=2, batch_size=48, learning_rate=5e-5)


@dataclass(frozen=True)
class SquadJob:
    """All that decides a result, and where it is written."""

    start: Start
    train: Path
    dev: Path
    folder: Path
    """OUT/seed_N."""
    seed: int
    setting: Setting
    windows: WindowSettings
    answers: AnswerSettings
    null_score_diff_threshold: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        return f"SQuAD seed {self.seed}"

    @property
    def result(self) -> Path:
        """The file whose existence says that the job is done."""
        return self.folder / "result.json"

    def files(self) -> list[Path]:
        """The answers that are written before the result."""
        odds = [NULL_ODDS] if read_squad(self.dev).is_version_2 else []
        return [self.folder / name for name in (PREDICTIONS, NBEST, *odds)]

    def conditions(self) -> dict[str, object]:
        """What a finished result must have had to be this job's."""
        files = {"train": self.train, "dev": self.dev}
        return {
            **self.start.conditions(self.setting, self.seed, files),
            **asdict(self.windows), **asdict(self.answers),
            "null_score_diff_threshold": self.null_score_diff_threshold,
        }  # fmt: skip


@dataclass(frozen=True)
class SquadResult:
    """What a job came to."""

    job: SquadJob
    scores: Scores
    """Under their official names, in per cent."""
    seconds: float


def default_setting(train: Path) -> Setting:
    """The original BERT's for the version that the file has."""
    return SETTING_2 if read_squad(train).is_version_2 else SETTING_1


def windows_for(config: BertConfig, given: Mapping[str, int]) -> WindowSettings:
    """The original BERT's, or what fits shorter sequences: overlapping windows.

    `given` replaces fields by name. ConfigError where the model takes no windows of this length.
    """
    most = config.max_position_embeddings
    longest = given.get("max_seq_length", min(384, most))
    if longest > most:
        raise ConfigError(
            f"--max-seq-length: got {longest}; allowed: at most {most}, the model's longest"
        )
    query = given.get("max_query_length", max(1, min(64, (longest - NUM_SPECIAL) // 2)))
    stride = given.get("doc_stride", min(128, max(1, (longest - NUM_SPECIAL - query) // 2)))
    return WindowSettings(longest, stride, query)


def run_job(job: SquadJob) -> SquadResult:
    """Fine-tune, answer, score and write; nothing counts until the result is written."""
    began = time.monotonic()
    conditions = job.conditions()
    start, given, dev = job.start.load(), training_set(read_squad(job.train)), read_squad(job.dev)
    rows = SquadRows(squad_features(given.examples, start.tokenizer, job.windows))
    if not len(rows):
        raise SquadError(f"{job.train}: nothing to train on: no question has a usable answer")
    tuner = FineTuner(
        start, BertForQuestionAnswering, job.setting,
        load_deepspeed_config(job.start.deepspeed_config), num_rows=len(rows), seed=job.seed,
        strict_precision=job.start.strict_precision,
    )  # fmt: skip
    asked = SquadRows(squad_features(dev.examples, start.tokenizer, job.windows))
    notes = [*given.notes(), *rows.notes(job.train, "left out"),
             *asked.notes(job.dev, "answered with nothing")]  # fmt: skip
    for note in [*tuner.notices, *notes]:
        tell_once(note)
    with tuner, naming(job.name):
        tuner.train(lambda _: rows, teller(job.name))
        scores = _answer(job, tuner, dev, asked)
    result = SquadResult(job, scores, time.monotonic() - began)
    write_result(
        job.result, start, tuner, scores=scores, seconds=result.seconds,
        conditions=conditions, notes=notes,
    )  # fmt: skip
    return result


def _answer(job: SquadJob, tuner: FineTuner, dev: SquadSet, asked: "SquadRows") -> Scores:
    """Predict, write the original's files, and score them."""
    features = asked.features
    logits = np.full((*features.input_ids.shape, 2), np.finfo(np.float32).min, np.float32)
    for rows, found in tuner.predict(asked) if len(logits) else ():
        logits[rows, : found.shape[1]] = found
    said = predict(
        dev.examples, features, logits[..., 0], logits[..., 1], job.answers,
        is_version_2=dev.is_version_2,
    )  # fmt: skip
    write_predictions(job.folder, said, job.null_score_diff_threshold)
    texts = {one.id: one.text(job.null_score_diff_threshold) for one in said}
    if not dev.is_version_2:
        return score_version_1(dev.examples, texts)
    odds = {one.id: one.null_odds for one in said if one.null_odds is not None}
    return score_version_2(dev.examples, texts, odds, math.inf)


@dataclass(frozen=True, eq=False)
class SquadRows:
    """Windows as the fine-tuner takes them."""

    features: SquadFeatures

    def __len__(self) -> int:
        """W."""
        return len(self.features.input_ids)

    def notes(self, path: Path, consequence: str) -> list[str]:
        """Which questions of the file have no window, and what becomes of them; a line or none."""
        ids = self.features.dropped
        return [f"{path}: {len(ids)} questions {consequence}: their answer, or their whole "
                f"context, has no token: {some_ids(ids)}"] if ids else []  # fmt: skip

    def lengths(self) -> Rows:
        """Tokens of each window, [W]."""
        found: Rows = self.features.input_mask.sum(axis=1, dtype=np.int64)
        return found

    def labelled_batch(self, rows: Rows) -> LabelledBatch:
        """The windows [B], padded to the longest of them; labels [B, 2]."""
        found = self.features
        width = int(found.input_mask[rows].sum(axis=1, dtype=np.int64).max())
        labels: npt.NDArray[np.int64] = np.stack(
            [found.start_positions[rows], found.end_positions[rows]], axis=1
        ).astype(np.int64)
        return LabelledBatch.of_rows(
            found.input_ids[rows, :width], found.segment_ids[rows, :width],
            found.input_mask[rows, :width], labels,
        )  # fmt: skip
