"""The masked-LM loss from hidden states and the decoder, without fp32 logits of all rows.

Dimensions: R rows (masked tokens and filling), H hidden, V vocabulary.

The gradient of a sum of cross entropies by the logits, softmax minus one-hot, is known as soon as
they are. It is computed with the losses, in fp32 for some rows at a time, and takes the logits'
place in their own precision; the backward pass is two matrix products. Known from Liger Kernel (Hsu
et al. 2024, section 3.2). Its products work on some rows at a time, too; here they stay whole:
adding up gradients of a decoder costs more than the 16-bit logits of a micro batch take.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100
_CPU_NUMBERS, _NUMBERS = 2**20, 2**24
"""Logits in fp32 at a time: what caches hold (4 MiB); on a GPU 64 MiB."""
_FP16_SCALE = 1024.0
"""Of the gradient by the logits in fp16, which has no number between 0 and 6e-8."""


def masked_lm_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of cross entropies in fp32, and in how many rows the first largest logit is the label's.

    Under autocast in its precision, as F.linear is. Nothing is kept where no gradient is recorded.

    Args:
        hidden: [R,H].
        weight: [V,H].
        bias: [V]; None: none.
        labels: [R] int64, -100 where a row does not count.
    """
    if torch.compiler.is_compiling():  # which fuses by itself what follows
        logits = F.linear(hidden, weight, bias).float()
        correct = (logits.argmax(-1) == labels).sum()
        return F.cross_entropy(logits, labels, reduction="sum"), correct
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    loss: Tensor
    loss, correct = _MaskedLMLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, torch.is_grad_enabled()
    )
    return loss, correct


class _MaskedLMLoss(torch.autograd.Function):
    """See the top of this file. The gradient by the logits is `scale` times too large."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, records: bool
    ) -> tuple[Tensor, Tensor]:
        """The two sums."""
        logits = F.linear(hidden, weight, bias)
        counts = labels != IGNORED_LABEL
        targets = labels.clamp(min=0)[:, None]
        ctx.scale = _FP16_SCALE if logits.dtype == torch.float16 else 1.0
        scale = ctx.scale if records and any(ctx.needs_input_grad) else None
        losses, hits = _losses(logits, targets, scale)
        correct = (hits & counts).sum()
        ctx.mark_non_differentiable(correct)
        if scale is not None:
            ctx.save_for_backward(hidden, weight, logits, counts[:, None])
        return losses.masked_fill_(~counts, 0.0).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply; the incoming gradient and the rows that count come in at the narrow sides."""
        hidden, weight, by_logits, counts = ctx.saved_tensors
        factors = gradients[0] * counts  # [R,1] fp32
        by_hidden = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_hidden = (torch.mm(by_logits, weight) * (factors / ctx.scale)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            scaled = (hidden * factors).to(hidden.dtype)
            # alpha is applied before the result is rounded to 16 bits.
            by_weight = torch.addmm(
                scaled.new_zeros(1), by_logits.t(), scaled, beta=0, alpha=1 / ctx.scale
            )
        if ctx.needs_input_grad[2]:
            ones = counts[:, 0].to(hidden.dtype) / ctx.scale
            by_bias = (torch.mv(by_logits.t(), ones) * gradients[0]).to(hidden.dtype)
        return by_hidden, by_weight, by_bias, None, None


def _losses(logits: Tensor, targets: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """[R,V], [R,1] -> cross entropies [R] in fp32, and whether the first largest is the target [R].

    With `scale` the logits become that many times the gradient by them.
    """
    numbers = _CPU_NUMBERS if logits.device.type == "cpu" else _NUMBERS
    rows = max(1, numbers // logits.shape[1])
    losses = torch.empty_like(targets, dtype=torch.float32)
    hits = torch.empty_like(targets, dtype=torch.bool)
    for first in range(0, len(logits), rows):
        part = slice(first, first + rows)
        block, target = logits[part], targets[part]
        largest, guess = block.max(-1, keepdim=True)
        probabilities = block.softmax(-1, dtype=torch.float32)
        losses[part] = (
            largest.float() - block.gather(1, target) - probabilities.gather(1, guess).log()
        )
        hits[part] = guess == target
        if scale is not None:
            probabilities.scatter_add_(1, target, torch.full_like(losses[part], -1.0))
            block.copy_(probabilities if scale == 1.0 else probabilities.mul_(scale))
    return losses[:, 0], hits[:, 0]
