"""Growing a Hugging Face folder: one of the five homes in, a larger one of the same class out.

`plan_folder` checks everything without reading a weight; `grow_folder` grows, writes into a
temporary folder beside the target, loads that with transformers, compares its outputs with the
old model's, and only then renames it. What the file lacks is not invented, and what it holds
besides the encoder and BERT's heads is refused, so that nothing is lost in silence.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from stacking.config import BertConfig
from stacking.errors import CheckpointError, ConfigError, GrowthError, UserError
from stacking.growth.plan import GrowthPlan, Operators, growth_faults, plan_growth
from stacking.growth.target import (
    GROWABLE,
    folder_changes,
    resolve_target,
    unknown_size_faults,
)
from stacking.hf import load_transformers, our_config, read_home
from stacking.hf_folder import (
    FolderWeights,
    architecture_of,
    has_pooler,
    read_folder,
    stored_dtype,
    to_ours,
    to_theirs,
)
from stacking.hf_homes import ROBERTA_PRE, Home, Weights
from stacking.hf_probe import largest_changes, probe_batches
from stacking.hf_side_files import copy_side_files, out_faults, replace_folder, write_record

_INDEPENDENT = ("num_hidden_layers", "intermediate_size", "max_position_embeddings")
"""Sizes that are right or wrong whatever the hidden size is."""


@dataclass(frozen=True)
class FolderPlan:
    """A growth that is legal as far as the configurations tell; no weight was read yet.

    Attributes:
        model: the folder to grow.
        out: the folder to write.
        home: the architecture of both.
        architecture: the class that config.json names; None: it names none.
        source: the old model's sizes.
        target: the new ones.
        operators: how each dimension grows.
        notes: what was decided on the way.
    """

    model: Path
    out: Path
    home: Home
    architecture: str | None
    source: BertConfig
    target: BertConfig
    operators: Operators
    notes: tuple[str, ...]

    @property
    def growth(self) -> GrowthPlan:
        """The moves and their promise."""
        return plan_growth(self.source, self.target, self.operators)

    def text(self) -> str:
        """What people read before it starts."""
        tolerance = self.growth.tolerance()
        contract = (
            "outputs may change; the change is measured"
            if tolerance is None
            else f"outputs stay within {tolerance:.0e} of the largest, or nothing is written"
        )
        lines = [
            f"model:    {_sizes(self.source)} ({self.architecture or self.home.model_type})",
            f"grown:    {_sizes(self.target)}",
            f"plan:     {self.growth.name}",
            *(f"note:     {note}" for note in self.notes),
            f"contract: {contract}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class GrowthReport:
    """What was written, and how far its outputs are from the old model's.

    Attributes:
        folder: the new folder.
        architecture: the class that loads it.
        plan: the operators.
        tolerance: the promise on `changes`; None: the function may change.
        changes: of each output, the largest difference over the largest value, in fp32. A hidden
            vector is compared copy by copy.
        dtype: of the weights in the file.
        rounding_changes: the same with weights rounded to `dtype`; empty in fp32.
        num_parameters: numbers in the file, before and after.
        notes: what else the reader should know.
    """

    folder: Path
    architecture: str
    plan: str
    tolerance: float | None
    changes: dict[str, float]
    dtype: str
    rounding_changes: dict[str, float]
    num_parameters: tuple[int, int]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"folder": str(self.folder)}

    def text(self) -> str:
        """What people read at the end."""
        before, after = self.num_parameters
        lines = [f"measured: {_changes_text(self.changes)}"]
        if self.rounding_changes:
            lines.append(f"stored:   {self.dtype}: {_changes_text(self.rounding_changes)}")
        lines += [f"note:     {note}" for note in self.notes]
        lines.append(
            f"{self.folder}: {self.architecture}, {before / 1e6:,.1f} -> {after / 1e6:,.1f} M "
            f"parameters, {self.dtype}"
        )
        return "\n".join(lines)


def plan_folder(
    model: Path,
    target: BertConfig | Mapping[str, object],
    operators: Operators,
    out: Path,
) -> FolderPlan:
    """Check the whole request; ConfigError with every fault that can be told from here."""
    faults = out_faults(out, model)
    try:
        home, fields = read_home(model)
        architecture = architecture_of(model, home)
    except UserError as error:
        # Without a model, what else is wrong can still be said of the names alone.
        faults = _lines_of(error) + faults
        faults += [] if isinstance(target, BertConfig) else unknown_size_faults(target)
        raise ConfigError(faults + operators.faults()) from error
    source = our_config(fields, home, has_nsp=False)
    grown, notes, size_faults = _checked_sizes(source, target, operators)
    if faults + size_faults:
        raise ConfigError(faults + size_faults)
    if grown.max_position_embeddings != source.max_position_embeddings:
        notes.append("the tokenizer's model_max_length stays: raise it to use longer inputs")
    return FolderPlan(model, out, home, architecture, source, grown, operators, tuple(notes))


def _checked_sizes(
    source: BertConfig, target: BertConfig | Mapping[str, object], operators: Operators
) -> tuple[BertConfig, list[str], list[str]]:
    """(configuration to grow to, notes, faults): what is wrong does not hide what else is."""
    changes = folder_changes(source, target)
    faults = unknown_size_faults(changes) + operators.faults()
    changes = {name: value for name, value in changes.items() if name in GROWABLE}
    usable = replace(Operators(), **{
        dimension: name for dimension, name in asdict(operators).items()
        if not any(fault.startswith(f"{dimension}:") for fault in faults)
    })  # fmt: skip
    grown, notes = source, list[str]()
    try:
        grown, notes = resolve_target(source, changes)
    except ConfigError as error:
        faults += error.faults
        apart = {key: changes[key] for key in _INDEPENDENT if key in changes}
        with suppress(ConfigError):
            grown, notes = resolve_target(source, apart)
    faults += growth_faults(source, grown, usable)
    is_shorter = grown.max_position_embeddings < source.max_position_embeddings
    if is_shorter and source.position != "learned":
        faults.append(
            f"max_position_embeddings: got {grown.max_position_embeddings} after "
            f"{source.max_position_embeddings}; allowed: at least as many"
        )
    if not faults and grown == source:
        faults = ["nothing grows: the model has these sizes already; give a larger one"]
    return grown, notes, faults


def grow_path(
    model: Path,
    target: BertConfig | Mapping[str, object],
    operators: Mapping[str, str],
    out: str | Path | None,
    seed: int,
) -> GrowthReport:
    """Plan and grow in one: the part of `stacking.grow` that needs transformers."""
    if out is None:
        raise ConfigError(f"out: missing; give the folder to write what {model} becomes")
    return grow_folder(plan_folder(model, target, Operators(**operators), Path(out)), seed)


def grow_folder(plan: FolderPlan, seed: int = 0) -> GrowthReport:
    """Grow, measure, and write `plan.out`; GrowthError, and nothing written, if a promise breaks.

    At no moment is there a half-written `plan.out`, whatever interrupts.
    """
    partial = plan.out.with_name(plan.out.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        report = _grow_into(partial, plan, seed)
        write_record(partial, report.as_dict())
        replace_folder(plan.out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _grow_into(partial: Path, plan: FolderPlan, seed: int) -> GrowthReport:
    """Write the whole folder at `partial` and hold it to the promise."""
    theirs = read_folder(plan.model, plan.home, plan.architecture)
    weights = theirs.weights()
    form: dict[str, object] = {"num_nsp_labels": 2 if has_pooler(weights, plan.home) else 0}
    if theirs.prefix:  # the encoder alone: no decoder to untie
        form["tie_word_embeddings"] = True
    source, target = (config.model_copy(update=form) for config in (plan.source, plan.target))
    growth = plan_growth(source, target, plan.operators)
    state = growth.grow(to_ours(weights, source, plan.home), seed=seed)
    grown, lost = to_theirs(state, growth, plan.home, weights)
    dtype = stored_dtype(plan.model)
    stored = {name.removeprefix(theirs.prefix): tensor.to(dtype) for name, tensor in grown.items()}
    save_file(stored, partial / "model.safetensors", metadata={"format": "pt"})
    _write_config(partial, plan)
    notes = copy_side_files(plan.model, partial, source.hidden_size, target.hidden_size)
    changes, rounding = _measure(partial, plan, theirs, grown, dtype)
    tolerance = growth.tolerance()
    if tolerance is not None and not all(change <= tolerance for change in changes.values()):
        raise GrowthError(
            f"{growth.name} promised outputs within {tolerance:.0e} of the largest, measured: "
            f"{_changes_text(changes)}; {plan.out} is untouched"
        )
    return GrowthReport(
        plan.out,
        type(theirs.model).__name__ if plan.architecture is None else plan.architecture,
        growth.name,
        tolerance,
        changes,
        str(dtype).removeprefix("torch."),
        rounding,
        (theirs.count(weights), theirs.count(grown)),
        (*lost, *notes),
    )


def _measure(
    partial: Path, plan: FolderPlan, theirs: FolderWeights, grown: Weights, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, float]]:
    """(changes of the outputs in fp32, changes of what was stored; {} where that is fp32)."""
    model, missing, unexpected = load_transformers(partial, theirs.auto)
    state = model.state_dict()
    fp32 = {name.removeprefix(theirs.prefix): tensor for name, tensor in grown.items()}
    wrong = [name for name, tensor in fp32.items()
             if not torch.equal(state[name], tensor.to(dtype).float())]  # fmt: skip
    if wrong or unexpected or missing - theirs.missing:
        names = sorted({*wrong, *unexpected, *(missing - theirs.missing)})
        raise CheckpointError(f"{plan.out}: transformers read back otherwise {names[:3]}")
    batches = probe_batches(plan.model, plan.source)
    before = theirs.model
    stored = largest_changes(before, model, batches, theirs.missing)
    if dtype == torch.float32:
        return stored, {}
    model.load_state_dict(fp32, strict=False)
    return largest_changes(before, model, batches, theirs.missing), stored


def _write_config(partial: Path, plan: FolderPlan) -> None:
    """config.json of the old model with the sizes that changed; all other keys as they are."""
    fields = json.loads((plan.model / "config.json").read_text(encoding="utf-8"))
    for name in folder_changes(plan.source, plan.target):
        fields[name] = getattr(plan.target, name)
    if plan.home is ROBERTA_PRE:  # it counts positions from behind the padding id
        offset = plan.target.pad_token_id + 1
        fields["max_position_embeddings"] = plan.target.max_position_embeddings + offset
    if fields.get("embedding_size") is not None:
        fields["embedding_size"] = plan.target.hidden_size
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")


def _lines_of(error: UserError) -> list[str]:
    return error.faults if isinstance(error, ConfigError) else [str(error)]


def _sizes(config: BertConfig) -> str:
    heads = config.num_attention_heads
    return (
        f"{config.num_hidden_layers} layers x {config.hidden_size}, {heads} heads of "
        f"{config.hidden_size // heads}, inner {config.intermediate_size:,}, "
        f"{config.max_position_embeddings} positions"
    )


def _changes_text(changes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {change:.1e}" for name, change in changes.items())
