"""From one stage's model to the next: save -> tear down -> grow -> probe -> rebuild.

The only place where two sizes meet. A switch inside the running process and one in a new process,
from the checkpoint of the stage's end, both go through `switch_stage`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from stacking import distributed
from stacking.config import BertConfig, Recipe
from stacking.dataset import MaskedLMBatch
from stacking.engine import TrainEngine
from stacking.errors import GrowthError
from stacking.masked_lm_loss import IGNORED_LABEL
from stacking.modeling import BertForPreTraining, next_sentence_loss
from stacking.residuals import recorded
from stacking.snapshot import Snapshot
from stacking.stage_growth import LearningBatches, StageGrowth


@dataclass
class SwitchReport:
    """What one switch did; a row of metrics.jsonl."""

    from_stage: int
    to_stage: int
    from_num_hidden_layers: int
    to_num_hidden_layers: int
    operator: str
    """All operators in their order, as in "ffn tile + depth stack"."""
    moments: str = "reset"
    changes: dict[str, tuple[object, object]] = field(default_factory=dict)
    """Fields of the model that differ: before and after."""
    loss_before: float = float("nan")
    loss_after: float = float("nan")
    max_logit_difference: float = float("nan")
    relative_logit_difference: float = float("nan")
    promised_tolerance: float | None = None
    """On the relative difference; None: the operator may change the function."""
    residual_rms_before: list[float] = field(default_factory=list)
    residual_rms_after: list[float] = field(default_factory=list)
    """Size of the hidden states after the embeddings and after each layer; see residuals.py."""
    duplicate_similarity: dict[str, float] = field(default_factory=dict)
    """Mean cosine between copies of duplicated units, right after growth."""
    warning: str = ""
    seconds: float = 0.0
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    rss_bytes: int = 0

    def row(self) -> dict[str, object]:
        """As written to metrics.jsonl."""
        return asdict(self)

    @property
    def summary(self) -> str:
        """What grew, as in "num_hidden_layers 3 -> 6"."""
        parts = [f"{name} {old} -> {new}" for name, (old, new) in self.changes.items()]
        return ", ".join(parts) or "the same model"

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Charge the block's time to `part`."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.seconds_by_part[part] = self.seconds_by_part.get(part, 0.0) + seconds
        self.seconds += seconds


@dataclass(frozen=True)
class Probe:
    """A fixed batch on which the model is measured before and after, and where to compute it.

    Attributes:
        batch: sequences that both models take.
        device: this rank's, free between the two engines.
        learning_batches: for a growth whose map is learned.
    """

    batch: MaskedLMBatch
    device: torch.device
    learning_batches: LearningBatches | None = None


def switch_stage(
    recipe: Recipe,
    to_stage: int,
    take: Callable[[SwitchReport], Snapshot | None],
    build: Callable[[Snapshot | None], TrainEngine],
    probe: Probe,
) -> tuple[TrainEngine, SwitchReport]:
    """Grow the model of stage `to_stage - 1` into that of `to_stage`. Collective.

    `take` saves and tears down what runs, or reads the checkpoint, and hands over the old state,
    timing its parts; `build` makes the new stage's engine. State is the main rank's alone, and so
    is what the report has measured of it. The learning rate goes on (Gong et al.
    2019, section 4.1): it is a function of the global step.
    """
    growth = StageGrowth(recipe, to_stage)
    report = SwitchReport(
        from_stage=to_stage - 1,
        to_stage=to_stage,
        from_num_hidden_layers=growth.source.num_hidden_layers,
        to_num_hidden_layers=growth.target.num_hidden_layers,
        operator=growth.name,
        moments=growth.stage.moments,
        changes=growth.changes,
        promised_tolerance=growth.tolerance,
    )
    grown = _grow(report, growth, take(report), probe)
    with report.timed("build"):
        engine = build(grown)
    report.rss_bytes = psutil.Process().memory_info().rss
    return engine, report


def _grow(
    report: SwitchReport, growth: StageGrowth, old: Snapshot | None, probe: Probe
) -> Snapshot | None:
    """The new stage's state, measured; on return nothing holds the old one."""
    with report.timed("grow"):
        grown = growth.apply(old, probe.learning_batches, probe.device)
    with report.timed("probe"):
        distributed.only_on_main(lambda: _inspect(report, growth, old, grown, probe))
    return grown


def _inspect(
    report: SwitchReport,
    growth: StageGrowth,
    old: Snapshot | None,
    grown: Snapshot | None,
    probe: Probe,
) -> None:
    """Measure both models and hold the operators to their promise."""
    assert old is not None
    assert grown is not None
    report.duplicate_similarity = growth.similarity(grown.weights)
    _measure(report, (growth.source, old.weights), (growth.target, grown.weights), probe)
    _judge(report, growth.stage.broken_promise)


def _measure(
    report: SwitchReport,
    before: tuple[BertConfig, dict[str, Tensor]],
    after: tuple[BertConfig, dict[str, Tensor]],
    probe: Probe,
) -> None:
    """Loss, logits and hidden states of both models in fp32, dropout off, on the same sequences."""
    old = _probe_model(*before, probe.batch, probe.device)
    new = _probe_model(*after, probe.batch, probe.device)
    report.loss_before, report.loss_after = old.loss, new.loss
    report.residual_rms_before, report.residual_rms_after = old.residual_rms, new.residual_rms
    report.max_logit_difference = float((new.logits - old.logits).abs().max())
    report.relative_logit_difference = report.max_logit_difference / float(
        old.logits.abs().max().clamp_min(1e-30)
    )


def _judge(report: SwitchReport, broken_promise: str) -> None:
    """Hold the operator to its promise; GrowthError, or a warning in the report."""
    tolerance = report.promised_tolerance
    # Written so that a NaN breaks the promise.
    if tolerance is None or report.relative_logit_difference <= tolerance:
        return
    report.warning = (
        f"growth by {report.operator!r} ({report.summary}) promises to keep the function to "
        f"{tolerance:.0e}, "
        f"but the logits moved by {report.relative_logit_difference:.1e} of the largest"
    )
    if broken_promise == "refuse":
        raise GrowthError(
            f"{report.warning}; the stage before is saved. To go on all the same, set this "
            'stage\'s broken_promise to "warn"'
        )


@dataclass(frozen=True)
class _Probed:
    """What one model made of the probe's batch."""

    loss: float  # mean, MLM plus NSP, nats
    logits: Tensor  # MLM, [B, P, V]
    residual_rms: list[float]


@torch.no_grad()
def _probe_model(
    config: BertConfig, weights: dict[str, Tensor], batch: MaskedLMBatch, device: torch.device
) -> _Probed:
    """One forward pass of one model."""
    with torch.device("meta"):
        model = BertForPreTraining(config)
    model.load_state_dict(weights, assign=True)  # on the CPU it shares them: no second copy
    model.to(device).eval()
    batch = batch.to(device)
    with recorded(model) as residuals:
        outputs = model(
            batch.input_ids, batch.token_type_ids, batch.attention_mask, batch.masked_lm_positions
        )
    # A second forward, for the loss, would double the longest part of a switch on a CPU.
    logits = outputs["prediction_logits"].float()
    targets = batch.masked_lm_ids.flatten()
    loss_sum = F.cross_entropy(
        logits.flatten(0, 1), targets, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    loss = float(loss_sum) / max(1, batch.num_masked)
    related = outputs.get("seq_relationship_logits")
    if related is not None and batch.next_sentence_labels is not None:
        loss += float(next_sentence_loss(related, batch.next_sentence_labels)) / len(related)
    return _Probed(loss, logits.cpu(), [float(size) for size in residuals])
