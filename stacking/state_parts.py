"""Tensors of which every rank holds a part, put together on the main rank alone.

They travel in buckets: what the main rank holds beside the result, and any other rank beside its
own parts, does not grow with the model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stacking import distributed

BUCKET_ELEMENTS = 1 << 20  # of all ranks together: 4 MiB in fp32, and no slower than 64


@dataclass(frozen=True)
class Part:
    """What this rank holds of one tensor; `numel` 0: nothing."""

    shape: torch.Size  # of the whole tensor
    start: int  # its first element's place in the flattened tensor
    numel: int
    values: Callable[[], Tensor]  # at least `numel` of them, asked for once, when they are sent

    @classmethod
    def nothing(cls, shape: torch.Size) -> "Part":
        """Of a tensor that others hold."""
        return cls(shape, 0, 0, lambda: torch.empty(0))

    @classmethod
    def whole(cls, tensor: Tensor) -> "Part":
        """All of it."""
        return cls(tensor.shape, 0, tensor.numel(), lambda: tensor)


class _Cut(NamedTuple):
    """Elements that travel together: `numel` of one tensor, from its element `start` on."""

    tensor: int  # its number
    start: int
    numel: int


def gather_parts(parts: Sequence[Part], device: torch.device) -> list[Tensor] | None:
    """Whole fp32 tensors on the main rank's CPU; None elsewhere. Collective.

    Ranks give the same tensors in the same order, and parts that cover each of them. `device`: of
    the kind that the process group works on.
    """
    world = distributed.world_size()
    size = max(1, BUCKET_ELEMENTS // world)
    mine = [_Cut(index, part.start, part.numel) for index, part in enumerate(parts) if part.numel]
    rounds = math.ceil(max(distributed.gather_objects(sum(cut.numel for cut in mine))) / size)
    layouts = distributed.gather_on_main(mine)
    bucket = torch.empty(size, device=device)
    streams = [] if layouts is None else [_buckets(layout, size) for layout in layouts]
    received = [torch.empty_like(bucket) for _ in streams]
    wholes = [torch.empty(part.shape) for part in parts] if layouts is not None else []
    assert layouts is None or _cover(layouts, wholes), "the ranks' parts leave gaps"
    sending = _filled(_buckets(mine, size), parts, bucket)
    for _ in range(rounds):
        next(sending, None)
        distributed.gather_tensors(bucket, received)
        for stream, arrived in zip(streams, received, strict=True):
            for cut, values in _split(next(stream, []), arrived):
                wholes[cut.tensor].view(-1)[cut.start : cut.start + cut.numel].copy_(values)
    return None if layouts is None else wholes


def _buckets(layout: Sequence[_Cut], size: int) -> Iterator[list[_Cut]]:
    """`layout`, cut where a bucket of `size` elements is full."""
    bucket: list[_Cut] = []
    room = size
    for index, start, numel in layout:
        end = start + numel
        while start < end:
            bucket.append(_Cut(index, start, min(room, end - start)))
            start += bucket[-1].numel
            room -= bucket[-1].numel
            if not room:
                yield bucket
                bucket, room = [], size
    if bucket:
        yield bucket


def _filled(buckets: Iterator[list[_Cut]], parts: Sequence[Part], bucket: Tensor) -> Iterator[None]:
    """Fill `bucket` with this rank's next elements, again and again."""
    index, values = -1, bucket
    for cuts in buckets:
        for cut, place in _split(cuts, bucket):
            if cut.tensor != index:
                index, values = cut.tensor, parts[cut.tensor].values().detach().flatten()
            first = cut.start - parts[index].start
            place.copy_(values[first : first + cut.numel])
        yield


def _split(cuts: Sequence[_Cut], bucket: Tensor) -> Iterator[tuple[_Cut, Tensor]]:
    """Each cut with its elements, which lie one behind the other in the bucket."""
    place = 0
    for cut in cuts:
        yield cut, bucket[place : place + cut.numel]
        place += cut.numel


def _cover(layouts: Sequence[Sequence[_Cut]], wholes: Sequence[Tensor]) -> bool:
    """Whether the parts of all ranks have as many elements as the tensors."""
    missing = [whole.numel() for whole in wholes]
    for layout in layouts:
        for cut in layout:
            missing[cut.tensor] -= cut.numel
    return not any(missing)
