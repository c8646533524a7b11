"""Where ranks read their data: in the shared folder, or copies on each node; on all the same data.

Shards are copied in rounds, between which all ranks meet: a copy that fails on one node ends all of
them then, a wish to stop is heard, and nobody waits in one collective for hours.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.plain_files import read_plain
from data_prep.shard_format import MANIFEST
from stacking import distributed
from stacking.errors import ShardError, UserError
from stacking.node_copies import NodeCopies, size_text
from stacking.rank_agreement import require_equal

ROUND_SECONDS = 20.0
_SAME_DATA = "mount the same folder on every host, or copy it to each (rsync -a)"


@dataclass(frozen=True)
class Session:
    """What copying needs of the run: a mark for the watch before each round, a line to the user,
    and whether this rank wants to stop.
    """

    mark: Callable[[], None]
    say: Callable[[str], None]
    is_stopping: Callable[[], bool]


class _Work(NamedTuple):
    """What is left to copy, of one node or of all."""

    nodes: int
    shards: int
    num_bytes: int


class DataPlace:
    """The folder that this rank reads its data from."""

    def __init__(self, data_dir: Path, stage_dir: Path | None) -> None:
        """`stage_dir`: a folder of each node's own, for copies; None: `data_dir` itself is read."""
        self._data_dir = data_dir
        self._stage_dir = stage_dir
        self._copies: NodeCopies | None = None

    @property
    def folder(self) -> Path:
        """To read from, once it is open."""
        return self._data_dir if self._copies is None else self._copies.folder

    def open(self) -> None:
        """Compare the manifests of all ranks; make each node's folder. Collective.

        UserError on all ranks where manifests differ, with the hosts, or a folder cannot be made.
        """
        found = distributed.together(lambda: _identity(self._data_dir))
        require_equal({f"--data {self._data_dir}": found}, _SAME_DATA)
        distributed.together(self._link)

    def _link(self) -> None:
        if self._stage_dir is None:
            return
        if fault := self._folder_fault(self._stage_dir):
            raise UserError(
                f"--stage-data {self._stage_dir}: {fault}; make a folder on every node, on a disk "
                "of its own, or give another"
            )
        self._copies = NodeCopies(self._data_dir, self._stage_dir)
        if _is_its_nodes():
            self._copies.link()

    def _folder_fault(self, stage_dir: Path) -> str:
        if stage_dir == Path():
            return "names no folder"
        if not stage_dir.exists():
            return "no such folder"
        if not stage_dir.is_dir():
            return "is not a folder"
        if stage_dir.resolve().is_relative_to(self._data_dir.resolve()):
            return f"lies in --data {self._data_dir}, which is to be copied"
        return ""

    def fill(self, names: Callable[[], set[str]], session: Session) -> bool:
        """Copy the shards of `names()` to each node; False if a rank wants to stop. Collective.

        What is not copied is read in the shared folder, by a link.
        """
        if self._copies is None:
            return True
        session.mark()
        copies, began = self._copies, time.monotonic()
        todo = distributed.together(lambda: _todo(copies, names()))
        whole = left = _of_all(todo)
        if not left.shards:
            session.say(f"all shards that are needed lie in {copies.folder}")
            return True
        session.say(f"staging {_amount(whole)} in {copies.folder} of {whole.nodes} node"
                    f"{'s' * (whole.nodes > 1)}; all ranks wait")  # fmt: skip
        while left.shards:
            if any(distributed.gather_objects(session.is_stopping())):
                return False
            session.mark()
            distributed.together(lambda: _copy_some(copies, todo))
            left = _of_all(todo)
            if left.shards:
                session.say(f"staging: {_amount(left)} left")
        session.say(f"staged in {time.monotonic() - began:.1f} s")
        return True


def _is_its_nodes() -> bool:
    """Whether this rank copies for its node."""
    return distributed.local_rank() == 0


def _todo(copies: NodeCopies, names: set[str]) -> dict[str, int]:
    """Shards that this rank has to copy, with their bytes; UserError without room for them."""
    todo = copies.missing(sorted(names)) if _is_its_nodes() else {}
    if todo:
        copies.check_room(sum(todo.values()))
    return todo


def _copy_some(copies: NodeCopies, todo: dict[str, int]) -> None:
    """Copy shards off `todo` for a round's time, at least one."""
    deadline = time.monotonic() + ROUND_SECONDS
    for name in list(todo):
        copies.copy(name)
        del todo[name]
        if time.monotonic() >= deadline:
            return


def _of_all(todo: dict[str, int]) -> _Work:
    """Over all ranks. Collective."""
    told = distributed.gather_objects(_Work(int(bool(todo)), len(todo), sum(todo.values())))
    return _Work(*(sum(column) for column in zip(*told, strict=True)))


def _amount(work: _Work) -> str:
    return f"{work.shards:,} shard{'s' * (work.shards > 1)} ({size_text(work.num_bytes)})"


def _identity(data_dir: Path) -> str:
    """What a folder's data are, for a comparison; ShardError if that cannot be read."""
    if not data_dir.is_dir():
        return "no such folder"
    try:
        return f"manifest {hashlib.sha256(read_plain(data_dir / MANIFEST)).hexdigest()[:12]}"
    except FileNotFoundError:
        return "no manifest.json"
    except OSError as error:
        raise ShardError(f"{data_dir / MANIFEST}: cannot be read: {error}") from error
