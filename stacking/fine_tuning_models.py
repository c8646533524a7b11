"""BERT with a head for a task: classification or regression of a sequence, answers in a text.

Dimensions: B sequences, S tokens, H hidden, C logits. The heads begin at zero, as StackingBERT's do
(Gong et al. 2019): what a model says at first is a function of its pre-training alone. A
pre-trained pooler stays below the classifier; a model without one is read at [CLS] directly.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stacking.backbone import BertBackbone
from stacking.config import BertConfig
from stacking.functional import dropout
from stacking.layers import LayerNormFactory, ZeroLinear
from stacking.unpadding import Layout

Kind = Literal["classes", "one_logit", "regression"]


class BertForSequenceClassification(BertBackbone):
    """Logits of [CLS]: one for each class, one for "yes", or a number."""

    loss_names = ("loss_sum",)

    def __init__(
        self, config: BertConfig, layer_norm: LayerNormFactory, *, kind: Kind, num_logits: int
    ) -> None:
        """`num_logits`: C, of "classes"; else 1."""
        super().__init__(config, layer_norm)
        assert kind == "classes" or num_logits == 1, (kind, num_logits)
        self._kind = kind
        has_pooler = config.pooler and config.num_nsp_labels > 0
        self.pooler = ZeroLinear(config.hidden_size, config.hidden_size) if has_pooler else None
        self.classifier = ZeroLinear(config.hidden_size, num_logits)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        layout: Layout | None = None,
    ) -> dict[str, Tensor]:
        """`loss_sum` (fp32) with labels, else `logits` [B,C].

        Args:
            input_ids: [B,S] int64.
            token_type_ids: [B,S] segment of each token; None: all 0.
            attention_mask: [B,S] bool, False at padding; None: nothing is padded.
            labels: [B], class numbers (int64), or 0 and 1 or the number itself (fp32).
            layout: of `attention_mask` (unpadding.py): nothing is computed for padding.
        """
        first = torch.zeros_like(input_ids[:, :1])
        hidden = self.encode(input_ids, token_type_ids, attention_mask, rows=first, layout=layout)[
            :, 0
        ]
        if self.pooler is not None:
            hidden = torch.tanh(self.pooler(hidden))
        hidden = dropout(hidden, self.config.hidden_dropout_prob, self.training)
        logits = self.classifier(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss_sum": _loss(self._kind, logits.float(), labels)}


class BertForQuestionAnswering(BertBackbone):
    """Where in the sequence the answer begins and ends; at [CLS] where there is none."""

    loss_names = ("loss_sum",)

    def __init__(self, config: BertConfig, layer_norm: LayerNormFactory) -> None:
        super().__init__(config, layer_norm)
        self.qa_outputs = ZeroLinear(config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        layout: Layout | None = None,
    ) -> dict[str, Tensor]:
        """`loss_sum` (fp32) with labels, else `logits` [B,S,2] of a begin and of an end.

        `labels` [B,2]: the positions of the answer's first and last token; other arguments as
        BertForSequenceClassification has them. The loss of a sequence is the mean of both (Devlin
        et al. 2019, section 4.2). Padding gets the smallest logits.
        """
        hidden = self.encode(input_ids, token_type_ids, attention_mask, layout=layout)
        logits = self.qa_outputs(hidden).float()
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask[:, :, None], torch.finfo(logits.dtype).min)
        if labels is None:
            return {"logits": logits}
        begin, end = (
            F.cross_entropy(logits[:, :, side], labels[:, side], reduction="sum") for side in (0, 1)
        )
        return {"loss_sum": (begin + end) / 2}


def _loss(kind: Kind, logits: Tensor, labels: Tensor) -> Tensor:
    """[B,C], [B] -> sum of the cross entropies (nats) or of the squared errors."""
    if kind == "classes":
        return F.cross_entropy(logits, labels, reduction="sum")
    if kind == "one_logit":
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels, reduction="sum")
    return F.mse_loss(logits[:, 0], labels, reduction="sum")
