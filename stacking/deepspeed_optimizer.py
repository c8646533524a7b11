"""Which optimizer a recipe's numbers and a DeepSpeed JSON's choice make together."""

from dataclasses import dataclass
from typing import Literal

from stacking.config import Recipe
from stacking.config_loading import JsonObject
from stacking.deepspeed_schema import EngineSettings

_NO_LAMB = (
    "optimizer.type: got 'Lamb', whose kernel DeepSpeed cannot build here (no nvcc); allowed: "
    "AdamW or Muon, a CUDA toolkit, or apex.fused_lamb true where NVIDIA's apex is installed"
)


@dataclass(frozen=True)
class Accelerator:
    """What this machine's device can do."""

    kind: Literal["cpu", "cuda"]
    supports_fp16: bool
    supports_bf16: bool
    fused_adam: bool  # whether DeepSpeed's own FusedAdam kernel can be built here
    fused_lamb: bool = False  # likewise its FusedLamb


@dataclass(frozen=True)
class ClientOptimizer:
    """An optimizer that the trainer makes itself and hands to DeepSpeed."""

    kind: Literal["muon", "apex_lamb"]
    numbers: JsonObject  # as its constructor takes them; of Muon also those of its Adam
    torch_adam: bool = True  # Muon: whether torch's AdamW updates what Muon does not
    fused: bool = True  # of torch's AdamW


def optimizer_faults(
    settings: EngineSettings, recipe: Recipe, accelerator: Accelerator
) -> list[str]:
    """Why the chosen optimizer cannot run on this device, or not with the recipe's numbers."""
    faults = _clipping_faults(settings, recipe)
    if settings.optimizer.type != "Lamb":
        return faults
    if accelerator.kind == "cpu":
        faults.append("optimizer.type: got 'Lamb', which is for GPUs only; allowed: AdamW or Muon")
    elif not settings.apex.fused_lamb and not accelerator.fused_lamb:
        faults.append(_NO_LAMB)
    return faults


def write_optimizer(
    document: JsonObject, recipe: Recipe, settings: EngineSettings, accelerator: Accelerator
) -> list[str]:
    """The recipe's optimizer numbers in the JSON's implementation; notices."""
    document["gradient_clipping"] = recipe.optimizer.max_grad_norm
    document.pop("optimizer", None)
    params, is_torch = settings.optimizer.params, _runs_torch_adam(settings, accelerator)
    numbers = _numbers(recipe) | {"weight_decay": recipe.optimizer.weight_decay}
    if settings.optimizer.type == "Lamb":
        if not settings.apex.fused_lamb:  # which is a client optimizer, as Muon is
            numbers |= {"max_coeff": params.max_coeff, "min_coeff": params.min_coeff}
            document["optimizer"] = {"type": "Lamb", "params": numbers}
        return []
    if settings.optimizer.type != "Muon":
        numbers |= {"torch_adam": True, "fused": params.fused} if is_torch else {}
        # DeepSpeed's "Adam" decays as AdamW too unless told otherwise: named for what it is.
        document["optimizer"] = {"type": "AdamW", "params": numbers}
    if accelerator.kind == "cuda" and is_torch and not params.torch_adam:
        return ["FusedAdam cannot be built here (no nvcc): torch's fused AdamW runs"]
    return []


def client_optimizer(
    recipe: Recipe, settings: EngineSettings, accelerator: Accelerator
) -> ClientOptimizer | None:
    """What DeepSpeed does not make as it is needed here; weight decay is that of the groups."""
    params = settings.optimizer.params
    if settings.optimizer.type == "Muon":
        momentum: JsonObject = {"momentum": recipe.optimizer.muon_momentum}
        numbers = _numbers(recipe) | momentum | {"ns_method": params.ns_method}
        torch_adam = _runs_torch_adam(settings, accelerator)
        return ClientOptimizer("muon", numbers, torch_adam, params.fused)
    if settings.apex.fused_lamb:
        return ClientOptimizer("apex_lamb", _numbers(recipe))
    return None


def optimizer_notes(settings: EngineSettings, accelerator: Accelerator) -> tuple[str, ...]:
    """Replacements that change no number, one line each."""
    if accelerator.kind == "cpu" and not settings.optimizer.params.torch_adam:
        return ("on a CPU torch's fused AdamW replaces FusedAdam: same numbers, nothing to build",)
    return ()


def _clipping_faults(settings: EngineSettings, recipe: Recipe) -> list[str]:
    """ZeRO clips what Muon has made of the gradient, stage 0 the gradient: two trainings."""
    norm = recipe.optimizer.max_grad_norm
    if settings.optimizer.type != "Muon" or not norm:
        return []
    return [
        f"optimizer.type: got 'Muon' with the recipe's optimizer.max_grad_norm {norm}; allowed: 0, "
        "because under ZeRO DeepSpeed clips Muon's update, whose norm is some hundreds whatever "
        "the gradient, and so would divide the learning rate by it; "
        "--set optimizer.max_grad_norm=0"
    ]


def _runs_torch_adam(settings: EngineSettings, accelerator: Accelerator) -> bool:
    """Whether torch's AdamW replaces DeepSpeed's kernel, which a CPU compiles for a minute."""
    if settings.optimizer.type == "Lamb":
        return False
    if accelerator.kind == "cpu" or settings.optimizer.params.torch_adam:
        return True
    is_offloaded = settings.zero_optimization.offload_optimizer.device == "cpu"
    return not accelerator.fused_adam and not is_offloaded


def _numbers(recipe: Recipe) -> JsonObject:
    return {
        "lr": 0.0,  # written before each step from schedule.py; 0 makes a forgotten write harmless
        "betas": list(recipe.optimizer.betas),
        "eps": recipe.optimizer.eps,
    }
