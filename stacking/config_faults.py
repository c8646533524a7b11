"""pydantic's errors in; lines for people out: path, what was given, what is allowed, near keys."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel, ValidationError

from stacking.config_base import BETWEEN_FIELDS

_Location = Sequence[int | str]
_Schema = Mapping[str, object]

_LONGEST_VALUE = 60  # characters of what was given that a message repeats
_LONGEST_KEY_LIST = 12  # known keys that a message lists when no key is near

_PLAIN_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "string": "a string",
    "null": "null",
    "object": "an object",
}


def fault_lines(
    error: ValidationError,
    model: type[BaseModel],
    prefix: str = "",
    also_known: Sequence[str] = (),
) -> list[str]:
    """One line a fault, without those between fields, which have their own second pass.

    `prefix` is put before each path; `also_known`: dotted keys outside the model to suggest too.
    """
    schema: _Schema = model.model_json_schema()
    lines = []
    for item in error.errors(include_url=False):
        if item["type"] == BETWEEN_FIELDS:
            continue
        path = prefix + ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key; {_suggestion(item['loc'], schema, also_known)}")
            continue
        node = _node_at(item["loc"], schema)
        allowed = _describe(node, schema)
        if item["type"] == "value_error":
            allowed = str(item["ctx"]["error"])
        got = "missing" if item["type"] == "missing" else f"got {show(item['input'])}"
        about = f" ({node['description']})" if "description" in node else ""
        lines.append(f"{path}: {got}; allowed: {allowed}{about}")
    return lines


def show(value: object) -> str:
    """A value as its author wrote it, cut to one short line."""
    return cut(repr(value) if isinstance(value, str) else json.dumps(value, default=repr))


def cut(text: str) -> str:
    """A text that a message repeats, no longer than one short line."""
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."


def nearest(key: str, known: Sequence[str]) -> str:
    """'did you mean' the most similar key, or the list of keys."""
    close = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    listed = ", ".join(sorted(known)[:_LONGEST_KEY_LIST])
    return f"known keys here: {listed}{', ...' if len(known) > _LONGEST_KEY_LIST else ''}"


def _suggestion(location: _Location, schema: _Schema, also_known: Sequence[str]) -> str:
    """The near key of the same object, or else the same key in another object."""
    *parents, key = (str(part) for part in location)
    known = list(_properties(_node_at(location[:-1], schema), schema))
    others = [path.split(".") for path in also_known]
    known += [path[-1] for path in others if path[:-1] == parents]
    homes = [home for home in _paths(schema, schema) if home.split(".")[-1] == key]
    if homes and not difflib.get_close_matches(key, known, n=1, cutoff=0.85):
        return f"it belongs in '{homes[0]}'"
    return nearest(key, known)


def _node_at(location: _Location, schema: _Schema) -> _Schema:
    """The part of a JSON Schema that a pydantic error location points at; {} if unknown."""
    node = _resolve(schema, schema)
    for part in location:
        if isinstance(part, int):
            fixed = _list(node.get("prefixItems"))
            child = fixed[part] if part < len(fixed) else node.get("items")
        else:
            child = _properties(node, schema).get(part)
        if child is None:
            return {}
        node = _resolve(child, schema)
    return node


def _resolve(node: object, schema: _Schema) -> _Schema:
    """Follow $ref and the branch of an optional value that is not null; keep the description."""
    resolved = _mapping(node)
    branches = [b for b in _list(resolved.get("anyOf")) if _mapping(b).get("type") != "null"]
    target: object = branches[0] if len(branches) == 1 else None
    if "$ref" in resolved:
        name = str(resolved["$ref"]).rsplit("/", 1)[-1]
        target = _mapping(schema["$defs"])[name]
    if target is None:
        return resolved
    inner = _resolve(target, schema)
    own = {key: resolved[key] for key in ("description", "default") if key in resolved}
    nullable = {"nullable": True} if branches else {}
    return {**inner, **own, **nullable}


def _properties(node: _Schema, schema: _Schema) -> dict[str, _Schema]:
    return {k: _resolve(v, schema) for k, v in _mapping(node.get("properties")).items()}


def _paths(node: _Schema, schema: _Schema, prefix: str = "") -> Iterator[str]:
    """All dotted key paths below a node; list elements are shown as N."""
    for key, child in _properties(node, schema).items():
        yield prefix + key
        yield from _paths(child, schema, f"{prefix}{key}.")
        if "items" in child:
            yield from _paths(_resolve(child["items"], schema), schema, f"{prefix}{key}.N.")


def _describe(node: _Schema, schema: _Schema) -> str:
    """What a JSON Schema node allows, in words."""
    if "enum" in node:
        text = "one of " + ", ".join(show(value) for value in _list(node["enum"]))
    elif "const" in node:
        text = show(node["const"])
    elif node.get("type") == "array":
        text = _describe_list(node, schema)
    elif node.get("properties"):
        text = "an object with the keys " + ", ".join(_properties(node, schema))
    else:
        text = _PLAIN_TYPES.get(str(node.get("type")), "another value") + _bounds(node)
    return text + (" or null" if "nullable" in node else "")


def _describe_list(node: _Schema, schema: _Schema) -> str:
    fixed = _list(node.get("prefixItems"))
    if fixed:
        inner = ", ".join(_describe(_resolve(item, schema), schema) for item in fixed)
        return f"a list of {len(fixed)}: {inner}"
    item = _resolve(node.get("items"), schema)
    inner = "objects" if item.get("properties") else "values, each " + _describe(item, schema)
    least = "at least 1 of " if node.get("minItems") else ""
    return f"a list of {least}{inner}"


def _bounds(node: _Schema) -> str:
    names = {
        "exclusiveMinimum": "greater than",
        "minimum": "at least",
        "exclusiveMaximum": "less than",
        "maximum": "at most",
    }
    bounds = [f"{word} {node[name]}" for name, word in names.items() if name in node]
    if node.get("minLength"):
        bounds.append("that is not empty")
    if "maxLength" in node:
        bounds.append(f"of at most {node['maxLength']} characters")
    if "pattern" in node:
        bounds.append(f"that matches {node['pattern']}")
    return " " + " and ".join(bounds) if bounds else ""


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
