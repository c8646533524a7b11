"""stacking/modeling.py against transformers, against itself on other paths, and at the edges."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import stacking
from stacking.config import BertConfig
from stacking.encoder import EncoderLayer
from stacking.functional import attend, dropout, gather_rows
from stacking.hf import home_config
from stacking.hf_homes import BERT, from_home, to_home
from stacking.masked_lm_loss import IGNORED_LABEL
from stacking.modeling import BertForPreTraining, init_weights, next_sentence_loss
from stacking.positions import RotaryTable, SinusoidalTable

SIZE = BertConfig(
    vocab_size=57,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=31,
    max_position_embeddings=19,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.2,
)
VARIANTS = [
    {},
    {"layer_norm": "pre"},
    {"position": "rotary", "type_vocab_size": 0},
    {"layer_norm": "pre", "position": "rotary", "embedding_layer_norm": False},
    {"layer_norm": "pre", "layer_norm_affine": False, "position": "sinusoidal", "num_nsp_labels": 1,
     "pooler": False, "embedding_scale": True, "embedding_layer_norm": False, "mlm_bias": False},
    {"num_nsp_labels": 0, "num_hidden_layers": 1, "hidden_act": "relu"},
    {"num_hidden_layers": 4, "shared_attention_layers": (1, 3), "layer_norm": "pre"},
    {"shared_attention_layers": (1, 2), "position": "rotary"},
    {"layer_intermediate_sizes": (5, 31, 9), "tie_word_embeddings": False},
]  # fmt: skip


def build(options: dict[str, object] | None = None) -> BertForPreTraining:
    """A small model in training mode without dropout; biases and LayerNorms are random, too."""
    model = BertForPreTraining(SIZE.model_copy(update=options or {}))
    generator = torch.Generator().manual_seed(3)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def batch(model: BertForPreTraining, seed: int = 5) -> dict[str, Tensor]:
    """Three sequences of 11 tokens, 7 and 11 and 9 of them real; P = 4 with filling."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, 57, (3, 11), generator=generator)
    mask = torch.arange(11) < torch.tensor([[7], [11], [9]])
    input_ids[~mask] = 0
    labels = torch.tensor([[5, 9, 2, -100], [8, 1, 56, 3], [4, -100, -100, -100]])
    segments = {"token_type_ids": (torch.arange(11) > 4).long().repeat(3, 1)}
    return {
        "input_ids": input_ids,
        **(segments if model.config.type_vocab_size else {}),
        "attention_mask": mask,
        "masked_lm_positions": torch.tensor([[1, 3, 6, 0], [2, 5, 8, 10], [8, 0, 0, 0]]),
        "masked_lm_ids": labels,
        "next_sentence_labels": torch.tensor([1, 0, 1]),
    }


def logits_only(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same batch without anything that asks for losses or for some positions only."""
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {name: inputs[name] for name in names if name in inputs}


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """Sum of all loss sums."""
    return torch.stack([value for name, value in losses.items() if "loss" in name]).sum()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient, which must be there."""
    assert parameter.grad is not None
    return parameter.grad


def their_bert() -> transformers.BertForPreTraining:
    """transformers' model with our sizes and its own random weights."""
    torch.manual_seed(0)
    fields = home_config(SIZE, BERT)
    return transformers.BertForPreTraining(transformers.BertConfig.from_dict(fields))


def test_the_tested_package_is_this_checkout() -> None:
    """An installed copy elsewhere would make every other test meaningless."""
    assert Path(stacking.__file__).resolve().parents[1] == Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("direction", ["theirs_to_ours", "ours_to_theirs"])
def test_logits_and_gradients_equal_transformers(direction: str) -> None:
    """fp32, padding and segments: logits to 1e-5, every gradient of the summed losses to 1e-5."""
    theirs, ours = their_bert(), build()
    if direction == "theirs_to_ours":
        ours.load_state_dict(from_home(theirs.state_dict(), SIZE, BERT))
    else:
        missing = theirs.load_state_dict(to_home(ours, BERT), strict=False).missing_keys
        assert set(missing) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        theirs.tie_weights()
    inputs = batch(ours)
    expected = theirs(**logits_only(inputs))
    actual = ours(**logits_only(inputs))
    mask = inputs["attention_mask"]
    for name in ("prediction_logits", "seq_relationship_logits"):
        select = mask if name == "prediction_logits" else slice(None)
        torch.testing.assert_close(actual[name][select], expected[name][select], atol=1e-5, rtol=0)
    torch.autograd.backward([total_loss(ours(**inputs))])
    picked = gather_rows(expected["prediction_logits"], inputs["masked_lm_positions"]).flatten(0, 1)
    labels = inputs["masked_lm_ids"].flatten()
    loss = F.cross_entropy(picked, labels, ignore_index=-100, reduction="sum")
    nsp = expected["seq_relationship_logits"]
    loss = loss + F.cross_entropy(nsp, inputs["next_sentence_labels"], reduction="sum")
    torch.autograd.backward([loss])
    named = {name: gradient_of(parameter) for name, parameter in theirs.named_parameters()}
    for name, gradient in from_home(named, SIZE, BERT).items():
        torch.testing.assert_close(
            gradient_of(ours.get_parameter(name)), gradient, atol=1e-5, rtol=1e-5, msg=name
        )


@pytest.mark.parametrize("options", VARIANTS)
def test_losses_equal_those_of_the_full_logits(options: dict[str, object]) -> None:
    """The short cut (last layer and head at some rows only) changes no loss and no gradient."""
    model = build(options)
    inputs = batch(model)
    losses = model(**inputs)
    short = torch.autograd.grad(total_loss(losses), list(model.parameters()))
    outputs = model(**logits_only(inputs))
    picked = gather_rows(outputs["prediction_logits"], inputs["masked_lm_positions"]).flatten(0, 1)
    labels = inputs["masked_lm_ids"].flatten()
    expected = F.cross_entropy(picked, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    torch.testing.assert_close(losses["mlm_loss_sum"], expected, atol=1e-5, rtol=1e-6)
    assert losses["mlm_correct"] == (picked.argmax(-1) == labels).sum()
    if "nsp_loss_sum" in losses:
        nsp = outputs["seq_relationship_logits"]
        expected = expected + next_sentence_loss(nsp, inputs["next_sentence_labels"])
    full = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(short, full, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("options", VARIANTS)
def test_logits_at_positions_equal_full_logits_there(options: dict[str, object]) -> None:
    """Masked-only logits are full logits, gathered."""
    model = build(options)
    inputs = batch(model)
    positions = inputs["masked_lm_positions"]
    full = model(**logits_only(inputs))["prediction_logits"]
    some = model(**logits_only(inputs), masked_lm_positions=positions)["prediction_logits"]
    expected = full.gather(1, positions[:, :, None].expand(-1, -1, 57))
    torch.testing.assert_close(some, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_nothing_at_real_tokens(
    options: dict[str, object], dtype: torch.dtype
) -> None:
    """Whatever stands in the padding, and however much of it there is."""
    model = build(options).to(dtype)
    inputs = logits_only(batch(model))
    expected = model(**inputs)["prediction_logits"][0, :7]
    inputs["input_ids"][0, 7:] = 33
    assert torch.equal(model(**inputs)["prediction_logits"][0, :7], expected)
    alone = {name: tensor[:1, :7] for name, tensor in inputs.items()}
    del alone["attention_mask"]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.25}[dtype]
    actual = model(**alone)["prediction_logits"][0]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("options", VARIANTS)
def test_order_of_the_batch_does_not_matter(options: dict[str, object]) -> None:
    """A sequence's logits do not depend on its neighbours, nor the sums on their order."""
    model = build(options)
    inputs = batch(model)
    order = torch.tensor([2, 0, 1])
    shuffled = {name: tensor[order] for name, tensor in inputs.items()}
    expected = model(**logits_only(inputs))["prediction_logits"][order]
    actual = model(**logits_only(shuffled))["prediction_logits"]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        total_loss(model(**shuffled)), total_loss(model(**inputs)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("options", VARIANTS)
def test_bf16_stays_within_its_rounding(options: dict[str, object]) -> None:
    """bf16 parameters and activations: losses within 2 %, logits within 5 % of their spread."""
    model = build(options)
    inputs = batch(model)
    expected, full = model(**inputs), model(**logits_only(inputs))["prediction_logits"]
    model.bfloat16()
    actual, half = model(**inputs), model(**logits_only(inputs))["prediction_logits"]
    assert actual["mlm_loss_sum"].dtype == torch.float32
    assert actual["mlm_loss_sum"].item() == pytest.approx(expected["mlm_loss_sum"].item(), rel=0.02)
    error = (half.float() - full)[inputs["attention_mask"]]
    assert error.pow(2).mean().sqrt() < 0.05 * full.std()


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_predict_gives_zero_loss_and_finite_gradients(
    options: dict[str, object], dtype: torch.dtype
) -> None:
    """A batch of filling only, as at the end of a validation split, all padding in one row."""
    model = build(options).to(dtype)
    inputs = batch(model)
    inputs["masked_lm_ids"] = torch.full((3, 4), IGNORED_LABEL)
    inputs["next_sentence_labels"] = torch.full((3,), IGNORED_LABEL)
    inputs["attention_mask"][1] = False
    losses = model(**inputs)
    assert total_loss(losses) == 0.0
    assert losses["mlm_correct"] == 0
    torch.autograd.backward([total_loss(losses)])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_every_token_may_be_masked() -> None:
    """P = S, every position predicted: the loss of all logits; so is positions None."""
    model = build({"num_nsp_labels": 0})
    inputs = batch(model)
    labels = torch.randint(1, 57, (3, 11), generator=torch.Generator().manual_seed(2))
    inputs["masked_lm_positions"] = torch.arange(11).repeat(3, 1)
    inputs["masked_lm_ids"] = labels
    actual = model(**inputs)["mlm_loss_sum"]
    logits = model(**logits_only(inputs))["prediction_logits"]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-6)
    del inputs["masked_lm_positions"]
    torch.testing.assert_close(model(**inputs)["mlm_loss_sum"], actual, atol=1e-3, rtol=1e-6)


def test_one_token_sequence_has_finite_losses_and_gradients() -> None:
    """S = 1: attention over a single token."""
    model = build({"position": "rotary"})
    ids = torch.tensor([[7], [8]])
    positions = torch.zeros(2, 1, dtype=torch.int64)
    losses = model(ids, None, None, positions, ids, torch.tensor([0, 1]))
    torch.autograd.backward([total_loss(losses)])
    assert total_loss(losses).isfinite()
    assert all(gradient_of(parameter).isfinite().all() for parameter in model.parameters())


def test_one_logit_is_the_probability_of_next() -> None:
    """NVIDIA's label 1 = random becomes StackingBERT's target 0; -100 counts nothing."""
    logits = torch.tensor([[2.0], [-1.5], [9.0]])
    loss = next_sentence_loss(logits, torch.tensor([0, 1, IGNORED_LABEL]))
    expected = -torch.log(torch.sigmoid(torch.tensor(2.0))) - torch.log(
        1 - torch.sigmoid(torch.tensor(-1.5))
    )
    torch.testing.assert_close(loss, expected)


def test_two_logits_count_the_random_class_as_one() -> None:
    """A confident class 1 is right exactly where the label is 1."""
    logits = torch.tensor([[0.0, 20.0]])
    assert next_sentence_loss(logits, torch.tensor([1])) < 1e-6
    assert next_sentence_loss(logits, torch.tensor([0])) > 19


def test_rotary_attention_depends_on_distance_only() -> None:
    """Without other position information, shifting a pattern by padding in front shifts outputs."""
    model = build({"position": "rotary"})
    tokens = torch.tensor([[9, 4, 7, 22, 5]])
    shifted = F.pad(tokens, (3, 0), value=1)
    mask = torch.arange(8)[None] >= 3
    expected = model(tokens)["last_hidden_state"]
    actual = model(shifted, None, mask)["last_hidden_state"][:, 3:]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(model(tokens.flip(1))["last_hidden_state"].flip(1), expected)


def test_rotary_table_is_exact_in_a_bf16_model() -> None:
    """Position 500: within bf16 rounding of the true cosine; a bf16 angle would be off by 1 rad."""
    cos, sin = RotaryTable(8).lookup(512, torch.zeros((), dtype=torch.bfloat16))
    angle = 500.0 * 10_000.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert (cos[500, 0, 0].double() - angle.cos()).abs().max() < 2**-8
    assert (sin[500, 0, 0].double() - angle.sin()).abs().max() < 2**-8


def test_tables_born_in_inference_mode_serve_training() -> None:
    """Evaluation first, training after it: the cache must not hold inference tensors."""
    for position in ("rotary", "sinusoidal"):
        model = build({"position": position})
        inputs = batch(model)
        with torch.inference_mode():
            model(**inputs)
        torch.autograd.backward([total_loss(model(**inputs))])


def test_sinusoids_have_the_layout_of_fairseq() -> None:
    """Sines first, then cosines; feature 0 has wavelength 2 pi; an odd size ends in zero."""
    table = SinusoidalTable(7).lookup(5, torch.zeros(()))
    assert table.shape == (5, 7)
    torch.testing.assert_close(table[4, 0], torch.tensor(4.0).sin())
    torch.testing.assert_close(table[4, 3], torch.tensor(4.0).cos())
    torch.testing.assert_close(table[4, 2], torch.tensor(4.0 / 10_000).sin())
    assert (table[:, 6] == 0).all()


def test_initialisation_follows_bert_and_the_generator() -> None:
    """Same generator, same weights; sigma as configured; padding row, biases 0; LayerNorm 1."""
    config = SIZE.model_copy(update={"vocab_size": 997, "initializer_range": 0.02})
    first, second = BertForPreTraining(config), BertForPreTraining(config)
    torch.manual_seed(1)
    init_weights(first, torch.Generator().manual_seed(11))
    torch.manual_seed(2)
    init_weights(second, torch.Generator().manual_seed(11))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif "layer_norm" in name:
            assert (parameter == 1).all()
    words = first.embeddings.word_embeddings.weight
    assert (words[0] == 0).all()
    assert words[1:].std().item() == pytest.approx(0.02, rel=0.05)


def test_gradient_of_a_two_row_table_survives_bf16() -> None:
    """4,096 equal summands of 1: a bf16 running sum would stop at 256."""
    model = build().bfloat16()
    weight = model.get_parameter("embeddings.token_type_embeddings.weight")
    model.embeddings.layer_norm = None
    hidden = model.embeddings(torch.ones(256, 16, dtype=torch.int64), torch.ones(256, 16).long())
    torch.autograd.backward([hidden.sum()])
    assert (gradient_of(weight)[1] == 4096).all()
    assert (gradient_of(weight)[0] == 0).all()


def test_dropout_only_in_training() -> None:
    """Two training passes differ, two evaluation passes do not."""
    model = build({"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3})
    inputs = batch(model)
    assert model(**inputs)["mlm_loss_sum"] != model(**inputs)["mlm_loss_sum"]
    model.eval()
    assert model(**inputs)["mlm_loss_sum"] == model(**inputs)["mlm_loss_sum"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(probability: float, dtype: torch.dtype) -> None:
    """Share of zeros within 4 sigma; survivors scaled; the gradient uses the very same factors."""
    torch.manual_seed(0)
    hidden = torch.ones(331, 303, dtype=dtype, requires_grad=True)
    output = dropout(hidden, probability, training=True)
    share = (output == 0).float().mean().item()
    sigma = (probability * (1 - probability) / hidden.numel()) ** 0.5
    assert share == pytest.approx(probability, abs=4 * sigma + 2**-16)
    assert output.max().item() == pytest.approx(1 / (1 - probability), rel=2**-8)
    assert len(set(output.flatten().tolist())) == 2
    torch.autograd.backward([output.sum()])
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, output.detach())
    by_column = (output == 0).float().mean(0)
    assert (by_column - probability).abs().max() < 6 * (probability / 331) ** 0.5
    assert dropout(hidden, probability, training=False) is hidden


def test_dropout_follows_torchs_generator() -> None:
    """The same seed drops the same elements: exact resume and activation checkpointing need it."""
    hidden = torch.ones(7, 5)
    torch.manual_seed(3)
    first = dropout(hidden, 0.5, training=True)
    second = dropout(hidden, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(dropout(hidden, 0.5, training=True), first)
    assert not torch.equal(first, second)


def test_attention_dropout_keeps_the_mean_on_the_16_bit_path() -> None:
    """Attention over equal values is that value on average, with and without SDPA's kernel."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 64, 2, 33, 8).unbind(0)
    for dtype in (torch.float32, torch.bfloat16):
        value = torch.ones(64, 2, 33, 8, dtype=dtype)
        output = attend(query.to(dtype), key.to(dtype), value, None, 0.25).float()
        assert float(output.mean()) == pytest.approx(1.0, abs=0.02)
        assert float(output.std()) > 0.05


@pytest.mark.parametrize("layer_norm", ["post", "pre"])
def test_shared_attention_equals_the_formula(layer_norm: str) -> None:
    """Layers 1 and 2 use layer 0's probabilities on their own values; layer 3 has its own."""
    model = build({"layer_norm": layer_norm, "num_hidden_layers": 4,
                   "shared_attention_layers": (1, 2)}).eval()  # fmt: skip
    ids = batch(model)["input_ids"][1:2]
    hidden: Tensor = model.embeddings(ids, None)
    probabilities = torch.zeros(())
    for index, layer in enumerate(model.encoder.layers):
        assert isinstance(layer, EncoderLayer)
        attention, pre = layer.attention, layer_norm == "pre"
        source = layer.attention_layer_norm(hidden) if pre else hidden
        if index in (1, 2):
            value = attention.get_submodule("value")(source).view(11, 3, 8)
        else:
            fused = attention.get_submodule("qkv")(source)
            query, key, value = fused.view(11, 3, 3, 8).unbind(1)
            scores = torch.einsum("rnd,snd->nrs", query, key) / 8**0.5
            probabilities = scores.softmax(-1)
        mixed = torch.einsum("nrs,snd->rnd", probabilities, value).reshape(1, 11, 24)
        hidden = hidden + attention.output(mixed)
        if pre:
            hidden = hidden + layer.feed_forward(layer.feed_forward_layer_norm(hidden))
        else:
            hidden = layer.attention_layer_norm(hidden)
            hidden = layer.feed_forward_layer_norm(hidden + layer.feed_forward(hidden))
    if model.encoder.final_layer_norm is not None:
        hidden = model.encoder.final_layer_norm(hidden)
    actual = model(ids)["last_hidden_state"]
    torch.testing.assert_close(actual, hidden, atol=1e-5, rtol=0)


def test_shared_probabilities_are_dropped_anew() -> None:
    """With all values 1, a layer's context is the sum of what it kept: other gaps, same mean."""
    model = build({"shared_attention_layers": (1,), "attention_probs_dropout_prob": 0.5})
    contexts: list[Tensor] = []
    for name in ("encoder.layers.0.attention.qkv", "encoder.layers.1.attention.value"):
        with torch.no_grad():
            model.get_parameter(f"{name}.weight").zero_()
            model.get_parameter(f"{name}.bias").fill_(1.0)
        output = model.get_submodule(name.rpartition(".")[0] + ".output")
        output.register_forward_pre_hook(lambda _, given: contexts.append(given[0].detach()))
    reused: list[Tensor] = []
    sharing = model.get_submodule("encoder.layers.1.attention")
    sharing.register_forward_pre_hook(lambda _, given: reused.append(given[1].detach()))
    model(**batch(model))
    first, second = contexts
    torch.testing.assert_close(reused[0].sum(-1), torch.ones(3, 3, 11))  # nothing is dropped yet
    assert not torch.equal(first, second)
    assert float(first.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(second.mean()) == pytest.approx(1.0, abs=0.1)


def test_small_forms_have_the_parameters_of_their_names() -> None:
    """Names and shapes that growth and checkpoints rely on."""
    model = build({
        "layer_intermediate_sizes": (5, 31, 9), "shared_attention_layers": (2,),
        "tie_word_embeddings": False, "pooling": "concat", "pooling_size": 3,
    })  # fmt: skip
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ordinary = dict(build().named_parameters())
    assert {name: shape for name, shape in shapes.items() if name not in ordinary} == {
        "encoder.layers.2.attention.value.weight": (24, 24),
        "encoder.layers.2.attention.value.bias": (24,),
        "embeddings.pooling.weight": (24, 72),
        "embeddings.pooling.bias": (24,),
        "mlm_head.decoder.weight": (57, 24),
    }
    qkv = {f"encoder.layers.2.attention.qkv.{kind}" for kind in ("weight", "bias")}
    assert set(ordinary) - set(shapes) == qkv
    inner = [shapes[f"encoder.layers.{i}.feed_forward.inner.weight"] for i in range(3)]
    assert inner == [(5, 24), (31, 24), (9, 24)]


def test_an_untied_decoder_is_drawn_as_a_matrix_and_used() -> None:
    """Padding's row included; logits are those of a tied model whose words it is."""
    model = BertForPreTraining(SIZE.model_copy(update={"tie_word_embeddings": False}))
    init_weights(model, torch.Generator().manual_seed(1))
    decoder = model.get_parameter("mlm_head.decoder.weight")
    assert decoder.std().item() == pytest.approx(0.2, rel=0.1)
    assert (decoder[0] != 0).all()
    tied = BertForPreTraining(SIZE)
    state = {name: tensor for name, tensor in model.state_dict().items() if "decoder" not in name}
    tied.load_state_dict(state | {"embeddings.word_embeddings.weight": decoder})
    hidden = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.decode(hidden), tied.decode(hidden))


def test_a_fused_layer_norm_can_be_passed_in() -> None:
    """The factory gets (size, eps, affine), as torch's and apex's classes take them."""
    calls: list[tuple[int, float, bool]] = []

    def factory(size: int, eps: float, affine: bool) -> nn.Module:
        calls.append((size, eps, affine))
        return nn.LayerNorm(size, eps, affine)

    BertForPreTraining(SIZE.model_copy(update={"layer_norm_affine": False}), factory)
    assert calls == [(24, 1e-12, True), *[(24, 1e-12, False)] * 6, (24, 1e-12, True)]
