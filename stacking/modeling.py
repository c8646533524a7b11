"""BertForPreTraining: one encoder for all three systems, plain single-device torch.

Dimensions: B sequences, S tokens, P masked positions, H hidden, V vocabulary, L layers; with
pooling, T rows (pooling.py).

Options (stacking/config_model.py) cover BERT (Devlin et al. 2019: post-LN, learned positions),
StackingBERT (Gong et al. 2019: pre-LN without affine, sinusoidal positions, scaled embeddings, one
NSP logit), rotary positions (Su et al. 2021) and the small forms of CompoundGrow (Gu et al. 2021:
pooled embeddings, shared attention, narrow layers). The training forward computes the last layer's
rows and the vocabulary projection only where a loss reads them, as StackingBERT does: the rows
that are left out influence nothing. With a frozen prefix (MSLT, Yang et al. 2020), embeddings and
bottom layers run without a record for the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacking.backbone import BertBackbone
from stacking.config import BertConfig
from stacking.functional import gather_rows
from stacking.layers import ACTIVATIONS, LayerNormFactory, ZeroLinear
from stacking.masked_lm_loss import IGNORED_LABEL, masked_lm_loss
from stacking.pooling import Streams, split_streams
from stacking.unpadding import Layout


class BertForPreTraining(BertBackbone):
    """Encoder, MLM head and optional next-sentence head."""

    loss_names = ("mlm_loss_sum", "nsp_loss_sum")
    count_names = ("mlm_correct",)

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory = nn.LayerNorm) -> None:
        super().__init__(config, layer_norm)
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
        layout: Layout | None = None,
    ) -> dict[str, Tensor]:
        """Sums of the losses when `masked_lm_ids` is given, logits otherwise.

        Args:
            input_ids: [B,S] int64.
            token_type_ids: [B,S] segment of each token; None: all 0.
            attention_mask: [B,S] bool, False at padding; None when nothing is padded (faster: no
                mask is applied).
            masked_lm_positions: [B,P] positions in the sequence; None: all S, without pooling. With
                pooling the positions are distinct and 0 is filling, since [CLS] stands there.
            masked_lm_ids: [B,P] true ids, -100 where the entry is filling.
            next_sentence_labels: [B], 1 = the second segment is random, -100 = ignored row.
            layout: of `attention_mask` (unpadding.py): nothing is computed for padding. Needs
                `masked_lm_ids`, no pooling and no shared attention.

        Returns:
            With `masked_lm_ids`: mlm_loss_sum (fp32, summed over non-ignored entries), mlm_correct
            (int64) and, where there are a head and labels, nsp_loss_sum (fp32). Otherwise
            prediction_logits [B,S or P,V], last_hidden_state [B,S or T,H] and, where there is a
            head, seq_relationship_logits [B,num_nsp_labels].
        """
        if masked_lm_ids is None:
            return self._logits(input_ids, token_type_ids, attention_mask, masked_lm_positions)
        with_nsp = self.nsp_head is not None and next_sentence_labels is not None
        streams = self._streams(input_ids, attention_mask, masked_lm_positions)
        if streams is None:
            rows = _rows_with_loss(masked_lm_positions, with_nsp)
        else:
            rows = streams.rows_with_loss(with_nsp)
        hidden = self.encode(input_ids, token_type_ids, attention_mask, streams, rows, layout)
        first, masked = hidden[:, 0], hidden[:, 1:] if with_nsp and rows is not None else hidden
        losses = self._masked_lm_losses(masked, masked_lm_ids)
        if self.nsp_head is not None and next_sentence_labels is not None:
            losses["nsp_loss_sum"] = next_sentence_loss(self.nsp_head(first), next_sentence_labels)
        return losses

    def decode(self, hidden: Tensor) -> Tensor:
        """[..., H] hidden states -> [..., V] logits."""
        return F.linear(self.mlm_head(hidden), self._decoder_weight(), self.mlm_head.bias)

    def _decoder_weight(self) -> Tensor:
        """[V,H]."""
        decoder = self.mlm_head.decoder or self.embeddings.word_embeddings
        return decoder.weight

    def _streams(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None
    ) -> Streams | None:
        """What goes where with pooling; None: without, or where every position is asked for."""
        if self.config.pooling == "none" or positions is None:
            return None
        return split_streams(
            attention_mask,
            positions,
            length=input_ids.shape[1],
            pooling_size=self.config.pooling_size,
        )

    def _logits(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None,
        attention_mask: Tensor | None,
        positions: Tensor | None,
    ) -> dict[str, Tensor]:
        streams = self._streams(input_ids, attention_mask, positions)
        hidden = self.encode(input_ids, token_type_ids, attention_mask, streams, None)
        if positions is None:
            selected = hidden
        elif streams is None:
            selected = gather_rows(hidden, positions)
        else:
            selected = hidden[:, hidden.shape[1] - positions.shape[1] :]
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
        loss, correct = masked_lm_loss(
            self.mlm_head(hidden), self._decoder_weight(), self.mlm_head.bias, labels
        )
        return {"mlm_loss_sum": loss, "mlm_correct": correct}


class MaskedLMHead(nn.Module):
    """Linear, activation, LayerNorm; `BertForPreTraining.decode` adds the projection to V logits.

    `decoder` is its matrix where it is not the word embedding itself.
    """

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__()
        self.dense = ZeroLinear(config.hidden_size, config.hidden_size)
        self.layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, True)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.mlm_bias else None
        self.decoder = (
            None
            if config.tie_word_embeddings
            else ZeroLinear(config.hidden_size, config.vocab_size, bias=False)
        )
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
def init_weights(model: BertBackbone, generator: torch.Generator) -> None:
    """Initialise as BERT does: matrices normal(0, initializer_range), biases 0, padding row 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, model.config.initializer_range, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()


def _rows_with_loss(masked_lm_positions: Tensor | None, with_nsp: bool) -> Tensor | None:
    """[B,R] positions that a loss reads, [CLS] first if the next-sentence head does; None: all."""
    if masked_lm_positions is None or not with_nsp:
        return masked_lm_positions
    return F.pad(masked_lm_positions, (1, 0))
