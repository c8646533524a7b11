"""Hostile and broken files: refused with a message and exit code 2, or read rightly. Never a
traceback, a hang, much memory or a silent wrong number.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_sandbox import LIMIT, Sandbox
from fuzz_shards import ShardEdit, shard_edits
from fuzz_targets import Case, run_case
from fuzz_world import STEPS, make_world
from fuzzing import (
    HOSTILE,
    ByteEdit,
    PlaceEdit,
    Raw,
    TreeEdit,
    byte_edits,
    mild_edits,
    place_edits,
    tree_edits,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SHARES = {"recipe": 30, "engine": 15, "ours": 20, "nvidia": 12, "run": 18, "metrics": 5}
"""How many of a hundred mutations each kind gets."""

RICH = 1  # of the recipes by name
TRAINING_LIMIT = 150.0  # seconds a case; the first one imports DeepSpeed

KEYS = (
    "stages.0.steps", "stages.1.deepspeed", "stages.9.steps", "learning_rate.peak", "seed", "name",
    "model.hidden_size", "data", "stages", "model.vocab_size", "stages.-1.steps", "x.y", "", "=",
    "stages." + "9" * 5000 + ".steps", "stages.\u0663.steps", "a" * 300, ".",
    "stages.0.freeze.layers",
)  # fmt: skip
TAGS = ("../../x", "", ".", "..", "/", "\0", "step_00000002/", "\ud800", "x" * 300, "*", ".hidden")

_numbers = st.integers(0, 2**10)
_json_files = st.lists(tree_edits, min_size=1, max_size=3) | st.lists(
    byte_edits | place_edits, min_size=1, max_size=2
)
_any_file = st.lists(tree_edits | byte_edits | place_edits, min_size=1, max_size=2)
_settings = st.builds(
    lambda key, value: f"{key}={value.written() if isinstance(value, Raw) else value}",
    st.sampled_from(KEYS),
    st.sampled_from(HOSTILE) | st.integers(),
)


def cases(target: str) -> st.SearchStrategy[Case]:
    """Damage of one kind."""
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "recipe": _json_files,
        "engine": _json_files,
        "ours": _any_file | st.lists(shard_edits, min_size=1, max_size=2),
        "nvidia": st.lists(byte_edits | place_edits | shard_edits, min_size=1, max_size=2),
        "train": st.lists(mild_edits, min_size=1, max_size=1),
    }
    edits = kinds.get(target, _any_file)
    words: st.SearchStrategy[list[str]] = st.just([])
    if target == "recipe":
        words = st.lists(_settings, max_size=1)
    if target == "run":
        words = st.lists(st.sampled_from([*TAGS, *STEPS]), max_size=1)
    return st.builds(
        Case, st.just(target), _numbers, _numbers, edits.map(tuple), st.booleans(), words.map(tuple)
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("fuzz") / "world")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox("fuzz_targets")
    yield box
    box.close()


def fuzz(target: str, count: int, world: Path, sandbox: Sandbox) -> dict[str, int]:
    """Let a target read `count` damaged worlds; how many were accepted and refused."""
    verdicts = {"accepted": 0, "refused": 0}

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(cases(target))
    def one(case: Case) -> None:
        limit = TRAINING_LIMIT if target == "train" else LIMIT
        verdict = sandbox.run(run_case, world, world.parent / "scratch", case, limit=limit)
        verdicts[verdict] += 1

    one()
    return verdicts


@pytest.mark.parametrize("target", SHARES)
def test_damaged_files_are_refused_or_read_rightly(
    target: str, world: Path, sandbox: Sandbox
) -> None:
    verdicts = fuzz(target, 3 * SHARES[target], world, sandbox)
    assert verdicts["refused"], "the damage was never seen: is it done at all?"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("target", SHARES)
def test_thousands_of_damaged_files_are_refused_or_read_rightly(
    target: str, count: int, world: Path, sandbox: Sandbox
) -> None:
    verdicts = fuzz(target, count * SHARES[target] // 100, world, sandbox)
    assert verdicts["refused"]
    assert verdicts["accepted"], "nothing was accepted: is the target broken?"
    print(f"\n{target}: {verdicts}")


def huge(digits: int) -> str:
    return "1" + "0" * digits


FOUND = (
    # A recipe of which one part does not hold, and another has parts of its own.
    Case("recipe", RICH, words=("stages.2.stepz=1",)),
    Case("recipe", RICH, words=(f"stages.{'9' * 5000}.steps=1",)),
    Case("recipe", RICH, words=(f"stages.0.steps={huge(400)}",)),
    Case("recipe", RICH, words=(f"model.type_vocab_size={huge(12)}",)),
    Case("recipe", RICH, words=(f"stages.9.steps={'[' * 10_000}{']' * 10_000}",)),
    Case("recipe", RICH, words=(f"learning_rate.points=[[0, 0.001], [{huge(400)}, 0.01]]",)),
    *(Case(target, RICH, edits=(PlaceEdit(op),))
      for target in ("recipe", "engine", "metrics") for op in ("fifo", "endless", "folder")),
    Case("metrics", edits=(ByteEdit("brackets", 0),)),
    *(Case("metrics", edits=(TreeEdit("replace", where, value),))
      for where, value in ((25, 7), (25, -1), (25, True), (70, 10**400))),
    # A flipped bit in a token id that stays one, in each shard; a manifest that says otherwise.
    *(Case("ours", file=file, edits=(ByteEdit("flip", 2100),)) for file in (2, 3, 4, 5)),
    *(Case("ours", file=file, edits=(PlaceEdit(op),))
      for file in (0, 2, 6) for op in ("fifo", "endless")),
    *(Case("nvidia", file=0, edits=(ShardEdit(op, where, value),))
      for op, where, value in (
          ("constant", 5, 4), ("constant", 5, 0), ("constant", 4, 4), ("constant", 3, 8),
          ("constant", 1, 4), ("link", 0, 3), ("link", 0, 5), ("outside", 0, 0), ("far", 0, 9),
      )),
    *(Case("run", file=file, edits=(PlaceEdit(op),))
      for file in (*range(11), 12, 13) for op in ("fifo", "endless")),
    *(Case("run", file=file, edits=(ByteEdit("brackets", 0),), is_signed=True)
      for file in range(11)),
    Case("run", words=("x" * 300,)),
)  # fmt: skip


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case.target}-{case.file}")
def test_what_was_once_a_fault_is_refused(case: Case, world: Path, sandbox: Sandbox) -> None:
    scratch = world.parent / "scratch"
    assert sandbox.run(run_case, world, scratch, case) == "refused"


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, pytest.param(80, marks=pytest.mark.soak)])
def test_what_is_accepted_also_trains(count: int, world: Path, sandbox: Sandbox) -> None:
    verdicts = fuzz("train", count, world, sandbox)
    assert verdicts["accepted"] >= count // 8
    assert verdicts["refused"]
    print(f"\ntrain: {verdicts}")


@pytest.mark.parametrize("target", SHARES)
def test_what_is_not_damaged_is_accepted(target: str, world: Path, sandbox: Sandbox) -> None:
    verdict = sandbox.run(run_case, world, world.parent / "scratch", Case(target, base=1))
    assert verdict == "accepted"
