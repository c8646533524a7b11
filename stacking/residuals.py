"""How large the hidden states of a forward pass are, after the embeddings and after each layer.

Dimensions: B sequences, S tokens, T rows that go up, R rows that leave the last layer, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stacking.backbone import BertBackbone


@contextmanager
def recorded(model: BertBackbone) -> Iterator[list[Tensor]]:
    """Inside, the first forward pass leaves its root mean squares in the list: 1 + L scalars.

    They are fp32, on the model's device, and change nothing of what the model computes. Padding is
    left out. With pooling the rows are the pooled ones. The last layer's are those that leave it:
    in training and evaluation the rows that a loss reads, each once.
    """
    recorder = _Recorder(len(model.encoder.layers))
    handles = [model.encoder.register_forward_pre_hook(recorder.enter)]
    handles += [layer.register_forward_hook(recorder.leave) for layer in model.encoder.layers]
    try:
        yield recorder.found
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """The hooks' memory: which rows of the layers' outputs count."""

    def __init__(self, num_layers: int) -> None:
        self.found: list[Tensor] = []
        self._num_layers = num_layers
        self._counted: Tensor | None = None  # [B,T] of the rows between layers; None: all
        self._counted_at_last: Tensor | None = None  # [B,R] of those that leave the last one

    def enter(self, encoder: nn.Module, given: tuple[object, ...]) -> None:
        """`given`: the arguments of Encoder.forward."""
        if self.found:
            return
        hidden, mask, rows, pooled, _, layout = given
        if pooled is not None:
            hidden, mask, _ = pooled  # type: ignore[misc]
        assert isinstance(hidden, Tensor)
        assert mask is None or isinstance(mask, Tensor)
        self.found.append(root_mean_square(hidden, mask))
        self._counted = self._counted_at_last = None if layout is not None else mask
        if isinstance(rows, Tensor):
            self._counted_at_last = _once(rows, mask)

    def leave(self, layer: nn.Module, given: object, output: tuple[Tensor, Tensor | None]) -> None:
        """After each layer; `output` as EncoderLayer's: [B,T,H], or without padding [1,T,H]."""
        number = len(self.found)
        if number > self._num_layers:
            return
        is_last = number == self._num_layers
        self.found.append(
            root_mean_square(output[0], self._counted_at_last if is_last else self._counted)
        )


def root_mean_square(hidden: Tensor, counted: Tensor | None) -> Tensor:
    """Of [..., H] over the rows where `counted` (bool, as many rows) holds; None: all. fp32."""
    squares = hidden.detach().float().square().mean(dim=-1).flatten()
    if counted is None:
        return squares.mean().sqrt()
    weights = counted.flatten().float()
    return ((squares * weights).sum() / weights.sum().clamp(min=1)).sqrt()


def _once(rows: Tensor, mask: Tensor | None) -> Tensor:
    """[B,R] which of the places `rows` are real by `mask` [B,T] and not named before."""
    is_again = (rows[:, :, None] == rows[:, None, :]).tril(-1).any(2)
    is_real = torch.ones_like(is_again) if mask is None else mask.bool().gather(1, rows)
    return is_real & ~is_again
