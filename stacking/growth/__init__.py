"""Growth operators: pure functions from weights at one size to weights at another."""

from stacking.growth.plan import grow, grow_weights, promised_tolerance

__all__ = ["grow", "grow_weights", "promised_tolerance"]
