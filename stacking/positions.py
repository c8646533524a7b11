"""Position information without parameters: rotary and sinusoidal tables.

The tables are plain objects, no buffers: DeepSpeed's `module.bfloat16()` rounds buffers too, and an
angle that is rounded to bf16 is wrong by up to a radian at position 500. Angles, sines and cosines
are computed in fp64 on the CPU, then rounded to the model's dtype, once per length, device, dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""cos and sin, [S,1,1,D/2], or [B,S,1,1,D/2] where positions differ by sequence."""

MAX_WAVELENGTH = 10_000.0
"""Longest wavelength over 2 pi (Vaswani et al. 2017, section 3.5; kept by RoFormer)."""


class RotaryTable:
    """cos and sin of rotary positions (Su et al. 2021, RoFormer, section 3.2.2)."""

    def __init__(self, head_size: int) -> None:
        self.head_size = head_size
        self.cache: dict[tuple[int, torch.device, torch.dtype], Rotation] = {}
        self.frequencies: dict[torch.device, Tensor] = {}

    def lookup(self, length: int, like: Tensor) -> Rotation:
        """(cos, sin), each [S,1,1,D/2], on `like`'s device and in its dtype."""
        key = (length, like.device, like.dtype)
        if key not in self.cache:
            with torch.inference_mode(False):  # Autograd refuses tensors born in inference mode.
                angles = rotary_angles(length, self.head_size)[:, None, None, :]
                cos, sin = (
                    part.to(like.device, like.dtype) for part in (angles.cos(), angles.sin())
                )
            self.cache[key] = (cos, sin)
        return self.cache[key]

    def at(self, positions: Tensor, like: Tensor) -> Rotation:
        """(cos, sin), each [B,T,1,1,D/2], at [B,T] fp64 positions, whole or not."""
        if positions.device not in self.frequencies:
            with torch.inference_mode(False):
                frequencies = rotary_frequencies(self.head_size).to(positions.device)
            self.frequencies[positions.device] = frequencies
        angles = positions[..., None, None, None] * self.frequencies[positions.device]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class SinusoidalTable:
    """Fixed positions as in tensor2tensor and fairseq (sinusoidal_positional_embedding.py).

    The first H // 2 features are sines, the next H // 2 cosines, with wavelengths from 2 pi to
    2 pi * 10,000 inclusive; an odd last feature is 0. Positions count from 0 (fairseq: from
    padding_idx + 1).
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.cache: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def lookup(self, length: int, like: Tensor) -> Tensor:
        """[S,H] on `like`'s device and in its dtype."""
        key = (length, like.device, like.dtype)
        if key not in self.cache:
            with torch.inference_mode(False):
                self.cache[key] = self._table(length).to(like.device, like.dtype)
        return self.cache[key]

    def _table(self, length: int) -> Tensor:
        half = self.size // 2
        exponents = torch.arange(half, dtype=torch.float64, device="cpu") / max(half - 1, 1)
        angles = torch.outer(_positions(length), MAX_WAVELENGTH**-exponents)
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, self.size % 2))


def rotary_angles(length: int, head_size: int) -> Tensor:
    """[S,D/2] fp64: position s times frequency."""
    return torch.outer(_positions(length), rotary_frequencies(head_size))


def rotary_frequencies(head_size: int) -> Tensor:
    """[D/2] fp64: 10,000^(-2i/D)."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size
    return MAX_WAVELENGTH**-exponents


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B,S,1 or 2,N,D] queries and keys by their positions, pairing feature i with i + D/2.

    The half-split pairing of GPT-NeoX and ESM: both members of a pair lie in contiguous halves, so
    that no strided access is needed. RoFormer pairs 2i with 2i + 1: the same function after a
    permutation of the projections' rows (stacking/hf_homes.py).
    """
    left, right = heads.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _positions(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float64, device="cpu")
