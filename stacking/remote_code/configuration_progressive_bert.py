"""Sizes and form of a ProgressiveBert; names and defaults are BERT's where it has them."""

from transformers import PretrainedConfig


class ProgressiveBertConfig(PretrainedConfig):
    """What config.json says.

    Attributes:
        layer_intermediate_sizes: inner width of each layer; empty: `intermediate_size` in all.
        position: "learned", "sinusoidal" (a table in the file, which does not train) or "rotary".
        layer_norm: "post" (after each sum) or "pre" (before each branch, and last).
        layer_norm_affine: whether the layers' LayerNorms have weight and bias.
        embedding_layer_norm: whether the sum of embeddings is normalised.
        embedding_scale: whether word embeddings are multiplied by sqrt(hidden_size).
        mlm_bias: whether the decoder has a bias.
        num_nsp_labels: logits of the next-sentence head; 0: it has none.
        pooler: whether that head reads tanh(Linear([CLS])), or [CLS] itself.
        shared_attention_layers: layers, from 0, that reuse the probabilities of the layer below.
    """

    model_type = "progressive_bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    tie_word_embeddings: bool = True
    layer_intermediate_sizes: list[int] | tuple[int, ...] = ()
    position: str = "learned"
    layer_norm: str = "post"
    layer_norm_affine: bool = True
    embedding_layer_norm: bool = True
    embedding_scale: bool = False
    mlm_bias: bool = True
    num_nsp_labels: int = 2
    pooler: bool = True
    shared_attention_layers: list[int] | tuple[int, ...] = ()

    def inner_size(self, layer: int) -> int:
        """Inner width of the feed-forward block of `layer`."""
        sizes = self.layer_intermediate_sizes
        return sizes[layer] if sizes else self.intermediate_size
