"""What a model costs, by arithmetic: BertConfig in, number of parameters and FLOPs out.

FLOPs count matrix products only, 2 m n k each, on padded sequences of S tokens:

    layer      2 B S 3 H^2 + R (4 B S H + 2 B H^2 + 4 B H F)    R = S, in the last layer R = rows
    MLM head   B P (2 H^2 + 2 H V)
    NSP head   B (2 H^2 with a pooler + 2 H labels)

The training forward finishes the last layer only at the P masked positions and [CLS] (modeling.py).
With `all_rows=True`, R = S everywhere: the usual formula of BERT's model FLOPs, per token
2 L 12 H^2 + 4 L H S + 2 (V H + H^2) P / S at F = 4 H, by which other trainers state their figures.
"""

from stacking.config import BertConfig

BACKWARD_PER_FORWARD = 2
"""Each product has two gradients, each a product of the same size."""


def num_parameters(config: BertConfig) -> int:
    """Trainable numbers of BertForPreTraining(config); the tied decoder counts once."""
    hidden = config.hidden_size
    norm = 2 * hidden if config.layer_norm_affine else 0
    embeddings = (config.vocab_size + config.type_vocab_size) * hidden
    embeddings += config.max_position_embeddings * hidden if config.position == "learned" else 0
    embeddings += 2 * hidden if config.embedding_layer_norm else 0
    layer = _linear(hidden, 3 * hidden) + _linear(hidden, hidden) + 2 * norm
    layer += _linear(hidden, config.intermediate_size) + _linear(config.intermediate_size, hidden)
    final_norm = norm if config.layer_norm == "pre" else 0
    mlm_head = _linear(hidden, hidden) + 2 * hidden + (config.vocab_size if config.mlm_bias else 0)
    nsp_head = _linear(hidden, config.num_nsp_labels) if config.num_nsp_labels else 0
    nsp_head += _linear(hidden, hidden) if config.num_nsp_labels and config.pooler else 0
    return embeddings + config.num_hidden_layers * layer + final_norm + mlm_head + nsp_head


def forward_flops(
    config: BertConfig,
    batch_size: int,
    seq_length: int,
    num_predictions: int,
    *,
    all_rows: bool = False,
) -> int:
    """FLOPs of one training forward of B sequences of S tokens with P predictions each."""
    hidden, labels = config.hidden_size, config.num_nsp_labels
    rows = seq_length if all_rows else num_predictions + (1 if labels else 0)
    full_layers = (config.num_hidden_layers - 1) * _layer_flops(config, seq_length, seq_length)
    last_layer = _layer_flops(config, seq_length, rows)
    mlm_head = num_predictions * 2 * hidden * (hidden + config.vocab_size)
    nsp_head = 2 * hidden * labels + (2 * hidden**2 if labels and config.pooler else 0)
    return batch_size * (full_layers + last_layer + mlm_head + nsp_head)


def training_flops(
    config: BertConfig,
    batch_size: int,
    seq_length: int,
    num_predictions: int,
    *,
    all_rows: bool = False,
) -> int:
    """FLOPs of forward and backward; nothing is recomputed, the optimizer is not counted."""
    forward = forward_flops(config, batch_size, seq_length, num_predictions, all_rows=all_rows)
    return (1 + BACKWARD_PER_FORWARD) * forward


def _layer_flops(config: BertConfig, seq_length: int, rows: int) -> int:
    """One encoder layer of one sequence of which `rows` positions leave the layer."""
    hidden = config.hidden_size
    projections = 2 * seq_length * 3 * hidden**2
    per_row = 4 * seq_length * hidden + 2 * hidden**2 + 4 * hidden * config.intermediate_size
    return projections + rows * per_row


def _linear(inputs: int, outputs: int) -> int:
    """Weights and biases of a Linear."""
    return inputs * outputs + outputs
