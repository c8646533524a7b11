"""What lies in a Hugging Face folder beside the weights: tokenizer, model card, pooling.

`copy_side_files` takes it along when a model grows; `out_faults` says where a grown model may be
written, and `require_replaceable` where an export may.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from stacking.errors import ConfigError
from stacking.hf_remote import CODE_FILES

CARD = "README.md"
_EXPORTED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    CARD,
    *CODE_FILES,
}
_SEAL = "<!-- Written by launch/export.py; sha256 of what stands above: {} -->\n"
RECORD = "growth.json"
"""What a growth did: marks a folder as ours, so that the same command may write it again."""

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth",
                    ".ckpt", ".tflite", ".gguf"}  # fmt: skip
_WEIGHTS = "model.safetensors"
_MODULES = "modules.json"
_WIDTH_KEYS = ("word_embedding_dimension", "embedding_dimension")
_ANY_WIDTH = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers without weights of their own."""


def out_faults(out: Path, model: Path) -> list[str]:
    """Why a grown `model` cannot be written to `out`; empty: it can."""
    here, there = out.resolve(), model.resolve()
    if here == there:
        return [f"--out {out}: is the model itself; give a new folder"]
    if there in here.parents:
        return [f"--out {out}: lies inside the model's folder; give a folder beside it"]
    if not out.exists():
        return []
    if not out.is_dir():
        return [f"--out {out}: is a file; give a folder"]
    foreign = _foreign(out)
    if not foreign:
        return []
    return [
        f"--out {out}: exists and holds {', '.join(foreign[:3])}, which no growth wrote; "
        "give a new folder"
    ]


def sealed(card: str) -> str:
    """A model card with a last line by which we know that nobody has changed it since."""
    return card + _SEAL.format(hashlib.sha256(card.encode()).hexdigest())


def require_replaceable(folder: Path) -> None:
    """ConfigError where `folder` holds anything that no export wrote, or a card that was edited."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; give a folder")
    if not folder.is_dir():
        return
    foreign = sorted({path.name for path in folder.iterdir()} - _EXPORTED)
    if foreign:
        raise ConfigError(
            f"--out {folder}: holds {', '.join(foreign[:3])}, which no export wrote; "
            "give a new folder"
        )
    if (folder / CARD).exists() and not _is_sealed(folder / CARD):
        raise ConfigError(
            f"--out {folder}: its {CARD} is not as an export wrote it; keep it elsewhere, or give "
            "a new folder"
        )


def replace_folder(folder: Path, partial: Path) -> None:
    """Put `partial` in the place of `folder`; at no moment is there a half-written `folder`."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _is_sealed(path: Path) -> bool:
    try:
        text = path.read_bytes().decode()
    except (OSError, ValueError):
        return False
    end = re.search(_SEAL.format("[0-9a-f]{64}") + r"\Z", text)
    return end is not None and sealed(text[: end.start()]) == text


def write_record(folder: Path, record: dict[str, object]) -> None:
    """Write RECORD, last of all files: what was done, and which files are ours."""
    files = sorted(_files(folder))
    record = record | {"files": files, "weights_sha256": _digest(folder / _WEIGHTS)}
    _write_json(folder / RECORD, record)


def copy_side_files(model: Path, folder: Path, old_width: int, new_width: int) -> list[str]:
    """Copy all of `model` but weights and config.json into `folder`; returns notes.

    The width that a pooling of sentence-transformers expects is brought up to date.
    """
    modules = _modules(model)
    notes = []
    for path in sorted(model.iterdir()):
        if path.is_dir():
            has_weights = any(_is_weights(inner) for inner in path.rglob("*"))
            if path.name in modules or not (has_weights or path.name.startswith(".")):
                shutil.copytree(path, folder / path.name)
            else:
                notes.append(f"{path.name}/ was left out: it is not part of the model's new size")
        elif _is_weights(path):
            if path.suffix != ".safetensors" and not path.name.startswith("pytorch_model"):
                notes.append(f"{path.name} was left out: it holds weights of the old size")
        elif path.name not in ("config.json", RECORD) and not path.name.endswith(".index.json"):
            shutil.copy2(path, folder / path.name)
    if old_width != new_width:
        notes += [
            note
            for name, kind in modules.items()
            for note in _widen_module(folder / name, kind, old_width, new_width)
        ]
    return notes


def _widen_module(folder: Path, kind: str, old: int, new: int) -> Iterator[str]:
    """Set the width in the config.json of one module of sentence-transformers."""
    path = folder / "config.json"
    if kind not in _ANY_WIDTH:
        yield f"{folder.name} ({kind}) still reads {old} numbers and did not grow: fit it anew"
    elif path.is_file():
        fields = json.loads(path.read_text(encoding="utf-8"))
        stale = [key for key in _WIDTH_KEYS if fields.get(key) == old]
        if stale:
            _write_json(path, fields | dict.fromkeys(stale, new))
            yield f"{folder.name}/config.json: {', '.join(stale)} is now {new}"


def _modules(model: Path) -> dict[str, str]:
    """Folder -> class name of each module of sentence-transformers but the encoder itself."""
    path = model / _MODULES
    if not path.is_file():
        return {}
    listed = json.loads(path.read_text(encoding="utf-8"))
    return {entry["path"]: entry["type"].split(".")[-1] for entry in listed if entry["path"]}


def _foreign(out: Path) -> list[str]:
    """Files in `out` that the growth that wrote it did not write, or that changed since."""
    present = set(_files(out))
    if RECORD not in present:
        return sorted(present) or [path.name for path in sorted(out.iterdir())]
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except ValueError:
        return [f"an unreadable {RECORD}"]
    foreign = sorted(present - set(record.get("files", [])) - {RECORD})
    weights = out / _WEIGHTS
    if weights.is_file() and _digest(weights) != record.get("weights_sha256"):
        foreign.append(f"a changed {_WEIGHTS}")
    return foreign


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _is_weights(path: Path) -> bool:
    return path.suffix in _WEIGHT_SUFFIXES


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
