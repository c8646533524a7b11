"""What the engine's JSON asks of the model: checkpointed layers, compiled layers. Only torch.

Each encoder layer is compiled by itself: all layers of a size share their graphs, also those of
another engine, so that a change of depth compiles nothing anew, and a layer that is recomputed in
the backward pass is the compiled one. A graph of the whole model would be lost at each switch, and
breaks where the losses select their rows.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from stacking import distributed
from stacking.backbone import BertBackbone
from stacking.deepspeed_config import ResolvedEngine
from stacking.deepspeed_schema import Compile

_MOST_GRAPHS = 64
"""Of a layer's forward; torch gives up at 8. Mask or none, all rows or some, pooled or not, with
gradients or without: 16, each for one size and for all, and some room."""


def apply(model: BertBackbone, resolved: ResolvedEngine) -> None:
    """Make `model` compute as asked. The numbers of fp32 stay; compiled dropout draws its own.

    What cannot be compiled here fails in the first step: see `settle`.
    """
    model.encoder.checkpoint_interval = resolved.checkpoint_interval
    if resolved.compile is None:
        return
    torch.compiler.config.recompile_limit = _MOST_GRAPHS
    for layer in model.encoder.layers:
        # Not layer.compile(), which takes an engine's hooks into the graph.
        layer.forward = torch.compile(layer.forward, **_torch_options(resolved.compile))


def settle(stages: Sequence[ResolvedEngine], device: torch.device) -> list[ResolvedEngine]:
    """The stages without what cannot be compiled here, and a notice instead. Collective.

    All ranks make the same choice. Tries each way of compiling once a process, in seconds.
    """
    return [_settled(stage, device) for stage in stages]


def _settled(resolved: ResolvedEngine, device: torch.device) -> ResolvedEngine:
    if resolved.compile is None:
        return resolved
    fault = compile_fault(resolved.compile, device)
    if distributed.all_ranks_agree(fault is None, device):
        return resolved
    notice = f"compile asked, but {fault or 'another rank cannot compile'}: layers run uncompiled"
    return replace(resolved, compile=None, notices=(*resolved.notices, notice))


@functools.cache
def compile_fault(options: Compile, device: torch.device) -> str | None:
    """Why nothing can be compiled on this machine, in one line; None: a small function was.

    What torch raises is no closed list (no compiler, no Triton, an old GPU or Python, a folder for
    its cache that cannot be written), but all of it is RuntimeError, ImportError or OSError.
    """
    number = time.time_ns() % 2**30  # a new function, that no cache of an earlier process holds

    def small(values: Tensor) -> Tensor:
        return (values * number).sin() + 1

    try:
        torch.compile(small, **_torch_options(options))(torch.ones(7, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{options.backend} cannot ({lines[0] if lines else type(error).__name__})"
    return None


class _Options(TypedDict):
    backend: str
    mode: str | None
    dynamic: bool | None


def _torch_options(options: Compile) -> _Options:
    """Arguments of torch.compile; `mode` is inductor's alone."""
    mode = options.mode if options.backend == "inductor" and options.mode != "default" else None
    return {"backend": options.backend, "mode": mode, "dynamic": options.dynamic}
