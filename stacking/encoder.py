"""The stack of encoder layers: token vectors [B,S,H] in, hidden states out.

Dimensions: B sequences, S tokens, T pooled rows, R rows that leave the last layer, H hidden.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stacking.attention import Asking, SelfAttention, SharedAttention
from stacking.config import BertConfig
from stacking.functional import additive_mask, dropout, gather_rows
from stacking.layers import FeedForward, LayerNormFactory
from stacking.pooling import Pooled
from stacking.positions import RotaryTable, Rotation
from stacking.unpadding import Layout


class Encoder(nn.Module):
    """L layers and, for pre-LN, the final LayerNorm.

    Attributes:
        checkpoint_interval: k: every k-th layer that trains keeps its inputs only, and is computed
            again, with the same dropout, when the backward pass comes to it (Chen et al. 2016);
            0: all keep what the backward pass reads. The numbers are the same.
    """

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [EncoderLayer(config, layer_norm, i) for i in range(config.num_hidden_layers)]
        )
        self.final_layer_norm = (
            layer_norm(config.hidden_size, config.layer_norm_eps, config.layer_norm_affine)
            if config.layer_norm == "pre"
            else None
        )
        head_size = config.hidden_size // config.num_attention_heads
        self.rotary = RotaryTable(head_size) if config.position == "rotary" else None
        self.checkpoint_interval = 0

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        rows: Tensor | None,
        pooled: Pooled | None = None,
        frozen_layers: int = 0,
        layout: Layout | None = None,
    ) -> Tensor:
        """[B,S,H] -> [B,S,H]; with `rows` [B,R] only these leave the last layer: [B,R,H].

        With `pooled`, its T rows go up instead, and `hidden` answers in the first layer only. The
        bottom `frozen_layers` leave nothing for a backward pass. With `layout`, which says what
        `attention_mask` does, and no pooling, nothing is computed for padding.
        """
        if layout is not None:
            return self._without_padding(hidden, layout, rows, frozen_layers)
        bias = None if attention_mask is None else additive_mask(attention_mask, hidden.dtype)
        rotation = None if self.rotary is None else self.rotary.lookup(hidden.shape[1], hidden)
        return self._climb(hidden, bias, rotation, rows, pooled, frozen_layers)

    def _without_padding(
        self, hidden: Tensor, layout: Layout, rows: Tensor | None, frozen_layers: int
    ) -> Tensor:
        rotation = None
        if self.rotary is not None:
            tables = self.rotary.lookup(hidden.shape[1], hidden)
            positions = layout.positions()
            rotation = (tables[0][positions], tables[1][positions])
        asking = None if rows is None else layout.rows(rows)
        tokens = layout.unpad(hidden)
        found = self._climb(tokens, layout, rotation, asking, None, frozen_layers)
        return layout.pad(found) if rows is None else found.view(*rows.shape, -1)

    def _climb(
        self,
        hidden: Tensor,
        bias: Tensor | Layout | None,
        rotation: Rotation | None,
        rows: Tensor | None,
        pooled: Pooled | None,
        frozen_layers: int,
    ) -> Tensor:
        """Through all layers and the final LayerNorm."""
        asking: Asking | None = None
        probabilities: Tensor | None = None
        last = len(self.layers) - 1
        if pooled is not None:
            asking, rows = self._asking(pooled, rows)
        for index, layer in enumerate(self.layers):
            given = (bias, rotation, rows if index == last else None, asking, probabilities)
            if self._is_recomputed(index - frozen_layers):
                hidden, probabilities = checkpoint(
                    # ZeRO-3's hooks count the calls of modules: none may stop half-way.
                    layer,
                    hidden,
                    *given,
                    use_reentrant=False,
                    early_stop=False,
                )
            else:
                with torch.no_grad() if index < frozen_layers else nullcontext():
                    hidden, probabilities = layer(hidden, *given)
            if pooled is not None and asking is not None:
                bias, rotation = additive_mask(pooled[1], hidden.dtype), asking[1]
                asking = None
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        return hidden

    def _is_recomputed(self, trained_index: int) -> bool:
        """Whether the layer of this number, counted from the first that trains, is checkpointed."""
        interval = self.checkpoint_interval
        is_asked = interval > 0 and trained_index >= 0 and trained_index % interval == 0
        return is_asked and torch.is_grad_enabled()

    def _asking(self, pooled: Pooled, rows: Tensor | None) -> tuple[Asking, Tensor | None]:
        """What asks in the first layer, and the rows that the last one then has to select.

        Where the first layer is the last, only the selected rows ask.
        """
        source, _, positions = pooled
        if len(self.layers) == 1 and rows is not None:
            source = gather_rows(source, rows)
            positions = None if positions is None else positions.gather(1, rows)
            rows = None
        if self.rotary is None:
            return (source, None), rows
        assert positions is not None, "rotary positions need those of the pooled rows"
        return (source, self.rotary.at(positions, source)), rows


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block, with residual sums; LayerNorm after or before."""

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory, index: int) -> None:
        super().__init__()
        size, eps, affine = config.hidden_size, config.layer_norm_eps, config.layer_norm_affine
        shared = config.shared_attention_layers
        self.attention = (
            SharedAttention(config)
            if index in shared
            else SelfAttention(config, keeps_probabilities=index + 1 in shared)
        )
        self.attention_layer_norm = layer_norm(size, eps, affine)
        self.feed_forward = FeedForward(size, config.inner_size(index), config.hidden_act)
        self.feed_forward_layer_norm = layer_norm(size, eps, affine)
        self.pre = config.layer_norm == "pre"
        self.dropout = config.hidden_dropout_prob

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor | Layout | None,
        rotation: Rotation | None,
        rows: Tensor | None,
        asking: Asking | None = None,
        probabilities: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B,S,H] -> [B,S,H], or [B,R,H] with `rows` [B,R] or `asking` (see SelfAttention).

        `probabilities` [B,N,S,S] are those of the layer below; the second value are those that the
        layer above may reuse.
        """
        residual = hidden if asking is None else asking[0]
        residual = residual if rows is None else gather_rows(residual, rows)
        source = self.attention_layer_norm(hidden) if self.pre else hidden
        if asking is not None and self.pre:
            asking = (self.attention_layer_norm(asking[0]), asking[1])
        if isinstance(self.attention, SharedAttention):
            attended = self.attention(source, probabilities, rows)
        else:
            attended, probabilities = self.attention(source, bias, rotation, rows, asking)
        hidden = residual + dropout(attended, self.dropout, self.training)
        return self._feed(hidden), probabilities

    def _feed(self, hidden: Tensor) -> Tensor:
        """The second half: [B,R,H] -> [B,R,H]."""
        if self.pre:
            inner = self.feed_forward(self.feed_forward_layer_norm(hidden))
            return hidden + dropout(inner, self.dropout, self.training)
        hidden = self.attention_layer_norm(hidden)
        summed = hidden + dropout(self.feed_forward(hidden), self.dropout, self.training)
        normalised: Tensor = self.feed_forward_layer_norm(summed)
        return normalised
