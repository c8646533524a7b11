"""Stage: which size is trained, how long, which part of it, and how it came from the one before."""

from typing import Literal

from pydantic import Field

from stacking.config_base import MOST_STEPS, Frozen
from stacking.config_model import LARGEST_SIZE, LARGEST_WIDTH, MOST_LAYERS, Layers, Sizes

MODEL_FIELDS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
    "layer_intermediate_sizes", "shared_attention_layers", "pooling", "pooling_size",
    "tie_word_embeddings",
)  # fmt: skip
"""What a stage may state otherwise than the model at full size."""
DATA_FIELDS = ("max_seq_length", "max_predictions_per_seq")
"""What a stage may state otherwise than the recipe's data."""


class Freeze(Frozen):
    """The bottom of the model runs forward only (MSLT, Yang et al. 2020)."""

    layers: int = Field(
        gt=0, le=MOST_LAYERS, description="Bottom layers, with all embeddings, that do not train."
    )
    dropout: bool = Field(
        default=True, description="Whether dropout stays on in the frozen part, as in later stages."
    )
    decoder: Literal["freeze", "train"] = Field(
        default="freeze",
        description="Whether the MLM decoder's matrix trains; where it is tied, so does the word "
        "embedding, through the decoder alone.",
    )


class Rewarm(Frozen):
    """A factor on the learning rate after the switch; without it the rate simply goes on."""

    parameters: Literal["all", "new"] = Field(
        default="all", description="All parameters, or those that did not exist before."
    )
    steps: int = Field(
        default=0, ge=0, le=MOST_STEPS, description="Optimizer steps from `start` to `factor`."
    )
    start: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Factor from which the ramp begins, before the first step.",
    )
    factor: float = Field(
        default=1.0, gt=0, le=100, description="Factor after the ramp, to the end of the stage."
    )


class Learned(Frozen):
    """LiGO: the map from old to new weights is learned (Wang et al. 2023)."""

    steps: int = Field(default=100, gt=0, le=MOST_STEPS, description="Optimizer steps on the map.")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="AdamW's rate for the map.")
    batch_size: int = Field(
        default=32,
        gt=0,
        le=LARGEST_SIZE,
        description="Training sequences per step, at most the global batch; the main rank computes "
        "them at once.",
    )


class Stage(Frozen):
    """One growth stage; what it does not state is as in the model and data at full size."""

    num_hidden_layers: int = Field(
        gt=0, le=MOST_LAYERS, description="Encoder layers in this stage."
    )
    steps: int = Field(gt=0, le=MOST_STEPS, description="Optimizer steps of this stage.")
    hidden_size: int | None = Field(
        default=None, gt=0, le=LARGEST_WIDTH, description="Width H in this stage."
    )
    num_attention_heads: int | None = Field(
        default=None, gt=0, description="Heads in this stage; they grow with hidden_size."
    )
    intermediate_size: int | None = Field(
        default=None, gt=0, le=LARGEST_SIZE, description="Inner width F in this stage."
    )
    layer_intermediate_sizes: Sizes | None = Field(
        default=None, description="Inner width of each layer in this stage, where they differ."
    )
    shared_attention_layers: Layers | None = Field(
        default=None, description="Layers without queries and keys in this stage."
    )
    pooling: Literal["none", "mean", "max", "concat"] | None = Field(
        default=None, description="Embedding pooling in this stage."
    )
    pooling_size: int | None = Field(
        default=None, gt=0, description="Neighbours that become one in this stage."
    )
    tie_word_embeddings: bool | None = Field(
        default=None, description="Whether the MLM decoder is the word embedding in this stage."
    )
    max_seq_length: int | None = Field(
        default=None, gt=2, description="Longer sequences of the shards are cut to this length."
    )
    max_predictions_per_seq: int | None = Field(
        default=None, gt=0, description="Most masked positions P of a sequence in this stage."
    )
    depth: Literal[
        "stack", "interleave", "copy_top", "append_last", "middle",
        "random", "identity", "identity_noise", "identity_exact",
    ] = Field(
        default="stack", description="Depth operator on entry; ignored in the first stage."
    )  # fmt: skip
    ffn: Literal["tile", "split", "zero", "aki"] = Field(
        default="tile", description="Operator of the inner width on entry."
    )
    hidden: Literal["duplicate", "uneven", "fpi", "aki"] = Field(
        default="duplicate", description="Operator of hidden size and heads on entry."
    )
    heads: Literal["replicate", "zero"] = Field(
        default="replicate", description="New heads: copies, or fresh ones with zero output."
    )
    positions: Literal["tile", "interpolate", "fresh"] = Field(
        default="tile", description="How learned positions beyond the old length are filled."
    )
    learned: Learned | None = Field(
        default=None,
        description="Learn depth, inner width and hidden size together (LiGO), instead of by the "
        "operators above.",
    )
    moments: Literal["reset", "keep", "grow", "seed_v"] = Field(
        default="reset",
        description="Adam's moments on entry: all fresh (Gong et al. 2019); old ones kept and new "
        "ones fresh; grown like the weights; or new ones with the grown second moment only.",
    )
    rewarm: Rewarm | None = Field(
        default=None, description="Factor on the learning rate on entry; null: it goes on."
    )
    freeze: Freeze | None = Field(
        default=None, description="What does not train in this stage; null: everything trains."
    )
    broken_promise: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="What happens if growth that promises to keep the function changes it.",
    )
    deepspeed: dict[str, object] = Field(
        default_factory=dict,
        description="DeepSpeed keys that this stage overrides, for example its micro batch.",
    )

    def changes(self, fields: tuple[str, ...]) -> dict[str, object]:
        """Those of `fields` that this stage states."""
        return {name: value for name in fields if (value := getattr(self, name)) is not None}
