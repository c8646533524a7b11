"""Encoding without padding: T real tokens, one sequence behind the other, in place of [B,S].

Dimensions: B sequences, S tokens, T real ones of all sequences, R rows that ask, N heads, D head
size, H hidden, M slots.

All that is done token by token (projections, feed-forward, LayerNorm, dropout) is done on [1,T,H].
For attention, sequences of like length form groups, each padded to its longest. As no token can
attend to padding, the numbers are those of the padded computation; only dropout draws others.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from stacking import distributed
from stacking.config import BertConfig
from stacking.functional import additive_mask, attend

MOST_REAL = 0.9  # share of real tokens from which on moving rows costs more than padding
GROUP_STEP = 64  # sequences whose lengths, divided by this and rounded up, agree form a group


@dataclass(frozen=True)
class Group:
    """Sequences of like length.

    Attributes:
        sequences: [b] which of the batch.
        length: s, the longest one's.
        mask: [b,s] True at real tokens; None: all are.
    """

    sequences: Tensor
    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a padded batch lie without padding, and in the groups.

    Attributes:
        tokens: [T] place of each real token in the flattened [B,S].
        ranks: [B,S] number of each token among the real ones; any at padding.
        slots: [M] number of the token in each slot of the groups, one group behind the other; 0
            where it is padding.
        places: [T] slot of each token.
        sequences: [B] number of each sequence when the groups lie one behind the other.
        groups: of all sequences.
    """

    tokens: Tensor
    ranks: Tensor
    slots: Tensor
    places: Tensor
    sequences: Tensor
    groups: tuple[Group, ...]

    def to(self, device: torch.device) -> "Layout":
        """The same on `device`; waits for nothing."""
        groups = tuple(
            replace(
                group,
                sequences=distributed.to_device(group.sequences, device),
                mask=None if group.mask is None else distributed.to_device(group.mask, device),
            )
            for group in self.groups
        )
        moved = {
            name: distributed.to_device(getattr(self, name), device)
            for name in ("tokens", "ranks", "slots", "places", "sequences")
        }
        return Layout(**moved, groups=groups)

    def unpad(self, hidden: Tensor) -> Tensor:
        """[B,S,H] -> [1,T,H]."""
        return _take(hidden.flatten(0, 1), self.tokens)[None]

    def pad(self, hidden: Tensor) -> Tensor:
        """[1,T,H] -> [B,S,H], zeros at padding."""
        padded = hidden.new_zeros(self.ranks.numel(), hidden.shape[2])
        return padded.index_copy(0, self.tokens, hidden[0]).view(*self.ranks.shape, -1)

    def positions(self) -> Tensor:
        """[T] position of each token in its sequence."""
        return self.tokens % self.ranks.shape[1]

    def rows(self, rows: Tensor) -> Tensor:
        """[B,R] positions -> [1,B*R] numbers of these tokens."""
        return self.ranks.gather(1, rows).view(1, -1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, *, rows_ask: bool
    ) -> Tensor:
        """Attention within each sequence: keys and values [1,T,N,D] -> [1,T,H].

        Queries are [1,T,N,D], or with `rows_ask` [1,B*R,N,D], and so is then the result.
        """
        size = query.shape[2:]
        keys, values = (_spread(part[0].flatten(1), self) for part in (key, value))
        asking = query[0].flatten(1)
        if rows_ask:
            batch = self.ranks.shape[0]
            asking = asking.view(batch, -1, asking.shape[1])
        else:
            asking = _spread(asking, self)
        found, first = [], 0
        for group in self.groups:
            count = len(group.sequences)
            here = slice(first, first + count * group.length)
            first = here.stop
            shape = (count, -1, *size)
            asked = asking.index_select(0, group.sequences) if rows_ask else asking[here]
            asked, answers, given = (
                part.reshape(shape).transpose(1, 2) for part in (asked, keys[here], values[here])
            )
            bias = None if group.mask is None else additive_mask(group.mask, query.dtype)
            context = attend(asked, answers, given, bias, dropout_p).transpose(1, 2)
            found.append(context.flatten(2) if rows_ask else context.reshape(-1, size.numel()))
        together = torch.cat(found)
        if rows_ask:
            return together.index_select(0, self.sequences).flatten(0, 1)[None]
        return _take(together, self.places)[None]


def can_unpad(config: BertConfig) -> bool:
    """Whether a model of this form takes a Layout."""
    return config.pooling == "none" and not config.shared_attention_layers


def find_layout(attention_mask: Tensor) -> Layout | None:
    """Of [B,S] bool on the CPU, True at real tokens; None where padding is no more than little."""
    lengths = attention_mask.sum(1)
    total = int(lengths.sum())
    if not 0 < total <= MOST_REAL * attention_mask.numel():
        return None
    starts = lengths.cumsum(0) - lengths
    steps = (lengths + GROUP_STEP - 1) // GROUP_STEP
    groups, slots, order = [], [], []
    places = torch.empty(total, dtype=torch.int64)
    first = 0
    for step in sorted(set(steps.tolist())):
        sequences = (steps == step).nonzero().flatten()
        longest = max(1, int(lengths[sequences].max()))
        columns = torch.arange(longest)
        mask = columns < lengths[sequences, None]
        numbers = (starts[sequences, None] + columns).masked_fill_(~mask, 0)
        places[numbers[mask]] = first + mask.flatten().nonzero().flatten()
        first += numbers.numel()
        groups.append(Group(sequences, longest, None if bool(mask.all()) else mask))
        slots.append(numbers.flatten())
        order.append(sequences)
    return Layout(
        tokens=attention_mask.flatten().nonzero().flatten(),
        ranks=(attention_mask.flatten().cumsum(0) - 1).clamp_(min=0).view_as(attention_mask),
        slots=torch.cat(slots),
        places=places,
        sequences=torch.cat(order).argsort(),
        groups=tuple(groups),
    )


def _take(padded: Tensor, places: Tensor) -> Tensor:
    """[M,C] at the [T] different `places` -> [T,C]."""
    taken: Tensor = _Take.apply(padded, places)  # type: ignore[no-untyped-call]
    return taken


def _spread(rows: Tensor, layout: Layout) -> Tensor:
    """[T,C] -> [M,C], some row where the slot is padding."""
    spread: Tensor = _Spread.apply(rows, layout.slots, layout.places)  # type: ignore[no-untyped-call]
    return spread


class _Take(torch.autograd.Function):
    """index_select of rows that differ: its gradient copies, where torch's adds them up."""

    @staticmethod
    def forward(ctx: FunctionCtx, padded: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(padded)  # type: ignore[attr-defined]
        return padded.index_select(0, places)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors  # type: ignore[attr-defined]
        padded = gradients[0].new_zeros(ctx.size, gradients[0].shape[1])  # type: ignore[attr-defined]
        return padded.index_copy_(0, places, gradients[0]), None


class _Spread(torch.autograd.Function):
    """index_select whose rows of padding have no gradient, as nothing attends to them."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return rows.index_select(0, slots)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradients[0].index_select(0, places), None, None
