"""Growth operators: pure functions from weights at one size to weights at another."""

from stacking.growth.legality import recipe_faults
from stacking.growth.plan import (
    GrowthPlan,
    Operators,
    grow,
    grow_weights,
    growth_faults,
    plan_growth,
)

__all__ = [
    "GrowthPlan",
    "Operators",
    "grow",
    "grow_weights",
    "growth_faults",
    "plan_growth",
    "recipe_faults",
]
