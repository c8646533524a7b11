"""The masked-LM loss on one GPU: the plain path's numbers, less memory, and no wait of the host.

bash tests/run.sh tests/gpu.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stacking.masked_lm_loss import IGNORED_LABEL, masked_lm_loss

ROWS, SIZE, WORDS = 3000, 256, 30_522  # six blocks
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 logits of all rows."""
    logits = F.linear(hidden, weight, bias).float()
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device="cuda") * 0.5
        return values.to(dtype).requires_grad_()

    labels = torch.randint(0, WORDS, (ROWS,), generator=generator, device="cuda")
    labels[::7] = IGNORED_LABEL
    return draw(ROWS, SIZE), draw(WORDS, SIZE), draw(WORDS), labels


@pytest.mark.parametrize("dtype", ROUNDING)
def test_loss_and_gradients_are_those_of_the_plain_path(dtype: torch.dtype) -> None:
    given = inputs(dtype)
    wide = [t.detach().float().requires_grad_() for t in given[:3]]
    loss, correct = masked_lm_loss(*given)
    expected, _ = plain(wide[0], wide[1], wide[2], given[3])
    assert abs(float(loss / expected) - 1) <= ROUNDING[dtype]
    assert correct == plain(*given)[1]
    pairs = zip(torch.autograd.grad(loss, given[:3]), torch.autograd.grad(expected, wide),
                strict=True)  # fmt: skip
    for found, right in pairs:
        assert float((found.float() - right).norm() / right.norm()) <= ROUNDING[dtype]


def test_it_needs_a_third_of_the_memory() -> None:
    peaks = []
    losses: list[Loss] = [masked_lm_loss, plain]
    for loss in losses:
        given = inputs(torch.bfloat16)
        torch.autograd.backward([loss(*given)[0]])  # the libraries' work spaces
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.backward([loss(*given)[0]])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] < peaks[1] / 3


def test_the_host_waits_for_nothing() -> None:
    given = inputs(torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.backward([masked_lm_loss(*given)[0]])
    finally:
        torch.cuda.set_sync_debug_mode("default")
