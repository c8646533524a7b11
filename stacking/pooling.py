"""CompoundGrow's embedding pooling: token vectors in, the fewer rows that the encoder works on out.

Dimensions: B sequences, S tokens, P masked positions, p neighbours that become one, H hidden,
W = ceil((S - 1) / p) windows, T = 1 + W + P rows.

The rows are [CLS], the windows of p neighbouring unmasked tokens, and the masked tokens. The first
layer asks with these rows, and the S unpooled tokens answer; later layers know the T rows only (Gu
et al. 2021; grow_bert's resolution_layer.py and transformer_encoder.py). Two choices are ours:
[CLS] stays outside the windows for every kind (grow_bert pools it with concat), and padding takes
no part in a mean (grow_bert lets it).

Shapes depend on S, p and P alone, and nothing is read back from the device: a sequence with fewer
unmasked tokens has windows, and one with fewer predictions has slots, that nobody attends to.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stacking.functional import gather_rows

Kind = Literal["none", "mean", "max", "concat"]
Pooled = tuple[Tensor, Tensor, Tensor | None]
"""Rows [B,T,H], which of them are real [B,T] bool, and for rotation their positions [B,T] fp64."""


@dataclass(frozen=True)
class Streams:
    """Which token goes where.

    Attributes:
        windows: [B,W,p] position of each window's tokens; any where `in_window` is False.
        in_window: [B,W,p] False at padding, and behind a sequence's last unmasked token.
        masked: [B,P] positions of the masked tokens; 0 is filling, as [CLS] is never predicted.
        mask: [B,T] rows that stand for at least one real token.
    """

    windows: Tensor
    in_window: Tensor
    masked: Tensor
    mask: Tensor

    def positions(self) -> Tensor:
        """[B,T] fp64 position of each row: for a window the mean of its tokens' positions."""
        weights = self.in_window.double()
        means = (self.windows * weights).sum(2) / weights.sum(2).clamp(min=1)
        first = torch.zeros_like(self.mask[:, :1], dtype=torch.float64)
        return torch.cat([first, means, self.masked.double()], dim=1)

    def rows_with_loss(self, with_nsp: bool) -> Tensor:
        """[B,R] rows that a loss reads: the last P, and first [CLS] if a head reads it."""
        batch, predictions = self.masked.shape
        total = self.mask.shape[1]
        rows = torch.arange(total - predictions, total, device=self.masked.device)
        return F.pad(rows, (1, 0) if with_nsp else (0, 0)).expand(batch, -1)


def split_streams(
    attention_mask: Tensor | None, masked_lm_positions: Tensor, *, length: int, pooling_size: int
) -> Streams:
    """Streams of sequences of S = `length` tokens, [CLS] first, given [B,S] bool or None, [B,P]."""
    positions = masked_lm_positions
    is_masked = torch.zeros(
        positions.shape[0], length, dtype=torch.bool, device=positions.device
    ).scatter_(1, positions, True)
    is_masked[:, 0] = False
    everywhere = torch.arange(length, device=positions.device)
    order = (everywhere + length * is_masked).argsort(1)[:, 1:]  # unmasked first, [CLS] left out
    is_unmasked = ~is_masked if attention_mask is None else attention_mask.bool() & ~is_masked
    num_windows = -(-(length - 1) // pooling_size)
    missing = num_windows * pooling_size - (length - 1)
    windows, in_window = (
        F.pad(tokens, (0, missing)).reshape(len(positions), num_windows, pooling_size)
        for tokens in (order, is_unmasked.gather(1, order))
    )
    slots = positions > 0
    first = torch.ones_like(is_masked[:, :1])
    if attention_mask is not None:
        slots = slots & attention_mask.bool().gather(1, positions)
        first = attention_mask[:, :1].bool()
    mask = torch.cat([first, in_window.any(2), slots], dim=1)
    return Streams(windows, in_window, positions, mask)


def pool_rows(
    hidden: Tensor, streams: Streams, kind: Kind, projection: nn.Module | None = None
) -> Tensor:
    """[B,S,H] -> [B,T,H]: [CLS], the windows, the masked tokens.

    `projection` maps [B,W,p*H] -> [B,W,H]; kind "concat" alone needs it. Tokens that are not in a
    window count as zeros there; a window without any is zero (for "concat": the bias).
    """
    batch, num_windows, pooling_size = streams.windows.shape
    inside = streams.in_window[..., None]
    tokens = gather_rows(hidden, streams.windows.flatten(1)).view(
        batch, num_windows, pooling_size, hidden.shape[2]
    )
    if kind == "max":
        highest = tokens.masked_fill(~inside, -torch.inf).amax(2)
        windows = highest.masked_fill(~inside.any(2), 0.0)
    elif kind == "mean":
        counts = inside.sum(2).clamp(min=1).to(hidden.dtype)
        windows = (tokens * inside).sum(2) / counts
    else:
        assert kind == "concat", f"no pooling of kind {kind!r}"
        assert projection is not None, "concat needs its projection"
        windows = projection((tokens * inside).flatten(2))
    return torch.cat([hidden[:, :1], windows, gather_rows(hidden, streams.masked)], dim=1)
