"""A DeepSpeed JSON document in; the document with typed settings out, or all its faults at once."""

import copy
from collections.abc import Iterator, Set
from dataclasses import dataclass

from pydantic import ValidationError

from stacking.config_faults import fault_lines, show
from stacking.config_loading import JsonObject
from stacking.deepspeed_schema import OWNED_BY_RECIPE, REFUSED, REMOVED, EngineSettings
from stacking.errors import ConfigError

_AUTO = "auto"
_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_ADAM_PARAMS = {"adam_w_mode", "torch_adam", "fused"}
_PARAMS_OF = {
    "Adam": _ADAM_PARAMS,
    "AdamW": _ADAM_PARAMS,
    "Lamb": {"adam_w_mode", "max_coeff", "min_coeff"},
    "Muon": _ADAM_PARAMS | {"ns_method"},
}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """A DeepSpeed JSON that passed every check that needs no recipe and no device."""

    source: str  # file name, for messages
    document: JsonObject  # as written, without "auto"
    settings: EngineSettings


def check_document(document: JsonObject, *, source: str, prefix: str) -> DeepSpeedConfig:
    """Check a whole document; `prefix` is put before each path. ConfigError lists every fault."""
    document = copy.deepcopy(document)
    faults = _take_out_named_keys(document)
    if document.get(_MICRO_BATCH) == _AUTO:
        del document[_MICRO_BATCH]
    autos = list(_take_out_autos(document, _unknown(document)))
    faults += [
        f'{path}: got "auto"; allowed: a value, or absent for the default; only '
        f"{_MICRO_BATCH} and keys of the recipe may be auto"
        for path in autos
    ]
    try:
        settings = EngineSettings.model_validate(document)
    except ValidationError as error:
        faults = [prefix + fault for fault in faults]
        faults += fault_lines(error, EngineSettings, prefix, also_known=tuple(OWNED_BY_RECIPE))
        raise ConfigError(faults) from None
    if not autos:  # without their values the checks below would report what is not so
        faults += _faults_between(settings)
    if faults:
        raise ConfigError([prefix + fault for fault in faults])
    return DeepSpeedConfig(source, document, settings)


def _take_out_named_keys(document: JsonObject) -> list[str]:
    """Remove keys that are the recipe's, gone from DeepSpeed or refused; their faults."""
    faults = []
    for path, home in OWNED_BY_RECIPE.items():
        for value in _take_out(document, path):
            if value != _AUTO:
                faults.append(
                    f"{path}: got {show(value)}; belongs in the recipe: {home}; "
                    'allowed here: absent or "auto"'
                )
    for path, hint in REMOVED.items():
        for _ in _take_out(document, path):
            faults.append(
                f"{path}: removed from DeepSpeed 0.19.8, which stops at it even when it is "
                f"disabled; allowed: absent; {hint}"
            )
    for path, reason in REFUSED.items():
        for _ in _take_out(document, path):
            faults.append(f"{path}: not supported; allowed: absent; {reason}")
    return faults


def _take_out(document: JsonObject, path: str) -> Iterator[object]:
    """Remove the value at a dotted path and yield it, if it is there."""
    *parents, key = path.split(".")
    node: object = document
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if isinstance(node, dict) and key in node:
        yield node.pop(key)


def _unknown(document: JsonObject) -> set[str]:
    """Paths of keys that nobody knows, whatever their values."""
    try:
        EngineSettings.model_validate(document)
    except ValidationError as error:
        faults = [item for item in error.errors() if item["type"] == "extra_forbidden"]
        return {".".join(map(str, item["loc"])) for item in faults}
    return set()


def _take_out_autos(node: JsonObject, unknown: Set[str], prefix: str = "") -> Iterator[str]:
    """Remove every remaining "auto" of a known key and yield its path."""
    for key, value in list(node.items()):
        if value == _AUTO and prefix + key not in unknown:
            del node[key]
            yield prefix + key
        elif isinstance(value, dict):
            yield from _take_out_autos(value, unknown, f"{prefix}{key}.")


def _faults_between(settings: EngineSettings) -> list[str]:
    return [
        *_precision_faults(settings),
        *_gradient_faults(settings),
        *_zeropp_faults(settings),
        *_offload_faults(settings),
        *_optimizer_faults(settings),
        *_compile_faults(settings),
        *_lamb_faults(settings),
        *_muon_faults(settings),
    ]


def _precision_faults(settings: EngineSettings) -> list[str]:
    names = ("fp16", "bf16", "torch_autocast")
    enabled = [name for name in names if getattr(settings, name).enabled]
    faults = []
    if len(enabled) > 1:
        faults.append(
            f"{enabled[1]}.enabled: got true, and {' and '.join(enabled[:1] + enabled[2:])} too; "
            f"allowed: one of {', '.join(names)}"
        )
    if settings.zero_optimization.stage == 0 and enabled and enabled != ["torch_autocast"]:
        faults.append(
            f"zero_optimization.stage: got 0 with {enabled[0]}; allowed: 1, 2 or 3, because at "
            "stage 0 DeepSpeed makes an optimizer step on zero gradients whenever an engine is "
            "built, so at each growth; use stage 1, also on one rank"
        )
    return faults


def _gradient_faults(settings: EngineSettings) -> list[str]:
    """Combinations at which DeepSpeed stops with a bare assertion."""
    zero = settings.zero_optimization
    faults = []
    if zero.stage >= 2 and zero.reduce_scatter:
        why = f"at ZeRO stage {zero.stage} with reduce_scatter"
        if settings.prescale_gradients:
            faults.append(f"prescale_gradients: got true {why}; allowed: false")
        if settings.gradient_predivide_factor != 1:
            got = settings.gradient_predivide_factor
            faults.append(f"gradient_predivide_factor: got {got} {why}; allowed: 1.0")
    if zero.stage in (1, 2) and zero.round_robin_gradients:
        faults.append(
            "zero_optimization.round_robin_gradients: got true; allowed: false, because DeepSpeed "
            "0.19.8 then reads and writes other parameters' masters than it is asked for, so "
            "that checkpoints and switches would be wrong"
        )
    accumulation = settings.data_types.grad_accum_dtype
    if zero.stage == 0 and accumulation != "fp32":
        faults.append(
            f"data_types.grad_accum_dtype: got '{accumulation}' at ZeRO stage 0; allowed: 'fp32', "
            "or stages 1 to 3"
        )
    return faults


def _zeropp_faults(settings: EngineSettings) -> list[str]:
    """ZeRO++ where DeepSpeed would ignore it, or stop with a bare assertion."""
    zero = settings.zero_optimization
    plain = {
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
    }
    faults = [
        f"zero_optimization.{name}: got {show(getattr(zero, name))} at ZeRO stage {zero.stage}; "
        f"allowed: {show(value)}, or stage 3, which alone has it"
        for name, value in plain.items()
        if zero.stage != 3 and getattr(zero, name) != value
    ]
    if zero.stage == 3 and zero.zero_quantized_gradients and not zero.reduce_scatter:
        faults.append(
            "zero_optimization.zero_quantized_gradients: got true with reduce_scatter false; "
            "allowed: reduce_scatter true"
        )
    return faults


def _offload_faults(settings: EngineSettings) -> list[str]:
    zero = settings.zero_optimization
    faults = []
    if zero.offload_optimizer.device == "cpu":
        if zero.stage == 0:
            faults.append(
                "zero_optimization.offload_optimizer: got device 'cpu' at stage 0; "
                "allowed: stages 1 to 3"
            )
        if settings.optimizer.params.torch_adam and settings.zero_force_ds_cpu_optimizer:
            faults.append(
                "optimizer.params.torch_adam: got true with offload_optimizer; allowed: false, for "
                "DeepSpeed's own CPU Adam, or zero_force_ds_cpu_optimizer false"
            )
    if zero.offload_param.device == "cpu" and zero.stage != 3:
        faults.append(
            f"zero_optimization.offload_param: got device 'cpu' at stage {zero.stage}; "
            "allowed: stage 3"
        )
    if zero.offload_optimizer.ratio < 1 and zero.stage != 3:
        faults.append(
            f"zero_optimization.offload_optimizer.ratio: got {zero.offload_optimizer.ratio} at "
            f"stage {zero.stage}; allowed: 1.0, or stage 3"
        )
    return faults


def _optimizer_faults(settings: EngineSettings) -> list[str]:
    """Parameters that the chosen implementation does not take."""
    optimizer = settings.optimizer
    given = optimizer.params.model_fields_set
    wrong = given - _PARAMS_OF[optimizer.type]
    if not optimizer.params.torch_adam:
        wrong |= given & {"fused"}
    if settings.apex.fused_lamb:
        wrong |= given & {"max_coeff", "min_coeff"}
    faults = []
    for name in sorted(wrong):
        condition = ""
        if name in _PARAMS_OF[optimizer.type]:
            condition = " without torch_adam" if name == "fused" else " with apex.fused_lamb"
        faults.append(
            f"optimizer.params.{name}: not a parameter of {optimizer.type}{condition}; "
            "allowed: absent"
        )
    return faults


def _compile_faults(settings: EngineSettings) -> list[str]:
    if settings.zero_optimization.stage < 3 or not settings.compile.enabled:
        return []
    return [
        "compile.enabled: got true at ZeRO stage 3; allowed: stage 0, 1 or 2, because stage 3 "
        "takes parameters away between modules, which a compiled backward pass still reads"
    ]


def _lamb_faults(settings: EngineSettings) -> list[str]:
    """LAMB where it would not be LAMB."""
    stage, faults = settings.zero_optimization.stage, []
    if settings.optimizer.type == "Lamb" and stage > 0:
        faults.append(
            f"optimizer.type: got 'Lamb' at ZeRO stage {stage}; allowed: stage 0, because ZeRO "
            "hands the optimizer one flat vector and LAMB's ratio of each matrix is lost; or AdamW"
        )
    if settings.apex.fused_lamb and settings.optimizer.type != "Lamb":
        faults.append(
            f"apex.fused_lamb: got true with optimizer.type '{settings.optimizer.type}'; "
            "allowed: false, or type 'Lamb'"
        )
    return faults


def _muon_faults(settings: EngineSettings) -> list[str]:
    """What stops Muon inside DeepSpeed, or keeps its state where no snapshot finds it."""
    zero = settings.zero_optimization
    if settings.optimizer.type != "Muon":
        return []
    faults = [
        f"zero_optimization.{name}: got device 'cpu' with optimizer.type 'Muon'; allowed: 'none', "
        "because its update needs whole matrices on the device; or AdamW"
        for name in ("offload_optimizer", "offload_param")
        if getattr(zero, name).device == "cpu"
    ]
    if zero.stage == 3:
        faults += [
            f"zero_optimization.{name}: got true with optimizer.type 'Muon' at stage 3, where it "
            "needs whole gradients; allowed: false or absent"
            for name in ("reduce_scatter", "zero_quantized_gradients")
            if name in zero.model_fields_set and getattr(zero, name)
        ]
    if settings.compile.enabled and settings.activation_checkpointing.enabled:
        faults.append(
            "compile.enabled: got true with activation_checkpointing and optimizer.type 'Muon'; "
            "allowed: two of the three, because Muon keeps torch from compiling while the "
            "backward pass computes layers again"
        )
    return faults
