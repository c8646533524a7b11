"""Damage as data: edits of JSON trees, of bytes and of places; and how they are done to files.

An edit says where by a number that is taken modulo what there is, so that it fits any file and
shrinks to the first place. Everything here can be pickled and reads well in a failure's report.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st


@dataclass(frozen=True)
class Raw:
    """JSON text that is written as it is: what json.dumps would never say."""

    text: str
    repeat: int = 1
    tail: str = ""

    def written(self) -> str:
        return self.text * self.repeat + self.tail * self.repeat


@dataclass(frozen=True)
class TreeEdit:
    """One change of a JSON document."""

    op: str
    where: int
    value: object = None


@dataclass(frozen=True)
class ByteEdit:
    """One change of a file's bytes; `size` bytes from `where` on."""

    op: str
    where: int
    size: int = 1


@dataclass(frozen=True)
class PlaceEdit:
    """Something else in a file's place."""

    op: str
    where: int = 0


FileEdit = TreeEdit | ByteEdit | PlaceEdit

TREE_OPS = (
    "replace", "delete", "rename", "duplicate", "insert", "swap", "negate", "scale", "quote",
    "nudge", "nudge", "choose", "choose",
)  # fmt: skip
WORDS = (
    "linear", "cosine", "constant", "wsd", "piecewise", "none", "mean", "max", "concat", "stack",
    "interleave", "append_last", "middle", "random", "identity", "tile", "split", "zero", "aki",
    "duplicate", "uneven", "fpi", "replicate", "interpolate", "fresh", "reset", "keep", "grow",
    "seed_v", "learned", "rotary", "sinusoidal", "pre", "post", "relu", "static", "dynamic", "fp16",
    "bf16", "fp32", "bfloat16", "cpu", "Lamb", "Adam", "unmasked", "nvidia", "F16", "I64",
    "F8_E4M3",
)  # fmt: skip
BYTE_OPS = (
    "truncate", "flip", "overwrite", "append", "empty", "bom", "utf16", "latin1", "nul", "cut",
    "repeat", "zero", "ones", "brackets",
)  # fmt: skip
PLACE_OPS = ("missing", "folder", "loop", "fifo", "endless", "link", "exchange")
HOSTILE: tuple[object, ...] = (
    None, True, False, 0, 1, 2, 3, 5, -1, -(2**63), 127, 2**16, 2**24, 2**31, 2**53, 2**63, 2**64,
    10**30, 10**400, Raw("1", 5000), Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("Infinity"),
    Raw("-Infinity"), Raw("-0.0"), Raw("1e-400"), Raw("1e5"), Raw("2.0"), 5e-324, 1e-30, 1e30,
    1e308, 0.1, 1.5, "", " ", "4", "auto", "\0", "a\0b", Raw('"\\ud800"'), "../../x", "/none/x",
    "\u00e9\U0001f600", "x" * 10_000, "{}", "%s", [], [[]], {}, {"a": 1}, [1, 2], ["x"], [0.1, 0.2],
    Raw("[", 10_000, "]"), Raw('{"a":', 900), Raw("// comment"), Raw("1,"), "nan", "stack", "cpu",
)  # fmt: skip

_values = st.sampled_from(HOSTILE) | st.integers(-3, 70) | st.floats(width=32) | st.text(max_size=4)
_where = st.integers(0, 2**20)
tree_edits = st.builds(TreeEdit, st.sampled_from(TREE_OPS), _where, _values)
mild_edits = st.builds(TreeEdit, st.sampled_from(("nudge", "choose", "delete")), _where)
"""Most of them legal."""
byte_edits = st.builds(ByteEdit, st.sampled_from(BYTE_OPS), _where, st.integers(1, 40))
place_edits = st.builds(PlaceEdit, st.sampled_from(PLACE_OPS), _where)


def edit_file(path: Path, edits: Sequence[FileEdit], others: Sequence[Path] = ()) -> None:
    """Do all edits to a file: first the tree's, then the bytes', then the place's.

    `others`: files that it may change places with.
    """
    trees = [edit for edit in edits if isinstance(edit, TreeEdit)]
    if trees:
        path.write_bytes(_edited_lines(path.read_bytes(), trees))
    for edit in edits:
        if isinstance(edit, ByteEdit):
            path.write_bytes(edit_bytes(path.read_bytes(), edit))
    for edit in edits:
        if isinstance(edit, PlaceEdit):
            _replace_place(path, edit, others)
            return  # one is all that there is room for


def _edited_lines(content: bytes, edits: Sequence[TreeEdit]) -> bytes:
    """A JSON document, the line of JSON lines that the first edit hits, or safetensors' head."""
    size = int.from_bytes(content[:8], "little")
    if content[8:9] == b"{" and size < len(content):
        head = edited_json(json.loads(content[8 : 8 + size]), edits).encode()
        return len(head).to_bytes(8, "little") + head + content[8 + size :]
    lines = [content] if content[:2] == b"{\n" else content.splitlines()
    hit = edits[0].where % len(lines) if lines else 0
    try:
        lines[hit] = edited_json(json.loads(lines[hit]), edits).encode()
    except (ValueError, IndexError):  # no JSON: a vocabulary, or a binary file
        return content
    return b"\n".join(lines) + b"\n"


class _Object:
    """A JSON object whose keys may stand twice."""

    def __init__(self, pairs: list[list[object]]) -> None:
        self.pairs = pairs


def edited_json(document: object, edits: Sequence[TreeEdit]) -> str:
    """The document's text after all edits."""
    root = [_thawed(document)]
    for edit in edits:
        _edit_tree(root, edit)
    return _text(root[0])


def _thawed(value: object) -> object:
    if isinstance(value, Mapping):
        return _Object([[key, _thawed(item)] for key, item in value.items()])
    return [_thawed(item) for item in value] if isinstance(value, list) else value


def _slots(node: object) -> list[tuple[list[object], int]]:
    """Every place of a value below a node, as (list, index), deepest last."""
    found: list[tuple[list[object], int]] = []
    if isinstance(node, _Object):
        for pair in node.pairs:
            found += [(pair, 1), *_slots(pair[1])]
    elif isinstance(node, list):
        for index, item in enumerate(node):
            found += [(node, index), *_slots(item)]
    return found


def _pairs(node: object) -> list[tuple[list[list[object]], int]]:
    """Every key below a node, as (object's pairs, index)."""
    found: list[tuple[list[list[object]], int]] = []
    if isinstance(node, _Object):
        for index, pair in enumerate(node.pairs):
            found += [(node.pairs, index), *_pairs(pair[1])]
    elif isinstance(node, list):
        for item in node:
            found += _pairs(item)
    return found


def _edit_tree(root: list[object], edit: TreeEdit) -> None:
    slots, pairs = _slots(root), _pairs(root[0])
    holder, index = slots[edit.where % len(slots)]
    old = holder[index]
    if edit.op in ("replace", "insert") or not pairs:
        if edit.op == "insert" and pairs:
            siblings, place = pairs[edit.where % len(pairs)]
            siblings.insert(place, [f"new_{edit.where % 7}", _thawed(edit.value)])
        else:
            holder[index] = _thawed(edit.value)
    elif edit.op == "swap":
        other, there = slots[(edit.where * 7 + 3) % len(slots)]
        if not any(slot[0] is other for slot in _slots([old])) and old is not other[there]:
            holder[index], other[there] = other[there], old
    elif edit.op in ("negate", "scale", "quote", "nudge", "choose"):
        holder[index] = _changed(old, edit)
    else:
        siblings, place = pairs[edit.where % len(pairs)]
        if edit.op == "delete":
            del siblings[place]
        elif edit.op == "rename":
            siblings[place][0] = f"{siblings[place][0]}s"
        elif edit.op == "duplicate":
            siblings.append([siblings[place][0], _thawed(edit.value)])


def _changed(old: object, edit: TreeEdit) -> object:
    """A value near the old one: most of these are legal."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, str) and edit.op == "choose":
        return WORDS[edit.where % len(WORDS)]
    if not isinstance(old, int | float):
        return None
    if edit.op == "nudge":
        return old + (1, -1, old)[edit.where % 3]
    return {"negate": -old, "scale": old * 1000, "quote": str(old), "choose": 1}[edit.op]


def _text(node: object) -> str:
    if isinstance(node, _Object):
        return "{" + ",".join(f"{json.dumps(k)}:{_text(v)}" for k, v in node.pairs) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    return node.written() if isinstance(node, Raw) else json.dumps(node)


def edit_bytes(content: bytes, edit: ByteEdit) -> bytes:
    """The bytes after one edit."""
    at = edit.where % max(1, len(content))
    end = min(len(content), at + edit.size)
    noise = bytes((edit.where * 31 + 7 * n) % 256 for n in range(edit.size))
    flipped = bytes([content[at] ^ (1 << edit.size % 8)]) if content else b""
    changes: dict[str, Callable[[], bytes]] = {
        "truncate": lambda: content[:at],
        "flip": lambda: content[:at] + flipped + content[at + 1 :],
        "overwrite": lambda: content[:at] + noise[: end - at] + content[end:],
        "append": lambda: content + noise,
        "empty": lambda: b"",
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "utf16": lambda: content.decode("latin1").encode("utf-16"),
        "latin1": lambda: content[:at] + b"\xe9" + content[at:],
        "nul": lambda: content[:at] + b"\0" * edit.size + content[at:],
        "cut": lambda: content[:at] + content[end:],
        "repeat": lambda: content[:end] + content[at:],
        "zero": lambda: content[:at] + b"\0" * (end - at) + content[end:],
        "ones": lambda: content[:at] + b"\xff" * (end - at) + content[end:],
        "brackets": lambda: b"[" * 10_000 + content,
    }
    return changes[edit.op]()


def _replace_place(path: Path, edit: PlaceEdit, others: Sequence[Path]) -> None:
    if edit.op == "exchange":
        other = others[edit.where % len(others)] if others else path
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
        return
    aside = path.with_name(f"aside_{path.name}.bak")
    shutil.move(path, aside)
    if edit.op == "folder":
        path.mkdir()
    elif edit.op == "loop":
        path.symlink_to(path.name)
    elif edit.op == "fifo":
        os.mkfifo(path)
    elif edit.op == "endless":
        path.symlink_to("/dev/zero")
    elif edit.op == "link":  # as good as the file
        path.symlink_to(aside.name)
