"""stacking.residuals: the sizes are those of a forward made by hand, and change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.modeling import BertForPreTraining, init_weights
from stacking.residuals import recorded, root_mean_square
from stacking.unpadding import find_layout

LENGTHS = torch.tensor([7, 2, 5])
MASK = torch.arange(7) < LENGTHS[:, None]
POSITIONS = torch.tensor([[1, 4], [1, 0], [3, 0]])  # 0 is filling


def model(layers: int = 3, **changes: Any) -> BertForPreTraining:
    config = BertConfig.model_validate({
        "vocab_size": 61, "hidden_size": 12, "num_hidden_layers": layers, "num_attention_heads": 2,
        "intermediate_size": 20, "max_position_embeddings": 9, **changes,
    })  # fmt: skip
    made = BertForPreTraining(config)
    init_weights(made, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


def inputs(mask: Tensor | None = MASK) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 61, (3, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "masked_lm_positions": POSITIONS}


def losses(with_nsp: bool = True) -> dict[str, Tensor]:
    """What turns the forward of `inputs` into one for training."""
    wanted = {"masked_lm_ids": torch.tensor([[7, 8], [9, -100], [11, -100]])}
    labels = {"next_sentence_labels": torch.tensor([0, 1, 1])} if with_nsp else {}
    return {**wanted, **labels}


def size(rows: Tensor) -> float:
    """Of rows [n, H]."""
    return float((rows.detach().double() ** 2).mean().sqrt())


def hidden_states(made: BertForPreTraining, mask: Tensor | None) -> list[Tensor]:
    """[B,S,H] after the embeddings and after each layer: layer by layer, nothing left out."""
    given = inputs(mask)
    seen = []
    hooks = [made.embeddings.register_forward_hook(lambda m, args, out: seen.append(out))]
    hooks += [layer.register_forward_hook(lambda m, args, out: seen.append(out[0]))
              for layer in made.encoder.layers]  # fmt: skip
    made(given["input_ids"], attention_mask=mask)
    for hook in hooks:
        hook.remove()
    return seen


FORMS: list[dict[str, Any]] = [
    {}, {"layer_norm": "pre"}, {"position": "rotary"}, {"shared_attention_layers": [1]},
]  # fmt: skip


@pytest.mark.parametrize("changes", FORMS, ids=str)
@pytest.mark.parametrize("mask", [MASK, None], ids=["padded", "whole"])
def test_sizes_are_those_of_real_tokens(mask: Tensor | None, changes: dict[str, Any]) -> None:
    made = model(**changes)
    real = torch.ones_like(MASK) if mask is None else mask
    expected = [size(states[real]) for states in hidden_states(made, mask)]
    with recorded(made) as found:
        made(**inputs(mask))
    assert [float(f) for f in found] == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 4) for value in expected}) == 4  # a test that could not fail else


@pytest.mark.parametrize("unpads", [False, True])
@pytest.mark.parametrize("with_nsp", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_in_training_the_last_layers_are_those_that_a_loss_reads(
    layers: int, with_nsp: bool, unpads: bool
) -> None:
    made = model(layers, num_nsp_labels=2, pooler=True)
    layout = find_layout(MASK) if unpads else None
    states = hidden_states(made, MASK)
    read = torch.zeros_like(MASK).scatter_(1, POSITIONS, True)
    if with_nsp:
        read[:, 0] = True
    expected = [size(rows[MASK]) for rows in states[:-1]] + [size(states[-1][read & MASK])]
    with recorded(made) as found:
        made(**inputs(), **losses(with_nsp), layout=layout)
    assert [float(f) for f in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["mean", "max", "concat"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("trains", [False, True])
def test_pooled_rows_count_in_place_of_tokens(kind: str, layers: int, trains: bool) -> None:
    """Checked against what goes through the layers; rows that stand for padding are left out."""
    made = model(layers, pooling=kind, pooling_size=2)
    given = {**inputs(), **(losses(with_nsp=False) if trains else {})}
    streams = made._streams(given["input_ids"], MASK, POSITIONS)
    assert streams is not None
    assert not streams.mask.all()
    seen: list[Tensor] = []
    hooks = [made.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[3][0]))]
    hooks += [layer.register_forward_hook(lambda m, args, out: seen.append(out[0]))
              for layer in made.encoder.layers]  # fmt: skip
    with recorded(made) as found:
        made(**given)
    for hook in hooks:
        hook.remove()
    counted = [streams.mask] * layers + [streams.mask[:, -2:] if trains else streams.mask]
    expected = [size(rows[mask]) for rows, mask in zip(seen, counted, strict=True)]
    assert [float(f) for f in found] == pytest.approx(expected, rel=1e-5)


def test_a_frozen_prefix_is_measured_too() -> None:
    made = model()
    whole = hidden_states(made, MASK)
    made.train().frozen_layers = 2
    made.frozen_dropout = False
    with recorded(made) as found:
        made(**inputs(), **losses(with_nsp=False))
    expected = [size(states[MASK]) for states in whole[:3]]
    assert [float(f) for f in found[:3]] == pytest.approx(expected, rel=1e-5)


def test_only_the_first_pass_counts_and_nothing_is_left_behind() -> None:
    made = model()
    first, other = inputs(), {**inputs(), "input_ids": torch.full((3, 7), 6)}
    with recorded(made) as found:
        made(**first)
        sizes = [float(f) for f in found]
        made(**other)
    assert [float(f) for f in found] == sizes
    modules = [made.encoder, *made.encoder.layers]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("forward", [lambda m: m(**inputs(), **losses()), lambda m: m(**inputs())])
def test_outputs_and_gradients_stay_to_the_bit(
    forward: Callable[[BertForPreTraining], dict[str, Tensor]],
) -> None:
    answers = []
    for watches in (False, True):
        made = model(num_nsp_labels=2)
        made.train()
        torch.manual_seed(0)
        if watches:
            with recorded(made):
                outputs = forward(made)
        else:
            outputs = forward(made)
        sum(out.double().sum() for out in outputs.values() if out.requires_grad).backward()  # type: ignore[union-attr]
        answers.append([*outputs.values(), *(p.grad for p in made.parameters())])
    for left, right in zip(*answers, strict=True):
        assert (left is None and right is None) or torch.equal(left, right)


def test_16_bits_are_squared_in_32() -> None:
    large = torch.full((2, 3, 4), 300.0, dtype=torch.float16)  # its square is none of fp16's
    assert float(root_mean_square(large, None)) == pytest.approx(300.0)
