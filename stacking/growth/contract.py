"""What every growth operator promises: the form of a contract and of an operator.

A growth operator is a pure function from one model's tensors to a larger model's. It declares
whether the function that the model computes stays as it was, how exactly, and how units that
were duplicated come apart in training; the tests hold it to that.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.modeling import BertForPreTraining

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "is_old"]
"""What the tensors are: weights, Adam's first or second moments of them, or flags: 1 at a number
that has a history, else 0."""

LayerNormKind = Literal["post", "pre"]

# On max |logit difference| relative to max |logit|: rounding over a few layers of each format.
TOLERANCE: dict[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 1e-5}

# What differs here changes neither a tensor nor the function in eval mode.
_TRAINING_ONLY = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"}
_INNER = {"intermediate_size", "layer_intermediate_sizes"}


@dataclass(frozen=True)
class Contract:
    """The promise of one operator for one model.

    Attributes:
        preserves: the `layer_norm` kinds for which the function, in eval mode, is unchanged.
        tolerance: per dtype, on max |logit difference| relative to max |logit|; empty where
            nothing is preserved.
        symmetry: how duplicated units come apart, or why there are none.
        source: paper and section.
    """

    preserves: frozenset[LayerNormKind]
    tolerance: dict[torch.dtype, float]
    symmetry: str
    source: str


@dataclass(frozen=True)
class Request:
    """What an operator is asked for; checked by GrowthOperator.grow, whose arguments these are."""

    tensors: Mapping[str, Tensor]
    source: BertConfig
    target: BertConfig
    kind: Kind
    fresh: Mapping[str, Tensor] | None
    generator: torch.Generator | None


class GrowthOperator(ABC):
    """One way to grow one dimension."""

    name: str
    """The operator's name in recipes."""

    @abstractmethod
    def contract(self, config: BertConfig) -> Contract:
        """What is promised when a model of this form grows."""

    @abstractmethod
    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Why `source` cannot grow into `target`, by field; empty: it can."""

    def draws_fresh(self, source: BertConfig, target: BertConfig) -> bool:
        """Whether weights need `fresh`."""
        return False

    def grow(
        self,
        tensors: Mapping[str, Tensor],
        source: BertConfig,
        target: BertConfig,
        *,
        kind: Kind = "weight",
        fresh: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Tensors of `source` turned into tensors of `target`.

        The input is never modified and the result never aliases it. All randomness comes from
        `generator`.

        Args:
            tensors: by the names of BertForPreTraining's parameters; any float dtype, kept; CPU.
            source: the model that the tensors belong to.
            target: the model to be filled.
            kind: weights, or Adam's moments of them: the same index map, with the factors of the
                gradient (exp_avg) or their squares (exp_avg_sq); fresh parts get zeros and no
                moment gets noise. Or flags (is_old): the first copy of a number keeps its flag,
                further copies and fresh numbers get 0.
            fresh: a freshly initialised target's weights; may be None for moments.
            generator: the source of noise; may be None where the operator draws none.

        Raises:
            GrowthError: `check` finds faults, a tensor is missing, or `fresh` or `generator` is
                needed and was not given.
        """
        require_legal(self.name, self.check(source, target))
        require_tensors(tensors, source, "the model to grow")
        if kind == "weight" and self.draws_fresh(source, target):
            if fresh is None:
                raise GrowthError(
                    f"{self.name} needs a freshly initialised model to fill what is new: give "
                    "`fresh` weights"
                )
            require_tensors(fresh, target, "the fresh model")
        return self._map(Request(tensors, source, target, kind, fresh, generator))

    @abstractmethod
    def _map(self, request: Request) -> dict[str, Tensor]:
        """The tensors of `request.target`; `check` has found nothing, all tensors fit."""


def fixed_faults(
    source: BertConfig,
    target: BertConfig,
    may_change: Collection[str],
    because: str = "this operator does not change it",
) -> list[str]:
    """A fault for each field outside `may_change` in which two models differ as functions."""
    free = _TRAINING_ONLY | set(may_change)
    if source.position == target.position != "learned":
        free.add("max_position_embeddings")  # there is no table
    if inner_sizes(source) == inner_sizes(target):
        free |= _INNER
    ours, theirs = source.model_dump(), target.model_dump()
    return [
        f"{key}: got {theirs[key]!r} after {ours[key]!r}; allowed: {ours[key]!r}, because {because}"
        for key in ours
        if ours[key] != theirs[key] and key not in free
    ]


def inner_sizes(config: BertConfig) -> list[int]:
    """Inner width of each layer."""
    return [config.inner_size(layer) for layer in range(config.num_hidden_layers)]


def parameter_shapes(config: BertConfig) -> dict[str, torch.Size]:
    """Names and shapes of a model's parameters, in its order; allocates nothing."""
    return dict(_shapes(config))


@lru_cache(maxsize=64)
def _shapes(config: BertConfig) -> tuple[tuple[str, torch.Size], ...]:
    with torch.device("meta"):
        model = BertForPreTraining(config)
    return tuple((name, parameter.shape) for name, parameter in model.named_parameters())


def require_legal(name: str, faults: list[str]) -> None:
    """Raise one GrowthError with all faults of operator `name`; none: return."""
    if faults:
        raise GrowthError(f"{name} cannot grow this model: " + "; ".join(faults))


def require_tensors(tensors: Mapping[str, Tensor], config: BertConfig, what: str) -> None:
    """Raise GrowthError unless `tensors` are exactly the parameters of such a model, by shape."""
    shapes = parameter_shapes(config)
    faults = [f"no tensor {name!r}" for name in shapes if name not in tensors]
    faults += [f"unexpected tensor {name!r}" for name in tensors if name not in shapes]
    faults += [
        f"{name!r} has shape {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        raise GrowthError(f"{what} does not fit the configuration: " + "; ".join(faults))
