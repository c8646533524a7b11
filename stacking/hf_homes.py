"""Which transformers architecture can hold which options, and how its names and layouts differ.

A home is data: what it requires of a BertConfig, what it calls each weight. Two layouts differ:
RoFormer pairs rotary features 2i and 2i + 1 (ours: i and i + D/2), and RobertaPreLayerNorm counts
positions from pad_token_id + 1. What fits none of them has REMOTE, whose class is this project's
own (stacking/remote_code) and travels with the folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stacking.config import BertConfig
from stacking.errors import ConfigError
from stacking.modeling import BertForPreTraining
from stacking.positions import SinusoidalTable, rotary_angles

LAYER_PREFIX = "encoder.layers."
QKV = "attention.qkv."
POSITIONS = "embeddings.position_embeddings.weight"
SEGMENTS = "embeddings.token_type_embeddings.weight"
MLM_BIAS = "mlm_head.bias"

Weights = dict[str, Tensor]
Requirements = Mapping[str, tuple[str | int | bool, ...]]


@dataclass(frozen=True, kw_only=True)
class Home:
    """One transformers architecture: its classes, its requirements and its names."""

    model_type: str
    prefix: str
    masked_lm_class: str
    requires: Requirements
    layer_names: Mapping[str, str]
    outer_names: Mapping[str, str]
    pre_training_class: str | None = None
    layers: str = "encoder.layer"
    any_nsp_head: bool = False
    """Whether its next-sentence head may have one logit, or no pooler."""

    def objections(self, config: BertConfig) -> list[str]:
        """What this home cannot represent, as `option=value (needs ...)`."""
        found = []
        for option, allowed in self.requires.items():
            value = getattr(config, option)
            if value not in allowed:
                found.append(f"{option}={value} (needs {' or '.join(map(str, allowed))})")
        if config.shared_attention_layers:
            found.append(f"shared_attention_layers={list(config.shared_attention_layers)}")
        if len(set(config.layer_intermediate_sizes)) > 1:
            found.append(f"layer_intermediate_sizes={list(config.layer_intermediate_sizes)}")
        return found

    def holds_nsp(self, config: BertConfig) -> bool:
        """Whether the next-sentence head can come along."""
        if self.pre_training_class is None or self.any_nsp_head:
            return self.any_nsp_head and config.num_nsp_labels > 0
        return config.num_nsp_labels == 2 and config.pooler

    def architecture(self, config: BertConfig) -> str:
        """Class that a folder of this config names."""
        if self.pre_training_class is not None and self.holds_nsp(config):
            return self.pre_training_class
        return self.masked_lm_class


BERT_LAYER_NAMES = {
    "attention.output": "attention.output.dense",
    "attention_layer_norm": "attention.output.LayerNorm",
    "feed_forward.inner": "intermediate.dense",
    "feed_forward.output": "output.dense",
    "feed_forward_layer_norm": "output.LayerNorm",
}
BERT_HEAD_NAMES = {
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.layer_norm": "cls.predictions.transform.LayerNorm",
    "mlm_head.decoder": "cls.predictions.decoder",
    "mlm_head": "cls.predictions",
    "nsp_head.pooler": "bert.pooler.dense",
    "nsp_head.classifier": "cls.seq_relationship",
}
ROBERTA_HEAD_NAMES = {
    "mlm_head.dense": "lm_head.dense",
    "mlm_head.layer_norm": "lm_head.layer_norm",
    "mlm_head.decoder": "lm_head.decoder",
    "mlm_head": "lm_head",
}
TABLE_POSITIONS = ("learned", "sinusoidal")

BERT = Home(
    model_type="bert",
    prefix="bert.",
    masked_lm_class="BertForMaskedLM",
    pre_training_class="BertForPreTraining",
    requires={
        "layer_norm": ("post",),
        "position": TABLE_POSITIONS,
        "embedding_layer_norm": (True,),
        "embedding_scale": (False,),
    },
    layer_names=BERT_LAYER_NAMES,
    outer_names={"embeddings.layer_norm": "bert.embeddings.LayerNorm", **BERT_HEAD_NAMES},
)
ROFORMER = Home(
    model_type="roformer",
    prefix="roformer.",
    masked_lm_class="RoFormerForMaskedLM",
    requires={
        "layer_norm": ("post",),
        "position": ("rotary",),
        "embedding_layer_norm": (True,),
        "embedding_scale": (False,),
    },
    layer_names=BERT_LAYER_NAMES,
    outer_names={"embeddings.layer_norm": "roformer.embeddings.LayerNorm", **BERT_HEAD_NAMES},
)
MEGATRON = Home(
    model_type="megatron-bert",
    prefix="bert.",
    masked_lm_class="MegatronBertForMaskedLM",
    pre_training_class="MegatronBertForPreTraining",
    requires={
        "layer_norm": ("pre",),
        "position": TABLE_POSITIONS,
        "embedding_layer_norm": (False,),
        "embedding_scale": (False,),
    },
    layer_names={
        **BERT_LAYER_NAMES,
        "attention_layer_norm": "attention.ln",
        "feed_forward_layer_norm": "ln",
    },
    outer_names={"encoder.final_layer_norm": "bert.encoder.ln", **BERT_HEAD_NAMES},
)
ROBERTA_PRE = Home(
    model_type="roberta-prelayernorm",
    prefix="roberta_prelayernorm.",
    masked_lm_class="RobertaPreLayerNormForMaskedLM",
    requires={
        "layer_norm": ("pre",),
        "position": TABLE_POSITIONS,
        "embedding_layer_norm": (True,),
        "embedding_scale": (False,),
        "hidden_act": ("gelu",),
    },
    layer_names={
        **BERT_LAYER_NAMES,
        "attention_layer_norm": "attention.LayerNorm",
        "feed_forward_layer_norm": "intermediate.LayerNorm",
    },
    outer_names={
        "embeddings.layer_norm": "roberta_prelayernorm.embeddings.LayerNorm",
        "encoder.final_layer_norm": "roberta_prelayernorm.LayerNorm",
        **ROBERTA_HEAD_NAMES,
    },
)
ESM = Home(
    model_type="esm",
    prefix="esm.",
    masked_lm_class="EsmForMaskedLM",
    requires={
        "layer_norm": ("pre",),
        "position": ("rotary",),
        "type_vocab_size": (0,),
        "embedding_scale": (False,),
        "hidden_act": ("gelu",),
    },
    layer_names={
        **BERT_LAYER_NAMES,
        "attention_layer_norm": "attention.LayerNorm",
        "feed_forward_layer_norm": "LayerNorm",
    },
    outer_names={
        "embeddings.layer_norm": "esm.embeddings.layer_norm",
        "encoder.final_layer_norm": "esm.encoder.emb_layer_norm_after",
        **ROBERTA_HEAD_NAMES,
    },
)
HOMES = (BERT, ROFORMER, MEGATRON, ROBERTA_PRE, ESM)
"""Classes of transformers."""

REMOTE = Home(
    model_type="progressive_bert",
    prefix="bert.",
    masked_lm_class="ProgressiveBertForPreTraining",
    pre_training_class="ProgressiveBertForPreTraining",
    layers="layers",
    any_nsp_head=True,
    requires={},
    layer_names={
        "attention.qkv": "attention.qkv",
        "attention.value": "attention.value",
        "attention.output": "attention.output",
        "attention_layer_norm": "attention_layer_norm",
        "feed_forward.inner": "inner",
        "feed_forward.output": "output",
        "feed_forward_layer_norm": "output_layer_norm",
    },
    outer_names={
        "encoder.final_layer_norm": "bert.final_layer_norm",
        "mlm_head.dense": "mlm_head.dense",
        "mlm_head.layer_norm": "mlm_head.layer_norm",
        "mlm_head.decoder": "mlm_head.decoder",
        "mlm_head": "mlm_head.decoder",
        "nsp_head.pooler": "bert.pooler",
        "nsp_head.classifier": "seq_relationship",
    },
)
"""stacking/remote_code/modeling_progressive_bert.py."""


def choose_home(config: BertConfig) -> Home:
    """The class of transformers that holds `config`, REMOTE where none does.

    ConfigError for the one form that has no class at all: a stage with pooled embeddings reads the
    positions of the masked tokens, which nobody knows after training.
    """
    if config.pooling != "none":
        raise ConfigError(
            f"model.pooling: got {config.pooling}, which exists in training only; allowed: none; "
            "grow the model to this form first (a last stage with it)"
        )
    return next((home for home in HOMES if not home.objections(config)), REMOTE)


def nearest_homes(config: BertConfig) -> list[str]:
    """Why no class of transformers holds `config`: what is in the way of those with the least."""
    objections = {home.model_type: home.objections(config) for home in HOMES}
    fewest = min(len(found) for found in objections.values())
    return [
        f"{model_type} cannot hold {', '.join(found)}"
        for model_type, found in objections.items()
        if len(found) == fewest
    ]


def to_home(model: BertForPreTraining, home: Home) -> Weights:
    """Weights of `model` in fp32 under the names and in the layouts of `home`.

    What a home has and `model` has not gets the value that changes nothing: LayerNorms 1 and 0,
    biases 0, segment vectors 0.
    """
    if home is REMOTE:
        own = _own_state(model).items()
        return {_their_name(name, home): tensor.contiguous() for name, tensor in own}
    config = model.config
    exported: Weights = {}
    for name, tensor in _with_neutral_parts(model).items():
        for theirs, value in _exported(name, tensor, config, home):
            exported[theirs] = value.contiguous()
    exported.update(_constants(config, home))
    return exported


def from_home(weights: Weights, config: BertConfig, home: Home) -> Weights:
    """Inverse of `to_home`: the state dict of BertForPreTraining(config)."""
    state: Weights = {}
    with torch.device("meta"):
        names = list(BertForPreTraining(config).state_dict())
    if home is REMOTE:
        return {name: weights[_their_name(name, home)].float().clone() for name in names}
    for name in names:
        if QKV in name:
            parts = [weights[theirs] for theirs in _qkv_names(name, home)]
            if home is ROFORMER:
                parts[:2] = [_pairs_to_halves(part, config) for part in parts[:2]]
            state[name] = torch.cat(parts)
        else:
            theirs = _their_name(name, home)
            if name == MLM_BIAS and not config.tie_word_embeddings:  # What an untied decoder adds.
                theirs = next(n for n in (_decoder_bias(home), theirs) if n in weights)
            tensor = weights[theirs]
            skipped = config.pad_token_id + 1 if home is ROBERTA_PRE and name == POSITIONS else 0
            state[name] = tensor[skipped:]
    return {name: tensor.float().clone() for name, tensor in state.items()}


def _own_state(model: BertForPreTraining) -> Weights:
    """State dict of `model` in fp32, with a table of its positions if they are sinusoidal."""
    config = model.config
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    if config.position == "sinusoidal":
        table = SinusoidalTable(config.hidden_size)
        state[POSITIONS] = table.lookup(config.max_position_embeddings, torch.zeros(()))
    return state


def _with_neutral_parts(model: BertForPreTraining) -> Weights:
    """The same, completed to that of an affine model with all biases."""
    config, state = model.config, _own_state(model)
    norms = [f"{LAYER_PREFIX}{i}.{part}_layer_norm" for i in range(config.num_hidden_layers)
             for part in ("attention", "feed_forward")]  # fmt: skip
    norms += ["encoder.final_layer_norm"] if config.layer_norm == "pre" else []
    for norm in norms:
        state.setdefault(f"{norm}.weight", torch.ones(config.hidden_size))
        state.setdefault(f"{norm}.bias", torch.zeros(config.hidden_size))
    state.setdefault("mlm_head.bias", torch.zeros(config.vocab_size))
    return state


def _exported(
    name: str, tensor: Tensor, config: BertConfig, home: Home
) -> list[tuple[str, Tensor]]:
    """(their name, their layout) of one of our weights; nothing where `home` has no such part."""
    if name.startswith("nsp_head.") and not home.holds_nsp(config):
        return []
    if QKV in name:
        query, key, value = tensor.chunk(3)
        if home is ROFORMER:
            query, key = _halves_to_pairs(query, config), _halves_to_pairs(key, config)
        return list(zip(_qkv_names(name, home), (query, key, value), strict=True))
    if home is ROBERTA_PRE and name == POSITIONS:
        tensor = torch.cat([torch.zeros(config.pad_token_id + 1, config.hidden_size), tensor])
    names = [_their_name(name, home)]
    if name == MLM_BIAS and not config.tie_word_embeddings and home is not ESM:
        names.append(_decoder_bias(home))
    return [(theirs, tensor.clone() if len(names) > 1 else tensor) for theirs in names]


def _constants(config: BertConfig, home: Home) -> Weights:
    """Tensors that a home stores beside the weights, or that our model lacks."""
    constants: Weights = {}
    if home is not ESM and not config.type_vocab_size:
        # Two rows: tokenizers number the second sentence 1.
        constants[home.prefix + SEGMENTS] = torch.zeros(2, config.hidden_size)
    if config.position == "rotary":
        head_size = config.hidden_size // config.num_attention_heads
        angles = rotary_angles(config.max_position_embeddings, head_size)
        if home is ROFORMER:
            table = torch.cat([angles.sin(), angles.cos()], dim=1)
            constants["roformer.encoder.embed_positions.weight"] = table.float()
        else:
            constants["esm.rotary_embeddings.inv_freq"] = rotary_angles(2, head_size)[1].float()
    if home is ESM:  # Contact prediction is for proteins; without these, loading would draw them.
        num_maps = config.num_hidden_layers * config.num_attention_heads
        constants["esm.contact_head.regression.weight"] = torch.zeros(1, num_maps)
        constants["esm.contact_head.regression.bias"] = torch.zeros(1)
    return constants


def _their_name(name: str, home: Home) -> str:
    """Name in `home` of our weight or bias `name` (not of a fused projection)."""
    module, _, kind = name.rpartition(".")
    if module in home.outer_names:
        return f"{home.outer_names[module]}.{kind}"
    if module.startswith(LAYER_PREFIX):
        index, _, part = module.removeprefix(LAYER_PREFIX).partition(".")
        return f"{home.prefix}{home.layers}.{index}.{home.layer_names[part]}.{kind}"
    return home.prefix + name


def _decoder_bias(home: Home) -> str:
    """Where an untied decoder of transformers keeps its bias; ESM's has none of its own."""
    return f"{home.outer_names['mlm_head.decoder']}.bias"


def _qkv_names(name: str, home: Home) -> list[str]:
    """Names in `home` of the three parts of our fused projection."""
    index, _, kind = name.removeprefix(LAYER_PREFIX).partition(f".{QKV}")
    layer = f"{home.prefix}encoder.layer.{index}.attention.self"
    return [f"{layer}.{part}.{kind}" for part in ("query", "key", "value")]


def _halves_to_pairs(rows: Tensor, config: BertConfig) -> Tensor:
    """Reorder each head's D output rows (i, i + D/2) -> (2i, 2i + 1)."""
    heads = rows.view(config.num_attention_heads, 2, -1, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _pairs_to_halves(rows: Tensor, config: BertConfig) -> Tensor:
    """Inverse of `_halves_to_pairs`."""
    heads = rows.view(config.num_attention_heads, -1, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)
