"""What the main rank has heard of all ranks, and what follows: who died, who left, who hangs.

No clock, thread or network in here: `rank_watch` brings the beats and the time.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import NamedTuple

_NAMED = 4  # culprits that a message names; of more it says how many
SOON = 5.0  # seconds of silence that are enough once a connection broke or a rank failed
EXPECTED_AT_MOST = 1800.0
"""Seconds that an evaluation, a save or a growth may take before it counts as hanging."""
LEARNING_STEP_AT_MOST = 60.0
"""Likewise, of one step of a growth map that is learned."""


class State(str, Enum):
    """How a rank stands to the run, as itself says."""

    RUNNING = "running"
    LOST = "lost"  # its collective failed: waits to hear whose fault it is
    TOLD = "told"  # knows the fault, about to end
    ERROR = "error"  # left by an exception
    MISTAKE = "mistake"  # likewise, by one that the user has to mend
    BYE = "bye"  # left in order
    CLOSED = "closed"  # the main rank's alone: as BYE, and nobody listens from now on


class Place(NamedTuple):
    """Where a rank stands in the run; ranks do the same things in the same order.

    Attributes:
        step: optimizer step.
        nth: how many marks came since the step began: orders the phases within it.
        phase: for the message, such as "training".
        at_most: seconds that may pass before the next mark, where more than the usual limit.
    """

    step: int = 0
    nth: int = 0
    phase: str = "starting"
    at_most: float = 0.0

    def __str__(self) -> str:
        """ "step 7, training"."""
        return f"step {self.step}, {self.phase}"


class Beat(NamedTuple):
    """One sign of life; `number` grows, `detail` is the error that a rank met, one line."""

    number: int
    state: State
    place: Place
    detail: str = ""

    def packed(self) -> str:
        """JSON: nothing that comes over the network is unpickled."""
        return json.dumps([self.number, self.state.value, *self.place, self.detail])

    @classmethod
    def unpacked(cls, data: bytes) -> "Beat | None":
        """The other way; None for a rank that has not said anything yet."""
        if not data:
            return None
        number, state, step, nth, phase, at_most, detail = json.loads(data)
        return cls(number, State(state), Place(step, nth, phase, at_most), detail)


@dataclass(frozen=True)
class Fault:
    """Why the run cannot go on: one clause a culprit, and the culprits' ranks (may be none)."""

    text: str
    ranks: tuple[int, ...] = ()
    is_mistake: bool = False
    """Whether the user has to act first: the same command would end here again."""

    def packed(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def unpacked(cls, data: bytes) -> "Fault | None":
        """The other way; None where nothing is wrong."""
        if not data:
            return None
        values = json.loads(data)
        return cls(values["text"], tuple(values["ranks"]), bool(values["is_mistake"]))


@dataclass(frozen=True)
class WatchLimits:
    """Seconds after which something counts as wrong.

    Attributes:
        dead_after: without a sign of life. A healthy rank is silent while one C call holds the
            interpreter's lock, such as the writing of a large file.
        hung_after: without a mark of any rank.
        error_grace: between one rank's leaving by an exception and the others', who may have met
            the same one a little later.
    """

    dead_after: float = 30.0
    hung_after: float = 300.0
    error_grace: float = 10.0

    @property
    def soon(self) -> float:
        """Silence that is enough once something else shows that the run is over."""
        return min(SOON, self.dead_after)

    @property
    def interval(self) -> float:
        """Between two beats."""
        return min(1.0, self.dead_after / 10)


class RankLedger:
    """The last beat of every rank and when it was news."""

    def __init__(self, names: Sequence[str], limits: WatchLimits) -> None:
        """All ranks, by rank, are taken to run at time 0."""
        self._names = list(names)
        self._limits = limits
        self._beats = [Beat(-1, State.RUNNING, Place()) for _ in names]
        self._heard = [0.0] * len(names)
        self._since = [0.0] * len(names)
        self._progress = 0.0

    def hear(self, rank: int, beat: Beat | None, now: float) -> None:
        """Note what was read of a rank; what was read before is no news."""
        known = self._beats[rank]
        if beat is None or beat.number == known.number:
            return
        self._heard[rank] = now
        if beat.state != known.state:
            self._since[rank] = now
        if beat.place != known.place:
            self._progress = now
        self._beats[rank] = beat

    def here(self, *, but: Sequence[int] = ()) -> list[int]:
        """Ranks that have neither left nor been told of a fault, as far as is known."""
        return [r for r in self._of(State.RUNNING, State.LOST) if r not in but]

    def reachable(self, now: float) -> list[int]:
        """Those of `here` that were heard of lately."""
        lately = now - 3 * self._limits.interval
        return [rank for rank in self.here() if self._heard[rank] >= lately]

    def fault(self, now: float) -> Fault | None:
        """What is wrong at `now`, if anything; None also when all have left."""
        here, lost = self.here(), self._of(State.LOST)
        failed = self._of(State.ERROR, State.MISTAKE)
        if not here:
            return None
        limits = self._limits
        enough = limits.soon if lost or failed else limits.dead_after
        silent = [rank for rank in here if now - self._heard[rank] > enough]
        is_alone = failed and (
            here == lost or now - min(self._since[r] for r in failed) > limits.error_grace
        )
        if silent or is_alone:
            clauses = {rank: self._silent(rank, now) for rank in silent}
            clauses |= {rank: self._failed(rank) for rank in failed}
            is_mistake = not silent and failed == self._of(State.MISTAKE)
            return replace(_joined(clauses), is_mistake=is_mistake)
        if lost and not failed and now - min(self._since[r] for r in lost) > 1.5 * limits.soon:
            return Fault(self._broken(lost[0]))
        patience = max([limits.hung_after, *(self._beats[rank].place.at_most for rank in here)])
        if not lost and not failed and now - self._progress > patience:
            return self._hung(here, now - self._progress)
        return None

    def _of(self, *states: State) -> list[int]:
        return [rank for rank, beat in enumerate(self._beats) if beat.state in states]

    def _silent(self, rank: int, now: float) -> str:
        return silent_text(self._names[rank], now - self._heard[rank], self._beats[rank])

    def _failed(self, rank: int) -> str:
        return failed_text(self._names[rank], self._beats[rank])

    def _broken(self, rank: int) -> str:
        """A collective failed though everybody lives."""
        return (
            f"{self._names[rank]} lost its connection to the others, though all ranks give signs "
            f"of life (last: {self._beats[rank].place}{self._left()}): {self._beats[rank].detail}"
        )

    def _hung(self, here: Sequence[int], seconds: float) -> Fault:
        """Nobody has moved: those behind are to blame, or nobody is."""
        places = {rank: self._beats[rank].place[:2] for rank in here}
        first = max(here, key=lambda rank: places[rank])
        behind = [rank for rank in here if places[rank] < places[first]]
        goal = self._beats[first].place
        if not behind:
            return Fault(
                f"no rank has come further than {goal} for {seconds:.0f} s (all wait at the same "
                f"place{self._left()}): a collective operation or the network hangs"
            )
        last = min(places[rank] for rank in behind)
        culprits = [rank for rank in behind if places[rank] == last]
        return _joined(
            {
                rank: f"{self._names[rank]} has hung for {seconds:.0f} s "
                f"(last: {self._beats[rank].place}; others wait at: {goal}{self._left()})"
                for rank in culprits
            }
        )

    def _left(self) -> str:
        left = self._of(State.BYE)
        names = ", ".join(self._names[rank] for rank in left[:_NAMED])
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        return f"; left before in order: {names}{more}" if left else ""


def silent_text(name: str, seconds: float, beat: Beat) -> str:
    """No beat for a while."""
    return f"{name} has given no sign of life for {seconds:.0f} s (last: {beat.place})"


def failed_text(name: str, beat: Beat) -> str:
    """Its own last words."""
    return f"{name} ended with an error (last: {beat.place}): {beat.detail}"


def _joined(clauses: dict[int, str]) -> Fault:
    """The first few culprits' clauses."""
    more = len(clauses) - _NAMED
    texts = [*list(clauses.values())[:_NAMED], *([f"{more} more likewise"] if more > 0 else [])]
    return Fault("; ".join(texts), tuple(clauses))
