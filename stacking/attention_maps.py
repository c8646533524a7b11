"""Attention probabilities of a model on a sentence, and where they go.

Dimensions: L layers, N heads, S tokens: [CLS], the words, [SEP].

Gong et al. 2019 (figure 2) motivate stacking by maps of these probabilities: heads mix attention to
near tokens with attention to the start token, and top layers look like bottom layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from stacking.attention import SelfAttention
from stacking.config import BertConfig
from stacking.errors import ConfigError
from stacking.modeling import BertForPreTraining

SHARES = ("neighbours", "start", "separator")
"""Where attention goes, in the order of `attention_shares`; the rest goes to other tokens."""


@dataclass(frozen=True)
class Sentence:
    """One sentence with its special tokens.

    Attributes:
        tokens: [S] the pieces, for people.
        ids: [S] their numbers; the first is the start token, the last the separator.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ModelAttention:
    """What one model attends to.

    Attributes:
        name: the checkpoint's tag, or the folder's name.
        caption: what the model is, for people.
        maps: [L,N,S,S] probabilities on the sentence that is shown; row i is what token i reads.
        shares: [L,N,3] mean of SHARES over the words of all sentences.
        uniform: [3] the same for attention that is equal everywhere.
        origins: for each layer the layer of the first model that it came from; None: it is new.
    """

    name: str
    caption: str
    maps: Tensor
    shares: Tensor
    uniform: Tensor
    origins: tuple[int | None, ...]


def measure(
    model: BertForPreTraining, shown: Sentence, sentences: Sequence[Sentence]
) -> tuple[Tensor, Tensor, Tensor]:
    """`maps` of the sentence `shown`; `shares` and `uniform` over `sentences` (ModelAttention)."""
    _check_vocabulary(model.config, [shown, *sentences])
    shares, uniform, words = torch.zeros(()), torch.zeros(()), 0
    for sentence in sentences:
        length = len(sentence.ids)
        shares = shares + attention_shares(attention_maps(model, sentence.ids)) * (length - 2)
        uniform = uniform + attention_shares(torch.full((length, length), 1 / length)) * (
            length - 2
        )
        words += length - 2
    return attention_maps(model, shown.ids), shares / words, uniform / words


@torch.no_grad()
def attention_maps(model: BertForPreTraining, ids: Sequence[int]) -> Tensor:
    """[S] ids -> [L,N,S,S] probabilities after softmax: those that the model's own forward uses.

    Without dropout and padding, all tokens in segment 0; in the dtype of the weights. Layers of
    shared attention show the probabilities that they reuse. Not for a model with pooling, whose
    layers work on other rows than the tokens.
    """
    assert model.config.pooling == "none", "with pooling the rows are no tokens"
    was_training = model.training
    with _keeping_probabilities(model) as kept:
        model.eval()
        model(torch.tensor([ids]))
    model.train(was_training)
    return torch.cat(kept)


def attention_shares(maps: Tensor) -> Tensor:
    """[...,S,S] probabilities -> [...,3]: SHARES, mean over the words.

    Of the attention of each word, a token that is neither the first nor the last, the parts that go
    to neighbours: the word itself and the ones beside it, as far as they are words;
    to the start token, [CLS]; and to the separator, [SEP], the last token. The three do not
    overlap. Near tokens and the start token are what Gong et al. 2019 see in figure 2; [SEP] takes
    much of the attention of BERT's middle layers (Clark et al. 2019, section 3.2).
    """
    places = torch.arange(maps.shape[-1])
    is_near = (places[1:-1, None] - places).abs() <= 1  # [S - 2, S]
    is_near[:, [0, -1]] = False
    asking = maps[..., 1:-1, :]
    parts = ((asking * is_near).sum(-1), asking[..., 0], asking[..., -1])
    return torch.stack(parts, -1).mean(-2)


def _check_vocabulary(config: BertConfig, sentences: Sequence[Sentence]) -> None:
    """ConfigError if the sentences have numbers that the model has no vector for."""
    largest = max(max(sentence.ids) for sentence in sentences)
    if largest >= config.vocab_size:
        raise ConfigError(
            f"tokenizer: gives the id {largest}, the model has a vocabulary of "
            f"{config.vocab_size}; the model's folder must hold the tokenizer it was trained with"
        )


@contextmanager
def _keeping_probabilities(model: BertForPreTraining) -> Iterator[list[Tensor]]:
    """A list that a forward fills with each layer's probabilities, [B,N,S,S].

    Each layer keeps what it would have kept for a layer of shared attention above it; the hooks
    read what it hands up.
    """
    kept: list[Tensor] = []
    attentions = [
        layer.attention
        for layer in model.encoder.layers
        if isinstance(layer.attention, SelfAttention)
    ]
    were_kept = [attention.keeps_probabilities for attention in attentions]
    hooks = [
        layer.register_forward_hook(lambda _layer, _given, output: kept.append(output[1]))
        for layer in model.encoder.layers
    ]
    for attention in attentions:
        attention.keeps_probabilities = True
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        for attention, was_kept in zip(attentions, were_kept, strict=True):
            attention.keeps_probabilities = was_kept
