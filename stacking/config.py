"""The recipe, what is trained, as typed models: plain values in, a frozen `Recipe` out.

`stacking/config_loading.py` reads recipes from files and turns all faults into one ConfigError.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from stacking.config_base import LARGEST_RATE, MOST_STEPS, FromList, Frozen, raise_together
from stacking.config_branches import GrowthBranch, Share
from stacking.config_learning_rate import LearningRateConfig, schedule_faults
from stacking.config_model import LARGEST_SIZE, BertConfig, next_sentence_faults, shape_faults
from stacking.config_stage import DATA_FIELDS, MODEL_FIELDS, Freeze, Learned, Rewarm, Stage

__all__ = [
    "BertConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "Freeze",
    "GrowthBranch",
    "Learned",
    "LearningRateConfig",
    "OptimizerConfig",
    "Recipe",
    "Rewarm",
    "Stage",
    "faults_between",
    "shape_faults",
]

_Share = Annotated[float, Field(ge=0, lt=1)]


class DataConfig(Frozen):
    """How shards become training sequences."""

    max_seq_length: int = Field(
        default=128, gt=2, description="Sequence length S in tokens; must be the shards' own."
    )
    max_predictions_per_seq: int = Field(
        default=20, gt=0, description="Most masked positions P in one sequence."
    )
    masked_lm_prob: float = Field(
        default=0.15, gt=0, lt=1, description="Share of a sequence's candidates that is predicted."
    )
    masking: Literal["dynamic", "static"] = Field(
        default="dynamic",
        description="Masks drawn at load time from (seed, epoch, sample), or read from the shard.",
    )
    whole_word: bool = Field(
        default=False, description="Whether a word's pieces are masked together (dynamic only)."
    )


class OptimizerConfig(Frozen):
    """The optimizer's numbers; which one, and which implementation, is the DeepSpeed JSON's."""

    betas: Annotated[tuple[_Share, _Share], FromList] = Field(
        default=(0.9, 0.999), description="Adam's decay rates."
    )
    eps: float = Field(default=1e-6, gt=0, le=1, description="Adam's epsilon.")
    weight_decay: float = Field(
        default=0.01, ge=0, le=LARGEST_RATE, description="Decoupled weight decay."
    )
    decay_all: bool = Field(
        default=False, description="Whether biases and LayerNorms decay too (StackingBERT: true)."
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, le=1e30, description="Global gradient-norm clip; 0: none."
    )
    muon_momentum: float = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="Muon only: decay rate of its momentum; the numbers above are then those of "
        "the parameters that Adam updates, and weight_decay is that of all.",
    )


class EvaluationConfig(Frozen):
    """Validation on held-out documents with fixed masks."""

    every_steps: int = Field(
        default=1000,
        gt=0,
        le=MOST_STEPS,
        description="Optimizer steps between evaluations; each stage's end is evaluated too.",
    )
    max_sequences: int = Field(
        default=2048, gt=0, le=MOST_STEPS, description="At most this many validation sequences."
    )
    batch_size: int = Field(
        default=64,
        gt=0,
        le=LARGEST_SIZE,
        description="Sequences per rank in one evaluation forward.",
    )


class CheckpointConfig(Frozen):
    """When to save; both sides of every switch are saved besides."""

    every_steps: int = Field(
        default=1000, gt=0, le=MOST_STEPS, description="Optimizer steps between checkpoints."
    )
    keep_last: int = Field(
        default=2,
        gt=0,
        le=MOST_STEPS,
        description="How many periodic checkpoints stay; stage ends always stay.",
    )


class Recipe(Frozen):
    """What is trained: the same on any hardware."""

    name: str = Field(min_length=1, description="Short name, shown in reports.")
    description: str = Field(default="", description="What this recipe is, for people.")
    model: BertConfig = Field(description="The model at full size; stages state what is smaller.")
    data: DataConfig = Field(default_factory=DataConfig, description="Sequences and masks.")
    global_batch_size: int = Field(
        default=256,
        gt=0,
        le=LARGEST_SIZE,
        description="Sequences per optimizer step, over all ranks and accumulation.",
    )
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="The optimizer's numbers."
    )
    learning_rate: LearningRateConfig = Field(
        default_factory=LearningRateConfig, description="Learning-rate schedule."
    )
    stages: Annotated[tuple[Stage, ...], FromList] = Field(
        min_length=1, description="Growth stages in order."
    )
    branches: Annotated[tuple[Share, ...], FromList] = Field(
        default=(),
        description="Shorter runs that share this one's steps until they decay, as shares of its "
        "steps and of its decay; schedule 'wsd' only.",
    )
    growth_branches: Annotated[tuple[GrowthBranch, ...], FromList] = Field(
        default=(), description="Other ways on from steps of this run."
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="Validation."
    )
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving.")
    seed: int = Field(
        default=1,
        ge=0,
        lt=2**32,
        description="Seed of initialisation, sample order, masks and dropout.",
    )

    @model_validator(mode="after")
    def _check_parts_together(self) -> Self:
        raise_together(faults_between(self.model, self.data, self.learning_rate, list(self.stages)))
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_model(self, stage: int) -> BertConfig:
        """The model of stage `stage` (0-based)."""
        return _stage_model(self.model, self.data, self.stages[stage])

    def stage_data(self, stage: int) -> DataConfig:
        """Sequence length and masks of stage `stage` (0-based)."""
        return _stage_data(self.data, self.stages[stage])


def _stage_model(model: BertConfig, data: DataConfig | None, stage: Stage) -> BertConfig:
    """`model` with what the stage states; nothing is checked.

    A stage of shorter sequences has learned positions for these only: the others would stay
    untrained, and growth fills them.
    """
    changes = stage.changes(MODEL_FIELDS)
    if "intermediate_size" in changes:
        changes.setdefault("layer_intermediate_sizes", ())
    if data and stage.max_seq_length and model.position == "learned":
        missing = data.max_seq_length - stage.max_seq_length
        if missing > 0:
            changes["max_position_embeddings"] = stage.max_seq_length
    return model.model_copy(update=changes)


def _stage_data(data: DataConfig, stage: Stage) -> DataConfig:
    return data.model_copy(update=stage.changes(DATA_FIELDS))


def faults_between(
    model: BertConfig | None,
    data: DataConfig | None,
    rate: LearningRateConfig | None,
    stages: Sequence[Stage | None],
) -> list[str]:
    """Faults that need more than one field to see; None: that part is invalid by itself."""
    faults: list[str] = []
    if model:
        faults += [f"model.{fault}" for fault in shape_faults(model)]
        faults += next_sentence_faults(model)
    if data:
        faults += _data_faults(data, model)
    if rate:
        valid = [stage for stage in stages if stage]
        is_complete = len(valid) == len(stages) > 0
        faults += schedule_faults(rate, [s.steps for s in valid] if is_complete else None)
    return faults + _stage_faults(stages, model, data)


def _data_faults(data: DataConfig, model: BertConfig | None) -> list[str]:
    length = data.max_seq_length
    faults = []
    if model and length > model.max_position_embeddings:
        faults.append(
            f"data.max_seq_length: got {length}; allowed: at most "
            f"model.max_position_embeddings, {model.max_position_embeddings}"
        )
    # [CLS] and [SEP] are never predicted, and something must be left to predict from.
    if data.max_predictions_per_seq >= length - 2:
        usual = max(1, math.ceil(data.masked_lm_prob * length))
        faults.append(
            f"data.max_predictions_per_seq: got {data.max_predictions_per_seq} with max_seq_length "
            f"{length}; allowed: 1 to {max(1, length - 3)}; "
            f"masked_lm_prob {data.masked_lm_prob} needs {usual}"
        )
    if data.whole_word and data.masking == "static":
        faults.append(
            "data.whole_word: got true with masking 'static'; allowed: false, because static masks "
            "come from the shard; set masking to 'dynamic'"
        )
    return faults


def _stage_faults(
    stages: Sequence[Stage | None], model: BertConfig | None, data: DataConfig | None
) -> list[str]:
    """What one stage, and the order of two, cannot be; operators: growth/plan.py, growth_faults."""
    faults: list[str] = []
    for index, stage in enumerate(stages):
        path = f"stages.{index}"
        before = stages[index - 1] if index else None
        if stage and before and stage.num_hidden_layers < before.num_hidden_layers:
            faults.append(
                f"{path}.num_hidden_layers: got {stage.num_hidden_layers} after "
                f"{before.num_hidden_layers}; allowed: at least {before.num_hidden_layers}, "
                "because a model only grows"
            )
        if stage:
            faults += _freeze_faults(path, index, stage)
            faults += _rewarm_faults(path, index, stage)
            faults += _size_faults(path, stage, model, data)
    if stages and stages[-1]:
        faults += _last_stage_faults(f"stages.{len(stages) - 1}", stages[-1], model, data)
    return faults


def _size_faults(
    path: str, stage: Stage, model: BertConfig | None, data: DataConfig | None
) -> list[str]:
    """Impossible shapes, with the names of the stage's own fields where it states them."""
    faults = []
    if model and not shape_faults(model):
        faults += [f"{path}.{fault}" for fault in shape_faults(_stage_model(model, data, stage))]
    if data and stage.changes(DATA_FIELDS):
        here = _stage_data(data, stage)
        if here.max_seq_length > data.max_seq_length:
            faults.append(
                f"{path}.max_seq_length: got {here.max_seq_length}; allowed: at most "
                f"data.max_seq_length, {data.max_seq_length}"
            )
        faults += [fault.replace("data.", f"{path}.", 1) for fault in _data_faults(here, None)]
        if data.masking == "static" and here != data:
            faults.append(
                f"{path}.max_seq_length: got {here.max_seq_length}, and max_predictions_per_seq "
                f"{here.max_predictions_per_seq}, with masking 'static', whose masks are those of "
                "whole sequences; set data.masking to 'dynamic'"
            )
    return faults


def _freeze_faults(path: str, index: int, stage: Stage) -> list[str]:
    if stage.freeze is None:
        return []
    faults = []
    if index == 0:
        faults.append(
            f"{path}.freeze: got {stage.freeze.layers} layers in the first stage, where they are "
            "random; allowed: from the second stage on"
        )
    if stage.freeze.layers >= stage.num_hidden_layers:
        faults.append(
            f"{path}.freeze.layers: got {stage.freeze.layers} of {stage.num_hidden_layers} layers; "
            f"allowed: 1 to {stage.num_hidden_layers - 1}, so that some train"
        )
    return faults


def _rewarm_faults(path: str, index: int, stage: Stage) -> list[str]:
    rewarm = stage.rewarm
    if rewarm is None:
        return []
    faults = []
    if index == 0:
        faults.append(
            f"{path}.rewarm: got a factor in the first stage; allowed: from the second stage on; "
            "the run's own warm-up is learning_rate.warmup_steps"
        )
    if rewarm.steps > stage.steps:
        faults.append(
            f"{path}.rewarm.steps: got {rewarm.steps} in a stage of {stage.steps}; allowed: 0 to "
            f"{stage.steps}"
        )
    if rewarm.factor == 1 and (rewarm.steps == 0 or rewarm.start == 1):
        faults.append(
            f"{path}.rewarm: got steps {rewarm.steps}, start {rewarm.start}, factor 1, which "
            "change nothing; allowed: a ramp (steps and a start other than 1), or another factor"
        )
    return faults


def _last_stage_faults(
    path: str, stage: Stage, model: BertConfig | None, data: DataConfig | None
) -> list[str]:
    """The last stage is the model at full size."""
    faults = []
    for whole, owner, fields in (
        (model, "model", MODEL_FIELDS), (data, "data", DATA_FIELDS),
    ):  # fmt: skip
        if whole is None:
            continue
        for name, value in stage.changes(fields).items():
            full = getattr(whole, name)
            if value != full:
                faults.append(
                    f"{path}.{name}: got {value}; allowed: {owner}.{name}, {full}, in the last "
                    "stage"
                )
    return faults
