"""What a user asks of `launch/plan.py --suggest`, checked; the Suggestion out, and its file."""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stacking.comparison_runs import each_once, read_runs, with_branches
from stacking.config import Recipe
from stacking.config_loading import resolved_json
from stacking.deepspeed_config import DeepSpeedConfig
from stacking.errors import ConfigError
from stacking.run_folder import write_text
from stacking.stage_plan import plan_recipe
from stacking.stage_plan_pilots import Evidence, gather
from stacking.stage_plan_suggest import RateShape, Suggestion, suggest
from stacking.stopping import parse_duration

TOLERANCE = 0.02
"""Nats; about the half percent of the loss within which Bu 2025 calls a grown model mixed."""


@dataclass(frozen=True)
class Request:
    """The command line's words; None where one is not given."""

    budget: str | None = None
    pilots: Sequence[Path] | None = None
    measure: Sequence[int] | None = None  # depths
    tolerance: float | None = None
    out: Path | None = None

    @property
    def nats(self) -> float:
        """The tolerance."""
        return TOLERANCE if self.tolerance is None else self.tolerance

    def faults(self, recipe: Recipe) -> list[str]:
        """All that cannot be, before anything is read or timed."""
        faults, layers = [], recipe.model.num_hidden_layers
        if self.budget is None:
            faults.append("--suggest: needs --budget, the time to train in, such as --budget 2h")
        if not self.pilots and not self.measure:
            faults.append(
                "--suggest: needs --pilot RUN..., run folders of short runs of this recipe: the "
                "target from scratch, a smaller depth alone, and one that grows; or, for bounds "
                "without any, depths to time here, such as --measure 2"
            )
        allowed = [depth for depth in range(1, layers) if layers % depth == 0]
        for depth in self.measure or ():
            if depth not in allowed:
                names = ", ".join(map(str, allowed)) or f"none below {layers} layer"
                faults.append(
                    f"--measure: got {depth}; allowed: depths of which {layers} is a multiple, "
                    f"{names}"
                )
        if not 0 < self.nats < math.inf:
            faults.append(f"--tolerance: got {self.tolerance}; allowed: nats above 0")
        if self.out and self.out.exists():
            faults.append(f"--out {self.out}: exists already; give another name")
        return faults


def refuse_idle(given: Mapping[str, object], owners: Mapping[str, Sequence[str]]) -> None:
    """ConfigError where a flag is given that nobody would read.

    `given`: the parsed command line; `owners`: flags that only go with another, by that one, of
    which there may be one.
    """
    asked = [f"--{owner}" for owner in owners if given[owner]]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(asked)}: give one of them")
    for owner, names in owners.items():
        if not given[owner] and any(given[name] is not None for name in names):
            flags = ", ".join("--" + name.replace("_", "-") for name in names)
            raise ConfigError(f"{flags}: need --{owner}")


def answer(
    recipe: Recipe, settings: DeepSpeedConfig, request: Request, *, world_size: int
) -> Suggestion:
    """Read the pilots, time what none of them has, suggest, and write the recipe if asked to.

    UserError, with all faults at once where they can be found together.
    """
    if faults := request.faults(recipe):
        raise ConfigError(faults)
    RateShape.of(recipe)
    budget = parse_duration(request.budget or "", "--budget")
    evidence = _evidence(recipe, settings, request)
    found = suggest(recipe, evidence, budget)
    plan_recipe(found.recipe, settings, world_size=world_size)  # refuses what cannot run
    if request.out:
        _write(request.out, found.recipe)
    return found


def _evidence(recipe: Recipe, settings: DeepSpeedConfig, request: Request) -> Evidence:
    folders = [path for folder in request.pilots or () for path in with_branches(folder)]
    runs = read_runs(each_once(folders))
    evidence = gather(recipe, runs, {}, request.nats)
    timed = {
        one.first.num_hidden_layers
        for one in evidence.candidates if math.isfinite(one.time.seconds)
    }  # fmt: skip
    depths = sorted(set(request.measure or ()) - timed)
    if not depths:
        return evidence
    # The only part that needs DeepSpeed, and the target too: only ratios compare with other runs.
    room = importlib.import_module("stacking.stage_plan_timing")
    measured = room.step_seconds(recipe, [*depths, recipe.model.num_hidden_layers], settings)
    return gather(recipe, runs, measured, request.nats)


def _write(path: Path, recipe: Recipe) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, resolved_json(recipe))
    except OSError as error:
        raise ConfigError(
            f"--out {path}: cannot be written: {error}; give a file in a folder that can"
        ) from error
