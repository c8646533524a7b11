"""LiGO: the map against stacking, copying and its own definition; what learning it is worth."""

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import GrowthError
from stacking.growth.contract import inner_sizes, parameter_shapes
from stacking.growth.depth import DEPTH_OPERATORS
from stacking.growth.learned import CONTRACT, initial_map, learn_growth, learned_faults
from stacking.growth.width import WidthOperator
from stacking.growth.width_ffn import FfnTile
from stacking.growth.width_hidden import HiddenDuplicate
from stacking.modeling import BertForPreTraining, init_weights

BATCH, LENGTH, VOCABULARY = 3, 7, 37
WORDS = "embeddings.word_embeddings.weight"

Weights = dict[str, Tensor]


def config_of(**fields: object) -> BertConfig:
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": 11,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    return BertConfig.model_validate({**sizes, **fields})


def changed(config: BertConfig, **fields: object) -> BertConfig:
    return BertConfig.model_validate({**config.model_dump(), **fields})


def wider(config: BertConfig, heads: int) -> BertConfig:
    size = config.hidden_size // config.num_attention_heads * heads
    return changed(config, num_attention_heads=heads, hidden_size=size)


def random_weights(config: BertConfig, dtype: torch.dtype = torch.float32) -> Weights:
    """Every parameter far from its initial value, biases and LayerNorm affines too."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) * 0.3
        + (1.0 if "layer_norm.weight" in name else 0.0)
        for name, shape in parameter_shapes(config).items()
    }


def batch_of(seed: int, *, rows: int = BATCH, length: int = LENGTH, nsp: bool = True) -> Weights:
    """Rows that count up by 1 or 2, two tokens masked; the step is the next-sentence label."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 32, (rows, 1), generator=generator)
    step = torch.randint(1, 3, (rows, 1), generator=generator)
    ids = (start + step * torch.arange(length)) % 32 + 5
    positions = torch.rand(rows, length, generator=generator).argsort(1)[:, :2]
    batch = {
        "input_ids": ids.scatter(1, positions, 4),
        "masked_lm_positions": positions,
        "masked_lm_ids": ids.gather(1, positions),
    }
    return {**batch, "next_sentence_labels": step[:, 0] - 1} if nsp else batch


def loss_of(config: BertConfig, weights: Weights, batches: list[Weights]) -> float:
    """Mean MLM plus NSP loss without dropout, counted here."""
    model = BertForPreTraining(config).to(weights[WORDS].dtype).eval()
    model.load_state_dict(weights)
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            losses = model(**batch)
            total += float(losses["mlm_loss_sum"]) / batch["masked_lm_ids"].numel()
            total += float(losses["nsp_loss_sum"]) / len(batch["input_ids"])
    return total / len(batches)


def logits_of(config: BertConfig, weights: Weights) -> list[Tensor]:
    model = BertForPreTraining(config).to(weights[WORDS].dtype).eval()
    model.load_state_dict(weights)
    inputs = {"input_ids": batch_of(3)["input_ids"]}
    if config.type_vocab_size:
        inputs["token_type_ids"] = (torch.arange(LENGTH) > 3).long().expand(BATCH, LENGTH)
    with torch.no_grad():
        outputs = model(**inputs)
    return [value for name, value in outputs.items() if name.endswith("logits")]


def exact_start(source: BertConfig, target: BertConfig, weights: Weights) -> Weights:
    growth = initial_map(source, target, noise=0.0).to(torch.device("cpu"), weights[WORDS].dtype)
    return {name: tensor.detach() for name, tensor in growth.expand(weights).items()}


@st.composite
def configs(draw: st.DrawFn) -> BertConfig:
    """Small models of every form; sizes odd and distinct where the form allows it."""
    labels = draw(st.sampled_from([0, 1, 2]))
    position = draw(st.sampled_from(["learned", "rotary", "sinusoidal"]))
    head_size = 2 * draw(st.integers(2, 3)) if position == "rotary" else draw(st.integers(4, 6))
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pooling = draw(st.sampled_from(["none", "none", "concat"]))
    shared = list(range(1 if pooling == "none" else 2, layers)) if draw(st.booleans()) else []
    return config_of(
        hidden_size=head_size * heads,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        intermediate_size=draw(st.integers(1, 13)),
        layer_intermediate_sizes=draw(
            st.just([]) | st.lists(st.integers(1, 9), min_size=layers, max_size=layers)
        ),
        position=position,
        layer_norm=draw(st.sampled_from(["post", "pre"])),
        layer_norm_affine=draw(st.booleans()),
        embedding_layer_norm=draw(st.booleans()),
        embedding_scale=draw(st.booleans()),
        mlm_bias=draw(st.booleans()),
        num_nsp_labels=labels,
        pooler=draw(st.booleans()) if labels else False,
        type_vocab_size=2 if labels else draw(st.sampled_from([0, 3])),
        tie_word_embeddings=draw(st.booleans()),
        pooling=pooling,
        pooling_size=1 if pooling == "none" else 2,
        shared_attention_layers=shared,
    )


def stacked_form(source: BertConfig, layers: int, inner: list[int], heads: int) -> BertConfig:
    """`source` with more of everything, its layers' forms repeated as stacking repeats them."""
    old = source.num_hidden_layers
    shared = [i for i in range(layers) if i % old in source.shared_attention_layers]
    return changed(
        wider(source, heads),
        num_hidden_layers=layers,
        layer_intermediate_sizes=inner,
        shared_attention_layers=shared,
    )


# ---- The start ----


@settings(deadline=None, max_examples=40)
@given(source=configs(), ratio=st.integers(1, 3), inner=st.integers(1, 3), more=st.integers(0, 3))
def test_without_noise_the_start_is_duplicate_tile_and_stack(
    source: BertConfig, ratio: int, inner: int, more: int
) -> None:
    weights = random_weights(source, torch.float64)
    heads, layers = source.num_attention_heads * ratio, source.num_hidden_layers + more
    sizes = [size * inner for size in inner_sizes(source)]
    wide = stacked_form(source, source.num_hidden_layers, inner_sizes(source), heads)
    widest = changed(wide, layer_intermediate_sizes=sizes)
    repeated = [sizes[i % len(sizes)] for i in range(layers)]
    target = stacked_form(source, layers, repeated, heads)
    moves: list[tuple[WidthOperator, BertConfig, BertConfig]] = [
        (HiddenDuplicate(noise=0.0), source, wide), (FfnTile(noise=0.0), wide, widest)
    ]  # fmt: skip
    expected = weights
    for operator, before, after in moves:
        expected = operator.grow(expected, before, after)
    expected = DEPTH_OPERATORS["stack"].grow(expected, widest, target)
    start = exact_start(source, target, weights)
    assert list(start) == list(parameter_shapes(target))
    for name, tensor in start.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-14, msg=name)


@settings(deadline=None, max_examples=40)
@given(source=configs(), ratio=st.integers(1, 3), extra=st.integers(0, 5))
def test_without_noise_an_integer_width_ratio_keeps_the_function(
    source: BertConfig, ratio: int, extra: int
) -> None:
    if source.position == "sinusoidal":
        source = changed(source, position="learned")
    weights = random_weights(source, torch.float64)
    sizes = [size + extra for size in inner_sizes(source)]  # any inner ratio is exact
    heads = source.num_attention_heads * ratio
    target = stacked_form(source, source.num_hidden_layers, sizes, heads)
    start = exact_start(source, target, weights)
    for before, after in zip(logits_of(source, weights), logits_of(target, start), strict=True):
        assert (after - before).abs().max() <= 1e-8 * before.abs().max()


@pytest.mark.parametrize("layers", [3, 4, 5])
def test_without_noise_depth_alone_starts_as_stack_to_the_last_bit(layers: int) -> None:
    source, target = config_of(), config_of(num_hidden_layers=layers)
    weights = random_weights(source)
    expected = DEPTH_OPERATORS["stack"].grow(weights, source, target)
    start = exact_start(source, target, weights)
    assert all(torch.equal(start[name], tensor) for name, tensor in expected.items())


def test_noise_moves_every_growing_tensor_and_little() -> None:
    source = config_of()
    target = changed(wider(source, 6), num_hidden_layers=5, intermediate_size=31)
    weights = random_weights(source)
    exact = exact_start(source, target, weights)
    generator = torch.Generator().manual_seed(1)
    noisy = initial_map(source, target, generator=generator).expand(weights)
    for name, tensor in exact.items():
        moved = float((noisy[name] - tensor).norm() / tensor.norm())
        is_fixed = name in ("mlm_head.bias", "nsp_head.classifier.bias")
        assert moved == 0 if is_fixed else 0.01 < moved < 0.7, (name, moved)


# ---- The map ----


def test_the_map_is_the_papers_sum_of_products() -> None:
    """Tensor by tensor, with inner widths that differ from layer to layer."""
    source = config_of(layer_intermediate_sizes=[5, 9])
    target = changed(wider(source, 5), num_hidden_layers=3, layer_intermediate_sizes=[7, 11, 8])
    weights = random_weights(source, torch.float64)
    growth = initial_map(source, target, generator=torch.Generator().manual_seed(2))
    growth = growth.to(torch.device("cpu"), torch.float64)
    maps, grown = growth.tensors, growth.expand(weights)
    hidden = maps["hidden"]
    torch.testing.assert_close(grown[WORDS], weights[WORDS] @ hidden.t())
    head = hidden @ weights["mlm_head.dense.weight"] @ reader(hidden).t()
    torch.testing.assert_close(grown["mlm_head.dense.weight"], head)
    norm = reader(hidden) @ weights["mlm_head.layer_norm.weight"]
    torch.testing.assert_close(grown["mlm_head.layer_norm.weight"], norm)
    for i, size in enumerate(target.layer_intermediate_sizes):
        wide = [widened_layer(maps, weights, j, size) for j in range(2)]
        wanted = {
            kind: torch.stack([maps[f"depth.{kind}"][i, j] * wide[j][kind] for j in range(2)]).sum(
                0
            )
            for kind in wide[0]
        }
        for leaf in ("weight", "bias"):
            parts = [wanted.pop(f"attention.{part}.{leaf}") for part in ("query", "key", "value")]
            wanted[f"attention.qkv.{leaf}"] = torch.cat(parts)
        for kind, tensor in wanted.items():
            torch.testing.assert_close(grown[f"encoder.layers.{i}.{kind}"], tensor, msg=kind)


def reader(matrix: Tensor) -> Tensor:
    """A of a B [new, old]: each row over the number of copies of its unit."""
    new, old = matrix.shape
    unit = torch.arange(new) % old
    return matrix / torch.bincount(unit, minlength=old)[unit][:, None]


def widened_layer(maps: Weights, weights: Weights, j: int, size: int) -> Weights:
    """V_j = B W_j A^T of an old layer, by kind of tensor."""
    old = {name.removeprefix(f"encoder.layers.{j}."): tensor for name, tensor in weights.items()}
    hidden, reads = maps["hidden"], reader(maps["hidden"]).t()
    value, inner = maps[f"layers.{j}.value"], maps[f"layers.{j}.ffn"][:size]
    wide = {
        "attention.output.weight": hidden @ old["attention.output.weight"] @ reader(value).t(),
        "attention_layer_norm.bias": hidden @ old["attention_layer_norm.bias"],
        "feed_forward.inner.weight": inner @ old["feed_forward.inner.weight"] @ reads,
        "feed_forward.inner.bias": inner @ old["feed_forward.inner.bias"],
        "feed_forward.output.weight": hidden
        @ old["feed_forward.output.weight"]
        @ reader(inner).t(),
    }
    for index, part in enumerate(("query", "key", "value")):
        own = maps[f"layers.{j}.{part}"]
        rows = old["attention.qkv.weight"].chunk(3)[index]
        wide[f"attention.{part}.weight"] = own @ rows @ reads
        wide[f"attention.{part}.bias"] = own @ old["attention.qkv.bias"].chunk(3)[index]
    return wide


@settings(deadline=None, max_examples=25)
@given(source=configs(), more=st.tuples(*[st.integers(0, 2)] * 3))
def test_any_larger_model_is_filled(source: BertConfig, more: tuple[int, int, int]) -> None:
    old = inner_sizes(source)
    layers = source.num_hidden_layers + more[0]
    inner = [old[i % len(old)] + (more[1] if i % 2 else 0) for i in range(layers)]
    target = stacked_form(source, layers, inner, source.num_attention_heads + more[2])
    if sum(more) == 0 or (layers, more[1:]) == (1, (more[1], 0)):
        return  # nothing may grow: its own test
    weights = random_weights(source)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    batch = batch_of(1, nsp=source.num_nsp_labels > 0)
    grown = learn_growth(weights, source, target, [batch] * 2, learning_rate=1e-3, seed=0)
    assert {name: tensor.shape for name, tensor in grown.items()} == parameter_shapes(target)
    own = {tensor.data_ptr() for tensor in weights.values()}
    for tensor in grown.values():
        assert tensor.dtype == torch.float32
        assert tensor.grad_fn is None
        assert not tensor.requires_grad
        assert tensor.data_ptr() not in own
        assert tensor.isfinite().all()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


# ---- Learning ----

SOURCE = config_of(position="rotary")
TARGETS = {
    "deeper": changed(SOURCE, num_hidden_layers=4),
    "wider": changed(wider(SOURCE, 6), intermediate_size=40),
    "both, odd": changed(wider(SOURCE, 5), num_hidden_layers=5, intermediate_size=31),
}
FIXED = [batch_of(seed, rows=32, length=9) for seed in range(4)]


@pytest.fixture(scope="module")
def trained() -> Weights:
    """A small model that has begun to count."""
    config = changed(SOURCE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForPreTraining(config)
    init_weights(model, torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(200):
        losses = model(**batch_of(seed, rows=32, length=9))
        loss = losses["mlm_loss_sum"] / 64 + losses["nsp_loss_sum"] / 32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def learned(weights: Weights, name: str, *, seed: int = 0, steps: int = 60) -> Weights:
    batches = (FIXED * steps)[:steps]
    return learn_growth(weights, SOURCE, TARGETS[name], batches, learning_rate=3e-3, seed=seed)


@pytest.mark.parametrize("name", TARGETS)
def test_sixty_steps_are_clearly_better_than_stacking_and_than_the_start(
    name: str, trained: Weights
) -> None:
    losses: list[float] = []
    target = TARGETS[name]
    grown = learn_growth(
        trained, SOURCE, target, FIXED * 15, learning_rate=3e-3, seed=0,
        on_step=lambda step, loss: losses.append(loss) if step == len(losses) else None,
    )  # fmt: skip
    assert len(losses) == 60
    start = initial_map(SOURCE, target, generator=torch.Generator().manual_seed(0)).expand(trained)
    assert losses[0] == pytest.approx(loss_of(target, start, FIXED[:1]), rel=1e-5)
    stacked = exact_start(SOURCE, target, trained)
    after = loss_of(target, grown, FIXED)
    assert after < loss_of(target, start, FIXED) - 0.3
    assert after < loss_of(target, stacked, FIXED) - 0.3
    held_out = [batch_of(9000 + seed, rows=32, length=9) for seed in range(4)]
    assert loss_of(target, grown, held_out) < loss_of(target, stacked, held_out)


def test_the_map_is_deterministic_in_the_seed(trained: Weights) -> None:
    torch.manual_seed(1)
    one = learned(trained, "both, odd", steps=4)
    torch.manual_seed(2)
    again = learned(trained, "both, odd", steps=4)
    other = learned(trained, "both, odd", steps=4, seed=1)
    assert all(torch.equal(again[name], tensor) for name, tensor in one.items())
    assert not torch.equal(other[WORDS], one[WORDS])


def test_no_two_units_of_the_grown_model_are_alike(trained: Weights) -> None:
    """Neither what they read nor what they write: copies would stay locked."""
    grown = learned(trained, "wider")
    locked = exact_start(SOURCE, TARGETS["wider"], trained)
    for name, axis in (
        (WORDS, 1),
        ("encoder.layers.1.attention.qkv.weight", 0),
        ("encoder.layers.0.attention.output.weight", 1),
        ("encoder.layers.1.feed_forward.inner.weight", 0),
        ("encoder.layers.0.feed_forward.output.weight", 1),
        ("encoder.layers.1.feed_forward.output.weight", 0),
        ("mlm_head.dense.weight", 0),
        ("nsp_head.pooler.weight", 1),
    ):
        assert closest(locked[name], axis) < 1e-6, name
        assert closest(grown[name], axis) > 0.02, name


def closest(matrix: Tensor, axis: int) -> float:
    """Smallest distance between two slices over the length of the shorter one."""
    slices = matrix.movedim(axis, 0).double()
    norms = slices.norm(dim=1)
    distance = torch.cdist(slices, slices) / torch.minimum(norms, norms[:, None])
    return float(distance.fill_diagonal_(math.inf).min())


def test_a_zero_padding_row_stays_zero(trained: Weights) -> None:
    trained = {**trained, WORDS: trained[WORDS].clone()}
    trained[WORDS][0] = 0
    grown = learned(trained, "both, odd", steps=5)
    assert not grown[WORDS][0].any()
    assert grown[WORDS][1:].any(dim=1).all()


def test_next_sentence_loss_is_learned_with_and_may_be_missing(trained: Weights) -> None:
    without = [{k: v for k, v in b.items() if k != "next_sentence_labels"} for b in FIXED]
    target = TARGETS["wider"]
    arguments = {"learning_rate": 3e-3, "seed": 0}
    one = learn_growth(trained, SOURCE, target, without, **arguments)  # type: ignore[arg-type]
    two = learn_growth(trained, SOURCE, target, FIXED, **arguments)  # type: ignore[arg-type]
    assert not torch.equal(one["nsp_head.pooler.weight"], two["nsp_head.pooler.weight"])
    assert CONTRACT.preserves == frozenset()
    assert CONTRACT.tolerance == {}


# ---- What is refused ----


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (SOURCE, "learned: got a stage in which neither layers nor hidden nor inner size grow"),
        (changed(SOURCE, num_hidden_layers=1), "num_hidden_layers: got 1 after 2; allowed: at le"),
        (wider(SOURCE, 2), "hidden_size: got 8 after 12; allowed: at least 12"),
        (changed(SOURCE, hidden_size=24), "num_attention_heads: got 3 after 3 with hidden_size 24"),
        (changed(SOURCE, intermediate_size=19), "intermediate_size: got 19 after 20"),
        (
            changed(SOURCE, num_hidden_layers=4, layer_intermediate_sizes=[20, 20, 20, 19]),
            r"layer_intermediate_sizes: got 19 after 20; .* \(layer 3 starts as layer 1\)",
        ),
        (
            changed(SOURCE, num_hidden_layers=3, shared_attention_layers=[2]),
            "shared_attention_layers: got a layer 2 that shares attention, which starts as layer 0",
        ),
        (changed(TARGETS["wider"], vocab_size=38), "vocab_size: .*the learned map does not"),
    ],
)
def test_what_the_map_cannot_do_is_refused_in_one_line_each(
    target: BertConfig, message: str
) -> None:
    faults = learned_faults(SOURCE, target)
    assert faults
    assert all("\n" not in fault for fault in faults)
    with pytest.raises(GrowthError, match=message):
        learn_growth(random_weights(SOURCE), SOURCE, target, FIXED, learning_rate=1e-3, seed=0)


def test_what_can_grow_has_no_faults() -> None:
    for target in TARGETS.values():
        assert learned_faults(SOURCE, target) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(value: float, trained: Weights) -> None:
    broken = {**trained, "mlm_head.bias": trained["mlm_head.bias"] * value}
    with pytest.raises(GrowthError, match=r"the loss at step 0 is nan.*learned\.learning_rate"):
        learned(broken, "deeper")


def test_a_rate_that_ruins_the_weights_is_refused(trained: Weights) -> None:
    with pytest.raises(
        GrowthError, match="infinite or undefined number, with learning rate 1e\\+37"
    ):
        learn_growth(trained, SOURCE, TARGETS["wider"], FIXED[:1], learning_rate=1e37, seed=0)


def test_batches_must_exist_and_have_labels(trained: Weights) -> None:
    def attempt(batches: list[Mapping[str, Tensor]]) -> None:
        learn_growth(trained, SOURCE, TARGETS["deeper"], batches, learning_rate=1e-3, seed=0)

    with pytest.raises(GrowthError, match="got no batch"):
        attempt([])
    with pytest.raises(GrowthError, match="without masked_lm_ids"):
        attempt([{"input_ids": FIXED[0]["input_ids"]}])
    weights = {name: tensor for name, tensor in trained.items() if name != "mlm_head.bias"}
    with pytest.raises(GrowthError, match="no tensor 'mlm_head.bias'"):
        learn_growth(weights, SOURCE, TARGETS["deeper"], FIXED, learning_rate=1e-3, seed=0)
