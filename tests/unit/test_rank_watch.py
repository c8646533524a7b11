"""What follows from beats, with a clock of the test's own; the watch of one rank; what is lost."""

import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from stacking import rank_agreement, rank_watch, trainer
from stacking.checkpoint import CheckpointManager, TrainState
from stacking.checkpoint_writer import CheckpointWriter
from stacking.distributed import rank_name
from stacking.errors import UserError
from stacking.rank_agreement import listed, require_equal, stretches
from stacking.rank_ledger import Beat, Fault, Place, RankLedger, State, WatchLimits
from stacking.rank_watch import RankWatch, is_lost_peer
from stacking.snapshot import Snapshot

LIMITS = WatchLimits(dead_after=30.0, hung_after=300.0, error_grace=10.0)
RUNNING = State.RUNNING


class Ranks:
    """Ranks that beat once a second; `silent` ones do not."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.ledger = RankLedger(
            [f"rank {rank} (host h, pid {rank})" for rank in range(count)], LIMITS
        )
        self.states = [RUNNING] * count
        self.details = [""] * count
        self.places = [Place(1, 0, "training")] * count
        self.silent: set[int] = set()
        self._number = 0

    def fault_within(self, seconds: int) -> tuple[float, Fault] | None:
        """When the first fault was found, and which."""
        for _ in range(seconds):
            self.now += 1.0
            self._number += 1
            for rank in set(range(len(self.states))) - self.silent:
                beat = Beat(self._number, self.states[rank], self.places[rank], self.details[rank])
                self.ledger.hear(rank, beat, self.now)
            if fault := self.ledger.fault(self.now):
                return self.now, fault
        return None

    def expect(self, seconds: int) -> tuple[float, Fault]:
        found = self.fault_within(seconds)
        assert found is not None
        return found


def test_ranks_that_beat_and_move_are_well() -> None:
    ranks = Ranks(3)
    for step in range(20):
        ranks.places = [Place(step, 0, "training")] * 3
        assert ranks.fault_within(200) is None


def test_a_silent_rank_is_dead_after_the_limit_and_not_before() -> None:
    ranks = Ranks(3)
    assert ranks.fault_within(5) is None
    ranks.silent = {1}
    assert ranks.fault_within(30) is None
    now, fault = ranks.expect(1)
    assert now == 36.0
    assert fault.ranks == (1,)
    assert fault.text == (
        "rank 1 (host h, pid 1) has given no sign of life for 31 s (last: step 1, training)"
    )


def test_a_rank_that_never_said_anything_is_dead_too() -> None:
    ranks = Ranks(2)
    ranks.silent = {1}
    assert ranks.expect(31)[1].text.endswith("(last: step 0, starting)")


def test_a_beat_that_was_read_before_is_no_sign_of_life() -> None:
    ledger = RankLedger(["a", "b"], LIMITS)
    for now in range(40):
        ledger.hear(0, Beat(now, RUNNING, Place()), now)
        ledger.hear(1, Beat(7, RUNNING, Place()), now)
    fault = ledger.fault(40.0)
    assert fault is not None
    assert fault.ranks == (1,)


def test_a_broken_collective_shortens_the_wait_for_the_dead_rank() -> None:
    ranks = Ranks(3)
    assert ranks.fault_within(5) is None
    ranks.silent = {2}
    ranks.states[0] = ranks.states[1] = State.LOST
    now, fault = ranks.expect(10)
    assert now == 11.0
    assert fault.ranks == (2,)


def test_a_broken_collective_of_ranks_that_all_live_is_told_as_such() -> None:
    ranks = Ranks(3)
    ranks.states = [State.LOST, State.LOST, State.BYE]
    ranks.details[0] = "RuntimeError: Connection reset by peer"
    now, fault = ranks.expect(20)
    assert now <= 10.0
    assert fault.ranks == ()
    assert "rank 0 (host h, pid 0) lost its connection to the others, though all" in fault.text
    assert "left before in order: rank 2 (host h, pid 2)" in fault.text
    assert fault.text.endswith("Connection reset by peer")


def test_the_rank_behind_the_others_hangs() -> None:
    ranks = Ranks(3)
    ranks.places = [Place(7, 2, "training"), Place(7, 1, "reading data"), Place(7, 2, "training")]
    assert ranks.fault_within(301) is None
    now, fault = ranks.expect(1)
    assert fault.ranks == (1,)
    assert fault.text == (
        "rank 1 (host h, pid 1) has hung for 301 s (last: step 7, reading data; others wait at: "
        "step 7, training)"
    )


def test_a_later_phase_of_an_earlier_step_is_behind() -> None:
    ranks = Ranks(2)
    ranks.places = [Place(8, 0, "reading data"), Place(7, 9, "saving")]
    assert ranks.expect(303)[1].ranks == (1,)


def test_one_rank_that_still_moves_is_enough() -> None:
    ranks = Ranks(2)
    for nth in range(5):
        ranks.places[0] = Place(7, nth, "evaluating")
        assert ranks.fault_within(299) is None
    assert ranks.expect(10)[1].ranks == (1,)


def test_ranks_that_hang_at_one_place_are_not_blamed() -> None:
    ranks = Ranks(2)
    fault = ranks.expect(303)[1]
    assert fault.ranks == ()
    assert fault.text.startswith("no rank has come further than step 1, training for 301 s")


def test_a_phase_may_claim_more_time_for_all() -> None:
    ranks = Ranks(2)
    ranks.places[0] = Place(1, 1, "growing", 1000.0)
    assert ranks.fault_within(1000) is None
    assert ranks.fault_within(3) is not None


def test_an_error_of_all_is_nobodys_fault_and_of_one_is_told_after_the_grace() -> None:
    ranks = Ranks(3)
    ranks.states[1], ranks.details[1] = State.ERROR, "ValueError: a bug"
    assert ranks.fault_within(10) is None
    ranks.states = [State.ERROR] * 3
    assert ranks.fault_within(400) is None
    ranks = Ranks(3)
    ranks.states[1], ranks.details[1] = State.ERROR, "ValueError: a bug"
    now, fault = ranks.expect(20)
    assert now == 12.0
    assert fault.ranks == (1,)
    assert fault.text == (
        "rank 1 (host h, pid 1) ended with an error (last: step 1, training): ValueError: a bug"
    )


def test_a_mistake_of_the_users_is_told_as_one_unless_more_went_wrong() -> None:
    ranks = Ranks(3)
    ranks.states[1], ranks.details[1] = State.MISTAKE, "the mount is missing"
    fault = ranks.expect(20)[1]
    assert (fault.ranks, fault.is_mistake) == ((1,), True)
    assert fault.text.endswith("the mount is missing")
    ranks = Ranks(3)
    ranks.states = [State.RUNNING, State.MISTAKE, State.ERROR]
    assert not ranks.expect(20)[1].is_mistake
    ranks = Ranks(3)
    ranks.states[1], ranks.silent = State.MISTAKE, {2}
    assert not ranks.expect(40)[1].is_mistake


def test_an_error_that_broke_the_others_collectives_is_told_at_once() -> None:
    ranks = Ranks(3)
    ranks.states = [State.LOST, State.ERROR, State.LOST]
    assert ranks.expect(1)[1].ranks == (1,)


def test_who_left_in_order_is_never_dead_nor_hung() -> None:
    ranks = Ranks(3)
    ranks.states = [State.BYE] * 3
    assert ranks.fault_within(1) is None
    ranks.silent = {0, 1, 2}
    assert ranks.fault_within(400) is None


def test_of_many_dead_ranks_a_few_are_named() -> None:
    ranks = Ranks(9)
    ranks.silent = set(range(2, 9))
    fault = ranks.expect(40)[1]
    assert fault.ranks == tuple(range(2, 9))
    assert fault.text.count("no sign of life") == 4
    assert fault.text.endswith("; 3 more likewise")


def test_beats_and_faults_travel_unchanged() -> None:
    beat = Beat(3, State.ERROR, Place(7, 2, "growing", 60.0), 'a "quoted" word')
    assert Beat.unpacked(beat.packed().encode()) == beat
    assert Beat.unpacked(b"") is None
    fault = Fault("all is lost", (1, 2), is_mistake=True)
    assert Fault.unpacked(fault.packed().encode()) == fault
    assert Fault.unpacked(b"") is None


def test_one_rank_has_no_thread_and_marks_all_the_same() -> None:
    before = threading.active_count()
    with RankWatch() as watch:
        watch.mark(1, "training")
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"), True),
        (torch.distributed.DistBackendError("remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (UserError("--run-dir /gloo/NCCL: exists"), False),
    ],
)
def test_only_a_failed_collective_is_anothers_fault(error: Exception, is_lost: bool) -> None:
    assert is_lost_peer(error) is is_lost


def test_an_error_that_a_lost_peer_led_to_counts_as_lost() -> None:
    error = ValueError("while tidying up")
    error.__context__ = RuntimeError("gloo: Connection closed by peer")
    assert is_lost_peer(error)


def pretend(monkeypatch: pytest.MonkeyPatch, held: Mapping[str, list[str]], ranks: int) -> None:
    """The module believes in several ranks that hold these values."""
    by_own = {values[0]: values for values in held.values()}
    names = [f"rank {rank} (host h{rank}, pid 1)" for rank in range(ranks)]

    def gather_objects(text: str) -> list[str]:
        return by_own.get(text, names)

    monkeypatch.setattr(rank_agreement, "gather_objects", gather_objects)


def test_ranks_that_differ_are_named_with_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"recipe": ["77cd", "77cd", "12ab", "77cd"], "data": ["d"] * 4, "torch": ["1", "2"] * 2}
    pretend(monkeypatch, held, 4)
    with pytest.raises(UserError) as fault:
        require_equal({what: values[0] for what, values in held.items()})
    assert str(fault.value) == (
        "the ranks do not agree; give all hosts the same files and packages: recipe: "
        "rank 2 (host h2, pid 1) has 12ab, ranks 0, 1 and 3 have 77cd; torch: rank 0 (host h0, "
        "pid 1) and rank 2 (host h2, pid 1) have 1, rank 1 (host h1, pid 1) and rank 3 (host h3, "
        "pid 1) have 2"
    )


def test_ranks_that_agree_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"recipe": ["a"] * 3}, 3)
    require_equal({"recipe": "a"})


def test_one_rank_agrees_with_itself() -> None:
    require_equal({"recipe": "a"})


def test_lists_of_ranks_are_short() -> None:
    assert stretches([0, 1, 2, 3, 5, 8, 9]) == ["0-3", "5", "8", "9"]
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"


def test_this_process_has_a_name() -> None:
    assert rank_name().startswith(f"rank 0 (host {socket.gethostname()}, pid ")


def test_a_save_that_fails_does_not_keep_a_process_from_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(CheckpointManager):
        def save(self, tag: str, snapshot: Snapshot, state: TrainState) -> None:
            raise MemoryError

    ended: list[int] = []
    monkeypatch.setattr(trainer, "end_process", ended.append)
    writer = CheckpointWriter(Broken(Path()))
    state = TrainState(
        global_step=1, stage=0, num_hidden_layers=1, loader={}, recipe_sha256="x"
    )  # fmt: skip
    writer.write("step_1", Snapshot({}), state)
    ending = object.__new__(trainer.Trainer)
    ending._after_watch = ExitStack()
    ending._after_watch.callback(writer.close)
    with pytest.raises(MemoryError):  # of the watch's thread, which the real end leaves no time
        ending._end_at_once(4)
    assert ended == [4]


def test_a_rank_that_has_lost_another_waits_for_its_own_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long the save takes that is finished first, or its exit code would be another."""
    monkeypatch.setattr(rank_watch, "_FLUSH", 0.0)
    saved, watch = threading.Event(), RankWatch(WatchLimits(dead_after=0.01, error_grace=0.01))

    def tell() -> None:
        watch._state = State.TOLD
        time.sleep(0.3)
        saved.set()

    guard = threading.Thread(target=tell)
    watch._state, watch._threads = State.LOST, [threading.Thread(), guard]
    guard.start()
    watch._linger()
    assert saved.is_set()


def test_the_main_rank_reaches_its_own_store_when_its_address_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DHCP takes it away with the cable; a rank that cannot reach its own store sees nothing."""
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")  # nobody's: RFC 5737
    monkeypatch.setattr(rank_watch, "_CONNECT", timedelta(seconds=1))
    watch = RankWatch()
    watch._names = ["rank 0"]
    assert watch._open() > 0
