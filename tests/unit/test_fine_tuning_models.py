"""Models to fine-tune beside transformers' own classes: logits, losses, gradients; their start."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig as TheirConfig
from transformers import BertForQuestionAnswering as TheirQuestionAnswering
from transformers import BertForSequenceClassification as TheirSequenceClassification

from stacking.config import BertConfig
from stacking.fine_tuning import initial_weights
from stacking.fine_tuning_models import BertForQuestionAnswering, BertForSequenceClassification
from stacking.hf import home_config, our_config
from stacking.hf_homes import BERT, to_home
from stacking.modeling import BertForPreTraining, init_weights
from stacking.pretrained import Pretrained
from stacking.unpadding import find_layout

CONFIG = BertConfig(
    vocab_size=53, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=19, initializer_range=0.2, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip
LENGTHS = (13, 8, 2, 5, 1)
Sizes = tuple[int, ...]
Ours = BertForSequenceClassification | BertForQuestionAnswering
assert_close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
KINDS = [("classes", 3), ("one_logit", 1), ("regression", 1)]
PADDINGS = [pytest.param(LENGTHS, id="padded"), pytest.param((13,) * 5, id="whole")]


def start_of(config: BertConfig = CONFIG, seed: int = 3) -> tuple[BertForPreTraining, Pretrained]:
    """A pre-trained model with random biases and LayerNorms, too; there is no tokenizer."""
    model = BertForPreTraining(config).eval()
    generator = torch.Generator().manual_seed(seed)
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return model, Pretrained("", config, weights, None, "", False)  # type: ignore[arg-type]


def classifier(kind: str, count: int) -> Callable[..., BertForSequenceClassification]:
    return partial(BertForSequenceClassification, kind=kind, num_logits=count)  # type: ignore[arg-type]


def built(make: Callable[..., Ours], start: Pretrained) -> Ours:
    """The model that FineTuner begins with."""
    model = make(start.config, torch.nn.LayerNorm)
    missing, unexpected = model.load_state_dict(initial_weights(make, start), strict=False)
    assert not missing
    assert not unexpected
    return model


def with_head(model: Ours) -> Ours:
    """Its head drawn at random: behind a head of zeros no gradient arrives."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("classifier.", "qa_outputs.")):
                parameter.normal_(0, 0.3, generator=generator)
    return model


def their_config(**more: object) -> TheirConfig:
    return TheirConfig.from_dict({**home_config(CONFIG, BERT), **more})


def theirs(ours: Ours, pretrained: BertForPreTraining, **more: object) -> torch.nn.Module:
    """transformers' model of the same weights, of which none may be left out."""
    is_qa = isinstance(ours, BertForQuestionAnswering)
    kind = TheirQuestionAnswering if is_qa else TheirSequenceClassification
    model: torch.nn.Module = kind(their_config(**more))
    given = {n: t for n, t in to_home(pretrained, BERT).items() if n.startswith("bert.")}
    if is_qa:  # their class for answers has no pooler
        given = {name: tensor for name, tensor in given.items() if "pooler" not in name}
    own = dict(model.named_parameters())
    heads = {n: t.detach() for n, t in ours.named_parameters() if n in own}
    missing, unexpected = model.load_state_dict({**given, **heads}, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model.eval()


def rows(lengths: Sizes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, CONFIG.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    segments = (torch.arange(max(lengths)) >= 4).long().expand_as(ids).contiguous()
    ids = ids.masked_fill(~mask, CONFIG.pad_token_id)
    return {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}


def labels_of(kind: str) -> Tensor:
    return {"classes": torch.tensor([2, 0, 1, 1, 2]),
            "one_logit": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]),
            "regression": torch.tensor([-0.5, 1.0, 0.25, -1.5, 0.0])}[kind]  # fmt: skip


def spans_of(lengths: Sizes) -> Tensor:
    return torch.tensor([[length // 2, length - 1] for length in lengths])


def assert_same_gradients(ours: Ours, other: torch.nn.Module) -> None:
    """Every gradient of ours, under transformers' names: a model of gradients is renamed."""
    found = BertForPreTraining(CONFIG)
    known = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            source = known.get(name.removeprefix("nsp_head."))
            if source is not None and not name.startswith(("mlm_head.", "nsp_head.classifier")):
                assert source.grad is not None, name
                parameter.copy_(source.grad)
    expected = {name: p.grad for name, p in other.named_parameters()}
    renamed = to_home(found, BERT)
    for name, gradient in expected.items():
        own = known[name].grad if name in known else renamed[name]
        assert gradient is not None, name
        assert_close(own, gradient)


@pytest.mark.parametrize("lengths", PADDINGS)
@pytest.mark.parametrize(("kind", "count"), KINDS)
def test_classification_is_that_of_transformers(kind: str, count: int, lengths: Sizes) -> None:
    pretrained, start = start_of()
    ours = with_head(built(classifier(kind, count), start))
    problem = "single_label_classification" if count > 1 else "regression"
    other = theirs(ours, pretrained, num_labels=count, problem_type=problem)
    given, labels = rows(lengths), labels_of(kind)
    logits = other(**given).logits
    assert_close(ours(**given)["logits"], logits)
    if kind == "one_logit":  # transformers has no such class: its logits, torch's loss
        expected = F.binary_cross_entropy_with_logits(logits[:, 0], labels)
    else:
        expected = other(**given, labels=labels).loss
    loss = ours(**given, labels=labels)["loss_sum"] / len(labels)
    assert_close(loss, expected)
    torch.autograd.backward([loss, expected])
    assert_same_gradients(ours, other)


@pytest.mark.parametrize("lengths", PADDINGS)
def test_answers_are_those_of_transformers_over_real_tokens(lengths: Sizes) -> None:
    """Theirs counts padding among the places of an answer; ours does not."""
    pretrained, start = start_of()
    ours = with_head(built(BertForQuestionAnswering, start))
    other = theirs(ours, pretrained)
    given, spans = rows(lengths), spans_of(lengths)
    mask = given["attention_mask"]
    said = other(**given)
    logits = torch.stack([said.start_logits, said.end_logits], dim=2)
    assert_close(ours(**given)["logits"][mask], logits[mask])
    if mask.all():
        expected = other(**given, start_positions=spans[:, 0], end_positions=spans[:, 1]).loss
    else:
        real = logits.masked_fill(~mask[:, :, None], -1e30)
        expected = sum(F.cross_entropy(real[:, :, side], spans[:, side]) for side in (0, 1)) / 2
    loss = ours(**given, labels=spans)["loss_sum"] / len(spans)
    assert_close(loss, expected)
    torch.autograd.backward([loss, expected])
    assert_same_gradients(ours, other)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("kind", ["classes", "answers"])
def test_nothing_changes_where_padding_is_left_out(kind: str, position: str) -> None:
    config = CONFIG.model_copy(update={"position": position})
    make = BertForQuestionAnswering if kind == "answers" else classifier("classes", 3)
    _, start = start_of(config)
    found = []
    for unpads in (False, True):
        model = with_head(built(make, start))
        given: dict[str, object] = dict(rows(LENGTHS))
        layout = find_layout(rows(LENGTHS)["attention_mask"])
        assert layout is not None
        given |= {"layout": layout} if unpads else {}
        logits = model(**given)["logits"]
        labels = spans_of(LENGTHS) if kind == "answers" else labels_of("classes")
        loss = model(**given, labels=labels)["loss_sum"]
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((logits, loss, gradients))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("make", [classifier("classes", 3), BertForQuestionAnswering])
def test_a_model_begins_with_a_head_of_zeros_over_the_weights_of_pre_training(
    make: Callable[..., Ours],
) -> None:
    _, start = start_of()
    before = {name: weight.clone() for name, weight in start.weights.items()}
    model = built(make, start)
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier.", "qa_outputs.")):
            assert not parameter.any()
        else:
            known = name if name in start.weights else f"nsp_head.{name}"
            assert torch.equal(parameter, start.weights[known])
    given = rows((13,) * 5)
    assert not model(**given)["logits"].any()
    if isinstance(model, BertForSequenceClassification):
        assert model.pooler is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], weight) for name, weight in start.weights.items())


FORMS: dict[str, dict[str, object]] = {
    "BERT": {},
    "no next-sentence head": {"num_nsp_labels": 0},
    "StackingBERT": {"num_nsp_labels": 1, "pooler": False, "layer_norm": "pre", "mlm_bias": False,
                     "layer_norm_affine": False, "embedding_layer_norm": False,
                     "embedding_scale": True, "position": "sinusoidal"},
    "rotary": {"position": "rotary", "layer_norm": "pre", "type_vocab_size": 0},
    "CompoundGrow's small one": {"pooling": "concat", "pooling_size": 2,
                                 "shared_attention_layers": (1,),
                                 "layer_intermediate_sizes": (40, 20, 40)},
    "untied": {"tie_word_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_at_the_first_token_through_its_pooler_if_it_has_one(form: str) -> None:
    pretrained, start = start_of(CONFIG.model_copy(update=FORMS[form]))
    model = with_head(built(classifier("classes", 3), start))
    assert isinstance(model, BertForSequenceClassification)
    has_pooler = pretrained.nsp_head is not None and pretrained.nsp_head.pooler is not None
    assert (model.pooler is not None) == has_pooler
    given = rows(LENGTHS)
    first = pretrained(**given)["last_hidden_state"][:, 0]
    if model.pooler is not None:
        first = torch.tanh(model.pooler(first))
    assert_close(model(**given)["logits"], model.classifier(first))
    answers = with_head(built(BertForQuestionAnswering, start))
    assert isinstance(answers, BertForQuestionAnswering)
    mask = given["attention_mask"]
    hidden = pretrained(**given)["last_hidden_state"]
    assert_close(answers(**given)["logits"][mask], answers.qa_outputs(hidden)[mask])


def test_dropout_stands_before_the_classifier() -> None:
    config = CONFIG.model_copy(update={"hidden_dropout_prob": 0.5})
    _, start = start_of(config)
    model = with_head(built(classifier("classes", 3), start))
    assert isinstance(model, BertForSequenceClassification)
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.train()(**rows(LENGTHS))
    model.eval()(**rows(LENGTHS))
    dropped, kept = (int((hidden == 0).sum()) for hidden in seen)
    assert kept == 0
    assert 0.3 < dropped / seen[0].numel() < 0.7


def test_the_config_of_transformers_comes_back() -> None:
    """The two descriptions of one model that these tests compare agree."""
    assert our_config(their_config().to_dict(), BERT, has_nsp=True) == CONFIG
