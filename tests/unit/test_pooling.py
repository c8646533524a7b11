"""stacking/pooling.py and the pooled forward: against slow references, and against the ordinary
model of which pooling by 1 is a permutation.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stacking.config import BertConfig
from stacking.functional import gather_rows
from stacking.masked_lm_loss import IGNORED_LABEL
from stacking.modeling import BertForPreTraining, init_weights
from stacking.pooling import Kind, pool_rows, split_streams

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
     "pooler": False, "embedding_scale": True, "embedding_layer_norm": False},
    {"num_nsp_labels": 0, "num_hidden_layers": 1, "position": "rotary"},
    {"num_hidden_layers": 4, "shared_attention_layers": (2, 3)},
]  # fmt: skip
KINDS: list[Kind] = ["mean", "max", "concat"]


def build(options: dict[str, object]) -> BertForPreTraining:
    """A small model in training mode without dropout; biases and LayerNorms are random, too."""
    model = BertForPreTraining(SIZE.model_copy(update=options))
    generator = torch.Generator().manual_seed(3)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def batch(model: BertForPreTraining, seed: int = 5) -> dict[str, Tensor]:
    """Four sequences of 11 tokens, 7, 11, 9 and 11 real; P = 4, the last with filling only."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, 57, (4, 11), generator=generator)
    mask = torch.arange(11) < torch.tensor([[7], [11], [9], [11]])
    input_ids[~mask] = 0
    ignored = [IGNORED_LABEL] * 4
    segments = (torch.arange(11) > 4).long().repeat(4, 1)
    return {
        "input_ids": input_ids,
        **({"token_type_ids": segments} if model.config.type_vocab_size else {}),
        "attention_mask": mask,
        "masked_lm_positions": torch.tensor([[1, 3, 6, 0], [2, 5, 8, 10], [8, 0, 0, 0], [0] * 4]),
        "masked_lm_ids": torch.tensor([[5, 9, 2, -100], [8, 1, 56, 3], [4, *ignored[1:]], ignored]),
        "next_sentence_labels": torch.tensor([1, 0, 1, 0]),
    }


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """Sum of all loss sums."""
    return torch.stack([value for name, value in losses.items() if "loss" in name]).sum()


def slow_rows(
    hidden: Tensor, mask: list[bool], masked: list[int], size: int, kind: Kind, weight: Tensor
) -> tuple[list[Tensor], list[float]]:
    """Real rows of one sequence [S,H] and their positions, token by token."""
    rows, positions = [hidden[0]], [0.0]
    stream = [at for at in range(1, len(hidden)) if at not in masked]
    for start in range(0, len(stream), size):
        inside = [at for at in stream[start : start + size] if mask[at]]
        if not inside:
            continue
        tokens = [hidden[at] if mask[at] else torch.zeros_like(hidden[at])
                  for at in stream[start : start + size]]  # fmt: skip
        tokens += [torch.zeros_like(hidden[0])] * (size - len(tokens))
        rows.append({"mean": torch.stack([hidden[at] for at in inside]).mean(0),
                     "max": torch.stack([hidden[at] for at in inside]).amax(0),
                     "concat": torch.cat(tokens) @ weight.T}[kind])  # fmt: skip
        positions.append(sum(inside) / len(inside))
    real = [at for at in masked if at and mask[at]]
    return rows + [hidden[at] for at in real], positions + [float(at) for at in real]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_rows_equal_those_pooled_token_by_token(data: st.DataObject, kind: Kind) -> None:
    """Any length, window, number of predictions and padding; the number of rows is fixed."""
    length, size = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 5))
    predictions = data.draw(st.integers(1, 6))
    real = data.draw(st.lists(st.integers(1, length), min_size=2, max_size=2))
    masked = [
        data.draw(st.lists(st.sampled_from(range(1, end)), unique=True, max_size=predictions))
        if end > 1
        else []
        for end in real
    ]
    hidden = torch.randn(2, length, 6, generator=torch.Generator().manual_seed(length))
    weight = torch.randn(6, 6 * size, generator=torch.Generator().manual_seed(size))
    projection = torch.nn.Linear(6 * size, 6, bias=False)
    projection.weight = torch.nn.Parameter(weight, requires_grad=False)
    mask = torch.arange(length) < torch.tensor(real)[:, None]
    slots = torch.tensor([at + [0] * (predictions - len(at)) for at in masked])
    streams = split_streams(mask, slots, length=length, pooling_size=size)
    rows = pool_rows(hidden, streams, kind, projection)
    assert rows.shape == (2, 1 + -(-(length - 1) // size) + predictions, 6)
    for index in range(2):
        expected, positions = slow_rows(
            hidden[index], mask[index].tolist(), masked[index], size, kind, weight
        )
        is_real = streams.mask[index]
        torch.testing.assert_close(rows[index][is_real], torch.stack(expected))
        torch.testing.assert_close(
            streams.positions()[index][is_real], torch.tensor(positions, dtype=torch.float64)
        )
        assert rows.isfinite().all()


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("padded", [True, False])
def test_pooling_by_one_is_the_ordinary_model_in_another_order(
    options: dict[str, object], kind: Kind, padded: bool
) -> None:
    """[CLS] and the masked rows are those of the ordinary encoder, with and without padding."""
    model = build(options)
    inputs = batch(model)
    ids, positions = inputs["input_ids"], inputs["masked_lm_positions"]
    mask = inputs["attention_mask"] if padded else None
    embedded = model.embeddings(ids, inputs.get("token_type_ids"))
    streams = split_streams(mask, positions, length=11, pooling_size=1)
    pooled = (pool_rows(embedded, streams, kind), streams.mask, streams.positions())
    rows: Tensor = model.encoder(embedded, mask, streams.rows_with_loss(True), pooled)
    ordinary: Tensor = model.encoder(embedded, mask, None)
    torch.testing.assert_close(rows[:, 0], ordinary[:, 0], atol=2e-5, rtol=0)
    expected = gather_rows(ordinary, positions)[positions > 0]
    torch.testing.assert_close(rows[:, 1:][positions > 0], expected, atol=2e-5, rtol=0)
    everything: Tensor = model.encoder(embedded, mask, None, pooled)
    assert everything.shape == (4, 15, 24)
    windows = everything[:, 1:11][streams.mask[:, 1:11]]
    at = streams.windows[..., 0][streams.mask[:, 1:11]]
    sequence = torch.arange(4)[:, None].expand(4, 10)[streams.mask[:, 1:11]]
    torch.testing.assert_close(windows, ordinary[sequence, at], atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_the_logits(options: dict[str, object], kind: Kind) -> None:
    """The last layer at the read rows only: no loss and no gradient changes."""
    model = build({**options, "pooling": kind, "pooling_size": 3})
    inputs = batch(model)
    losses = model(**inputs)
    short = torch.autograd.grad(total_loss(losses), list(model.parameters()))
    labels = inputs.pop("masked_lm_ids")
    next_labels = inputs.pop("next_sentence_labels")
    outputs = model(**inputs)
    logits = outputs["prediction_logits"]
    assert logits.shape == (4, 4, 57)
    assert outputs["last_hidden_state"].shape == (4, 1 + 4 + 4, 24)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(losses["mlm_loss_sum"], expected)
    assert losses["mlm_correct"] == (logits.argmax(-1) == labels).sum()
    if model.config.num_nsp_labels == 2:
        nsp = outputs["seq_relationship_logits"]
        expected = expected + F.cross_entropy(nsp, next_labels, reduction="sum")
    elif model.config.num_nsp_labels == 1:
        nsp = outputs["seq_relationship_logits"][:, 0]
        is_next = (next_labels == 0).float()
        expected = expected + F.binary_cross_entropy_with_logits(nsp, is_next, reduction="sum")
    full = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for name, one, other in zip(dict(model.named_parameters()), short, full, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_filling_and_padding_change_nothing(options: dict[str, object], kind: Kind) -> None:
    """More slots, more padding, other tokens in it: the same losses and gradients."""
    model = build({**options, "pooling": kind, "pooling_size": 2})
    inputs = batch(model)
    expected = total_loss(model(**inputs))
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    wider = dict(inputs)
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        if name in inputs:
            value = {"input_ids": 33, "token_type_ids": 1, "attention_mask": False}[name]
            wider[name] = F.pad(inputs[name], (0, 3), value=value)
    wider["input_ids"] = wider["input_ids"].masked_fill(~wider["attention_mask"], 44)
    wider["masked_lm_positions"] = F.pad(inputs["masked_lm_positions"], (0, 2))
    wider["masked_lm_ids"] = F.pad(inputs["masked_lm_ids"], (0, 2), value=IGNORED_LABEL)
    actual = total_loss(model(**wider))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(actual, list(model.parameters())), gradients, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_real_token_reaches_the_loss(kind: Kind) -> None:
    """Unmasked, masked and [CLS] tokens all matter, through keys and values at full length."""
    model = build({"pooling": kind, "pooling_size": 3})
    inputs = batch(model)
    expected = model(**inputs)["mlm_loss_sum"]
    for at in range(11):
        changed = inputs["input_ids"].clone()
        changed[1, at] = (changed[1, at] + 7) % 56 + 1
        loss = model(**{**inputs, "input_ids": changed})["mlm_loss_sum"]
        assert abs(loss - expected) > 1e-3, at


def test_order_of_the_predictions_does_not_matter() -> None:
    """Slots are a set: shuffled together with their labels they give the same losses."""
    model = build({"pooling": "mean", "pooling_size": 2, "position": "rotary"})
    inputs = batch(model)
    expected = total_loss(model(**inputs))
    order = torch.tensor([3, 1, 0, 2])
    for name in ("masked_lm_positions", "masked_lm_ids"):
        inputs[name] = inputs[name][:, order]
    torch.testing.assert_close(total_loss(model(**inputs)), expected, atol=1e-4, rtol=0)


def test_asking_for_every_position_leaves_pooling_out() -> None:
    """No positions: the ordinary forward of the same weights; the un-pooled stage continues it."""
    model = build({"pooling": "max", "pooling_size": 2})
    ordinary = BertForPreTraining(SIZE)
    ordinary.load_state_dict(model.state_dict())
    inputs = {
        name: batch(model)[name] for name in ("input_ids", "token_type_ids", "attention_mask")
    }
    for name, value in ordinary(**inputs).items():
        assert torch.equal(model(**inputs)[name], value)
    labels = torch.full((4, 11), 3)
    expected = ordinary(**inputs, masked_lm_ids=labels)["mlm_loss_sum"]
    assert torch.equal(model(**inputs, masked_lm_ids=labels)["mlm_loss_sum"], expected)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_fp32_and_empty_batches_are_finite(
    options: dict[str, object], kind: Kind
) -> None:
    """Losses within 3 %; a row of padding only and nothing to predict: zero loss, no NaN."""
    model = build({**options, "pooling": kind, "pooling_size": 2})
    inputs = batch(model)
    expected = total_loss(model(**inputs)).item()
    model.bfloat16()
    assert total_loss(model(**inputs)).item() == pytest.approx(expected, rel=0.03)
    inputs["masked_lm_ids"] = torch.full((4, 4), IGNORED_LABEL)
    inputs["masked_lm_positions"] = torch.zeros(4, 4, dtype=torch.int64)
    inputs["next_sentence_labels"] = torch.full((4,), IGNORED_LABEL)
    inputs["attention_mask"][1] = False
    losses = model(**inputs)
    assert total_loss(losses) == 0.0
    torch.autograd.backward([total_loss(losses)])
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_one_token_sequences_have_no_window() -> None:
    """S = 1: [CLS] alone, and one filling slot."""
    model = build({"pooling": "concat", "pooling_size": 2})
    ids = torch.tensor([[7], [8]])
    zeros = torch.zeros(2, 1, dtype=torch.int64)
    outputs = model(ids, None, None, zeros)
    assert outputs["last_hidden_state"].shape == (2, 2, 24)
    assert outputs["seq_relationship_logits"].isfinite().all()


def test_the_concat_projection_is_drawn_like_a_matrix() -> None:
    """init_weights covers it, and it trains."""
    model = BertForPreTraining(
        SIZE.model_copy(update={"pooling": "concat", "pooling_size": 3, "hidden_size": 192})
    )
    init_weights(model, torch.Generator().manual_seed(1))
    weight = model.get_parameter("embeddings.pooling.weight")
    assert weight.shape == (192, 576)
    assert weight.std().item() == pytest.approx(0.2, rel=0.02)
    assert (model.get_parameter("embeddings.pooling.bias") == 0).all()
    torch.autograd.backward([total_loss(model(**batch(model)))])
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_nothing_is_read_back_from_the_device() -> None:
    """The pooled forward runs on the meta device, where no shape may depend on data."""
    for kind in KINDS:
        with torch.device("meta"):
            model = BertForPreTraining(
                SIZE.model_copy(update={"pooling": kind, "pooling_size": 2, "position": "rotary"})
            )
        inputs = {name: value.to("meta") for name, value in batch(model).items()}
        losses = model(**inputs)
        torch.autograd.backward([total_loss(losses)])
        assert all(parameter.grad is not None for parameter in model.parameters())
