"""Hostile and broken files: refused with a message and exit code 2, or read rightly. Never a
traceback, a hang, much memory or a silent wrong number.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_sandbox import Sandbox
from fuzz_shards import shard_edits
from fuzz_targets import Case, run_case
from fuzz_world import STEPS, make_world
from fuzzing import HOSTILE, Raw, byte_edits, place_edits, tree_edits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SHARES = {"recipe": 30, "engine": 15, "ours": 20, "nvidia": 12, "run": 18, "metrics": 5}
"""How many of a hundred mutations each kind gets."""

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
    edits: st.SearchStrategy[list[object]] = {
        "recipe": _json_files,
        "engine": _json_files,
        "ours": _any_file | st.lists(shard_edits, min_size=1, max_size=2),
        "nvidia": st.lists(byte_edits | place_edits | shard_edits, min_size=1, max_size=2),
        "train": st.lists(tree_edits, min_size=1, max_size=2),
    }.get(target, _any_file)
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
        verdicts[sandbox.run(run_case, world, world.parent / "scratch", case)] += 1

    one()
    return verdicts


@pytest.mark.parametrize("target", SHARES)
def test_damaged_files_are_refused_or_read_rightly(
    target: str, world: Path, sandbox: Sandbox
) -> None:
    verdicts = fuzz(target, 3 * SHARES[target], world, sandbox)
    assert verdicts["refused"], "the damage was never seen: is it done at all?"


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARES)
def test_ten_thousand_damaged_files_are_refused_or_read_rightly(
    target: str, world: Path, sandbox: Sandbox
) -> None:
    verdicts = fuzz(target, 100 * SHARES[target], world, sandbox)
    assert verdicts["refused"]
    assert verdicts["accepted"], "nothing was accepted: is the target broken?"
    print(f"\n{target}: {verdicts}")
