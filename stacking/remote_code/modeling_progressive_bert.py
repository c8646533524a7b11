"""ProgressiveBert: a BERT with options that no class of transformers has, in plain torch.

It needs torch and transformers only; padding is on the right. Shapes: B sequences, S tokens,
H hidden, N heads, D = H / N, V vocabulary, C labels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.utils.generic import ModelOutput

from .configuration_progressive_bert import ProgressiveBertConfig

Rotation = tuple[Tensor, Tensor]  # cos and sin, [S,D/2] each

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda hidden: F.gelu(hidden, approximate="tanh"),
    "relu": F.relu,
}


@dataclass
class PreTrainingOutput(ModelOutput):
    """`loss` of masked tokens; `logits` [B,S,V]; `seq_relationship_logits`, where a head has them:
    [B,2], class 1 = the second segment is random, or [B,1], the log-odds of "is next".
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None


def rotation_of(length: int, head_size: int, like: Tensor) -> Rotation:
    """cos and sin of position s times 10,000^(-2i/D), computed in fp64 (Su et al. 2021)."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, 10_000.0**-exponents)
    return angles.cos().to(like), angles.sin().to(like)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """[B,N,S,D] -> the same, number i turned together with i + D/2."""
    (left, right), (cos, sin) = heads.chunk(2, dim=-1), rotation
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class Embeddings(nn.Module):
    """Word + position + segment vectors; each kind only where the configuration has it."""

    def __init__(self, config: ProgressiveBertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.position_embeddings, self.token_type_embeddings, self.layer_norm = None, None, None
        if config.position != "rotary":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
            self.position_embeddings.weight.requires_grad_(config.position == "learned")
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        if config.embedding_layer_norm:
            self.layer_norm = nn.LayerNorm(size, config.layer_norm_eps)
        self.scale = math.sqrt(size) if config.embedding_scale else 1.0
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """[B,S] ids and segments -> [B,S,H]."""
        hidden = self.word_embeddings(input_ids) * self.scale
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings.weight[: input_ids.shape[1]]
        if self.token_type_embeddings is not None:
            segments = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            hidden = hidden + self.token_type_embeddings(segments)
        return self.dropout(hidden if self.layer_norm is None else self.layer_norm(hidden))


class Attention(nn.Module):
    """Softmax attention; a shared layer has values only and reuses the probabilities from below."""

    def __init__(self, config: ProgressiveBertConfig, index: int) -> None:
        super().__init__()
        size, shared = config.hidden_size, config.shared_attention_layers
        self.is_shared, self.is_reused = index in shared, index + 1 in shared
        if self.is_shared:
            self.value = nn.Linear(size, size)
        else:
            self.qkv = nn.Linear(size, 3 * size)
        self.output = nn.Linear(size, size)
        self.num_heads = config.num_attention_heads
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, rotation: Rotation | None, below: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B,S,H] and probabilities of the layer below, [B,N,S,S] -> [B,S,H], and its own."""
        if self.is_shared:
            context = self.dropout(below) @ self.heads(self.value(hidden))
            return self.output(context.transpose(1, 2).flatten(2)), below
        query, key, value = (self.heads(part) for part in self.qkv(hidden).chunk(3, dim=-1))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        probabilities = None
        if self.is_reused:
            scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
            probabilities = (scores if mask is None else scores + mask).softmax(dim=-1)
            context = self.dropout(probabilities) @ value
        else:
            dropout_p = self.dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(query, key, value, mask, dropout_p)
        return self.output(context.transpose(1, 2).flatten(2)), probabilities

    def heads(self, hidden: Tensor) -> Tensor:
        """[B,S,H] -> [B,N,S,D]."""
        return hidden.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Attention and feed-forward block, with residual sums; LayerNorm after or before."""

    def __init__(self, config: ProgressiveBertConfig, index: int) -> None:
        super().__init__()
        size, eps, affine = config.hidden_size, config.layer_norm_eps, config.layer_norm_affine
        self.attention = Attention(config, index)
        self.attention_layer_norm = nn.LayerNorm(size, eps, elementwise_affine=affine)
        self.inner = nn.Linear(size, config.inner_size(index))
        self.output = nn.Linear(config.inner_size(index), size)
        self.output_layer_norm = nn.LayerNorm(size, eps, elementwise_affine=affine)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.is_pre = config.layer_norm == "pre"

    def forward(
        self, hidden: Tensor, mask: Tensor | None, rotation: Rotation | None, below: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[B,S,H] -> [B,S,H]; probabilities as Attention has them."""
        source = self.attention_layer_norm(hidden) if self.is_pre else hidden
        attended, probabilities = self.attention(source, mask, rotation, below)
        hidden = hidden + self.dropout(attended)
        hidden = hidden if self.is_pre else self.attention_layer_norm(hidden)
        source = self.output_layer_norm(hidden) if self.is_pre else hidden
        hidden = hidden + self.dropout(self.output(self.activation(self.inner(source))))
        return hidden if self.is_pre else self.output_layer_norm(hidden), probabilities


class ProgressiveBertPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of all classes."""

    config_class = ProgressiveBertConfig
    base_model_prefix = "bert"
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["Layer"]
    _supports_sdpa = True


class ProgressiveBertModel(ProgressiveBertPreTrainedModel):
    """Embeddings, layers, for pre-LN a last LayerNorm, and the pooler where there was one."""

    def __init__(self, config: ProgressiveBertConfig) -> None:
        super().__init__(config)
        size, eps, affine = config.hidden_size, config.layer_norm_eps, config.layer_norm_affine
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_layer_norm, self.pooler = None, None
        if config.layer_norm == "pre":
            self.final_layer_norm = nn.LayerNorm(size, eps, elementwise_affine=affine)
        if config.pooler and config.num_nsp_labels:
            self.pooler = nn.Linear(size, size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPooling:
        """[B,S]: ids, 1 at real tokens, segments -> last_hidden_state [B,S,H], pooler_output."""
        hidden, mask, rotation = self.embeddings(input_ids, token_type_ids), None, None
        if attention_mask is not None:  # Half of the smallest number: a row of padding is no NaN.
            blocked = (attention_mask == 0)[:, None, None, :].to(hidden.dtype)
            mask = blocked * (torch.finfo(hidden.dtype).min / 2)
        if self.config.position == "rotary":
            head_size = self.config.hidden_size // self.config.num_attention_heads
            rotation = rotation_of(input_ids.shape[1], head_size, hidden)
        probabilities = None
        for layer in self.layers:
            hidden, probabilities = layer(hidden, mask, rotation, probabilities)
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        pooled = None if self.pooler is None else self.pooler(hidden[:, 0]).tanh()
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


class ProgressiveBertForPreTraining(ProgressiveBertPreTrainedModel):
    """The logits of the masked-LM head and, where there is one, of the next-sentence head."""

    _tied_weights_keys = {"mlm_head.decoder.weight": "bert.embeddings.word_embeddings.weight"}

    def __init__(self, config: ProgressiveBertConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.bert = ProgressiveBertModel(config)
        self.mlm_head = nn.ModuleDict({
            "dense": nn.Linear(size, size),
            "layer_norm": nn.LayerNorm(size, config.layer_norm_eps),
            "decoder": nn.Linear(size, config.vocab_size, bias=config.mlm_bias),
        })  # fmt: skip
        labels = config.num_nsp_labels
        self.seq_relationship = nn.Linear(size, labels) if labels else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The decoder, whose matrix may be the word embedding itself."""
        return self.mlm_head["decoder"]

    def set_output_embeddings(self, decoder: nn.Module) -> None:
        """Where transformers puts a decoder of another size."""
        self.mlm_head["decoder"] = decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> PreTrainingOutput:
        """Arguments [B,S]; `labels`: true ids, -100 where nothing is predicted."""
        found = self.bert(input_ids, attention_mask, token_type_ids)
        hidden, sentence = found.last_hidden_state, None
        activated = ACTIVATIONS[self.config.hidden_act](self.mlm_head["dense"](hidden))
        logits = self.mlm_head["decoder"](self.mlm_head["layer_norm"](activated))
        if self.seq_relationship is not None:
            first = hidden[:, 0] if found.pooler_output is None else found.pooler_output
            sentence = self.seq_relationship(first)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return PreTrainingOutput(loss, logits, sentence)


class ProgressiveBertForSequenceClassification(ProgressiveBertPreTrainedModel):
    """Classes or a number of a sequence, read from the pooler or, without one, at [CLS]."""

    def __init__(self, config: ProgressiveBertConfig) -> None:
        super().__init__(config)
        self.bert = ProgressiveBertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """`labels`: [B] class numbers; [B,C] of 0.0 and 1.0; [B] numbers where C is 1."""
        found = self.bert(input_ids, attention_mask, token_type_ids)
        pooled = found.pooler_output
        pooled = found.last_hidden_state[:, 0] if pooled is None else pooled
        logits, loss = self.classifier(self.dropout(pooled)), None
        if labels is not None and logits.shape[1] == 1:
            loss = F.mse_loss(logits.flatten(), labels.flatten().to(logits.dtype))
        elif labels is not None and labels.is_floating_point():
            loss = F.binary_cross_entropy_with_logits(logits, labels)
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss, logits)
