"""Fine-tuning through the engine of pre-training: a model, rows and a setting in; logits out.

A fine-tuning is a recipe of one stage, so that the JSON, the precision, the schedule and the
dropout seeds are those of pre-training. It runs on one rank: several go side by side as processes
(side_by_side.py).

N rows, B rows of a batch, C logits of a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor
from typing_extensions import Self

from stacking import distributed, engine, engine_options
from stacking.backbone import BertBackbone
from stacking.config import BertConfig, Recipe
from stacking.config_faults import fault_lines
from stacking.deepspeed_checks import check_document
from stacking.deepspeed_config import DeepSpeedConfig, ResolvedEngine, resolve
from stacking.engine import TrainEngine
from stacking.engine_module import ModelMaker
from stacking.errors import ConfigError, NonFiniteError
from stacking.fine_tuning_batch import LabelledBatch
from stacking.pretrained import Pretrained
from stacking.schedule import stage_rates
from stacking.snapshot import Snapshot

Rows = npt.NDArray[np.int64]
_LARGEST_PREDICTED_BATCH = 64  # rows of a forward that predicts


@dataclass(frozen=True)
class Setting:
    """How a model is fine-tuned; the rate warms up and falls linearly to 0."""

    num_epochs: int
    batch_size: int
    learning_rate: float
    warmup_share: float = 0.1
    """Of the updates."""
    weight_decay: float = 0.01
    """Decoupled, of all parameters, as in 2019."""
    max_grad_norm: float = 0.0
    """0: gradients are not clipped."""
    dropout: float = 0.1
    """Of hidden states and of attention, as in 2019, whatever the pre-training's was."""

    def num_steps(self, num_rows: int) -> int:
        """Updates: the last batch of an epoch may be smaller."""
        return self.num_epochs * -(-num_rows // self.batch_size)


class Examples(Protocol):
    """Rows to train on or to predict; GlueFeatures and SquadFeatures give them."""

    def __len__(self) -> int:
        """N."""
        ...

    def lengths(self) -> Rows:
        """Tokens of each row, [N]."""
        ...

    def labelled_batch(self, rows: Rows) -> LabelledBatch:
        """The rows [B], padded to the longest of them, with their labels."""
        ...


Epoch = Callable[[int], Examples]
"""The training rows of an epoch, counted from 0, which may differ in what is swapped."""
Told = Callable[[int, int, float], None]
"""Told of each update: done, in all, its mean loss."""


class FineTuner:
    """One model on its way through one task; use as a context, which tears the engine down."""

    def __init__(
        self,
        start: Pretrained,
        make_model: ModelMaker,
        setting: Setting,
        deepspeed_config: DeepSpeedConfig,
        *,
        num_rows: int,
        seed: int,
        strict_precision: bool = False,
    ) -> None:
        """Build the engine; ConfigError where the JSON or the sizes do not fit."""
        _require_one_rank()
        config = start.config.model_copy(update={
            "hidden_dropout_prob": setting.dropout, "attention_probs_dropout_prob": setting.dropout
        })  # fmt: skip
        self._recipe = _recipe(config, setting, setting.num_steps(num_rows), seed)
        accelerator = engine.start()
        self._setting = setting
        self._num_rows = num_rows
        resolved = resolve(
            _with_micro_batch(deepspeed_config, setting.batch_size), self._recipe, world_size=1,
            accelerator=accelerator, strict_precision=strict_precision, stage=0,
        )  # fmt: skip
        self._resolved = _quiet(engine_options.settle([resolved], engine.current_device())[0])
        snapshot = Snapshot(initial_weights(make_model, start))
        self._engine = TrainEngine(
            config, self._recipe.optimizer, self._resolved, snapshot, make_model=make_model
        )

    def __enter__(self) -> Self:
        """The engine is built already."""
        return self

    def __exit__(self, *fault: object) -> None:
        """Tear the engine down."""
        self._engine.destroy()

    @property
    def notices(self) -> tuple[str, ...]:
        """What differs from the JSON, a line each."""
        return self._resolved.notices

    @property
    def precision(self) -> str:
        """What it computes in."""
        return self._resolved.precision

    def train(self, epoch: Epoch, tell: Told = lambda *_: None) -> None:
        """All updates; NonFiniteError if the loss becomes no number."""
        total = self._recipe.total_steps
        for step, batch in enumerate(self._batches(epoch)):
            try:
                loss = self._update(step, batch)
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"step {step + 1} of {total}: {error}; try a smaller learning rate than "
                    f"{self._setting.learning_rate:g}"
                ) from error
            tell(step + 1, total, loss)

    def _update(self, step: int, batch: LabelledBatch) -> float:
        """Its mean loss."""
        rows = batch.loss_counts[0]
        sums = self._engine.train_step(
            [batch], learning_rate=stage_rates(self._recipe, step)[0],
            counts=torch.tensor([float(rows)], device=self._engine.device),
            seed=self._recipe.seed * 1_000_003 + step,
        )  # fmt: skip
        return float(sums[0]) / rows

    def predict(self, examples: Examples) -> Iterator[tuple[Rows, npt.NDArray[np.float32]]]:
        """Numbers of rows [B] and their logits [B, ...]; every row once, the longest first.

        NonFiniteError if a logit is no number.
        """
        order = np.argsort(-examples.lengths(), kind="stable")
        for begin in range(0, len(order), _LARGEST_PREDICTED_BATCH):
            rows = order[begin : begin + _LARGEST_PREDICTED_BATCH]
            batch = replace(examples.labelled_batch(rows), labels=None)
            logits: npt.NDArray[np.float32] = self._engine.logits(batch).cpu().numpy()
            if np.isnan(logits).any():
                raise NonFiniteError("the fine-tuned model's logits hold NaN; try a smaller rate")
            yield rows, logits

    def _batches(self, epoch: Epoch) -> Iterator[LabelledBatch]:
        for number in range(self._setting.num_epochs):
            examples = epoch(number)
            assert len(examples) == self._num_rows, "an epoch has other rows than were said"
            order = np.random.default_rng((self._recipe.seed, number)).permutation(len(examples))
            for begin in range(0, len(order), self._setting.batch_size):
                yield examples.labelled_batch(order[begin : begin + self._setting.batch_size])


def _require_one_rank() -> None:
    """ConfigError under a launcher that started several."""
    if distributed.world_size() > 1:
        raise ConfigError(
            f"fine-tuning got {distributed.world_size()} ranks; allowed: 1, started without the "
            "launcher; --processes has several tasks and seeds side by side"
        )


def initial_weights(make_model: ModelMaker, start: Pretrained) -> dict[str, Tensor]:
    """fp32 weights of the model to fine-tune, by name: pre-trained below, heads at zero."""
    model: BertBackbone = make_model(start.config, torch.nn.LayerNorm)
    known = {name.removeprefix("nsp_head."): weight for name, weight in start.weights.items()
             if not name.startswith("nsp_head.classifier")}  # fmt: skip
    found = {}
    for name, parameter in model.named_parameters():
        is_head = name.startswith(("classifier.", "qa_outputs."))
        found[name] = parameter.detach() if is_head else known[name]
    return found


def _recipe(config: BertConfig, setting: Setting, steps: int, seed: int) -> Recipe:
    """ConfigError where a number is beyond all bounds."""
    document = {
        "name": "fine-tuning",
        "model": config,
        "data": {"max_seq_length": config.max_position_embeddings, "max_predictions_per_seq": 1},
        "global_batch_size": setting.batch_size,
        "optimizer": {"weight_decay": setting.weight_decay, "decay_all": True,
                      "max_grad_norm": setting.max_grad_norm},
        "learning_rate": {"schedule": "linear", "peak": setting.learning_rate,
                          "warmup_steps": min(round(setting.warmup_share * steps), steps - 1)},
        "stages": [{"num_hidden_layers": config.num_hidden_layers, "steps": steps}],
        "seed": seed,
    }  # fmt: skip
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        # Faults between fields have no line of their own.
        raise ConfigError(fault_lines(error, Recipe, "fine-tuning: ") or str(error)) from error


def _with_micro_batch(config: DeepSpeedConfig, batch_size: int) -> DeepSpeedConfig:
    """A batch is one forward: the last one of an epoch could not be shared equally."""
    document = config.document | {"train_micro_batch_size_per_gpu": batch_size}
    return check_document(document, source=config.source, prefix=f"{config.source}: ")


def _quiet(resolved: ResolvedEngine) -> ResolvedEngine:
    """Without monitors: many short runs would each write a folder of them."""
    kept = {name: value for name, value in resolved.deepspeed.items()
            if name not in ("tensorboard", "csv_monitor", "wandb")}  # fmt: skip
    return replace(resolved, deepspeed=kept)
