"""stacking/cost.py against the module itself and against torch's counter of executed FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stacking.config import BertConfig
from stacking.cost import forward_flops, num_parameters, training_flops
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


@pytest.mark.parametrize("options", OPTION_SETS)
def test_flops_equal_those_that_torch_counts(options: dict[str, object]) -> None:
    """Forward exactly; backward is twice that, except that no gradient flows into the lookup."""
    config = SIZE.model_copy(update=options)
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(0))
    model.bfloat16()
    batch, length, predictions = 5, 17, 4
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 53, (batch, length), generator=generator)
    positions = torch.randint(1, length, (batch, predictions), generator=generator)
    labels = torch.zeros(batch, dtype=torch.int64) if config.num_nsp_labels else None
    with FlopCounterMode(display=False) as counter:
        losses = model(ids, None, None, positions, ids.gather(1, positions), labels)
        forward = counter.get_total_flops()
        sum(loss for name, loss in losses.items() if "loss" in name).backward()
    assert forward == forward_flops(config, batch, length, predictions)
    assert counter.get_total_flops() == training_flops(config, batch, length, predictions)


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
