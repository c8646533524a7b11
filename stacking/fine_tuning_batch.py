"""LabelledBatch: what one forward of a model to fine-tune reads."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """One micro batch of B sequences of S tokens."""

    input_ids: Tensor  # [B, S] int64
    token_type_ids: Tensor  # [B, S] int64
    attention_mask: Tensor  # [B, S] bool, False at padding
    labels: Tensor | None  # [B, ...] as the model takes them; None: to predict
    is_padded: bool

    @classmethod
    def of_rows(
        cls,
        input_ids: npt.NDArray[np.integer],
        segment_ids: npt.NDArray[np.integer],
        input_mask: npt.NDArray[np.integer],
        labels: npt.NDArray[np.generic] | None,
    ) -> Self:
        """From numpy rows [B, S], the mask 0 at padding, and labels [B, ...]."""
        return cls(
            input_ids=torch.from_numpy(input_ids.astype(np.int64)),
            token_type_ids=torch.from_numpy(segment_ids.astype(np.int64)),
            attention_mask=torch.from_numpy(input_mask.astype(np.bool_)),
            labels=None if labels is None else torch.from_numpy(labels),
            is_padded=not input_mask.all(),
        )

    @property
    def loss_counts(self) -> tuple[int]:
        """The sequences."""
        return (len(self.input_ids),)

    def to(self, device: torch.device | str) -> Self:
        """Return the batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward; without a mask where nothing is padded."""
        given = {"input_ids": self.input_ids, "token_type_ids": self.token_type_ids}
        if self.is_padded:
            given["attention_mask"] = self.attention_mask
        if self.labels is not None:
            given["labels"] = self.labels
        return given

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            input_ids=change(self.input_ids),
            token_type_ids=change(self.token_type_ids),
            attention_mask=change(self.attention_mask),
            labels=None if self.labels is None else change(self.labels),
        )
