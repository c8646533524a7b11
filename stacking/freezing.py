"""Which parameters train while the bottom of the model is frozen (MSLT, Yang et al. 2020).

Frozen are the embeddings and the bottom layers; layers above, the last LayerNorm and both heads
train. The MLM decoder's matrix, which may be the word embedding, trains only where asked to.
"""

from stacking.backbone import BertBackbone
from stacking.config import BertConfig, Freeze
from stacking.errors import ConfigError
from stacking.growth.contract import parameter_shapes

_LAYER = "encoder.layers."


def trained_names(config: BertConfig, freeze: Freeze | None) -> frozenset[str]:
    """Names of the parameters that an optimizer updates; without `freeze` all."""
    names = parameter_shapes(config)
    if freeze is None:
        return frozenset(names)
    if freeze.layers >= config.num_hidden_layers:
        raise ConfigError(
            f"freeze.layers: got {freeze.layers} of {config.num_hidden_layers} layers; allowed: 1 "
            f"to {config.num_hidden_layers - 1}, so that a layer is left to train"
        )
    return frozenset(name for name in names if _is_trained(name, config, freeze))


def apply_freeze(model: BertBackbone, freeze: Freeze | None) -> None:
    """Make exactly `trained_names` require gradients, and the forward stop below them.

    Gradients that frozen parameters hold are dropped. Call it before an optimizer or engine is
    built; with None it thaws, any model.
    """
    trained = None if freeze is None else trained_names(model.config, freeze)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained is None or name in trained)
        if not parameter.requires_grad:
            parameter.grad = None
    model.frozen_layers = 0 if freeze is None else freeze.layers
    model.frozen_dropout = freeze is None or freeze.dropout


def _is_trained(name: str, config: BertConfig, freeze: Freeze) -> bool:
    tied = config.tie_word_embeddings
    if name == ("embeddings.word_embeddings.weight" if tied else "mlm_head.decoder.weight"):
        return freeze.decoder == "train"
    if name.startswith(_LAYER):
        return int(name.removeprefix(_LAYER).partition(".")[0]) >= freeze.layers
    return not name.startswith("embeddings.")
