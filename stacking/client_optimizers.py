"""Optimizers that the trainer makes itself: Muon with its own choice of matrices, apex's LAMB.

`tests/unit/test_engine.py` names what is used of DeepSpeed's Muon and fails when a release moves
it.
"""

import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from stacking.deepspeed_config import ClientOptimizer
from stacking.errors import ConfigError

Groups = list[dict[str, Any]]


def optimizer_maker(asked: ClientOptimizer | None) -> Callable[[Groups], Optimizer] | None:
    """For deepspeed.initialize, which calls it with the groups once they are on the device.

    ConfigError where apex is asked for and is not there.
    """
    if asked is None:
        return None
    if asked.kind == "apex_lamb":
        lamb = _fused_lamb()
        # DeepSpeed has clipped already; apex's own clip divides by its limit, so 0 would not do.
        return lambda groups: lamb(groups, **asked.numbers, max_grad_norm=math.inf)
    return lambda groups: _muon(groups, asked)


def plain_kernels(asked: ClientOptimizer | None) -> AbstractContextManager[object]:
    """Inside, Muon's kernels run as they are written, whatever DeepSpeed's decorators say.

    torch would compile them for half a minute, fail without a compiler, and give up after eight
    shapes, so that a run that has grown would not compute what a resumed one does.
    """
    if asked is None or asked.kind != "muon":
        return nullcontext()
    found: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return found


def _muon(groups: Groups, asked: ClientOptimizer) -> Optimizer:
    """DeepSpeed's Muon, whose ZeRO optimizers know it, with an Adam for groups without use_muon."""
    # Imported here: DeepSpeed too imports it only where it is used.
    found = importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    for group in groups:
        is_muons = group.setdefault("use_muon", False)
        theirs = ("lr", "momentum", "ns_method") if is_muons else ("lr", "betas", "eps")
        group.update({name: asked.numbers[name] for name in theirs})
        for parameter in group["params"]:
            parameter.use_muon = is_muons  # where ZeRO looks
    if asked.torch_adam:
        adam, options = torch.optim.AdamW, {"fused": asked.fused}
    else:
        adam = importlib.import_module("deepspeed.ops.adam").FusedAdam
        options = {"adam_w_mode": True}
    made: Optimizer = found.MuonWithAuxAdam(
        groups, adam_optimizer=adam, adam_optimizer_kwargs=options
    )
    return made


def _fused_lamb() -> Any:  # apex ships no types
    try:  # optional, built from source by the user
        module = importlib.import_module("apex.optimizers")
        if not importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier.available:
            raise ImportError("apex was built without its CUDA extensions")
        return module.FusedLAMB
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"apex.fused_lamb: NVIDIA apex with its CUDA extensions is needed ({error}); "
            "build it from NVIDIA's source with --cpp_ext --cuda_ext (PyPI's 'apex' is another "
            "project), or set it to false for DeepSpeed's own"
        ) from error
