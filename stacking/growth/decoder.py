"""The MLM decoder gets a matrix of its own: tied model's tensors in, untied model's out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.growth.contract import (
    TOLERANCE,
    Contract,
    GrowthOperator,
    Request,
    fixed_faults,
)

_EMBEDDING, _DECODER = "embeddings.word_embeddings.weight", "mlm_head.decoder.weight"


@dataclass(frozen=True)
class Untie(GrowthOperator):
    """The decoder starts as a copy of the word embedding, then trains apart from it.

    Moments: the tied matrix's gradient is the sum of two, of which Adam kept no parts, so there is
    no law; both get the whole. Its second moment is too large then, which makes the first steps
    smaller.
    """

    name: str = "untie"

    def contract(self, config: BertConfig) -> Contract:
        """Exact to the last bit."""
        return Contract(
            frozenset({"post", "pre"}), dict(TOLERANCE), "they are used differently", "our own"
        )

    def check(self, source: BertConfig, target: BertConfig) -> list[str]:
        """Why `source` cannot grow into `target`; empty: it can."""
        faults = fixed_faults(source, target, {"tie_word_embeddings"})
        if target.tie_word_embeddings and not source.tie_word_embeddings:
            faults.append(
                "tie_word_embeddings: got true after false; allowed: false, because a decoder that "
                "was trained apart from the word embedding would be lost; untie at a later stage "
                "or not at all"
            )
        return faults

    def _map(self, request: Request) -> dict[str, Tensor]:
        """Copies, and one more of the word embedding."""
        grown = {name: tensor.detach().clone() for name, tensor in request.tensors.items()}
        if request.source.tie_word_embeddings and not request.target.tie_word_embeddings:
            embedding = grown[_EMBEDDING]
            grown[_DECODER] = (
                torch.zeros_like(embedding) if request.kind == "is_old" else embedding.clone()
            )
        return grown
