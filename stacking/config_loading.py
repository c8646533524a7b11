"""Recipe files in, a checked Recipe out; and back. All faults at once, in one ConfigError."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from data_prep.plain_files import read_plain
from stacking.branches import branch_faults
from stacking.config import (
    BertConfig,
    DataConfig,
    LearningRateConfig,
    Recipe,
    Stage,
    faults_between,
)
from stacking.config_base import BETWEEN_FIELDS
from stacking.config_faults import cut, fault_lines, nearest, show
from stacking.errors import ConfigError

JsonObject = dict[str, object]
_Part = TypeVar("_Part", bound=BaseModel)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its bases and `key.path=value` overrides; ConfigError lists every fault."""
    document = _read_with_bases(Path(path), ())
    faults = [fault for text in overrides if (fault := _override(document, text))]
    return _validate(document, faults)


def resolved_json(recipe: Recipe) -> str:
    """The recipe with every default written out: what a run folder keeps."""
    return json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n"


def recipe_schema_text() -> str:
    """JSON Schema of a recipe *file*, for editors: a file may leave to its base what it extends."""
    schema = Recipe.model_json_schema()
    properties = {
        "$schema": {"type": "string", "description": "Path of this schema, for editors."},
        "extends": {
            "type": "string",
            "description": "Recipe that this one changes, relative to this file; objects merge, "
            "lists replace.",
        },
        **schema.pop("properties"),
    }
    required = schema.pop("required")
    schema["$defs"]["BertConfig"].pop("required")
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": properties,
        "anyOf": [{"required": ["extends"]}, {"required": required}],
    }
    return json.dumps(schema, indent=2) + "\n"


def read_json_object(path: Path) -> JsonObject:
    """One JSON object from a file; duplicate keys, NaN and infinities are refused."""
    try:
        text = read_plain(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(_missing_file(path)) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}); give a file") from None
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; allowed: plain JSON, "
            "without comments or trailing commas"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}; allowed: plain JSON") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: got {show(value)}; allowed: one JSON object, {{...}}")
    return value


def parse_json(text: str) -> object:
    """json.loads, but strict about duplicate keys, NaN and infinities (ValueError)."""
    duplicates: list[str] = []

    def build(pairs: list[tuple[str, object]]) -> JsonObject:
        keys = [key for key, _ in pairs]
        duplicates.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(pairs)

    def refuse(constant: str) -> float:
        raise ValueError(f"got {constant}, which is not a JSON number")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(f"{digits[:20]}, too large a number")

    value: object = json.loads(
        text, object_pairs_hook=build, parse_constant=refuse, parse_float=number
    )
    if duplicates:
        names = ", ".join(map(repr, duplicates))
        raise ValueError(f"the same key is given twice in one object: {names}; keep one of each")
    return value


def merge(base: Mapping[str, object], change: Mapping[str, object]) -> JsonObject:
    """`change` over `base`: objects merge deeply, everything else replaces. Copies, never edits."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _read_with_bases(path: Path, readers: tuple[Path, ...]) -> JsonObject:
    """`readers`: the files that extend this one, the outermost first."""
    document = read_json_object(path)
    document.pop("$schema", None)
    base = document.pop("extends", None)
    if base is None:
        return document
    if not isinstance(base, str) or "\0" in base:
        raise ConfigError(f"{path}: extends: got {show(base)}; allowed: the path of a recipe")
    trail = (*readers, path.resolve())
    base_path = path.parent / base
    if base_path.resolve() in trail:
        names = " -> ".join(p.name for p in (*trail, base_path))
        raise ConfigError(f"{path}: extends: recipes extend each other in a circle: {names}")
    return merge(_read_with_bases(base_path, trail), document)


def _missing_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
    if not path.parent.is_dir():
        return f"{path}: no such file, nor the folder {path.parent}; give a JSON file"
    if not names:
        return f"{path}: no such file, and its folder has no .json file; give a JSON file"
    return f"{path}: no such file; {nearest(path.name, names).replace('keys here', 'files there')}"


def _override(document: JsonObject, text: str) -> str | None:
    """Write one `key.path=value` into the document; the fault, if that is impossible.

    Unknown keys are written as they are: validation then refuses them with the nearest known key.
    """
    path, separator, value_text = text.partition("=")
    parts = path.strip().split(".")
    given = f"--set {cut(text)}"
    if not separator or not all(parts):
        return f"{given}: allowed: key.path=value, for example stages.0.steps=500"
    try:
        value = parse_json(value_text)
    except (ValueError, RecursionError):
        value = value_text
    node: object = document
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        where = ".".join(parts[:depth])
        if isinstance(node, dict):
            if is_last:
                node[part] = value
            node = node.setdefault(part, {})
        elif isinstance(node, list):
            if part not in map(str, range(len(node))):
                allowed = f"an index from 0 to {len(node) - 1}" if node else "no index: it is empty"
                return f"{given}: {where}: got {show(part)}; allowed: {allowed}"
            if is_last:
                node[int(part)] = value
            node = node[int(part)]
        else:
            return f"{given}: {where} is {show(node)}, which has no keys; allowed: {where}=..."
    return None


def _validate(document: JsonObject, faults: Sequence[str]) -> Recipe:
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        found = [*faults, *fault_lines(error, Recipe), *_second_pass(document)]
        raise ConfigError(found) from None
    if found := [*faults, *branch_faults(recipe)]:
        raise ConfigError(found)
    return recipe


def _second_pass(document: JsonObject) -> list[str]:
    """Faults between fields, in the parts that are valid by themselves.

    pydantic skips checks between fields as soon as one field anywhere is wrong.
    """
    stages = document.get("stages")
    return faults_between(
        _part(BertConfig, document.get("model")),
        _part(DataConfig, document.get("data", {})),
        _part(LearningRateConfig, document.get("learning_rate", {})),
        [_part(Stage, stage) for stage in stages] if isinstance(stages, list) else [],
    )


def _part(model: type[_Part], value: object) -> _Part | None:
    """The part if its known fields are right one by one, whether or not they fit together."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        if not isinstance(value, dict):
            return None
        known = {key: item for key, item in value.items() if key in model.model_fields}
        if len(known) < len(value):
            return _part(model, known)
        if any(item["type"] != BETWEEN_FIELDS for item in error.errors()):
            return None
        return model.model_construct(**known)
