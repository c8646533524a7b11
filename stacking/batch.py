"""MaskedLMBatch: what one forward of the model reads."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_prep.masking import IntArray


@dataclass(frozen=True, eq=False)
class MaskedLMBatch:
    """One micro batch; masked_lm_ids is -100 where masked_lm_positions is padding."""

    input_ids: Tensor  # [B, S] int64
    token_type_ids: Tensor  # [B, S] int64
    attention_mask: Tensor  # [B, S] bool
    masked_lm_positions: Tensor  # [B, P] int64
    masked_lm_ids: Tensor  # [B, P] int64
    next_sentence_labels: Tensor | None  # [B] int64, 1 = random next
    sample_indices: IntArray  # [B] global row numbers, -1: filler
    num_masked: int
    num_real_tokens: int

    def to(self, device: torch.device | str) -> "MaskedLMBatch":
        """Return the batch with its tensors on `device`."""
        labels = self.next_sentence_labels
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            token_type_ids=self.token_type_ids.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            masked_lm_positions=self.masked_lm_positions.to(device, non_blocking=True),
            masked_lm_ids=self.masked_lm_ids.to(device, non_blocking=True),
            next_sentence_labels=None if labels is None else labels.to(device, non_blocking=True),
        )

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of BertForPreTraining.forward; without a mask where nothing is padded.

        Reads no tensor, so nothing waits for an accelerator.
        """
        given = {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "masked_lm_positions": self.masked_lm_positions,
            "masked_lm_ids": self.masked_lm_ids,
        }
        if self.num_real_tokens != self.input_ids.numel():
            given["attention_mask"] = self.attention_mask
        if self.next_sentence_labels is not None:
            given["next_sentence_labels"] = self.next_sentence_labels
        return given
