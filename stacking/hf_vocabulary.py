"""A model without the rows of its vocabulary that no token has."""

import torch

from stacking.modeling import BertForPreTraining

ROWS_BY_ID = ("embeddings.word_embeddings.weight", "mlm_head.decoder.weight", "mlm_head.bias")
"""Weights of BertForPreTraining with one row for each id."""


def trim_vocabulary(model: BertForPreTraining, num_ids: int) -> BertForPreTraining:
    """`model` with the first `num_ids` rows of its vocabulary; itself where it has no more.

    Its weights are views of the model's.
    """
    if num_ids >= model.config.vocab_size:
        return model
    with torch.device("meta"):
        trimmed = BertForPreTraining(model.config.model_copy(update={"vocab_size": num_ids}))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state |= {name: state[name][:num_ids] for name in ROWS_BY_ID if name in state}
    trimmed.load_state_dict(state, assign=True)
    return trimmed
