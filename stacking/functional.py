"""Tensor functions of the model, each in the form that is fastest where it runs.

Dimensions: B sequences, S tokens, R rows that ask, N heads, D head size, H hidden, T segments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout_p: float
) -> Tensor:
    """Softmax attention: [B,N,R,D], twice [B,N,S,D], additive [B,1,1,S] -> [B,N,R,D].

    On a CPU in 16 bits two batched products are 3 to 4 times as fast, forward and backward, as
    scaled_dot_product_attention (torch 2.13, one core with avx512_bf16: 5 against 23 ms at B=16,
    N=4, S=128, D=64; 66 against 125 ms at B=4, N=12, S=512). In fp32 its kernel is the faster one.
    """
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout_p
        )
    probabilities = attention_probabilities(query, key, bias)
    return torch.matmul(dropout(probabilities, dropout_p, training=True), value)


def attention_probabilities(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """[B,N,R,D], [B,N,S,D], additive [B,1,1,S] -> [B,N,R,S], before dropout."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))  # [B, N, R, S]
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1)


def gather_rows(hidden: Tensor, positions: Tensor) -> Tensor:
    """[B,S,H] at [B,R] positions -> [B,R,H]."""
    batch, length, size = hidden.shape
    offsets = torch.arange(0, batch * length, length, device=positions.device)[:, None]
    return (
        hidden.reshape(-1, size)
        .index_select(0, (positions + offsets).flatten())
        .view(batch, -1, size)
    )


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B,S] True at real tokens -> [B,1,1,S] to add to attention scores.

    Half of the smallest number instead of -inf: a row without any real token must not become NaN.
    """
    blocked = ~attention_mask.bool()
    return torch.zeros_like(blocked, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min / 2)[
        :, None, None, :
    ]


def segment_vectors(weight: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """[T,H] table at [B,S] segments -> [B,S,H], as a product with one-hot rows
    (google-research/bert modeling.py).

    An index lookup would add up the gradient of a two-row table in bf16, token by token, and lose
    most of it.
    """
    if token_type_ids is None:
        return weight[0]
    return F.one_hot(token_type_ids, weight.shape[0]).to(weight.dtype) @ weight


def dropout(hidden: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout that costs nothing where it does nothing, and on a CPU a part of what torch's costs.

    Torch draws one 32-bit number an element; 16 bits decide as well (a probability of 0.1 becomes
    0.100006), so four elements share one 64-bit number, and in 16 bits that number's own memory
    becomes the factors: see docs/performance.md. The numbers come from torch's global CPU
    generator, as usual.
    """
    if not training or probability == 0.0:
        return hidden
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(hidden, probability)
    dropped: Tensor = _CpuDropout.apply(hidden, probability)  # type: ignore[no-untyped-call]
    return dropped


class _CpuDropout(torch.autograd.Function):
    """Multiply by 0 or 1 / keep probability."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, probability: float) -> Tensor:
        """Draw the factors and keep them for the gradient."""
        threshold = round(probability * 2**16)
        words = torch.empty(-(-hidden.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: hidden.numel()].view(hidden.shape)
        kept = bits.ge_(threshold - 2**15)  # 0 or 1
        scale = torch.tensor(1 / (1 - threshold / 2**16), dtype=hidden.dtype)
        if hidden.element_size() == 2:
            # Times the number whose bits are those of `scale`: no pass that changes the type.
            factors = kept.mul_(int(scale.view(torch.int16))).view(hidden.dtype)
        else:
            factors = kept.to(hidden.dtype).mul_(scale)
        ctx.save_for_backward(factors)
        return hidden * factors

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        """Multiply by the same factors."""
        (factors,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0] * factors, None
