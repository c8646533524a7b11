"""Padding that is not computed changes no number: losses and gradients of the padded forward."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stacking.config import BertConfig, Freeze
from stacking.freezing import apply_freeze
from stacking.modeling import BertForPreTraining, init_weights
from stacking.unpadding import GROUP_STEP, can_unpad, find_layout

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 200, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "2019": {"layer_norm": "pre", "layer_norm_affine": False, "position": "sinusoidal",
             "embedding_scale": True, "num_nsp_labels": 1},
    "rotary": {"position": "rotary", "layer_norm": "pre"},
    "one layer, no pairs": {"num_hidden_layers": 1, "num_nsp_labels": 0, "type_vocab_size": 0},
}  # fmt: skip


def inputs(
    lengths: Sequence[int], length: int, config: BertConfig, *, masked: str
) -> dict[str, Any]:
    """A batch of sequences of these lengths; masked: "none", "all" real tokens, or "some"."""
    generator = torch.Generator().manual_seed(sum(lengths) + length)
    batch = len(lengths)
    ids = torch.randint(5, config.vocab_size, (batch, length), generator=generator)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    predictions = length if masked == "all" else 4
    positions = torch.zeros(batch, predictions, dtype=torch.int64)
    labels = torch.full_like(positions, -100)
    for row, real in enumerate(lengths if masked != "none" else ()):
        here = torch.randperm(real, generator=generator)[:predictions]
        positions[row, : len(here)] = here
        labels[row, : len(here)] = ids[row, here]
    found: dict[str, Any] = {
        "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask,
        "masked_lm_positions": positions, "masked_lm_ids": labels,
    }  # fmt: skip
    if config.num_nsp_labels:
        found["next_sentence_labels"] = torch.arange(batch) % 2
    if config.type_vocab_size:
        found["token_type_ids"] = (torch.arange(length) > length // 3).long().expand(batch, -1)
    return found


def built(config: BertConfig, dtype: torch.dtype = torch.float32) -> BertForPreTraining:
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(3))
    return model.to(dtype).train()


def losses_and_gradients(
    model: BertForPreTraining, given: dict[str, Any], *, unpadded: bool
) -> dict[str, Tensor]:
    layout = find_layout(given["attention_mask"]) if unpadded else None
    assert (layout is not None) == unpadded
    model.zero_grad(set_to_none=True)
    sums = model(**given, layout=layout)
    sum(value for name, value in sums.items() if name.endswith("_loss_sum")).backward()
    found = {name: value.detach() for name, value in sums.items()}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        scale = max(1.0, float(theirs[name].abs().max()))
        assert float((value - theirs[name]).abs().max()) <= bound * scale, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_every_form_of_model_has_the_same_losses_and_gradients(kind: str, masked: str) -> None:
    config = BertConfig(**(SIZES | KINDS[kind]))
    given = inputs([1, 70, 7, 150, 64, 65, 3], 150, config, masked=masked)
    model = built(config)
    padded = losses_and_gradients(model, given, unpadded=False)
    assert_close(losses_and_gradients(model, given, unpadded=True), padded, 1e-5)


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    masked=st.sampled_from(["none", "some", "all"]),
)
@settings(max_examples=40, deadline=None)
def test_any_lengths_have_the_same_losses_and_gradients(lengths: list[int], masked: str) -> None:
    """Length 0 is a row that fills up a validation batch."""
    config = BertConfig(**SIZES)
    lengths = [*lengths, 1]
    given = inputs(lengths, 101, config, masked=masked)
    given["next_sentence_labels"][torch.tensor(lengths) == 0] = -100
    model = built(config)
    padded = losses_and_gradients(model, given, unpadded=False)
    assert_close(losses_and_gradients(model, given, unpadded=True), padded, 1e-5)


def test_bf16_agrees_to_its_own_rounding() -> None:
    config = BertConfig(**(SIZES | {"initializer_range": 0.1}))
    given = inputs([5, 100, 33, 64], 128, config, masked="some")
    model = built(config, torch.bfloat16)
    padded = losses_and_gradients(model, given, unpadded=False)
    assert_close(losses_and_gradients(model, given, unpadded=True), padded, 0.03)


def test_a_mask_with_holes_is_meant_as_it_is() -> None:
    config = BertConfig(**SIZES)
    given = inputs([40, 90], 100, config, masked="none")
    given["attention_mask"][1, 5:30] = False
    given["masked_lm_positions"][1, :2] = torch.tensor([2, 60])
    given["masked_lm_ids"][1, :2] = torch.tensor([9, 10])
    model = built(config)
    padded = losses_and_gradients(model, given, unpadded=False)
    assert_close(losses_and_gradients(model, given, unpadded=True), padded, 1e-5)


def test_all_positions_leave_where_none_are_named() -> None:
    config = BertConfig(**(SIZES | {"num_nsp_labels": 0}))
    given = inputs([12, 55], 70, config, masked="none")
    labels = torch.full_like(given["input_ids"], -100)
    labels[:, 3:9] = given["input_ids"][:, 3:9]
    given |= {"masked_lm_positions": None, "masked_lm_ids": labels}
    model = built(config)
    padded = losses_and_gradients(model, given, unpadded=False)
    assert_close(losses_and_gradients(model, given, unpadded=True), padded, 1e-5)


def test_a_frozen_bottom_stays_frozen() -> None:
    config = BertConfig(**SIZES)
    given = inputs([12, 55], 70, config, masked="some")
    model = built(config)
    apply_freeze(model, Freeze(layers=2))
    padded = losses_and_gradients(model, given, unpadded=False)
    ours = losses_and_gradients(model, given, unpadded=True)
    assert_close(ours, padded, 1e-5)
    assert "encoder.layers.1.attention.qkv.weight" not in ours
    assert "encoder.layers.2.attention.qkv.weight" in ours


def test_layers_that_are_computed_again_draw_the_same_dropout() -> None:
    config = BertConfig(**(SIZES | {"hidden_dropout_prob": 0.2,
                                    "attention_probs_dropout_prob": 0.2}))  # fmt: skip
    given = inputs([12, 55], 70, config, masked="some")
    model = built(config)
    found = []
    for interval in (0, 1):
        model.encoder.checkpoint_interval = interval
        torch.manual_seed(5)
        found.append(losses_and_gradients(model, given, unpadded=True))
    assert_close(found[0], found[1], 0.0)


def test_groups_hold_sequences_of_like_length_and_every_token_once() -> None:
    lengths = torch.tensor([0, 3, GROUP_STEP, GROUP_STEP + 1, 500, 4])
    layout = find_layout(torch.arange(512) < lengths[:, None])
    assert layout is not None
    for group in layout.groups:
        real = lengths[group.sequences].clamp(min=1)
        assert group.length == int(real.max())
        assert group.length - int(real.min()) < GROUP_STEP
    assert sorted(layout.slots[layout.places].tolist()) == list(range(int(lengths.sum())))
    assert torch.equal(layout.slots[layout.places], torch.arange(int(lengths.sum())))


@pytest.mark.parametrize("lengths", [[10, 10], [10, 9], [0, 0]])
def test_little_padding_is_computed_and_so_is_nothing_but_padding(lengths: list[int]) -> None:
    assert find_layout(torch.arange(10) < torch.tensor(lengths)[:, None]) is None


@pytest.mark.parametrize(
    ("form", "can"),
    [
        ({}, True),
        ({"pooling": "mean", "pooling_size": 2}, False),
        ({"shared_attention_layers": (1,)}, False),
    ],
)
def test_models_that_mix_rows_otherwise_keep_their_padding(form: dict[str, Any], can: bool) -> None:
    assert can_unpad(BertConfig(**(SIZES | form))) is can
