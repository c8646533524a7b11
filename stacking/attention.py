"""Self-attention: with queries, keys and values, or with the probabilities of the layer below.

Dimensions: B sequences, S tokens, R rows that ask, H hidden, N heads, D = H / N.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacking.config import BertConfig
from stacking.functional import attend, attention_probabilities, dropout, gather_rows
from stacking.layers import ZeroLinear
from stacking.positions import Rotation, rotate
from stacking.unpadding import Layout

Asking = tuple[Tensor, Rotation | None]
"""Rows that ask where they are not those that answer: [B,R,H], and how their queries rotate."""


class FusedProjection(ZeroLinear):
    """Queries, keys and values, a third of the rows each, in one product or in parts."""

    def forward(self, hidden: Tensor, part: slice | None = None) -> Tensor:
        """[B,S,H] -> [B,S,3H]; with `part` only these rows of the matrix."""
        if part is None:
            return super().forward(hidden)
        return F.linear(hidden, self.weight[part], self.bias[part])


class SelfAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values."""

    def __init__(self, config: BertConfig, *, keeps_probabilities: bool = False) -> None:
        """`keeps_probabilities`: the layer above reuses them, so that they must exist as such."""
        super().__init__()
        self.qkv = FusedProjection(config.hidden_size, 3 * config.hidden_size)
        self.output = ZeroLinear(config.hidden_size, config.hidden_size)
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.keeps_probabilities = keeps_probabilities

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor | Layout | None,
        rotation: Rotation | None,
        rows: Tensor | None = None,
        asking: Asking | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B,S,H], additive [B,1,1,S] -> [B,S,H], and probabilities [B,N,R,S] where kept.

        With `rows` [B,R] only these ask: [B,R,H]. With `asking`, its rows ask, and those of
        `hidden` answer: [B,R,H]. With a Layout as `bias`, `hidden` is [1,T,H] without padding.
        """
        if asking is None:
            query, key, value = self._project(hidden, rotation)
        else:
            query, key, value = self._project_apart(hidden, rotation, asking)
        if rows is not None:
            query = gather_rows(query.flatten(2), rows).view(
                hidden.shape[0], -1, self.num_heads, hidden.shape[2] // self.num_heads
            )
        dropout_p = self.dropout if self.training else 0.0
        if isinstance(bias, Layout):
            context = bias.attend(query, key, value, dropout_p, rows_ask=rows is not None)
            return self.output(context), None
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        kept = attention_probabilities(query, key, bias) if self.keeps_probabilities else None
        if kept is None:
            context = attend(query, key, value, bias, dropout_p)
        else:
            context = torch.matmul(dropout(kept, dropout_p, training=True), value)
        return self.output(context.transpose(1, 2).flatten(2)), kept

    def _project(self, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """[B,S,H] -> query, key, value, each [B,S,N,D]."""
        parts = self.qkv(hidden).view(*hidden.shape[:2], 3, self.num_heads, -1)
        if rotation is None:
            return tuple(parts.unbind(2))
        return (*rotate(parts[:, :, :2], *rotation).unbind(2), parts[:, :, 2])

    def _project_apart(
        self, hidden: Tensor, rotation: Rotation | None, asking: Asking
    ) -> tuple[Tensor, ...]:
        """Queries [B,R,N,D] of the rows that ask; keys and values [B,S,N,D] of `hidden`."""
        source, query_rotation = asking
        size = hidden.shape[2]
        query = self.qkv(source, slice(size)).view(*source.shape[:2], 1, self.num_heads, -1)
        answers = self.qkv(hidden, slice(size, None)).view(*hidden.shape[:2], 2, self.num_heads, -1)
        key = answers[:, :, :1]
        if rotation is not None and query_rotation is not None:
            query, key = rotate(query, *query_rotation), rotate(key, *rotation)
        return query.squeeze(2), key.squeeze(2), answers[:, :, 1]


class SharedAttention(nn.Module):
    """Attention without queries and keys: the probabilities are those of the layer below.

    CompoundGrow's light attention (Gu et al. 2021; grow_bert's light_attention_layer.py): the
    probabilities after softmax and before dropout, which is drawn anew.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.value = ZeroLinear(config.hidden_size, config.hidden_size)
        self.output = ZeroLinear(config.hidden_size, config.hidden_size)
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, probabilities: Tensor, rows: Tensor | None = None) -> Tensor:
        """[B,S,H], [B,N,S,S] -> [B,S,H]; with `rows` [B,R] only these ask: [B,R,H]."""
        value = self.value(hidden).view(*hidden.shape[:2], self.num_heads, -1).transpose(1, 2)
        if rows is not None:
            shape = (-1, self.num_heads, -1, probabilities.shape[3])
            probabilities = probabilities.gather(2, rows[:, None, :, None].expand(shape))
        dropped = dropout(probabilities, self.dropout, self.training)
        output: Tensor = self.output(torch.matmul(dropped, value).transpose(1, 2).flatten(2))
        return output
