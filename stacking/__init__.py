"""Progressive BERT pre-training: grow a small encoder into a large one while it trains.

    from stacking import BertConfig, BertForPreTraining, grow, Recipe, Trainer

Only Trainer needs DeepSpeed, and only when it trains.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stacking.config import BertConfig, Recipe
    from stacking.growth import grow
    from stacking.modeling import BertForPreTraining
    from stacking.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["BertConfig", "BertForPreTraining", "Recipe", "Trainer", "grow"]

_HOMES = {
    "BertConfig": "stacking.config",
    "BertForPreTraining": "stacking.modeling",
    "Recipe": "stacking.config",
    "Trainer": "stacking.trainer",
    "grow": "stacking.growth",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use: `import stacking` stays fast (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stacking' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)
