"""GrowthBranch: another way on from a step of a run, whose steps until there it shares."""

from typing import Annotated

from pydantic import Field

from stacking.config_base import MOST_STEPS, FromList, Frozen
from stacking.config_stage import Stage

Share = Annotated[float, Field(gt=0, le=1)]


class GrowthBranch(Frozen):
    """A run that leaves this one after step `at` and goes on with stages of its own."""

    name: str = Field(
        default="",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        max_length=100,
        description="Its folder in RUN_DIR/branches: letters and digits, after the first also "
        "'.', '_' and '-'; default: at_ and the step.",
    )
    at: int = Field(
        ge=0,
        le=MOST_STEPS,
        description="Optimizer steps that it shares with this run; 0: none, it begins by itself.",
    )
    stages: Annotated[tuple[Stage, ...], FromList] = Field(
        min_length=1, description="What it trains then; the last stage is its full size."
    )
    decay_steps: int | None = Field(
        default=None,
        gt=0,
        le=MOST_STEPS,
        description="Optimizer steps of its final decay, with schedule 'wsd'; null: as this run.",
    )
    branches: Annotated[tuple[Share, ...], FromList] = Field(
        default=(), description="Decay branches of its own, as shares of its steps."
    )
