"""A fresh module for an engine, with the main rank's weights; under ZeRO-3 in parts at once."""

import copy
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stacking import distributed
from stacking.backbone import BertBackbone
from stacking.config import BertConfig
from stacking.errors import ConfigError
from stacking.layers import LayerNormFactory

try:
    import deepspeed
    from deepspeed.utils import groups
except ImportError:  # engine.start() says what to install
    deepspeed = None


ModelMaker = Callable[[BertConfig, LayerNormFactory], BertBackbone]
"""Makes the model of a config, such as the class BertForPreTraining."""


def build_module(
    make: ModelMaker,
    config: BertConfig,
    weights: Mapping[str, Tensor],
    document: Mapping[str, object],
    device: torch.device,
    apex_layer_norm: bool = False,
) -> BertBackbone:
    """A module on the CPU with the main rank's fp32 `weights`; others' may be empty. Collective.

    Args:
        make: makes it.
        config: its sizes.
        weights: by parameter name.
        document: the DeepSpeed JSON. At ZeRO-3 every layer is parted over the ranks as soon as it
            is made, so no rank ever holds the whole module, and has the JSON's 16 bits.
        device: this rank's, through which the weights come.
        apex_layer_norm: take NVIDIA apex's LayerNorm; ConfigError where it is not installed.
    """
    layer_norm = _layer_norm(apex_layer_norm)
    with _parted(document) if zero_stage(document) == 3 else nullcontext():
        model = make(config, layer_norm)
    for name, parameter in model.named_parameters():
        with _whole(parameter), torch.no_grad():
            there = torch.empty_like(parameter, dtype=torch.float32, device=device)
            parameter.copy_(distributed.from_main(weights.get(name), there))
    return model


def blueprint(make: ModelMaker, config: BertConfig) -> BertBackbone:
    """The module's names and shapes; allocates nothing."""
    with torch.device("meta"):
        return make(config, nn.LayerNorm)


def zero_stage(document: Mapping[str, object]) -> int:
    """The ZeRO stage of a DeepSpeed JSON."""
    zero = document.get("zero_optimization")
    return int(zero.get("stage", 0)) if isinstance(zero, dict) else 0


def _parted(document: Mapping[str, object]) -> AbstractContextManager[object]:
    """Inside, ZeRO-3 parts each module over the ranks as soon as it is made."""
    found: AbstractContextManager[object] = deepspeed.zero.Init(
        config_dict_or_path=copy.deepcopy(document),
        zero_param_parallel_group=_sharing_group(document),
    )
    return found


def _sharing_group(document: Mapping[str, object]) -> object | None:
    """The last engine's group for zero_hpz_partition_size, of which DeepSpeed makes only one."""
    zero = document.get("zero_optimization")
    size = int(zero.get("zero_hpz_partition_size", 1)) if isinstance(zero, dict) else 1
    group = groups._get_zero_param_intra_parallel_group()
    if size > 1 and group is not None and group.size() == min(size, distributed.world_size()):
        return group  # type: ignore[no-any-return]
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of another size: DeepSpeed makes a new one
    return None


def _whole(parameter: nn.Parameter) -> AbstractContextManager[object]:
    """Inside, a parameter that ZeRO-3 has parted is whole; what the main rank writes stays."""
    found: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")
    )
    return found


def _layer_norm(use_apex: bool) -> Any:  # apex ships no types
    if not use_apex:
        return nn.LayerNorm
    try:  # optional, built from source by the user
        fused = importlib.import_module("apex.normalization").FusedLayerNorm
        fused(8)  # its CUDA extension is looked up only now
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"apex.fused_layer_norm: NVIDIA apex with its CUDA extensions is needed ({error}); "
            "build it from NVIDIA's source with --cpp_ext --cuda_ext (PyPI's 'apex' is another "
            "project), or set it to false"
        ) from error
    return fused
