"""stacking/freezing.py and the frozen forward: what trains, what is held, and that nothing else
changes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from stacking.config import BertConfig, Freeze
from stacking.errors import ConfigError
from stacking.freezing import apply_freeze, trained_names
from stacking.modeling import BertForPreTraining, init_weights

SIZE = BertConfig(
    vocab_size=57,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=31,
    max_position_embeddings=19,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.2,
)
VARIANTS = [
    {},
    {"layer_norm": "pre", "position": "rotary", "tie_word_embeddings": False},
    {"layer_norm": "pre", "layer_norm_affine": False, "position": "sinusoidal", "num_nsp_labels": 1,
     "pooler": False, "embedding_layer_norm": False},
    {"shared_attention_layers": (2, 3), "num_nsp_labels": 0, "tie_word_embeddings": False},
    {"pooling": "concat", "pooling_size": 2, "shared_attention_layers": (3,)},
]  # fmt: skip
WORDS = "embeddings.word_embeddings.weight"


def build(options: dict[str, object]) -> BertForPreTraining:
    """A small model in training mode; biases and LayerNorms are random, too."""
    model = BertForPreTraining(SIZE.model_copy(update=options))
    generator = torch.Generator().manual_seed(3)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def loss_of(model: BertForPreTraining, seed: int = 5) -> Tensor:
    """Sum of the losses of three sequences of 11 tokens, with padding and P = 3."""
    generator = torch.Generator().manual_seed(seed)
    losses = model(
        torch.randint(1, 57, (3, 11), generator=generator),
        None,
        torch.arange(11) < torch.tensor([[7], [11], [9]]),
        torch.tensor([[1, 3, 6], [2, 5, 0], [8, 4, 1]]),
        torch.tensor([[5, 9, 2], [8, 1, -100], [3, 4, 6]]),
        torch.tensor([1, 0, 1]),
    )
    return torch.stack([value for name, value in losses.items() if "loss" in name]).sum()


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """Tensors that autograd keeps meanwhile."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def test_what_trains_in_a_frozen_stage() -> None:
    """Layers above, last LayerNorm, both heads; the decoder's matrix only where asked to."""
    config = SIZE.model_copy(update={"layer_norm": "pre"})
    everything = trained_names(config, None)
    assert everything == frozenset(dict(BertForPreTraining(config).named_parameters()))
    frozen = trained_names(config, Freeze(layers=3))
    tops = ("encoder.layers.3.", "encoder.final_layer_norm.", "mlm_head.", "nsp_head.")
    assert frozen == {name for name in everything if name.startswith(tops)}
    assert trained_names(config, Freeze(layers=3, decoder="train")) == frozen | {WORDS}
    untied = config.model_copy(update={"tie_word_embeddings": False})
    assert trained_names(untied, Freeze(layers=3)) == frozen
    trained = trained_names(untied, Freeze(layers=3, decoder="train"))
    assert trained == frozen | {"mlm_head.decoder.weight"}


def test_layer_numbers_are_compared_as_numbers() -> None:
    """Layer 10 lies above layer 9."""
    config = SIZE.model_copy(update={"num_hidden_layers": 12})
    names = trained_names(config, Freeze(layers=9))
    layers = {int(name.split(".")[2]) for name in names if name.startswith("encoder.layers.")}
    assert layers == {9, 10, 11}


def test_a_layer_must_be_left() -> None:
    with pytest.raises(ConfigError, match="freeze.layers: got 4 of 4 layers; allowed: 1 to 3"):
        trained_names(SIZE, Freeze(layers=4))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_gradients_above_are_those_of_the_whole_model(
    options: dict[str, object], layers: int
) -> None:
    """Bit for bit, without dropout; below there is none, not even an old one."""
    model = build(options)
    loss = loss_of(model)
    torch.autograd.backward([loss])
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    freeze = Freeze(layers=layers)
    apply_freeze(model, freeze)
    model.zero_grad(set_to_none=False)
    frozen_loss = loss_of(model)
    assert torch.equal(frozen_loss, loss)
    torch.autograd.backward([frozen_loss])
    trained = trained_names(model.config, freeze)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trained)
        if name not in trained:
            assert parameter.grad is None, name
        else:
            gradient, whole = parameter.grad, expected[name]
            assert gradient is not None, name
            assert whole is not None, name
            assert torch.equal(gradient, whole), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_decoder_gets_the_decoders_gradient_only(tied: bool) -> None:
    """Tied, that is a part of the word embedding's: what an untied decoder would get."""
    untied = build({"tie_word_embeddings": False})
    with torch.no_grad():
        words = untied.get_parameter(WORDS)
        untied.get_parameter("mlm_head.decoder.weight").copy_(words)
    torch.autograd.backward([loss_of(untied)])
    expected = untied.get_parameter("mlm_head.decoder.weight").grad
    model = build({"tie_word_embeddings": tied})
    state = {name: untied.get_parameter(name) for name, _ in model.named_parameters()}
    model.load_state_dict(state)
    apply_freeze(model, Freeze(layers=2, decoder="train"))
    torch.autograd.backward([loss_of(model)])
    name = WORDS if tied else "mlm_head.decoder.weight"
    actual = model.get_parameter(name).grad
    assert actual is not None
    assert expected is not None
    assert torch.equal(actual, expected)
    assert tied or model.get_parameter(WORDS).grad is None


@pytest.mark.parametrize("options", VARIANTS)
def test_the_frozen_part_keeps_nothing_for_the_backward_pass(options: dict[str, object]) -> None:
    """In the embeddings and below the boundary autograd saves no byte; above it does."""
    model = build({**options, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3})
    apply_freeze(model, Freeze(layers=2))
    counts: dict[str, int] = {}
    with saved_for_backward() as kept:
        layers = {f"layer {i}": layer for i, layer in enumerate(model.encoder.layers)}
        for name, module in {"embeddings": model.embeddings, **layers}.items():
            module.register_forward_hook(
                lambda *_, name=name: counts.update({name: sum(t.nbytes for t in kept)})
            )
        loss_of(model)
    assert [counts[name] for name in ("embeddings", "layer 0", "layer 1")] == [0, 0, 0]
    assert 0 < counts["layer 2"] < counts["layer 3"] < sum(tensor.nbytes for tensor in kept)


def test_the_boundary_alone_cuts() -> None:
    """Parameters below that still ask for gradients get none, and nothing is saved for them."""
    freeze = Freeze(layers=3, decoder="train")
    model = build({"pooling": "concat", "pooling_size": 2})
    model.frozen_layers = 3
    with saved_for_backward() as kept:
        loss = loss_of(model)
    torch.autograd.backward([loss])
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == trained_names(model.config, freeze)
    apply_freeze(model, freeze)
    with saved_for_backward() as expected:
        loss_of(model)
    assert [tensor.shape for tensor in kept] == [tensor.shape for tensor in expected]


def test_memory_does_not_grow_with_the_frozen_depth() -> None:
    """One layer on top of 1 or of 5 frozen ones: the same saved bytes; unfrozen, more."""
    held = {}
    for depth, frozen in ((2, 1), (6, 5), (6, 0)):
        model = build({"num_hidden_layers": depth, "hidden_dropout_prob": 0.1})
        apply_freeze(model, Freeze(layers=frozen) if frozen else None)
        with saved_for_backward() as kept:
            loss_of(model)
        held[depth, frozen] = sum(tensor.nbytes for tensor in kept)
    assert held[2, 1] == held[6, 5] < held[6, 0] / 3


def test_dropout_below_the_boundary_is_a_choice() -> None:
    """On: the boundary's input is noisy; off: it is that of evaluation; the modes come back."""
    model = build({"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5})
    inputs: list[Tensor] = []
    model.encoder.layers[2].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model.eval()
    loss_of(model)
    model.train()
    for dropout in (True, False):
        apply_freeze(model, Freeze(layers=2, dropout=dropout))
        loss_of(model)
        loss_of(model)
    evaluated, noisy, noisy_again, quiet, quiet_again = inputs
    assert not torch.equal(noisy, noisy_again)
    assert torch.equal(quiet, evaluated)
    assert torch.equal(quiet_again, evaluated)
    assert all(module.training for module in model.modules())
    assert loss_of(model) != loss_of(model), "dropout above stays on"


def test_modes_come_back_after_a_fault() -> None:
    """A batch that cannot be computed leaves the model in training mode."""
    model = build({})
    apply_freeze(model, Freeze(layers=2, dropout=False))
    with pytest.raises(IndexError):
        model(torch.tensor([[99]]), masked_lm_ids=torch.tensor([[1]]))
    assert all(module.training for module in model.modules())


def test_thawed_everything_trains() -> None:
    """The joint stage after the frozen ones, in the same process."""
    model = build({})
    apply_freeze(model, Freeze(layers=3, dropout=False))
    assert (model.frozen_layers, model.frozen_dropout) == (3, False)
    apply_freeze(model, None)
    assert (model.frozen_layers, model.frozen_dropout) == (0, True)
    torch.autograd.backward([loss_of(model)])
    assert all(parameter.grad is not None for parameter in model.parameters())
