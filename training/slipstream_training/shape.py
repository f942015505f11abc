"""The numbers that define a Llama network. Knows no tensors and no files."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LlamaShape:
    """Field names follow Hugging Face's config.json; `tied` says that the head reuses the embedding."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = True

    def parameters(self) -> int:
        """Number of stored weights."""
        heads = self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        layer = self.hidden_size * (heads + 3 * self.intermediate_size + 2)
        tables = 1 if self.tied else 2
        return tables * self.vocab_size * self.hidden_size + self.num_hidden_layers * layer + self.hidden_size
