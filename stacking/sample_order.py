"""The global order of samples as a pure function of (number of rows, seed, epoch); the same on
every rank and machine.

Two levels keep reading nearly sequential and memory flat at any N: blocks of 4096 consecutive rows
are permuted, and the rows of 16 blocks are shuffled together. Both permutations sort 64-bit hashes,
which no version of numpy can change.
"""

from collections import OrderedDict

import numpy as np

from data_prep.masking import IntArray, hash_chain

BLOCK_ROWS = 4096
GROUP_BLOCKS = 16
_BLOCK_STREAM = 0x626C6F636B  # "block"
_ROW_STREAM = 0x726F77  # "row"
# A batch that crosses from one group to the next reads both.
_GROUPS_KEPT = 2


class SampleOrder:
    """Maps positions of the global sample counter to rows; position p lies in epoch p // N."""

    def __init__(self, num_rows: int, seed: int) -> None:
        """Make the order of N rows; nothing is computed before it is needed."""
        assert num_rows > 0, "an order needs at least one row"
        self.num_rows = num_rows
        self.seed = seed
        self._plans: OrderedDict[int, _EpochPlan] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], IntArray] = OrderedDict()

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Return (row, epoch) of each position, both [n]; positions may lie in several epochs."""
        epochs = positions // self.num_rows
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            rows[of_epoch] = self._rows(int(epoch), positions[of_epoch] - epoch * self.num_rows)
        return rows, epochs

    def blocks(self, start: int, stop: int) -> IntArray:
        """Return the blocks whose rows may stand at positions start ... stop - 1, ascending.

        Of a group that a position falls into, all: its rows are shuffled together, so that each
        rank's share of a few batches comes from all of its blocks.
        """
        num_rows = self.num_rows
        first_whole = -(-start // num_rows)
        if (first_whole + 1) * num_rows <= stop:
            return np.arange(-(-num_rows // BLOCK_ROWS))
        found = [np.empty(0, np.int64)]
        for epoch in range(start // num_rows, -(-stop // num_rows)):
            plan = self._plan(epoch)
            ends = max(start - epoch * num_rows, 0), min(stop - epoch * num_rows, num_rows) - 1
            first, last = np.searchsorted(plan.group_starts, ends, side="right") - 1
            found.append(plan.blocks[first * GROUP_BLOCKS : (last + 1) * GROUP_BLOCKS])
        return np.unique(np.concatenate(found))

    def _rows(self, epoch: int, offsets: IntArray) -> IntArray:
        """Return the rows at offsets [n] of one epoch."""
        plan = self._plan(epoch)
        groups = np.searchsorted(plan.group_starts, offsets, side="right") - 1
        rows = np.empty_like(offsets)
        for group in np.unique(groups).tolist():
            of_group = groups == group
            rows[of_group] = self._group(epoch, group)[offsets[of_group] - plan.group_starts[group]]
        return rows

    def _plan(self, epoch: int) -> "_EpochPlan":
        if epoch not in self._plans:
            self._plans[epoch] = _EpochPlan(self.num_rows, self.seed, epoch)
            if len(self._plans) > _GROUPS_KEPT:
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def _group(self, epoch: int, group: int) -> IntArray:
        """Return the shuffled rows of one group of blocks."""
        key = (epoch, group)
        if key not in self._groups:
            blocks = self._plan(epoch).blocks[group * GROUP_BLOCKS : (group + 1) * GROUP_BLOCKS]
            rows = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)[None, :]).ravel()
            rows = rows[
                rows < self.num_rows
            ]  # the last block is short where 4096 does not divide N
            order = np.argsort(hash_chain(self.seed, epoch, _ROW_STREAM, rows), kind="stable")
            self._groups[key] = rows[order]
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        return self._groups[key]


class _EpochPlan:
    """The permuted blocks of one epoch, and the offset at which each group of blocks begins."""

    def __init__(self, num_rows: int, seed: int, epoch: int) -> None:
        num_blocks = -(-num_rows // BLOCK_ROWS)
        keys = hash_chain(seed, epoch, _BLOCK_STREAM, np.arange(num_blocks))
        self.blocks = np.argsort(keys, kind="stable")
        sizes = np.minimum(BLOCK_ROWS, num_rows - self.blocks * BLOCK_ROWS)
        first_blocks = np.arange(0, num_blocks, GROUP_BLOCKS)
        self.group_starts = np.concatenate([[0], np.cumsum(sizes)])[first_blocks]
