"""BertConfig: size and form of one BERT, and what no BERT can have."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from stacking.config_base import LARGEST_RATE, FromList, Frozen, raise_together

_Share = Annotated[float, Field(ge=0, lt=1)]

# Sanity bounds: beyond them a number is a typing error, and building would end in no memory.
LARGEST_SIZE = 2**24  # word pieces, positions, inner width, sequences in a batch
LARGEST_WIDTH = 2**17
MOST_LAYERS = 4096
MOST_PARAMETERS = 2**40

Sizes = Annotated[tuple[Annotated[int, Field(gt=0, le=LARGEST_SIZE)], ...], FromList]
Layers = Annotated[tuple[Annotated[int, Field(ge=0, lt=MOST_LAYERS)], ...], FromList]


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
    layer_intermediate_sizes: Sizes = Field(
        default=(),
        description="Inner width of each layer, where they differ (CompoundGrow narrows some); "
        "empty: intermediate_size in all.",
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
        default=2,
        ge=0,
        le=LARGEST_SIZE,
        description="Number of segment kinds; 0: no segment embedding.",
    )
    initializer_range: float = Field(
        default=0.02,
        gt=0,
        le=LARGEST_RATE,
        description="Standard deviation of the normal initialisation.",
    )
    layer_norm_eps: float = Field(
        default=1e-12, gt=0, le=1, description="Epsilon inside LayerNorm."
    )
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
    tie_word_embeddings: bool = Field(
        default=True, description="Whether the MLM decoder is the word embedding itself."
    )
    shared_attention_layers: Layers = Field(
        default=(),
        description="Layers, counted from 0, without queries and keys: they reuse the attention "
        "probabilities of the layer below (CompoundGrow's light attention).",
    )
    pooling: Literal["none", "mean", "max", "concat"] = Field(
        default="none",
        description="How neighbouring unmasked tokens become one after the embeddings "
        "(CompoundGrow's embedding pooling).",
    )
    pooling_size: int = Field(
        default=1,
        gt=0,
        le=LARGEST_SIZE,
        description="Neighbours that become one, with a pooling other than none.",
    )

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        raise_together(shape_faults(self))
        return self

    def inner_size(self, layer: int) -> int:
        """Inner width F of the feed-forward block of `layer` (0-based)."""
        sizes = self.layer_intermediate_sizes
        return sizes[layer] if sizes else self.intermediate_size


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
    if (count := _least_parameters(model)) > MOST_PARAMETERS:
        faults.append(
            f"hidden_size: got {size} with {model.num_hidden_layers} layers, vocab_size "
            f"{model.vocab_size} and intermediate_size {model.intermediate_size}, {count:,} "
            f"parameters; allowed: at most {MOST_PARAMETERS:,}"
        )
    return faults + _form_faults(model)


def _least_parameters(model: BertConfig) -> int:
    """Numbers in the matrices, from below; stacking/cost.py counts all."""
    size = model.hidden_size
    tables = model.vocab_size + model.type_vocab_size + model.max_position_embeddings
    inner = sum(model.layer_intermediate_sizes) or (
        model.num_hidden_layers * model.intermediate_size
    )
    windows = model.pooling_size if model.pooling == "concat" else 0
    return size * (tables + 2 * inner + (2 * model.num_hidden_layers + windows) * size)


def _form_faults(model: BertConfig) -> list[str]:
    """Layers that do not exist, and pooling that does nothing or meets what it cannot."""
    layers, sizes = model.num_hidden_layers, model.layer_intermediate_sizes
    shared = model.shared_attention_layers
    faults = []
    if sizes and len(sizes) != layers:
        faults.append(
            f"layer_intermediate_sizes: got {len(sizes)} sizes; allowed: one for each of the "
            f"{layers} layers, or none"
        )
    # With pooling the first layer's probabilities are over all tokens, the second's over fewer.
    first = 1 if model.pooling == "none" else 2
    if list(shared) != sorted({layer for layer in shared if first <= layer < layers}):
        faults.append(
            f"shared_attention_layers: got {list(shared)} with {layers} layers"
            f"{'' if model.pooling == 'none' else ' and pooling'}; allowed: ascending numbers from "
            f"{first} to {layers - 1}, as each reuses the probabilities of the layer below"
        )
    if (model.pooling == "none") != (model.pooling_size == 1):
        faults.append(
            f"pooling_size: got {model.pooling_size} with pooling '{model.pooling}'; allowed: "
            + ("1, or a pooling" if model.pooling == "none" else "2 or more, or pooling 'none'")
        )
    return faults


def next_sentence_faults(model: BertConfig) -> list[str]:
    """A next-sentence head that misses what it reads, or the other way round."""
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
