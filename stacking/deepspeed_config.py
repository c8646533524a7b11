"""The DeepSpeed JSON in, checked; with a recipe and an accelerator: what `initialize` gets, out.

Layer 1: pure functions, DeepSpeed is never imported.
"""

import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from stacking.config import Recipe
from stacking.config_loading import JsonObject, merge, read_json_object
from stacking.deepspeed_checks import DeepSpeedConfig, check_document
from stacking.deepspeed_optimizer import (
    Accelerator,
    ClientOptimizer,
    client_optimizer,
    optimizer_faults,
    optimizer_notes,
    write_optimizer,
)
from stacking.deepspeed_schema import Compile, EngineSettings
from stacking.errors import ConfigError

__all__ = [
    "Accelerator",
    "ClientOptimizer",
    "DeepSpeedConfig",
    "Precision",
    "ResolvedEngine",
    "asked_precision",
    "default_config_path",
    "load_deepspeed_config",
    "place_monitors",
    "resolve",
    "resolve_stages",
    "resolved_precision",
]

Precision = Literal["fp32", "fp16", "bf16", "bf16_autocast"]

DEFAULT_CONFIG = "fp16_fused_adam.json"
_LARGEST_LISTED_MICRO_BATCH = 1024  # sequences; in messages
_LARGEST_DEFAULT_MICRO_BATCH = 32  # sequences; fits BERT-Base at 128 tokens on any recent GPU


@dataclass(frozen=True)
class ResolvedEngine:
    """One stage's engine with every number concrete."""

    deepspeed: JsonObject  # for deepspeed.initialize
    precision: Precision
    zero_stage: int
    micro_batch_size: int  # sequences per rank in one forward
    gradient_accumulation_steps: int
    log_every: int  # optimizer steps between lines of metrics
    apex_layer_norm: bool
    checkpoint_interval: int = 0  # every so many layers that train are recomputed; 0: none
    compile: Compile | None = None  # how the layers are compiled; None: not
    unpads: bool = True  # leaves padding out, where the layers are not compiled
    notices: tuple[str, ...] = ()  # what differs from the JSON, one line each, for everybody
    debug_notices: tuple[str, ...] = ()  # differences that change no number
    client_optimizer: ClientOptimizer | None = None  # None: DeepSpeed makes it from the JSON

    @property
    def adds_up_fp32(self) -> bool:
        """Whether the JSON has gradients added up in fp32."""
        types = self.deepspeed.get("data_types")
        return isinstance(types, dict) and types.get("grad_accum_dtype") == "fp32"


def default_config_path() -> Path:
    """The default JSON of this checkout or installation; ConfigError if it is not there."""
    path = Path(__file__).resolve().parents[1] / "deepspeed_configs" / DEFAULT_CONFIG
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a DeepSpeed JSON with --deepspeed_config")
    return path


def load_deepspeed_config(path: Path | str | None = None) -> DeepSpeedConfig:
    """Read and check a DeepSpeed JSON (None: the default); ConfigError lists every fault."""
    path = default_config_path() if path is None else Path(path)
    document = read_json_object(path)
    return check_document(document, source=path.name, prefix=f"{path.name}: ")


def resolve(
    config: DeepSpeedConfig,
    recipe: Recipe,
    *,
    world_size: int,
    accelerator: Accelerator,
    strict_precision: bool,
    stage: int,
) -> ResolvedEngine:
    """What stage `stage` (0-based) runs with here; ConfigError lists every fault.

    The global batch is the recipe's on any hardware: accumulation = global / (micro * ranks).
    """
    config = _for_stage(config, recipe, stage)
    settings = config.settings
    precision, notices, faults = _fit_precision(settings, accelerator, strict_precision)
    micro, batch_faults = _micro_batch(settings, recipe.global_batch_size, world_size)
    faults += batch_faults + _device_faults(settings, accelerator)
    faults += _sharing_faults(settings, world_size)
    faults += optimizer_faults(settings, recipe, accelerator)
    if faults:
        raise ConfigError([f"{config.source}: {fault}" for fault in faults])
    document = _with_precision(config, precision)
    notices += _fit_to_cpu(document, settings) if accelerator.kind == "cpu" else []
    notices += write_optimizer(document, recipe, settings, accelerator)
    accumulation = recipe.global_batch_size // (micro * world_size)
    document |= {
        "train_batch_size": recipe.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
    }
    return ResolvedEngine(
        deepspeed=document,
        precision=precision,
        zero_stage=settings.zero_optimization.stage,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        log_every=settings.steps_per_print,
        apex_layer_norm=settings.apex.fused_layer_norm and accelerator.kind == "cuda",
        checkpoint_interval=_checkpoint_interval(settings),
        unpads=settings.unpadding.enabled,
        compile=settings.compile if settings.compile.enabled else None,
        notices=tuple(notices),
        debug_notices=optimizer_notes(settings, accelerator),
        client_optimizer=client_optimizer(recipe, settings, accelerator),
    )


def resolve_stages(
    config: DeepSpeedConfig,
    recipe: Recipe,
    *,
    world_size: int,
    accelerator: Accelerator,
    strict_precision: bool,
) -> list[ResolvedEngine]:
    """Every stage's engine; the faults of all stages are in one ConfigError, each once."""
    resolved, faults = [], _history_faults(config, recipe)
    for stage in range(len(recipe.stages)):
        try:
            engine = resolve(
                config,
                recipe,
                world_size=world_size,
                accelerator=accelerator,
                strict_precision=strict_precision,
                stage=stage,
            )
        except ConfigError as error:
            faults += error.faults
        else:
            resolved.append(engine)
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return resolved


def place_monitors(resolved: ResolvedEngine, run_dir: Path) -> ResolvedEngine:
    """Send monitors without an output_path to RUN_DIR/<name>; DeepSpeed's default is the home.

    Raises ConfigError for a monitor whose package is not installed.
    """
    document = dict(resolved.deepspeed)
    wandb = document.get("wandb")
    if isinstance(wandb, dict) and wandb.get("enabled") and find_spec("wandb") is None:
        raise ConfigError("wandb.enabled: the package is not installed; pip install wandb")
    for name in ("tensorboard", "csv_monitor"):
        block = document.get(name)
        if isinstance(block, dict) and block.get("enabled"):
            places = {"output_path": str(run_dir), "job_name": name}
            document[name] = places | {k: v for k, v in block.items() if v != ""}
    return replace(resolved, deepspeed=document)


def asked_precision(settings: EngineSettings) -> Precision:
    """The precision that the JSON asks for, whatever the device can do."""
    if settings.fp16.enabled:
        return "fp16"
    if settings.bf16.enabled:
        return "bf16"
    return "bf16_autocast" if settings.torch_autocast.enabled else "fp32"


def resolved_precision(document: JsonObject) -> Precision:
    """The precision of an engine that got `document`, ResolvedEngine's `deepspeed`."""

    def asks(name: str) -> bool:
        block = document.get(name)
        return isinstance(block, dict) and bool(block.get("enabled"))

    if asks("fp16"):
        return "fp16"
    if asks("bf16"):
        return "bf16"
    return "bf16_autocast" if asks("torch_autocast") else "fp32"


def _checkpoint_interval(settings: EngineSettings) -> int:
    block = settings.activation_checkpointing
    return block.interval if block.enabled else 0


def _for_stage(config: DeepSpeedConfig, recipe: Recipe, stage: int) -> DeepSpeedConfig:
    override = recipe.stages[stage].deepspeed
    if not override:
        return config
    merged = merge(config.document, override)
    return check_document(merged, source=config.source, prefix=f"stages.{stage}.deepspeed.")


def _fit_precision(
    settings: EngineSettings, accelerator: Accelerator, strict: bool
) -> tuple[Precision, list[str], list[str]]:
    """Precision to run in, notices, faults. Only a CPU may run another one than was asked.

    fp16 never runs on a CPU, even where DeepSpeed takes it: bf16 is more than twice as fast there,
    and torch's LayerNorm keeps its statistics in 16 bits, where those of a constant row (padding
    without positions) are infinite.
    """
    asked = asked_precision(settings)
    supported = {
        "fp32": True,
        "fp16": accelerator.supports_fp16 and accelerator.kind == "cuda",
        "bf16": accelerator.supports_bf16,
        "bf16_autocast": accelerator.supports_bf16,
    }
    if supported[asked]:
        return asked, [], []
    kind = asked[:4]
    if accelerator.kind == "cuda":
        other = "bf16" if kind == "fp16" else "fp16"
        return asked, [], [f"{asked}: this GPU has no {kind} arithmetic; allowed: {other} or fp32"]
    instead: Precision = "bf16" if accelerator.supports_bf16 else "fp32"
    lack = "which is for GPUs" if kind == "fp16" else "which this CPU has no arithmetic for"
    if strict:
        hint = f"--strict-precision refuses another; allowed here: {instead}"
        return asked, [], [f"{asked}, {lack}: {hint}"]
    notice = f"{kind} asked, {lack}: running {instead}; --strict-precision refuses instead"
    return instead, [notice], []


def _micro_batch(
    settings: EngineSettings, global_batch: int, world_size: int
) -> tuple[int, list[str]]:
    """Sequences per rank in one forward, and faults."""
    asked = settings.train_micro_batch_size_per_gpu
    if global_batch % world_size:
        worlds = _names(_divisors(global_batch, 2 * world_size))
        below = global_batch // world_size * world_size
        batches = [n for n in (below, below + world_size) if n]
        return 1, [
            f"the recipe's global_batch_size {global_batch} cannot be shared equally by a world of "
            f"{world_size} ranks; allowed: {worlds} ranks, or global_batch_size {_names(batches)}"
        ]
    share = global_batch // world_size
    if asked is None:
        return _divisors(share, _LARGEST_DEFAULT_MICRO_BATCH)[-1], []
    if share % asked:
        return 1, [
            f"train_micro_batch_size_per_gpu: got {asked}, but global_batch_size {global_batch} "
            f"over a world of {world_size} ranks is {share} sequences each; "
            f"allowed: {_names(_divisors(share, _LARGEST_LISTED_MICRO_BATCH))}"
        ]
    return asked, []


def _divisors(number: int, largest: int) -> list[int]:
    return [n for n in range(1, min(number, largest) + 1) if number % n == 0]


def _names(numbers: list[int]) -> str:
    return " or ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])]).removeprefix(" or ")


def _device_faults(settings: EngineSettings, accelerator: Accelerator) -> list[str]:
    if accelerator.kind == "cuda":
        return []
    return [
        f"zero_optimization.{name}: got true, which needs CUDA kernels; allowed: false"
        for name in ("zero_quantized_weights", "zero_quantized_gradients")
        if getattr(settings.zero_optimization, name)
    ]


def _sharing_faults(settings: EngineSettings, world_size: int) -> list[str]:
    """Ranks that DeepSpeed cannot divide into equal groups; fewer ranks are one group."""
    size = settings.zero_optimization.zero_hpz_partition_size
    if world_size % min(size, world_size) == 0:
        return []
    return [
        f"zero_optimization.zero_hpz_partition_size: got {size} with a world of {world_size} "
        f"ranks; allowed: {_names(_divisors(world_size, world_size))}, best the ranks of one node"
    ]


def _history_faults(config: DeepSpeedConfig, recipe: Recipe) -> list[str]:
    """Muon's history is of no use to Adam, nor Adam's to Muon."""
    faults, before = [], None
    for index, stage in enumerate(recipe.stages):
        try:
            settings = _for_stage(config, recipe, index).settings
        except ConfigError:  # reported with the stage
            return []
        is_muon = settings.optimizer.type == "Muon"
        if before is not None and is_muon != before and stage.moments != "reset":
            faults.append(
                f"stages.{index}.moments: got '{stage.moments}' where optimizer.type becomes "
                f"'{settings.optimizer.type}', which cannot go on with the history of another "
                "kind; allowed: 'reset', or one kind in all stages"
            )
        before = is_muon
    return faults


def _with_precision(config: DeepSpeedConfig, given: Precision) -> JsonObject:
    """A copy for DeepSpeed, with the asked 16-bit type replaced where this device runs another."""
    document = copy.deepcopy(config.document)
    for ours in ("apex", "activation_checkpointing", "compile", "unpadding"):
        document.pop(ours, None)  # not DeepSpeed's
    settings = config.settings
    if settings.optimizer.type == "Muon" and settings.zero_optimization.stage == 3:
        zero = document.get("zero_optimization")
        assert isinstance(zero, dict)
        zero["reduce_scatter"] = False  # DeepSpeed refuses both together
    asked = asked_precision(config.settings)
    if asked == given:
        return document
    for name in ("fp16", "bf16", "torch_autocast"):
        document.pop(name, None)
    if given == "bf16":
        document["bf16"] = {"enabled": True}
    if document.get("communication_data_type") == asked:
        document["communication_data_type"] = given
    if document.get("data_types") == {"grad_accum_dtype": asked}:
        document["data_types"] = {"grad_accum_dtype": given}
    if given == "bf16" and settings.zero_optimization.stage == 1:
        # As in cpu_bf16.json: another optimizer of DeepSpeed's, and the fastest on a CPU.
        document.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return document


def _fit_to_cpu(document: JsonObject, settings: EngineSettings) -> list[str]:
    """Drop what only moves work off a GPU, so that the same JSON runs here; one notice each."""
    notices = []
    zero = document.get("zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero, dict) and getattr(settings.zero_optimization, name).device == "cpu":
            del zero[name]
            notices.append(f"{name} to the cpu asked, everything is on the CPU here: dropped")
    if settings.apex.fused_layer_norm:
        notices.append("apex.fused_layer_norm asked, there is no GPU here: torch's LayerNorm runs")
    return notices
