"""What a model costs, by arithmetic: BertConfig in; parameters, FLOPs and bytes out.

FLOPs count matrix products only, 2 m n k each, on padded sequences of S tokens:

    layer      2 B S 3 H^2 + R (4 B S H + 2 B H^2 + 4 B H F)    R = S, in the last layer R = rows
    MLM head   B P (2 H^2 + 2 H V)
    NSP head   B (2 H^2 with a pooler + 2 H labels)

The training forward finishes the last layer only at the P masked positions and [CLS] (modeling.py).
With `all_rows=True`, R = S everywhere: the usual formula of BERT's model FLOPs, per token
2 L 12 H^2 + 4 L H S + 2 (V H + H^2) P / S at F = 4 H, by which other trainers state their figures.

With pooling, T = 1 + ceil((S - 1) / p) + P rows take the place of S, but in the first layer S
tokens still give keys and values; "concat" adds 2 B (T - 1 - P) p H^2. A layer that shares the
probabilities of the one below has one projection of three, and no scores.

Each product has two gradients, each a product of the same size, but with a frozen prefix those go
that the backward pass does not reach: all of the prefix, the input of the boundary layer's
projection (unless a LayerNorm with weights lies before it), probabilities that a frozen layer gave,
and the weight of a frozen decoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stacking.config import BertConfig, Freeze


@dataclass(frozen=True)
class Product:
    """Matrix products of one kind, of one sequence: FLOPs forward, gradients backward (0 to 2)."""

    flops: int
    num_gradients: int = 2


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank holds all the time: no activations, no buffers, no fragmentation."""

    weights: int
    gradients: int
    masters: int
    moments: int

    @property
    def total(self) -> int:
        """All four together."""
        return self.weights + self.gradients + self.masters + self.moments


def num_parameters(config: BertConfig) -> int:
    """Numbers in BertForPreTraining(config); the tied decoder counts once."""
    layers = sum(_layer_parameters(config, layer) for layer in range(config.num_hidden_layers))
    return _embedding_parameters(config) + layers + _head_parameters(config)


def trained_parameters(config: BertConfig, freeze: Freeze | None) -> int:
    """Those of `num_parameters` that train: the numbers of freezing.trained_names."""
    if freeze is None:
        return num_parameters(config)
    layers = range(freeze.layers, config.num_hidden_layers)
    trained = sum(_layer_parameters(config, layer) for layer in layers) + _head_parameters(config)
    decoder = config.vocab_size * config.hidden_size
    if config.tie_word_embeddings:
        return trained + (decoder if freeze.decoder == "train" else 0)
    return trained - (decoder if freeze.decoder == "freeze" else 0)


def forward_flops(
    config: BertConfig,
    batch_size: int,
    seq_length: int,
    num_predictions: int,
    *,
    all_rows: bool = False,
) -> int:
    """FLOPs of one training forward of B sequences of S tokens with P predictions each."""
    products = _products(config, seq_length, num_predictions, None, all_rows)
    return batch_size * sum(product.flops for product in products)


def training_flops(
    config: BertConfig,
    batch_size: int,
    seq_length: int,
    num_predictions: int,
    *,
    freeze: Freeze | None = None,
    all_rows: bool = False,
) -> int:
    """FLOPs of forward and backward; nothing is recomputed, the optimizer is not counted."""
    products = _products(config, seq_length, num_predictions, freeze, all_rows)
    return batch_size * sum(product.flops * (1 + product.num_gradients) for product in products)


def memory_bytes(
    config: BertConfig,
    *,
    zero_stage: Literal[0, 1, 2, 3],
    world_size: int,
    bits: Literal[16, 32] = 16,
    adds_up_fp32: bool = False,
    freeze: Freeze | None = None,
) -> StateBytes:
    """Bytes per rank of weights, gradients, fp32 masters and Adam's two fp32 moments.

    Activations are not included. ZeRO (Rajbhandari et al. 2020, section 5) divides the optimizer's
    state from stage 1 on, gradients from 2 on, weights in 3; shares are rounded up. Frozen
    parameters have weights only. DeepSpeed keeps masters apart from fp32 weights, too, from ZeRO 1
    on; its stage 3 keeps small tensors whole on each rank, which is not counted.

    `adds_up_fp32`: bf16 with fp32 accumulation at ZeRO 1, where DeepSpeed's BF16_Optimizer has
    whole gradients twice on each rank, in 16 and in 32 bits.
    """
    all_numbers, trained = num_parameters(config), trained_parameters(config, freeze)

    def share(number: int, from_stage: int) -> int:
        return -(-number // world_size) if zero_stage >= from_stage else number

    has_masters = bits == 16 or zero_stage >= 1
    has_both = adds_up_fp32 and bits == 16 and zero_stage == 1
    return StateBytes(
        weights=bits // 8 * share(all_numbers, 3),
        gradients=(bits // 8 + (4 if has_both else 0)) * share(trained, 2),
        masters=4 * share(trained, 1) if has_masters else 0,
        moments=8 * share(trained, 1),
    )


def checkpoint_bytes(config: BertConfig, freeze: Freeze | None = None) -> int:
    """Bytes of a checkpoint's tensors at most: fp32 weights, two moments of what trains."""
    return 4 * num_parameters(config) + 8 * trained_parameters(config, freeze)


def pooled_length(config: BertConfig, seq_length: int, num_predictions: int) -> int:
    """Rows T that the encoder works on: with pooling [CLS], windows and masked tokens, else S."""
    if config.pooling == "none":
        return seq_length
    return 1 + _num_windows(config, seq_length) + num_predictions


def _num_windows(config: BertConfig, seq_length: int) -> int:
    return -(-(seq_length - 1) // config.pooling_size)


def _products(
    config: BertConfig,
    seq_length: int,
    num_predictions: int,
    freeze: Freeze | None,
    all_rows: bool,
) -> Iterator[Product]:
    """All products of one sequence."""
    length = pooled_length(config, seq_length, num_predictions)
    if config.pooling == "concat":
        windows = _num_windows(config, seq_length)
        flops = 2 * windows * config.pooling_size * config.hidden_size**2
        yield Product(flops, 2 if freeze is None else 0)
    for layer in range(config.num_hidden_layers):
        is_last = layer == config.num_hidden_layers - 1
        rows = num_predictions + (1 if config.num_nsp_labels else 0)
        rows = rows if is_last and not all_rows else length
        answering = seq_length if layer == 0 else length
        products = _layer_products(config, layer, answering, rows, freeze)
        if freeze is not None and layer < freeze.layers:
            products = (Product(product.flops, 0) for product in products)
        yield from products
    yield from _head_products(config, num_predictions, freeze)


def _layer_products(
    config: BertConfig, layer: int, answering: int, rows: int, freeze: Freeze | None
) -> Iterator[Product]:
    """One encoder layer in which `rows` positions ask and leave, and `answering` give values."""
    hidden, frozen = config.hidden_size, 0 if freeze is None else freeze.layers
    normalised = config.layer_norm == "pre" and config.layer_norm_affine
    into_projection = 1 if freeze is not None and layer == frozen and not normalised else 2
    mixing = 2 * rows * answering * hidden  # the size of scores and of context
    if layer in config.shared_attention_layers:
        yield Product(2 * answering * hidden**2, into_projection)
        yield Product(mixing, 2 if _gives_probabilities(config, layer) >= frozen else 1)
    else:
        asking = rows if layer == 0 and config.pooling != "none" else answering
        yield Product(2 * asking * hidden**2 + 4 * answering * hidden**2, into_projection)
        yield Product(2 * mixing)
    yield Product(2 * rows * hidden**2)
    yield Product(4 * rows * hidden * config.inner_size(layer))


def _gives_probabilities(config: BertConfig, layer: int) -> int:
    """The layer whose probabilities `layer` uses."""
    while layer in config.shared_attention_layers:
        layer -= 1
    return layer


def _head_products(
    config: BertConfig, num_predictions: int, freeze: Freeze | None
) -> Iterator[Product]:
    hidden, labels = config.hidden_size, config.num_nsp_labels
    trains_decoder = freeze is None or freeze.decoder == "train"
    yield Product(2 * num_predictions * hidden**2)
    yield Product(2 * num_predictions * hidden * config.vocab_size, 2 if trains_decoder else 1)
    yield Product(2 * hidden * labels + (2 * hidden**2 if labels and config.pooler else 0))


def _embedding_parameters(config: BertConfig) -> int:
    hidden = config.hidden_size
    tables = config.vocab_size + config.type_vocab_size
    tables += config.max_position_embeddings if config.position == "learned" else 0
    pooling = _linear(config.pooling_size * hidden, hidden) if config.pooling == "concat" else 0
    return tables * hidden + (2 * hidden if config.embedding_layer_norm else 0) + pooling


def _layer_parameters(config: BertConfig, layer: int) -> int:
    hidden, inner = config.hidden_size, config.inner_size(layer)
    projections = 1 if layer in config.shared_attention_layers else 3
    attention = _linear(hidden, projections * hidden) + _linear(hidden, hidden)
    feed_forward = _linear(hidden, inner) + _linear(inner, hidden)
    return attention + feed_forward + 2 * _encoder_norm(config)


def _head_parameters(config: BertConfig) -> int:
    """Both heads, the last LayerNorm, and the decoder where it is not tied."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    head = _encoder_norm(config) if config.layer_norm == "pre" else 0
    head += _linear(hidden, hidden) + 2 * hidden + (vocabulary if config.mlm_bias else 0)
    head += 0 if config.tie_word_embeddings else vocabulary * hidden
    head += _linear(hidden, config.num_nsp_labels) if config.num_nsp_labels else 0
    return head + (_linear(hidden, hidden) if config.num_nsp_labels and config.pooler else 0)


def _encoder_norm(config: BertConfig) -> int:
    return 2 * config.hidden_size if config.layer_norm_affine else 0


def _linear(inputs: int, outputs: int) -> int:
    """Weights and biases of a Linear."""
    return inputs * outputs + outputs
