"""Checkpointed encoder layers: the same bits, fewer bytes, and only where something trains."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from stacking.config import BertConfig, Freeze
from stacking.freezing import apply_freeze
from stacking.modeling import BertForPreTraining, init_weights

SIZE = BertConfig(
    vocab_size=57, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=31,
    max_position_embeddings=19, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3,
    initializer_range=0.2,
)  # fmt: skip
VARIANTS: list[dict[str, object]] = [
    {},
    {"layer_norm": "pre", "position": "rotary"},
    {"shared_attention_layers": (1, 3), "layer_norm": "pre"},
    {"pooling": "mean", "position": "rotary"},
    {"pooling": "concat", "shared_attention_layers": (2, 3)},
    {"num_hidden_layers": 1, "num_nsp_labels": 0},
]
CASES = [(options, 0) for options in VARIANTS] + [
    (options, 2) for options in VARIANTS if options.get("num_hidden_layers") != 1
]
DTYPES = [torch.float32, torch.bfloat16]


def build(options: dict[str, object], frozen: int = 0) -> BertForPreTraining:
    model = BertForPreTraining(SIZE.model_copy(update=options))
    init_weights(model, torch.Generator().manual_seed(3))
    if frozen:
        apply_freeze(model, Freeze(layers=frozen))
    return model.train()


def batch(model: BertForPreTraining) -> dict[str, Tensor]:
    """Three sequences of 11 tokens, 7 and 11 and 9 of them real; P = 3 with filling."""
    input_ids = torch.randint(1, 57, (3, 11), generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([[4, 9, -100], [8, 3, 11], [5, -100, -100]])
    given = {
        "input_ids": input_ids,
        "attention_mask": torch.arange(11) < torch.tensor([[7], [11], [9]]),
        "masked_lm_positions": torch.tensor([[2, 5, 0], [1, 4, 9], [3, 0, 0]]),
        "masked_lm_ids": labels,
    }
    if model.nsp_head is not None:
        given["next_sentence_labels"] = torch.tensor([1, 0, 1])
    return given


def losses_and_gradients(model: BertForPreTraining, seed: int = 7) -> dict[str, Tensor]:
    """Every sum that the model returns and every gradient."""
    torch.manual_seed(seed)
    sums = model(**batch(model))
    loss = sums["mlm_loss_sum"] + sums.get("nsp_loss_sum", torch.zeros(()))
    torch.autograd.backward(loss)
    found = {f"sum {name}": value.detach() for name, value in sums.items()}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["next draw"] = torch.rand(3)
    model.zero_grad()
    return found


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def saved_bytes(model: BertForPreTraining) -> int:
    """What a training forward keeps for its backward pass, besides parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = model(**batch(model))
    assert sums["mlm_loss_sum"].requires_grad
    return sum(kept.values())


def calls_by_layer(model: BertForPreTraining, *, backward: bool = True) -> list[int]:
    """How often each layer is computed, in a forward and, where asked, its backward pass."""
    calls: Counter[int] = Counter()
    handles = [
        layer.register_forward_pre_hook(lambda _, __, i=i: calls.update([i]))
        for i, layer in enumerate(model.encoder.layers)
    ]
    sums = model(**batch(model))
    if backward:
        sums["mlm_loss_sum"].backward()
    for handle in handles:
        handle.remove()
    return [calls[i] for i in range(len(model.encoder.layers))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "frozen"), CASES, ids=str)
def test_checkpointing_changes_no_bit_of_losses_and_gradients(
    options: dict[str, object], frozen: int, dtype: torch.dtype
) -> None:
    model = build(options, frozen).to(dtype)
    plain = losses_and_gradients(model)
    assert not torch.equal(
        plain["sum mlm_loss_sum"], losses_and_gradients(model, 8)["sum mlm_loss_sum"]
    )
    for interval in (1, 2, 9):
        model.encoder.checkpoint_interval = interval
        assert_same_bits(losses_and_gradients(model), plain)


def test_checkpointing_under_autocast_changes_no_bit() -> None:
    model = build({"position": "rotary"})
    with torch.autocast("cpu", torch.bfloat16):
        plain = losses_and_gradients(model)
        model.encoder.checkpoint_interval = 1
        assert_same_bits(losses_and_gradients(model), plain)


def test_every_kth_layer_that_trains_is_computed_twice_and_no_other() -> None:
    model = build({})
    assert calls_by_layer(model) == [1, 1, 1, 1]
    model.encoder.checkpoint_interval = 1
    assert calls_by_layer(model) == [2, 2, 2, 2]
    model.encoder.checkpoint_interval = 2
    assert calls_by_layer(model) == [2, 1, 2, 1]
    model = build({}, frozen=1)
    model.encoder.checkpoint_interval = 2
    assert calls_by_layer(model) == [1, 2, 1, 2]


@pytest.mark.parametrize("is_training", [True, False])
def test_nothing_is_checkpointed_where_no_gradient_is_asked(
    is_training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build({}).train(is_training)
    model.encoder.checkpoint_interval = 1
    monkeypatch.setattr("stacking.encoder.checkpoint", None)
    with torch.no_grad():
        assert calls_by_layer(model, backward=False) == [1, 1, 1, 1]
    with pytest.raises(TypeError):
        calls_by_layer(model, backward=False)


def test_a_checkpointed_layer_keeps_little() -> None:
    model = build({"num_hidden_layers": 12})
    plain = saved_bytes(model)
    model.encoder.checkpoint_interval = 2
    half = saved_bytes(model)
    model.encoder.checkpoint_interval = 1
    full = saved_bytes(model)
    assert full < plain / 4
    assert full < half < 0.65 * plain
    assert full < half < plain
