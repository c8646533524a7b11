"""The end of a DeepSpeed engine: all that engine.destroy() forgets (DeepSpeed 0.19.8).

`tests/unit/test_engine.py` names every private DeepSpeed attribute used here.
"""

import gc
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from stacking import distributed

try:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero import (
        parameter_offload,
        partition_parameters,
        partitioned_param_coordinator,
    )
except ImportError:  # engine.start() says what to install
    get_accelerator = None


def tear_down(engine: Any) -> None:  # DeepSpeed ships no types
    """Destroy DeepSpeed's `engine` so that nothing of it stays once the caller has dropped it."""
    module = engine.module
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):
        hook = getattr(engine, name, None)  # destroy() leaves them; they pin the engine
        if hook is not None:
            hook.remove()
    engine.destroy()
    _close_monitors(engine)
    for parameter in module.parameters():
        parameter.grad = None
    _release_zero3_globals(module)


def collect() -> None:
    """Free what only cycles hold, and give back the device's and the host's free memory."""
    gc.collect()
    get_accelerator().empty_cache()
    distributed.release_memory()


def _close_monitors(engine: Any) -> None:  # DeepSpeed ships no types
    """Close the TensorBoard writer, which engine.destroy() forgets; a full disk is no matter."""
    monitor = getattr(getattr(engine, "monitor", None), "tb_monitor", None)
    writer = getattr(monitor, "summary_writer", None)
    if writer is not None:
        with suppress(OSError):
            writer.close()


def _release_zero3_globals(module: nn.Module) -> None:
    """Forget what ZeRO-3 keeps in globals after engine.destroy() (DeepSpeed issue 7204)."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    method = getattr(coordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    cells = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
    for candidate in [method, *cells]:
        if hasattr(candidate, "cache_clear"):
            candidate.cache_clear()
    initialiser = partition_parameters.InsertPostInitMethodToModuleSubClasses
    if hasattr(initialiser, "linear_bk"):
        torch.nn.functional.linear = initialiser.linear_bk
