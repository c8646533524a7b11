"""What every configuration model shares: frozen, strict, unknown keys forbidden."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Strict
from pydantic_core import PydanticCustomError

# Error type of faults between fields; config_loading reports these from its own second pass.
BETWEEN_FIELDS = "between_fields"

# Sanity bounds: beyond them a number is a typing error, or arithmetic with it overflows.
MOST_STEPS = 2**40  # optimizer steps
LARGEST_RATE = 100.0  # learning rate, weight decay, standard deviation

# JSON has no tuples: a list is taken where a tuple is declared, also from Python.
FromList = Strict(False)


class Frozen(BaseModel):
    """Base of all parts: immutable, unknown keys forbidden, no conversion ("4" is no 4)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def raise_together(faults: Sequence[str]) -> None:
    """Refuse, inside a pydantic validator, with all faults between fields at once."""
    if faults:
        raise PydanticCustomError(BETWEEN_FIELDS, "{faults}", {"faults": "\n".join(faults)})
