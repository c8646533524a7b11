"""What every BERT has below its heads: embeddings and encoder, frozen from the bottom on or not.

Dimensions: B sequences, S tokens, R rows that leave the last layer, H hidden; with pooling, T rows
(pooling.py). With a frozen prefix (MSLT, Yang et al. 2020), embeddings and bottom layers run
without a record for the backward pass.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from stacking.config import BertConfig
from stacking.encoder import Encoder
from stacking.functional import dropout, segment_vectors
from stacking.layers import LayerNormFactory, ZeroEmbedding, ZeroLinear
from stacking.pooling import Streams, pool_rows
from stacking.positions import SinusoidalTable
from stacking.unpadding import Layout


class BertBackbone(nn.Module):
    """Embeddings and encoder; a model adds its heads and a forward that returns sums of losses.

    Weights start at zero (LayerNorm at identity), so that building is cheap: call `init_weights`,
    or load a state.

    Attributes:
        loss_names: of the sums that forward returns, in nats, where it is given labels.
        count_names: of what it counts besides.
        frozen_layers: in training mode the embeddings and so many bottom layers leave nothing for
            the backward pass; 0: everything does. See stacking/freezing.py, which sets it.
        frozen_dropout: whether dropout is on in the frozen part.
    """

    loss_names: ClassVar[tuple[str, ...]] = ()
    count_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        self.config = config
        self.frozen_layers = 0
        self.frozen_dropout = True
        self.embeddings = Embeddings(config, layer_norm)
        self.encoder = Encoder(config, layer_norm)

    def encode(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        streams: Streams | None = None,
        rows: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Tensor:
        """[B,S] ids -> [B,S,H], pooled [B,T,H]; with `rows` [B,R] only these: [B,R,H].

        Arguments as BertForPreTraining.forward has them; `streams`: with pooling, what goes where.
        """
        frozen = self.frozen_layers if self.training else 0
        still = [] if self.frozen_dropout else [self.embeddings, *self.encoder.layers][: 1 + frozen]
        with _evaluating(still) if frozen else nullcontext():
            with torch.no_grad() if frozen else nullcontext():
                hidden: Tensor = self.embeddings(input_ids, token_type_ids)
                pooled = None
                if streams is not None:
                    pooled = (
                        pool_rows(hidden, streams, self.config.pooling, self.embeddings.pooling),
                        streams.mask,
                        streams.positions() if self.config.position == "rotary" else None,
                    )
            encoded: Tensor = self.encoder(hidden, attention_mask, rows, pooled, frozen, layout)
        return encoded


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
        self.pooling = (
            ZeroLinear(config.pooling_size * size, size) if config.pooling == "concat" else None
        )
        """Used by pooling.py, behind LayerNorm and dropout."""
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


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules that are in training mode, without dropout for a while."""
    modules = list(modules)
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()
