"""metrics.jsonl -> RunMetrics: typed rows, with what a resume superseded taken out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.plain_files import require_plain
from stacking.errors import UserError

Row = Mapping[str, object]

_LARGEST_NUMBER = 2**63


@dataclass(frozen=True)
class StagePlan:
    """One stage as the recipe plans it."""

    num_hidden_layers: int
    steps: int
    num_parameters: int
    num_trained: int


@dataclass(frozen=True)
class RunStart:
    """The first row: what runs, and where."""

    name: str
    total_steps: int
    stages: tuple[StagePlan, ...]
    world_size: int
    device: str
    precision: str
    unigram_loss: float  # nats per masked token; NaN where unknown
    data_fingerprint: int | None = None  # of the training shards; None in runs of older versions
    validation_fingerprint: int | None = None
    branch_from: str = ""  # RUN@STEP whose rows come first; empty: it began by itself
    start_from: str = ""  # folder whose weights were its first ones; empty: random ones
    start_sha256: str = ""  # of those
    device_name: str = ""  # such as "NVIDIA A100-SXM4-80GB"; empty in runs of older versions
    matmul_flops_per_second: float = math.nan  # dense products of all ranks together
    versions: str = ""  # of torch, DeepSpeed and this trainer; empty in runs of older versions


@dataclass(frozen=True)
class TrainRow:
    """Some optimizer steps up to `global_step`."""

    global_step: int
    stage: int  # 0-based
    mlm_loss: float  # nats per masked token
    lr: float
    tokens: int  # since the run's start
    tokens_per_second: float
    step_seconds: float
    elapsed_seconds: float
    grad_norm: float = math.nan  # of the last of the steps, before clipping
    grad_norm_old: float = math.nan  # of the parameters that the stage found; NaN: not measured
    grad_norm_new: float = math.nan  # of those that came with it


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation on the held-out documents."""

    global_step: int
    stage: int
    val_mlm_loss: float
    val_mlm_accuracy: float
    elapsed_seconds: float
    residual_rms: tuple[float, ...] = ()  # of the hidden states: embeddings, then each layer


@dataclass(frozen=True)
class SwitchRow:
    """One growth."""

    global_step: int
    to_stage: int
    changes: dict[str, tuple[str, str]]  # fields of the model that differ: before and after
    operator: str
    moments: str
    similarity: dict[str, float]  # mean cosine between copies of units, right after growth
    loss_before: float
    loss_after: float
    max_logit_difference: float
    seconds: float
    seconds_by_part: dict[str, float]
    residual_rms_before: tuple[float, ...] = ()  # of the small model's hidden states in the probe
    residual_rms_after: tuple[float, ...] = ()


@dataclass(frozen=True)
class SymmetryRow:
    """How alike duplicated units are, some steps after they were made."""

    global_step: int
    stage: int
    similarity: dict[str, float]


@dataclass(frozen=True)
class ResidualRow:
    """How large the hidden states are: after the embeddings, then after each layer."""

    global_step: int
    stage: int
    rms: tuple[float, ...]


@dataclass(frozen=True)
class RunMetrics:
    """A run so far, each kind of row ordered by step."""

    start: RunStart
    train: tuple[TrainRow, ...]
    evaluations: tuple[EvaluationRow, ...]
    switches: tuple[SwitchRow, ...]
    symmetry: tuple[SymmetryRow, ...]
    num_resumes: int
    is_finished: bool
    resumes: tuple[int, ...] = ()  # steps at which a new process went on, where that still counts

    @property
    def global_step(self) -> int:
        """Steps known to be done."""
        steps = [row.global_step for row in self.train]
        return max(steps + [row.global_step for row in self.evaluations], default=0)

    @property
    def elapsed_seconds(self) -> float:
        """Time up to the newest row; NaN where there is none."""
        seconds = [row.elapsed_seconds for row in self.train]
        return max(seconds + [row.elapsed_seconds for row in self.evaluations], default=math.nan)

    @property
    def residuals(self) -> list[ResidualRow]:
        """Of the grown model at each switch, and of each evaluation, ordered by stage and step."""
        rows = [ResidualRow(r.global_step, r.to_stage, r.residual_rms_after) for r in self.switches]
        rows += [ResidualRow(r.global_step, r.stage, r.residual_rms) for r in self.evaluations]
        return sorted((r for r in rows if r.rms), key=lambda r: (r.stage, r.global_step))

    def train_rows(self, stage: int) -> list[TrainRow]:
        """One stage's rows; `stage` is 0-based."""
        return [row for row in self.train if row.stage == stage]

    def first_step(self, stage: int) -> int:
        """Steps before the stage begins."""
        return sum(plan.steps for plan in self.start.stages[:stage])

    def stage_seconds(self, stage: int) -> float:
        """Seconds in optimizer steps, without evaluation and saving; NaN before the first."""
        rows, before, seconds = self.train_rows(stage), self.first_step(stage), 0.0
        for row in rows:
            seconds += row.step_seconds * (row.global_step - before)
            before = row.global_step
        return seconds if rows else math.nan


def read_rows(path: Path) -> list[Row]:
    """The rows of RUN_DIR/metrics.jsonl that count: none that a resume superseded."""
    return _without_superseded(_read_rows(path))


def read_metrics(path: Path) -> RunMetrics:
    """Read RUN_DIR/metrics.jsonl. Raises UserError on anything that is no such file."""
    rows = _read_rows(path)
    try:
        return _run_metrics(path, rows)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: a row is not as this version writes it ({type(error).__name__}: {error}); "
            "was it written by another version, or edited?"
        ) from error


def _run_metrics(path: Path, rows: Sequence[Row]) -> RunMetrics:
    kept = _without_superseded(rows)
    start = next((row for row in rows if row["event"] == "run_start"), None)
    if start is None:
        raise UserError(f"{path}: holds no run_start row; the run stopped before its first step")
    run = RunMetrics(
        start=_start(start),
        train=tuple(_train(row) for row in _of_kind(kept, "train")),
        evaluations=tuple(_evaluation(row) for row in _of_kind(kept, "evaluation")),
        switches=tuple(_switch(row) for row in _of_kind(kept, "stage_switch")),
        symmetry=tuple(_symmetry(row) for row in _of_kind(kept, "symmetry")),
        num_resumes=sum(row["event"] == "resume" for row in rows),
        is_finished=any(row["event"] == "run_end" for row in kept),
        resumes=tuple(_integer(row, "global_step") for row in _of_kind(kept, "resume")),
    )
    for rows_of_kind in (run.train, run.evaluations, run.symmetry):
        stages = [row.stage for row in rows_of_kind]
        if stages != sorted(stages) or max(stages, default=0) >= len(run.start.stages):
            raise ValueError(f"the stages of its rows are {str(stages)[:60]}, in order of steps")
    for row in run.residuals:
        layers = run.start.stages[row.stage].num_hidden_layers
        if len(row.rms) != 1 + layers:
            raise ValueError(f"{len(row.rms)} sizes of hidden states in a model of {layers} layers")
    return run


def _read_rows(path: Path) -> list[Row]:
    try:
        require_plain(path)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the --run-dir of a training run"
        ) from error
    lines = content.split(b"\n")
    # A whole line ends in a newline: what follows the last one was torn by a kill, or is empty.
    return [_row(path, number, line) for number, line in enumerate(lines[:-1], 1) if line.strip()]


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, line {number}: is no JSON ({error}); the file is damaged there"
        ) from error
    if not isinstance(row, dict) or "event" not in row:
        raise UserError(f'{path}, line {number}: is no object with an "event"')
    return row


def _without_superseded(rows: Sequence[Row]) -> list[Row]:
    """Drop what came after the checkpoint that a later resume went back to."""
    kept: list[Row] = []
    for row in rows:
        if row["event"] == "resume":
            step = _integer(row, "global_step")
            kept = [old for old in kept if _integer(old, "global_step", 0) <= step]
        kept.append(row)
    return kept


def _of_kind(rows: Sequence[Row], event: str) -> list[Row]:
    """Rows of one kind by step; of two for the same step the later one counts."""
    newest = {_integer(row, "global_step"): row for row in rows if row["event"] == event}
    return [newest[step] for step in sorted(newest)]


def _start(row: Row) -> RunStart:
    stages = row["stages"]
    if not isinstance(stages, list) or not stages:
        raise ValueError("stages is no list")
    return RunStart(
        name=str(row.get("name", "run")),
        total_steps=_integer(row, "total_steps"),
        stages=tuple(
            StagePlan(
                _integer(stage, "num_hidden_layers"),
                _integer(stage, "steps"),
                _integer(stage, "num_parameters"),
                _integer(stage, "num_trained"),
            )
            for stage in stages
        ),
        world_size=_integer(row, "world_size"),
        device=str(row["device"]),
        precision=str(row["precision"]),
        unigram_loss=_float(row, "unigram_loss"),
        data_fingerprint=_fingerprint(row, "data_fingerprint"),
        validation_fingerprint=_fingerprint(row, "validation_fingerprint"),
        branch_from=str(row.get("branch_from", "")),
        start_from=str(row.get("start_from", "")),
        start_sha256=str(row.get("start_sha256", "")),
        device_name=str(row.get("device_name") or ""),
        matmul_flops_per_second=_float(row, "matmul_flops_per_second"),
        versions=str(row.get("versions", "")),
    )


def _train(row: Row) -> TrainRow:
    return TrainRow(
        global_step=_integer(row, "global_step"),
        stage=_integer(row, "stage"),
        mlm_loss=_float(row, "mlm_loss"),
        lr=_float(row, "lr"),
        tokens=_integer(row, "tokens"),
        tokens_per_second=_float(row, "tokens_per_second"),
        step_seconds=_float(row, "step_seconds"),
        elapsed_seconds=_float(row, "elapsed_seconds"),
        grad_norm=_float(row, "grad_norm"),
        grad_norm_old=_float(row, "grad_norm_old"),
        grad_norm_new=_float(row, "grad_norm_new"),
    )


def _evaluation(row: Row) -> EvaluationRow:
    return EvaluationRow(
        global_step=_integer(row, "global_step"),
        stage=_integer(row, "stage"),
        val_mlm_loss=_float(row, "val_mlm_loss"),
        val_mlm_accuracy=_float(row, "val_mlm_accuracy"),
        elapsed_seconds=_float(row, "elapsed_seconds"),
        residual_rms=_sizes(row, "residual_rms"),
    )


def _switch(row: Row) -> SwitchRow:
    changes = row["changes"]
    if not isinstance(changes, dict):
        raise TypeError(f"changes is {changes!r}, no object")
    return SwitchRow(
        global_step=_integer(row, "global_step"),
        to_stage=_integer(row, "to_stage"),
        changes={str(name): (str(old), str(new)) for name, (old, new) in changes.items()},
        operator=str(row["operator"]),
        moments=str(row["moments"]),
        similarity=_floats(row, "duplicate_similarity"),
        loss_before=_float(row, "loss_before"),
        loss_after=_float(row, "loss_after"),
        max_logit_difference=_float(row, "max_logit_difference"),
        seconds=_float(row, "seconds"),
        seconds_by_part=_floats(row, "seconds_by_part"),
        residual_rms_before=_sizes(row, "residual_rms_before"),
        residual_rms_after=_sizes(row, "residual_rms_after"),
    )


def _symmetry(row: Row) -> SymmetryRow:
    return SymmetryRow(
        global_step=_integer(row, "global_step"),
        stage=_integer(row, "stage"),
        similarity=_floats(row, "duplicate_similarity"),
    )


def _floats(row: Row, key: str) -> dict[str, float]:
    """Numbers by name; empty where there are none."""
    parts = row.get(key)
    return {str(name): _float(parts, name) for name in parts} if isinstance(parts, dict) else {}


def _sizes(row: Row, key: str) -> tuple[float, ...]:
    """A list of numbers; empty in runs of older versions."""
    values = row.get(key, [])
    if not isinstance(values, list):
        raise TypeError(f"{key} is {str(values)[:40]}, no list")
    return tuple(_float({key: value}, key) for value in values)


def _integer(row: Row, key: str, default: int | None = None) -> int:
    value = row[key] if default is None else row.get(key, default)
    if type(value) is not int or not 0 <= value < _LARGEST_NUMBER:
        raise TypeError(f"{key} is {str(value)[:40]}, no whole number from 0 to 2^63")
    return value


def _fingerprint(row: Row, key: str) -> int | None:
    return None if row.get(key) is None else _integer(row, key)


def _float(row: Row, key: str) -> float:
    """A number; NaN for null, which stands for what JSON cannot hold or nobody knew."""
    value = row.get(key)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{key} is {str(value)[:40]}, no number")
    return float(value)
