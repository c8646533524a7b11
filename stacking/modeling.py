"""BertForPreTraining: one encoder for all three systems, plain single-device torch.

Dimensions: B sequences, S tokens, P masked positions, H hidden, N heads, D = H / N, F inner, V
vocabulary, L layers.

Options (stacking/config.py) cover BERT (Devlin et al. 2019: post-LN, learned positions),
StackingBERT (Gong et al. 2019: pre-LN without affine, sinusoidal positions, scaled embeddings, one
NSP logit) and rotary positions (Su et al. 2021). The training forward computes the last layer's
rows and the vocabulary projection only where a loss reads them, as StackingBERT does: the rows
that are left out influence nothing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacking.config import BertConfig
from stacking.functional import additive_mask, attend, dropout, gather_rows, segment_vectors
from stacking.positions import RotaryTable, SinusoidalTable, rotate

IGNORED_LABEL = -100

LayerNormFactory = Callable[[int, float, bool], nn.Module]
"""(size, eps, elementwise_affine) -> module: torch.nn.LayerNorm or apex's fused one."""


class BertForPreTraining(nn.Module):
    """Encoder, tied MLM head and optional next-sentence head.

    Weights start at zero (LayerNorm at identity), so that building is cheap: call `init_weights`,
    or load a state.
    """

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory = nn.LayerNorm) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config, layer_norm)
        self.encoder = Encoder(config, layer_norm)
        self.mlm_head = MaskedLMHead(config, layer_norm)
        self.nsp_head = NextSentenceHead(config) if config.num_nsp_labels else None

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        masked_lm_positions: Tensor | None = None,
        masked_lm_ids: Tensor | None = None,
        next_sentence_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sums of the losses when `masked_lm_ids` is given, logits otherwise.

        Args:
            input_ids: [B,S] int64.
            token_type_ids: [B,S] segment of each token; None: all 0.
            attention_mask: [B,S] bool, False at padding; None when nothing is padded (faster: no
                mask is applied).
            masked_lm_positions: [B,P] positions in the sequence; None: all S.
            masked_lm_ids: [B,P] true ids, -100 where the entry is filling.
            next_sentence_labels: [B], 1 = the second segment is random, -100 = ignored row.

        Returns:
            With `masked_lm_ids`: mlm_loss_sum (fp32, summed over non-ignored entries), mlm_correct
            (int64) and, where there are a head and labels, nsp_loss_sum (fp32). Otherwise
            prediction_logits [B,S or P,V], last_hidden_state [B,S,H] and, where there is a head,
            seq_relationship_logits [B,num_nsp_labels].
        """
        if masked_lm_ids is None:
            return self._logits(input_ids, token_type_ids, attention_mask, masked_lm_positions)
        embedded = self.embeddings(input_ids, token_type_ids)
        with_nsp = self.nsp_head is not None and next_sentence_labels is not None
        rows = _rows_with_loss(masked_lm_positions, with_nsp)
        hidden: Tensor = self.encoder(embedded, attention_mask, rows)
        first, masked = hidden[:, 0], hidden[:, 1:] if with_nsp and rows is not None else hidden
        losses = self._masked_lm_losses(masked, masked_lm_ids)
        if self.nsp_head is not None and next_sentence_labels is not None:
            losses["nsp_loss_sum"] = next_sentence_loss(self.nsp_head(first), next_sentence_labels)
        return losses

    def decode(self, hidden: Tensor) -> Tensor:
        """[..., H] hidden states -> [..., V] logits."""
        transformed: Tensor = self.mlm_head(hidden)
        return F.linear(transformed, self.embeddings.word_embeddings.weight, self.mlm_head.bias)

    def _logits(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        positions: Tensor | None,
    ) -> dict[str, Tensor]:
        hidden: Tensor = self.encoder(
            self.embeddings(input_ids, token_type_ids), attention_mask, None
        )
        selected = hidden if positions is None else gather_rows(hidden, positions)
        outputs = {"prediction_logits": self.decode(selected), "last_hidden_state": hidden}
        if self.nsp_head is not None:
            outputs["seq_relationship_logits"] = self.nsp_head(hidden[:, 0])
        return outputs

    def _masked_lm_losses(self, hidden: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """[B,P,H], [B,P] -> sum of cross entropies and number of correct predictions."""
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        if (
            hidden.device.type == "cpu"
        ):  # On an accelerator a shape that depends on data would stall the stream.
            kept = labels != IGNORED_LABEL
            hidden, labels = hidden[kept], labels[kept]
        logits = self.decode(hidden).float()
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        with torch.no_grad():
            correct = (logits.argmax(-1) == labels).sum()
        return {"mlm_loss_sum": loss, "mlm_correct": correct}


class Embeddings(nn.Module):
    """Word + segment + position vectors, then optional LayerNorm, then dropout."""

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = ZeroEmbedding(
            config.vocab_size, size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = (
            ZeroEmbedding(config.max_position_embeddings, size)
            if config.position == "learned"
            else None
        )
        self.token_type_embeddings = (
            ZeroEmbedding(config.type_vocab_size, size) if config.type_vocab_size else None
        )
        self.layer_norm = (
            layer_norm(size, config.layer_norm_eps, True) if config.embedding_layer_norm else None
        )
        self.scale = math.sqrt(size) if config.embedding_scale else 1.0
        self.dropout = config.hidden_dropout_prob
        self.sinusoids = SinusoidalTable(size) if config.position == "sinusoidal" else None

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """[B,S] ids and segments -> [B,S,H]."""
        hidden: Tensor = self.word_embeddings(input_ids)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings.weight[: input_ids.shape[1]]
        if self.sinusoids is not None:
            hidden = hidden + self.sinusoids.lookup(input_ids.shape[1], hidden)
        if self.token_type_embeddings is not None:
            hidden = hidden + segment_vectors(self.token_type_embeddings.weight, token_type_ids)
        if self.layer_norm is not None:
            hidden = self.layer_norm(hidden)
        return dropout(hidden, self.dropout, self.training)


class Encoder(nn.Module):
    """L layers and, for pre-LN, the final LayerNorm."""

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [EncoderLayer(config, layer_norm) for _ in range(config.num_hidden_layers)]
        )
        self.final_layer_norm = (
            layer_norm(config.hidden_size, config.layer_norm_eps, config.layer_norm_affine)
            if config.layer_norm == "pre"
            else None
        )
        head_size = config.hidden_size // config.num_attention_heads
        self.rotary = RotaryTable(head_size) if config.position == "rotary" else None

    def forward(self, hidden: Tensor, attention_mask: Tensor | None, rows: Tensor | None) -> Tensor:
        """[B,S,H] -> [B,S,H]; with `rows` [B,R] only these leave the last layer: [B,R,H]."""
        bias = None if attention_mask is None else additive_mask(attention_mask, hidden.dtype)
        rotation = None if self.rotary is None else self.rotary.lookup(hidden.shape[1], hidden)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, bias, rotation, rows if index == last else None)
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        return hidden


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block, with residual sums; LayerNorm after or before."""

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        size, eps, affine = config.hidden_size, config.layer_norm_eps, config.layer_norm_affine
        self.attention = SelfAttention(config)
        self.attention_layer_norm = layer_norm(size, eps, affine)
        self.feed_forward = FeedForward(config)
        self.feed_forward_layer_norm = layer_norm(size, eps, affine)
        self.pre = config.layer_norm == "pre"
        self.dropout = config.hidden_dropout_prob

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        rows: Tensor | None,
    ) -> Tensor:
        """[B,S,H] -> [B,S,H], or [B,R,H] with `rows` [B,R]."""
        residual = hidden if rows is None else gather_rows(hidden, rows)
        source = self.attention_layer_norm(hidden) if self.pre else hidden
        attended = self.attention(source, bias, rotation, rows)
        hidden = residual + dropout(attended, self.dropout, self.training)
        if self.pre:
            inner = self.feed_forward(self.feed_forward_layer_norm(hidden))
            return hidden + dropout(inner, self.dropout, self.training)
        hidden = self.attention_layer_norm(hidden)
        summed = hidden + dropout(self.feed_forward(hidden), self.dropout, self.training)
        normalised: Tensor = self.feed_forward_layer_norm(summed)
        return normalised


class SelfAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.qkv = ZeroLinear(config.hidden_size, 3 * config.hidden_size)
        self.output = ZeroLinear(config.hidden_size, config.hidden_size)
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        rows: Tensor | None,
    ) -> Tensor:
        """[B,S,H], additive [B,1,1,S] -> [B,S,H]; with `rows` [B,R] only these ask: [B,R,H]."""
        batch, length, size = hidden.shape
        projected = self.qkv(hidden)
        if rotation is None:
            query, key, value = projected.view(batch, length, 3, self.num_heads, -1).unbind(2)
        else:
            parts = projected.view(batch, length, 3, self.num_heads, -1)
            query, key = rotate(parts[:, :, :2], *rotation).unbind(2)
            value = parts[:, :, 2]
        if rows is not None:
            query = gather_rows(query.flatten(2), rows).view(
                batch, -1, self.num_heads, size // self.num_heads
            )
        context = attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            bias,
            self.dropout if self.training else 0.0,
        )
        output: Tensor = self.output(context.transpose(1, 2).flatten(2))
        return output


class FeedForward(nn.Module):
    """H -> F -> H with the activation in between."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.inner = ZeroLinear(config.hidden_size, config.intermediate_size)
        self.output = ZeroLinear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        output: Tensor = self.output(self.activation(self.inner(hidden)))
        return output


class MaskedLMHead(nn.Module):
    """Linear, activation, LayerNorm; `BertForPreTraining.decode` adds the tied projection."""

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        self.dense = ZeroLinear(config.hidden_size, config.hidden_size)
        self.layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, True)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.mlm_bias else None
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        normalised: Tensor = self.layer_norm(self.activation(self.dense(hidden)))
        return normalised


class NextSentenceHead(nn.Module):
    """Classifier on [CLS], through tanh(Linear) where there is a pooler."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.pooler = ZeroLinear(config.hidden_size, config.hidden_size) if config.pooler else None
        self.classifier = ZeroLinear(config.hidden_size, config.num_nsp_labels)

    def forward(self, first: Tensor) -> Tensor:
        """[B,H] hidden states of [CLS] -> [B, num_nsp_labels]."""
        pooled = first if self.pooler is None else torch.tanh(self.pooler(first))
        logits: Tensor = self.classifier(pooled)
        return logits


class ZeroLinear(nn.Linear):
    """nn.Linear that starts at zero: drawing the default costs a second per 100 M weights."""

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroEmbedding(nn.Embedding):
    """nn.Embedding that starts at zero."""

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        nn.init.zeros_(self.weight)


def next_sentence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the next-sentence losses in fp32; labels [B]: 1 = random, 0 = next, -100 = ignored.

    Two logits: cross entropy, class 1 = random (BERT). One logit: binary cross entropy of "is
    next" (StackingBERT).
    """
    logits = logits.float()
    if logits.shape[-1] == 2:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    counted = (labels != IGNORED_LABEL).float()
    is_next = (labels == 0).float()
    return F.binary_cross_entropy_with_logits(
        logits[:, 0], is_next, weight=counted, reduction="sum"
    )


@torch.no_grad()
def init_weights(model: BertForPreTraining, generator: torch.Generator) -> None:
    """Initialise as BERT does: matrices normal(0, initializer_range), biases 0, padding row 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, model.config.initializer_range, generator=generator)
        if isinstance(module, nn.Linear):
            module.bias.zero_()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda hidden: F.gelu(hidden, approximate="tanh"),
    "relu": F.relu,
}


def _rows_with_loss(masked_lm_positions: Tensor | None, with_nsp: bool) -> Tensor | None:
    """[B,R] positions that a loss reads, [CLS] first if the next-sentence head does; None: all."""
    if masked_lm_positions is None or not with_nsp:
        return masked_lm_positions
    return F.pad(masked_lm_positions, (1, 0))
