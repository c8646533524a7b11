"""What one forward of a model reads: any batch, and that of pre-training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from data_prep.masking import IntArray


class Batch(Protocol):
    """One micro batch of B sequences of S tokens, as an engine takes it."""

    @property
    def attention_mask(self) -> Tensor:
        """[B, S] bool, False at padding."""
        ...

    @property
    def is_padded(self) -> bool:
        """Whether any token is padding."""
        ...

    @property
    def loss_counts(self) -> tuple[int, ...]:
        """Over how many items the model sums each of its losses."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with its tensors on `device`."""
        ...

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward, without a mask where nothing is padded."""
        ...


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

    @classmethod
    def whole(cls, input_ids: Tensor, num_predictions: int) -> Self:
        """A batch [B,S] without padding or pairs, masked from the second token on: to time with."""
        positions = torch.arange(1, 1 + num_predictions).expand(len(input_ids), -1)
        return cls(
            input_ids=input_ids,
            token_type_ids=torch.zeros_like(input_ids),
            attention_mask=torch.ones_like(input_ids, dtype=torch.bool),
            masked_lm_positions=positions,
            masked_lm_ids=input_ids.gather(1, positions),
            next_sentence_labels=torch.zeros(len(input_ids), dtype=torch.int64),
            sample_indices=np.arange(len(input_ids)),
            num_masked=positions.numel(),
            num_real_tokens=input_ids.numel(),
        )

    @property
    def is_padded(self) -> bool:
        """Whether any token is padding."""
        return self.num_real_tokens != self.input_ids.numel()

    @property
    def loss_counts(self) -> tuple[int, int]:
        """Masked tokens, and sequences whose second segment is known to be next or random."""
        labels = self.next_sentence_labels
        return self.num_masked, 0 if labels is None else int((labels >= 0).sum())

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with its tensors on `device`; from pinned memory nothing waits."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """Return the batch in pinned host memory, from which a CUDA device copies by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

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
        if self.is_padded:
            given["attention_mask"] = self.attention_mask
        if self.next_sentence_labels is not None:
            given["next_sentence_labels"] = self.next_sentence_labels
        return given

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with each tensor changed."""
        labels = self.next_sentence_labels
        return replace(
            self,
            input_ids=change(self.input_ids),
            token_type_ids=change(self.token_type_ids),
            attention_mask=change(self.attention_mask),
            masked_lm_positions=change(self.masked_lm_positions),
            masked_lm_ids=change(self.masked_lm_ids),
            next_sentence_labels=None if labels is None else change(labels),
        )
