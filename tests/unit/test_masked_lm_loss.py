"""The masked-LM loss without fp32 logits against cross entropy of whole logits in fp64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stacking import masked_lm_loss as module
from stacking.config import BertConfig
from stacking.masked_lm_loss import IGNORED_LABEL, masked_lm_loss
from stacking.modeling import BertForPreTraining, init_weights

# The largest relative error of a gradient's norm that is allowed beside fp64. Half a unit in the
# last place is 2^-8 and 2^-11 of a number, and each gradient is rounded twice or thrice.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@dataclass
class Case:
    """Inputs, as the model has them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def to(self, dtype: torch.dtype) -> "Case":
        """Other leaves of the same values, rounded."""
        hidden, weight, *bias = (t.detach().to(dtype).requires_grad_() for t in self.inputs())
        return Case(hidden, weight, bias[0] if bias else None, self.labels)


def case(rows: int, size: int, words: int, dtype: torch.dtype = torch.float32, *, seed: int = 0,
         ignored: float = 0.3, has_bias: bool = True) -> Case:  # fmt: skip
    """Random inputs; a share of the rows does not count."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, deviation: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator) * deviation
        return values.to(dtype).requires_grad_()

    labels = torch.randint(0, words, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = IGNORED_LABEL
    bias = draw(words, deviation=0.5) if has_bias else None
    return Case(draw(rows, size), draw(words, size, deviation=0.3), bias, labels)


def plain(given: Case) -> tuple[Tensor, Tensor]:
    """The definition."""
    logits = F.linear(given.hidden, given.weight, given.bias)
    losses = F.cross_entropy(logits, given.labels, ignore_index=IGNORED_LABEL, reduction="none")
    return losses.sum(), (logits.argmax(-1) == given.labels).sum()


def exact(given: Case) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the same numbers in fp64."""
    wide = given.to(torch.float64)
    loss, _ = plain(wide)
    return loss.detach(), list(torch.autograd.grad(loss, wide.inputs()))


def ours(given: Case, factor: float = 1.0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, hits and the gradients of `factor` times the loss."""
    loss, correct = masked_lm_loss(given.hidden, given.weight, given.bias, given.labels)
    return loss.detach(), correct, list(torch.autograd.grad(loss * factor, given.inputs()))


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, of the norms; absolute where there is nothing to compare with."""
    norm = float(expected.norm())
    return float((found.double() - expected).norm()) / (norm if norm > 0 else 1.0)


def magnitudes(given: Case) -> list[Tensor]:
    """What each gradient would be if none of the terms that it sums were negative.

    Where these nearly cancel, no fp32 sum is close beside what is left.
    """
    hidden, weight, *bias = (t.detach().double() for t in given.inputs())
    probabilities = F.linear(hidden, weight, *bias).softmax(-1)
    terms = probabilities + F.one_hot(given.labels.clamp(min=0), len(weight))
    terms *= (given.labels != IGNORED_LABEL)[:, None]
    return [terms @ weight.abs(), terms.t() @ hidden.abs(), terms.sum(0)][: 2 + len(bias)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    ("rows", "size", "words"), [(1, 1, 2), (37, 19, 101), (200, 24, 57), (3, 8, 3001)]
)
def test_loss_and_gradients_are_those_of_cross_entropy(
    rows: int, size: int, words: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CPU_NUMBERS", 1000)  # several blocks, the last one smaller
    given = case(rows, size, words, dtype)
    loss, correct, gradients = ours(given)
    expected, wanted = exact(given)
    assert loss.dtype == torch.float32
    assert distance(loss, expected) <= ROUNDING[dtype]
    assert correct == plain(given)[1]
    for found, right, given_to in zip(gradients, wanted, given.inputs(), strict=True):
        assert (found.dtype, found.shape) == (dtype, given_to.shape)
        assert distance(found, right) <= ROUNDING[dtype]
    ignored = given.labels == IGNORED_LABEL
    assert not gradients[0][ignored].any()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40), size=st.integers(1, 33), words=st.integers(2, 70),
    ignored=st.sampled_from([0.0, 0.5, 1.0]), has_bias=st.booleans(), seed=st.integers(0, 999),
    numbers=st.integers(1, 2000), factor=st.sampled_from([1.0, 1e-4, 300.0]),
)  # fmt: skip
def test_any_size_in_fp32_to_1e_5(
    rows: int, size: int, words: int, ignored: float, has_bias: bool, seed: int, numbers: int,
    factor: float,
) -> None:  # fmt: skip
    given = case(rows, size, words, seed=seed, ignored=ignored, has_bias=has_bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_NUMBERS", numbers)
        loss, correct, gradients = ours(given, factor)
    expected, wanted = exact(given)
    assert distance(loss, expected) <= 1e-5
    assert correct == plain(given)[1]
    for found, right, terms in zip(gradients, wanted, magnitudes(given), strict=True):
        error = (found.double() - right * factor).norm()
        assert error <= factor * max(1e-5 * right.norm(), 2**-23 * terms.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_no_worse_than_the_plain_path(dtype: torch.dtype) -> None:
    """Beside fp64, as trained: the label's logit stands out, most words are very unlikely."""
    given = case(300, 64, 999, dtype, ignored=0.1)
    with torch.no_grad():
        given.hidden += 0.8 * given.weight[given.labels.clamp(min=0)]
    _, wanted = exact(given)
    for factor in (1e-3, 1.0, 200.0):  # shares of a loss, and fp16's loss scale
        logits = F.linear(given.hidden, given.weight, given.bias).float()
        loss = F.cross_entropy(logits, given.labels, reduction="sum")
        theirs = torch.autograd.grad(loss * factor, given.inputs())
        for mine, other, right in zip(ours(given, factor)[2], theirs, wanted, strict=True):
            assert distance(mine, right * factor) <= 1.3 * distance(other, right * factor) + 1e-4


@pytest.mark.parametrize("dtype", ROUNDING)
def test_rows_that_do_not_count_weigh_nothing(dtype: torch.dtype) -> None:
    for rows in (0, 5):
        given = case(rows, 8, 21, dtype, ignored=1.0)
        loss, correct, gradients = ours(given)
        assert float(loss) == 0.0
        assert int(correct) == 0
        assert not any(bool(gradient.any()) for gradient in gradients)
    filled = case(9, 8, 21, dtype, ignored=0.0)
    some = Case(filled.hidden, filled.weight, filled.bias, filled.labels.clone())
    some.labels[4:] = IGNORED_LABEL
    kept = Case(filled.hidden[:4].detach().requires_grad_(), filled.weight, filled.bias,
                filled.labels[:4])  # fmt: skip
    (loss, correct, gradients), (expected, right, wanted) = ours(some), ours(kept)
    torch.testing.assert_close(loss, expected)
    assert correct == right
    torch.testing.assert_close(gradients[0][:4], wanted[0])
    for found, wanted_too in zip(gradients[1:], wanted[1:], strict=True):
        torch.testing.assert_close(found, wanted_too)


def test_probabilities_that_fp16_cannot_hold_still_push() -> None:
    """A word of probability 3e-8 is pushed down; in fp16 itself it would be rounded to 0."""
    hidden = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[9.0], [-8.3]], dtype=torch.float16, requires_grad=True)
    loss, _ = masked_lm_loss(hidden, weight, None, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss * 1024, weight)
    expected = 1024 * torch.softmax(weight.detach().double()[:, 0], 0)[1]
    assert float(gradient[1, 0]) == pytest.approx(float(expected), rel=0.02)


def test_a_tie_is_decided_as_argmax_does() -> None:
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0], [1.0]])
    assert masked_lm_loss(hidden, weight, None, torch.tensor([1, 2]))[1] == 1


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_what_is_frozen_gets_no_gradient(frozen: tuple[int, ...]) -> None:
    given = case(13, 5, 17)
    every = ours(given)[2]
    for index in frozen:
        given.inputs()[index].requires_grad_(False)
    loss, _ = masked_lm_loss(given.hidden, given.weight, given.bias, given.labels)
    trained = [index for index in range(3) if index not in frozen]
    assert loss.requires_grad == bool(trained)
    if trained:
        found = torch.autograd.grad(loss, [given.inputs()[index] for index in trained])
        assert all(torch.equal(a, every[index]) for a, index in zip(found, trained, strict=True))


def test_without_a_record_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(13, 5, 17)
    expected = ours(given)
    # None of what the gradient is made of may be called.
    monkeypatch.setattr(torch, "full_like", None)
    with torch.no_grad():
        loss, correct = masked_lm_loss(given.hidden, given.weight, given.bias, given.labels)
    assert not loss.requires_grad
    assert torch.equal(loss, expected[0])
    assert torch.equal(correct, expected[1])


def test_a_graph_that_is_kept_can_be_gone_through_again() -> None:
    given = case(13, 5, 17)
    loss, _ = masked_lm_loss(given.hidden, given.weight, given.bias, given.labels)
    first = torch.autograd.grad(loss, given.inputs(), retain_graph=True)
    second = torch.autograd.grad(loss, given.inputs())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_products_alone_have_16_bits(dtype: torch.dtype) -> None:
    given = case(60, 24, 101)
    with torch.autocast("cpu", dtype):
        loss, _ = masked_lm_loss(given.hidden, given.weight, given.bias, given.labels)
    gradients = torch.autograd.grad(loss, given.inputs())
    expected, _, wanted = ours(given.to(dtype))
    assert torch.equal(loss, expected)
    for found, right in zip(gradients, wanted, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, right.float())


def test_compiled_it_gives_the_same() -> None:
    given = case(13, 5, 17)
    compiled = torch.compile(masked_lm_loss, backend="eager", fullgraph=True)
    loss, correct = compiled(given.hidden, given.weight, given.bias, given.labels)
    expected, right, wanted = ours(given)
    torch.testing.assert_close(loss, expected)
    assert correct == right
    for found, gradient in zip(torch.autograd.grad(loss, given.inputs()), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def test_the_backward_pass_holds_one_16_bit_number_for_each_logit() -> None:
    """Of what the graph keeps: the model's precision, once; the plain path keeps fp32 as well."""
    given = case(64, 8, 500, torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked_lm_loss(given.hidden, given.weight, given.bias, given.labels)
    assert [t.dtype for t in kept if t.numel() == 64 * 500] == [torch.bfloat16]


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_trains_both_ends_of_a_tied_decoder(tied: bool) -> None:
    config = BertConfig(
        vocab_size=41, hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=9, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, num_nsp_labels=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(1))
    ids = torch.randint(1, 41, (2, 9), generator=torch.Generator().manual_seed(2))
    labels = torch.where(ids % 2 == 0, ids, IGNORED_LABEL)
    found = model(ids, masked_lm_ids=labels)["mlm_loss_sum"]
    logits = model(ids)["prediction_logits"].flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = list(model.parameters())
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights),
                strict=True)  # fmt: skip
    for ours_, theirs in pairs:
        torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-6)
