"""The recipe, what is trained, as typed models: plain values in, a frozen `Recipe` out.

`stacking/config_loading.py` reads recipes from files and turns all faults into one ConfigError.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stacking.config_base import FromList, Frozen, raise_together
from stacking.config_learning_rate import LearningRateConfig, schedule_faults

__all__ = [
    "BertConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "LearningRateConfig",
    "OptimizerConfig",
    "Recipe",
    "Stage",
    "faults_between",
    "shape_faults",
]

_Share = Annotated[float, Field(ge=0, lt=1)]


# Sanity bounds: beyond them a number is a typing error, and building would end in no memory.
LARGEST_SIZE = 2**24  # word pieces, positions, inner width, sequences in a batch
LARGEST_WIDTH = 2**17
MOST_LAYERS = 4096


class BertConfig(Frozen):
    """Size and form of one BERT; names as in Google BERT and Hugging Face where they have one."""

    vocab_size: int = Field(
        gt=0, le=LARGEST_SIZE, description="Number of word pieces, including special ones."
    )
    hidden_size: int = Field(
        default=768, gt=0, le=LARGEST_WIDTH, description="Width H of the residual stream."
    )
    num_hidden_layers: int = Field(
        default=12, gt=0, le=MOST_LAYERS, description="Number L of encoder layers."
    )
    num_attention_heads: int = Field(
        default=12, gt=0, description="Number N of heads; divides hidden_size."
    )
    intermediate_size: int = Field(
        default=3072, gt=0, le=LARGEST_SIZE, description="Inner width F of the feed-forward block."
    )
    hidden_act: Literal["gelu", "gelu_new", "relu"] = Field(
        default="gelu", description="Activation of the feed-forward block and of the MLM head."
    )
    hidden_dropout_prob: _Share = Field(
        default=0.1, description="Dropout on embeddings and on each residual branch."
    )
    attention_probs_dropout_prob: _Share = Field(
        default=0.1, description="Dropout on attention probabilities."
    )
    max_position_embeddings: int = Field(
        default=512, gt=0, le=LARGEST_SIZE, description="Longest sequence in tokens."
    )
    type_vocab_size: int = Field(
        default=2, ge=0, description="Number of segment kinds; 0: no segment embedding."
    )
    initializer_range: float = Field(
        default=0.02, gt=0, description="Standard deviation of the normal initialisation."
    )
    layer_norm_eps: float = Field(default=1e-12, gt=0, description="Epsilon inside LayerNorm.")
    pad_token_id: int = Field(default=0, ge=0, description="Id of [PAD].")
    position: Literal["learned", "sinusoidal", "rotary"] = Field(
        default="learned", description="Kind of position information."
    )
    layer_norm: Literal["post", "pre"] = Field(
        default="post",
        description="LayerNorm after each residual sum (BERT), or before each branch and last.",
    )
    layer_norm_affine: bool = Field(
        default=True,
        description="Whether the encoder's LayerNorms have weight and bias (StackingBERT: false).",
    )
    embedding_layer_norm: bool = Field(
        default=True,
        description="Whether the embedding sum is normalised (BERT: true; StackingBERT: false).",
    )
    embedding_scale: bool = Field(
        default=False,
        description="Whether token embeddings are multiplied by sqrt(hidden_size) (StackingBERT).",
    )
    mlm_bias: bool = Field(
        default=True, description="Whether the tied MLM decoder has an output bias."
    )
    num_nsp_labels: Literal[0, 1, 2] = Field(
        default=2,
        description="Logits of the next-sentence head: 0 none, 1 (StackingBERT), 2 (BERT).",
    )
    pooler: bool = Field(
        default=True,
        description="Whether the next-sentence head reads tanh(Linear([CLS])) (BERT) or [CLS].",
    )

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        raise_together(shape_faults(self))
        return self


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
    """The numbers of AdamW; which implementation computes them is the DeepSpeed JSON's."""

    betas: Annotated[tuple[_Share, _Share], FromList] = Field(
        default=(0.9, 0.999), description="Adam's decay rates."
    )
    eps: float = Field(default=1e-6, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay.")
    decay_all: bool = Field(
        default=False, description="Whether biases and LayerNorms decay too (StackingBERT: true)."
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Global gradient-norm clip; 0: none."
    )


class Stage(Frozen):
    """One growth stage: which size is trained, how long, and how it came from the stage before."""

    num_hidden_layers: int = Field(gt=0, description="Encoder layers in this stage.")
    steps: int = Field(gt=0, description="Optimizer steps of this stage.")
    depth: Literal[
        "stack", "interleave", "copy_top", "append_last", "middle",
        "random", "identity", "identity_noise", "identity_exact",
    ] = Field(
        default="stack", description="Depth operator on entry; ignored in the first stage."
    )  # fmt: skip
    broken_promise: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="What happens if growth that promises to keep the function changes it.",
    )
    deepspeed: dict[str, object] = Field(
        default_factory=dict,
        description="DeepSpeed keys that this stage overrides, for example its micro batch.",
    )


class EvaluationConfig(Frozen):
    """Validation on held-out documents with fixed masks."""

    every_steps: int = Field(
        default=1000,
        gt=0,
        description="Optimizer steps between evaluations; each stage's end is evaluated too.",
    )
    max_sequences: int = Field(
        default=2048, gt=0, description="At most this many validation sequences."
    )
    batch_size: int = Field(
        default=64, gt=0, description="Sequences per rank in one evaluation forward."
    )


class CheckpointConfig(Frozen):
    """When to save; both sides of every switch are saved besides."""

    every_steps: int = Field(default=1000, gt=0, description="Optimizer steps between checkpoints.")
    keep_last: int = Field(
        default=2, gt=0, description="How many periodic checkpoints stay; stage ends always stay."
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
        default_factory=OptimizerConfig, description="AdamW's numbers."
    )
    learning_rate: LearningRateConfig = Field(
        default_factory=LearningRateConfig, description="Learning-rate schedule."
    )
    stages: Annotated[tuple[Stage, ...], FromList] = Field(
        min_length=1, description="Growth stages in order."
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
        layers = self.stages[stage].num_hidden_layers
        return self.model.model_copy(update={"num_hidden_layers": layers})


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
        faults += _next_sentence_faults(model)
    if data:
        faults += _data_faults(data, model)
    if rate:
        valid = [stage for stage in stages if stage]
        is_complete = len(valid) == len(stages) > 0
        faults += schedule_faults(rate, sum(s.steps for s in valid) if is_complete else None)
    return faults + _stage_faults(stages, model)


def shape_faults(model: BertConfig) -> list[str]:
    """Sizes that no BERT can have; paths are relative to the model."""
    heads, size = model.num_attention_heads, model.hidden_size
    faults = []
    if size % heads:
        divisors = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
        faults.append(
            f"num_attention_heads: got {heads} with hidden_size {size}; "
            f"allowed: a divisor of hidden_size ({divisors})"
        )
    elif model.position == "rotary" and (size // heads) % 2:
        faults.append(
            f"num_attention_heads: got {heads} with hidden_size {size}, heads of {size // heads}; "
            "allowed: heads of even size, because rotary positions turn pairs of numbers"
        )
    if model.pad_token_id >= model.vocab_size:
        faults.append(
            f"pad_token_id: got {model.pad_token_id} with vocab_size {model.vocab_size}; "
            f"allowed: 0 to {model.vocab_size - 1}"
        )
    return faults


def _next_sentence_faults(model: BertConfig) -> list[str]:
    faults = []
    if model.pooler and not model.num_nsp_labels:
        faults.append(
            "model.pooler: got true with num_nsp_labels 0; allowed: false, because only the "
            "next-sentence head reads it; set pooler to false or num_nsp_labels to 2"
        )
    if model.num_nsp_labels and model.type_vocab_size < 2:
        faults.append(
            f"model.type_vocab_size: got {model.type_vocab_size} with num_nsp_labels "
            f"{model.num_nsp_labels}; allowed: at least 2, because sentence pairs have two "
            "segments; set type_vocab_size to 2 or num_nsp_labels to 0"
        )
    return faults


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


def _stage_faults(stages: Sequence[Stage | None], model: BertConfig | None) -> list[str]:
    faults: list[str] = []
    for index in range(1, len(stages)):
        old, new = stages[index - 1], stages[index]
        if old and new:
            faults += _depth_faults(f"stages.{index}", old.num_hidden_layers, new)
    last = stages[-1] if stages else None
    if model and last and last.num_hidden_layers != model.num_hidden_layers:
        faults.append(
            f"stages.{len(stages) - 1}.num_hidden_layers: got {last.num_hidden_layers}; allowed: "
            f"model.num_hidden_layers, {model.num_hidden_layers}, in the last stage"
        )
    return faults


def _depth_faults(path: str, old: int, stage: Stage) -> list[str]:
    """What stacking.growth.depth would refuse hours later; the other operators take any growth."""
    new = stage.num_hidden_layers
    if new < old:
        return [
            f"{path}.num_hidden_layers: got {new} after {old}; allowed: at least {old}, because a "
            "model only grows"
        ]
    if stage.depth == "interleave" and new % old:
        return [
            f"{path}.depth: got 'interleave' from {old} to {new} layers; allowed: a multiple of "
            f"{old}, because each layer is repeated equally often; or depth 'stack'"
        ]
    if stage.depth in ("copy_top", "middle") and new > 2 * old:
        return [
            f"{path}.depth: got '{stage.depth}' from {old} to {new} layers; allowed: at most "
            f"{2 * old}, because the {old} old layers are copied at most once; or depth 'stack'"
        ]
    return []
