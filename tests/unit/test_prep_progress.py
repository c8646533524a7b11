"""data_prep.progress: bars on a terminal, silence elsewhere, seconds always."""

import io
import re

from rich.console import Console

from data_prep.progress import Steps


def _run(console: Console, is_live: bool = True) -> Steps:
    with Steps(is_live, console) as steps:
        with steps.step("cleaning", 4_000_000) as advance:
            advance(1_000_000)
            advance(3_000_000)
        with steps.step("vocabulary", None):
            pass
        with steps.step("shards", 700, "rows") as advance:
            advance(700)
    return steps


def test_a_terminal_sees_each_step_with_speed_and_time_left() -> None:
    stream = io.StringIO()
    _run(Console(file=stream, force_terminal=True, width=100))
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for words in ("cleaning", "vocabulary", "100%", "MB/s", "rows/s", "0:00:00 left"):
        assert words in seen, words


def test_elsewhere_nothing_is_drawn_but_seconds_are_kept() -> None:
    for console, is_live in (
        (Console(file=io.StringIO()), True),
        (Console(file=io.StringIO(), force_terminal=True), False),
    ):
        steps = _run(console, is_live)
        assert list(steps.seconds) == ["cleaning", "vocabulary", "shards"]
        assert all(value >= 0 for value in steps.seconds.values())
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().strip() == ""
