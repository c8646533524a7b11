"""Building blocks without a view of the whole: linear maps, tables, the feed-forward block.

Weights start at zero, so that building a model is cheap (modeling.py, `init_weights`).
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

LayerNormFactory = Callable[[int, float, bool], nn.Module]
"""(size, eps, elementwise_affine) -> module: torch.nn.LayerNorm or apex's fused one."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda hidden: F.gelu(hidden, approximate="tanh"),
    "relu": F.relu,
}


class ZeroLinear(nn.Linear):
    """nn.Linear that starts at zero: drawing the default costs a second per 100 M weights."""

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroEmbedding(nn.Embedding):
    """nn.Embedding that starts at zero."""

    def reset_parameters(self) -> None:
        """Fill with zeros."""
        nn.init.zeros_(self.weight)


class FeedForward(nn.Module):
    """H -> F -> H with the activation in between."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.inner = ZeroLinear(hidden_size, inner_size)
        self.output = ZeroLinear(inner_size, hidden_size)
        self.activation = ACTIVATIONS[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        output: Tensor = self.output(self.activation(self.inner(hidden)))
        return output
