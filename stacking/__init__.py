"""Progressive BERT pre-training: grow a small encoder into a large one while it trains.

    from stacking import BertConfig, BertForPreTraining, grow, Recipe, Trainer

Only Trainer needs DeepSpeed, and only when it trains; only growing a folder needs transformers.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    from stacking.config import BertConfig, Recipe
    from stacking.hf_grow import GrowthReport
    from stacking.modeling import BertForPreTraining
    from stacking.trainer import Trainer

__version__ = "0.1.0"
__all__ = ["BertConfig", "BertForPreTraining", "Recipe", "Trainer", "grow"]

_HOMES = {
    "BertConfig": "stacking.config",
    "BertForPreTraining": "stacking.modeling",
    "Recipe": "stacking.config",
    "Trainer": "stacking.trainer",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use: `import stacking` stays fast (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stacking' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)


@overload
def grow(
    model: "BertForPreTraining",
    target: "BertConfig | Mapping[str, object]",
    *,
    depth: str = "stack",
    ffn: str = "tile",
    heads: str = "replicate",
    hidden: str = "duplicate",
    positions: str = "tile",
    seed: int = 0,
    out: None = None,
) -> "BertForPreTraining": ...


@overload
def grow(
    model: str | Path,
    target: "BertConfig | Mapping[str, object]",
    *,
    depth: str = "stack",
    ffn: str = "tile",
    heads: str = "replicate",
    hidden: str = "duplicate",
    positions: str = "tile",
    seed: int = 0,
    out: str | Path,
) -> "GrowthReport": ...


def grow(
    model: "BertForPreTraining | str | Path",
    target: "BertConfig | Mapping[str, object]",
    *,
    depth: str = "stack",
    ffn: str = "tile",
    heads: str = "replicate",
    hidden: str = "duplicate",
    positions: str = "tile",
    seed: int = 0,
    out: str | Path | None = None,
) -> "BertForPreTraining | GrowthReport":
    """Grow a model that exists: a larger one with what the small one learned.

    Args:
        model: ours, which stays as it is; or a Hugging Face folder, ours or anybody's BERT.
        target: the configuration to grow to, or only the fields that change, as in
            `{"num_hidden_layers": 12}`; heads then grow along with hidden_size.
        depth: operator of the layers; this and the other operators: docs/growth.md.
        ffn: operator of the inner width.
        heads: operator of the attention heads, where hidden_size grows.
        hidden: operator of hidden_size.
        positions: operator of learned positions.
        seed: of all that is drawn; equal arguments give equal weights.
        out: the folder to write when `model` is one.

    Returns:
        A BertForPreTraining; for a folder the report: contract and measured change of the outputs.

    Raises:
        ConfigError: sizes, names or folders that cannot be, all of them at once.
        GrowthError: a growth that is illegal, or that changed the outputs against its promise.
    """
    operators = {"depth": depth, "ffn": ffn, "heads": heads, "hidden": hidden,
                 "positions": positions}  # fmt: skip
    if isinstance(model, str | Path):
        room = importlib.import_module("stacking.hf_grow")
        return room.grow_path(Path(model), target, operators, out, seed)  # type: ignore[no-any-return]
    if out is not None:
        raise TypeError("out is for folders; a BertForPreTraining is returned, not written")
    config, _ = importlib.import_module("stacking.growth.target").resolve_target(
        model.config, target
    )
    pure = importlib.import_module("stacking.growth")
    return pure.grow(model, config, **operators, seed=seed)  # type: ignore[no-any-return]
