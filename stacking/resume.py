"""Does a checkpoint belong to this recipe? Its state and tensors in; the same out, or an error.

Hashes say that a checkpoint is as it was written, not that it was written by this run.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stacking.checkpoint import Checkpoint, TrainState
from stacking.config import Recipe
from stacking.errors import CheckpointError
from stacking.growth.contract import parameter_shapes
from stacking.schedule import stage_start
from stacking.snapshot import Snapshot

_MOST_LISTED = 3  # tensors in a message


def state_for(checkpoint: Checkpoint, recipe: Recipe) -> TrainState:
    """The checkpoint's state; CheckpointError where this recipe never comes to it."""
    _refuse(checkpoint, _state_faults(checkpoint.state, recipe))
    return checkpoint.state


def snapshot_for(checkpoint: Checkpoint, recipe: Recipe) -> Snapshot:
    """The checkpoint's tensors; CheckpointError where they are not those of its stage's model."""
    state = state_for(checkpoint, recipe)
    snapshot = checkpoint.snapshot()
    shapes = parameter_shapes(recipe.stage_model(state.stage))
    _refuse(checkpoint, _tensor_faults(snapshot.weights, shapes))
    return snapshot


def _refuse(checkpoint: Checkpoint, faults: list[str]) -> None:
    if faults:
        raise CheckpointError(
            f"{checkpoint.folder}: is no checkpoint of this recipe: {'; '.join(faults)}; take "
            "another tag (--resume TAG)"
        )


def _state_faults(state: TrainState, recipe: Recipe) -> list[str]:
    if state.stage >= len(recipe.stages):
        return [f"stage {state.stage} of {len(recipe.stages)} (from 0)"]
    faults = []
    first, end = (stage_start(state.stage + n, recipe.stages) for n in (0, 1))
    if not first <= state.global_step <= end:
        faults.append(
            f"step {state.global_step} in stage {state.stage} (from 0), which has steps {first} to "
            f"{end}"
        )
    layers = recipe.stages[state.stage].num_hidden_layers
    if state.num_hidden_layers != layers:
        faults.append(f"{state.num_hidden_layers} layers in a stage of {layers}")
    consumed = state.global_step * recipe.global_batch_size
    if state.loader.get("samples_consumed", 0) != consumed:
        faults.append(
            f"{state.loader.get('samples_consumed')} samples read after {state.global_step} steps "
            f"of {recipe.global_batch_size}"
        )
    return faults


def _tensor_faults(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    faults = [f"{name} is missing" for name in shapes if name not in weights]
    faults += [f"{name} is nothing of the model's" for name in weights if name not in shapes]
    faults += [
        f"{name} is {list(weights[name].shape)}, not {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    more = len(faults) - _MOST_LISTED
    return faults[:_MOST_LISTED] + ([f"and {more} more"] if more > 0 else [])
