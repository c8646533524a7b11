"""stacking/cost.py against the module itself and against torch's counter of executed FLOPs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from stacking.config import BertConfig, Freeze
from stacking.cost import (
    forward_flops,
    memory_bytes,
    num_parameters,
    pooled_length,
    trained_parameters,
    training_flops,
)
from stacking.freezing import apply_freeze, trained_names
from stacking.growth.contract import parameter_shapes
from stacking.modeling import BertForPreTraining, init_weights

SIZE = BertConfig(
    vocab_size=53,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=31,
    max_position_embeddings=19,
)
OPTION_SETS = [
    {},
    {"type_vocab_size": 0, "num_nsp_labels": 0},
    {"layer_norm": "pre", "position": "rotary", "embedding_layer_norm": False},
    {"layer_norm": "pre", "layer_norm_affine": False, "position": "sinusoidal", "mlm_bias": False},
    {"layer_norm_affine": False, "num_nsp_labels": 1, "pooler": False},
    {"num_hidden_layers": 1, "num_nsp_labels": 2, "pooler": False, "embedding_scale": True},
    {"layer_intermediate_sizes": (7, 31, 12), "tie_word_embeddings": False},
    {"shared_attention_layers": (1, 2), "layer_norm": "pre"},
    {"pooling": "mean", "pooling_size": 2, "shared_attention_layers": (2,)},
    {"pooling": "concat", "pooling_size": 3, "position": "rotary"},
    {"pooling": "max", "pooling_size": 4, "num_hidden_layers": 1},
]


@pytest.mark.parametrize("options", OPTION_SETS)
def test_num_parameters_equals_the_modules(options: dict[str, object]) -> None:
    """Every option that adds or removes a tensor is counted."""
    config = SIZE.model_copy(update=options)
    model = BertForPreTraining(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_bert_base_has_its_published_size() -> None:
    """110,106,428 parameters: BERT-base uncased with both heads, as transformers counts them."""
    assert num_parameters(BertConfig(vocab_size=30522)) == 110_106_428


def executed_flops(
    config: BertConfig, batch: int, length: int, predictions: int, freeze: Freeze | None = None
) -> tuple[int, int]:
    """(forward, forward and backward) as torch counts them, in bf16, where no product is fused."""
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(0))
    model.bfloat16()
    apply_freeze(model, freeze)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, config.vocab_size, (batch, length), generator=generator)
    order = torch.rand(batch, length - 1, generator=generator).argsort(1) + 1
    positions = order[:, :predictions]
    labels = torch.zeros(batch, dtype=torch.int64) if config.num_nsp_labels else None
    with FlopCounterMode(display=False) as counter:
        losses = model(ids, None, None, positions, ids.gather(1, positions), labels)
        forward = counter.get_total_flops()
        torch.autograd.backward([loss for name, loss in losses.items() if "loss" in name])
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("options", OPTION_SETS)
def test_flops_equal_those_that_torch_counts(options: dict[str, object]) -> None:
    """Forward exactly; backward is twice that, except that no gradient flows into the lookup."""
    config = SIZE.model_copy(update=options)
    forward, both = executed_flops(config, 5, 17, 4)
    assert forward == forward_flops(config, 5, 17, 4)
    assert both == training_flops(config, 5, 17, 4)


@st.composite
def forms(draw: st.DrawFn) -> tuple[BertConfig, Freeze | None]:
    """Any model of up to five layers and what may be frozen of it."""
    layers = draw(st.integers(1, 5))
    pooling = draw(st.sampled_from(["none", "mean", "max", "concat"]))
    first = 1 if pooling == "none" else 2
    shared = st.lists(st.sampled_from(range(first, layers)), unique=True).map(sorted)
    sizes = st.lists(st.integers(1, 40), min_size=layers, max_size=layers)
    config = BertConfig.model_validate(
        {
            **SIZE.model_dump(),
            "num_hidden_layers": layers,
            "layer_intermediate_sizes": draw(sizes),
            "layer_norm": draw(st.sampled_from(["post", "pre"])),
            "layer_norm_affine": draw(st.booleans()),
            "position": draw(st.sampled_from(["learned", "sinusoidal", "rotary"])),
            "embedding_layer_norm": draw(st.booleans()),
            "mlm_bias": draw(st.booleans()),
            "num_nsp_labels": draw(st.sampled_from([0, 1, 2])),
            "pooler": draw(st.booleans()),
            "tie_word_embeddings": draw(st.booleans()),
            "shared_attention_layers": draw(shared) if layers > first else [],
            "pooling": pooling,
            "pooling_size": 1 if pooling == "none" else draw(st.integers(2, 5)),
        }
    )
    if layers == 1 or draw(st.booleans()):
        return config, None
    return config, Freeze(
        layers=draw(st.integers(1, layers - 1)), decoder=draw(st.sampled_from(["freeze", "train"]))
    )


@settings(max_examples=80, deadline=None)
@given(form=forms(), length=st.integers(4, 19), predictions=st.integers(1, 3))
def test_every_form_costs_what_torch_counts(
    form: tuple[BertConfig, Freeze | None], length: int, predictions: int
) -> None:
    """Parameters, those that train, forward and backward: exactly, whatever is combined."""
    config, freeze = form
    shapes = parameter_shapes(config)
    assert num_parameters(config) == sum(shape.numel() for shape in shapes.values())
    trained = trained_names(config, freeze)
    assert trained_parameters(config, freeze) == sum(shapes[name].numel() for name in trained)
    forward, both = executed_flops(config, 2, length, predictions, freeze)
    assert forward == forward_flops(config, 2, length, predictions)
    assert both == training_flops(config, 2, length, predictions, freeze=freeze)


def test_pooling_by_two_costs_little_more_than_half_in_the_upper_layers() -> None:
    """BERT-base at 128 tokens, 20 predicted: 85 rows after the first layer."""
    config = BertConfig(vocab_size=30522)
    pooled = config.model_copy(update={"pooling": "mean", "pooling_size": 2})
    assert pooled_length(config, 128, 20) == 128
    assert pooled_length(pooled, 128, 20) == 85
    share = training_flops(pooled, 1, 128, 20) / training_flops(config, 1, 128, 20)
    assert 85 / 128 < share < 0.69


def test_mslt_quarter_costs_what_its_schedule_assumes() -> None:
    """12 layers, 9 frozen: forward of all, backward of three; 18 / 36 of a full layer stack."""
    config = BertConfig(vocab_size=30522, num_nsp_labels=0, pooler=False)
    freeze = Freeze(layers=9)
    frozen = training_flops(config, 1, 128, 20, freeze=freeze, all_rows=True)
    full = training_flops(config, 1, 128, 20, all_rows=True)
    assert frozen / full == pytest.approx(18 / 36, abs=0.02)
    assert trained_parameters(config, freeze) / 1e6 == pytest.approx(21.3 + 0.6, abs=0.1)


def test_memory_of_bert_base_by_zero_stage() -> None:
    """16 bits: 2 + 2 + 12 bytes a parameter (Rajbhandari et al. 2020, figure 1), shared by 4."""
    config = BertConfig(vocab_size=30522)
    numbers = 110_106_428  # divisible by 4
    expected = {0: 16.0, 1: 2 + 2 + 12 / 4, 2: 2 + (2 + 12) / 4, 3: 16 / 4}
    for zero_stage in (0, 1, 2, 3):
        held = memory_bytes(config, zero_stage=zero_stage, world_size=4)
        assert held.total == expected[zero_stage] * numbers
        assert held.total == held.weights + held.gradients + held.masters + held.moments
        twice = memory_bytes(config, zero_stage=zero_stage, world_size=4, adds_up_fp32=True)
        more = 4 * numbers if zero_stage == 1 else 0  # whole on each rank
        assert twice.total - held.total == twice.gradients - held.gradients == more
    plain = memory_bytes(config, zero_stage=0, world_size=1, bits=32)
    assert (plain.masters, plain.total) == (0, 16 * numbers)
    assert memory_bytes(config, zero_stage=1, world_size=1, bits=32).masters == 4 * numbers


def test_frozen_parameters_have_weights_only() -> None:
    """No gradient, no master, no moment; shares are rounded up."""
    config = SIZE.model_copy(update={"num_nsp_labels": 0, "pooler": False})
    freeze = Freeze(layers=2)
    trained = trained_parameters(config, freeze)
    held = memory_bytes(config, zero_stage=2, world_size=7, freeze=freeze)
    assert trained % 7
    assert held.weights == 2 * num_parameters(config)
    assert held.gradients == 2 * (trained // 7 + 1)
    assert (held.masters, held.moments) == (4 * (trained // 7 + 1), 8 * (trained // 7 + 1))


@pytest.mark.parametrize(
    ("layers", "hidden", "length", "gigaflops"),
    [(12, 768, 128, 69.9), (12, 768, 512, 301), (24, 1024, 128, 241), (24, 1024, 512, 1021)],
)
def test_usual_formula_gives_the_published_figures(
    layers: int, hidden: int, length: int, gigaflops: float
) -> None:
    """Per sequence, 15 % predicted, vocabulary 30,528: the figures that trainers compare by."""
    config = BertConfig(
        vocab_size=30528,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        num_nsp_labels=0,
    )
    predictions = {128: 20, 512: 80}[length]
    flops = training_flops(config, 1, length, predictions, all_rows=True)
    assert flops / 1e9 == pytest.approx(gigaflops, rel=0.005)


def test_last_layer_is_cheaper_by_the_rows_that_no_loss_reads() -> None:
    """A two-layer stage, where this matters most: about a third of the encoder."""
    config = BertConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
    )
    executed = forward_flops(config, 1, 128, 20)
    usual = forward_flops(config, 1, 128, 20, all_rows=True)
    assert 0.6 < executed / usual < 0.8
