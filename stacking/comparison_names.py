"""Recipes in; names that no two of them share, told apart by what differs."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from stacking.comparison_runs import Run
from stacking.config_loading import JsonObject

MOST_VALUES, LONGEST = 3, 60  # differing values, and their characters, that a name may hold


def unique_names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A name for each group of seeds: the recipe's, and what tells it from others of that name.

    That is the values that differ or, where they are many, the folder of the first seed.
    """
    names = [group[0].recipe.name for group in groups]
    folders = _folders([group[0].folder for group in groups])
    values = among_equal(
        names,
        lambda places: differences([json.loads(groups[place][0].settings) for place in places]),
    )
    for told in (values, folders):
        twice = Counter(names)
        names = [f"{name} ({more})" if twice[name] > 1 and more else name
                 for name, more in zip(names, told, strict=True)]  # fmt: skip
    return names if len(set(names)) == len(names) else folders


def differences(documents: Sequence[JsonObject]) -> list[str]:
    """Of each the values that not all have, in few words; all empty where they are many."""
    leaves = [_leaves(document) for document in documents]
    paths = [path for path in dict.fromkeys(path for leaf in leaves for path in leaf)
             if len({leaf.get(path) for leaf in leaves}) > 1]  # fmt: skip
    told = [", ".join(f"{path} {leaf.get(path, 'none')}" for path in paths) for leaf in leaves]
    is_short = len(paths) <= MOST_VALUES and all(len(words) <= LONGEST for words in told)
    return told if is_short else [""] * len(documents)


def short_names(names: Sequence[str], longest: int) -> list[str]:
    """Each with at most `longest` characters, cut in its middle; whole where two became alike."""
    half = (longest - 3) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}...{name[-half:]}" for name in names]
    return [name if cut.count(short) > 1 else short
            for name, short in zip(names, cut, strict=True)]  # fmt: skip


def among_equal(names: Sequence[str], tell: Callable[[Sequence[int]], Sequence[str]]) -> list[str]:
    """What `tell` says of the places of each name that is there several times; else nothing."""
    told = [""] * len(names)
    for name, count in Counter(names).items():
        places = [place for place, other in enumerate(names) if other == name]
        for place, words in zip(places, tell(places) if count > 1 else [""], strict=True):
            told[place] = words
    return told


def _folders(paths: Sequence[Path]) -> list[str]:
    """As short as they still differ: seen from above all of them."""
    resolved = [path.resolve() for path in paths]
    above = Path(os.path.commonpath(resolved)) if resolved else Path()
    return [str(path.relative_to(above.parent if above in resolved else above))
            for path in resolved]  # fmt: skip


def _leaves(value: object, path: str = "") -> dict[str, str]:
    """Every single value by its dotted path."""
    if not isinstance(value, dict | list) or not value:
        return {path: str(value)}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, str] = {}
    for key, part in items:
        found |= _leaves(part, f"{path}.{key}" if path else str(key))
    return found
