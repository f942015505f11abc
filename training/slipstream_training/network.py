"""The Llama network in plain PyTorch, with Hugging Face's parameter names and a KV cache.

Owns the architecture only: no data, no loss, no file formats. Shapes: `B` sequences, `T` positions,
`V` vocabulary entries.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .shape import LlamaShape

Cache = list[tuple[Tensor, Tensor]]


class RmsNorm(nn.Module):
    """Root-mean-square norm with a gain per channel (arXiv 1910.07467, eq. 4)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotary_tables(shape: LlamaShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[max_positions, head_dim / 2]` (arXiv 2104.09864, eq. 34)."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    angles = torch.outer(torch.arange(shape.max_position_embeddings), shape.rope_theta**-exponents)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates element `i` with element `i + head_dim / 2` of each head; `x` is `[B, heads, T, head_dim]`."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Softmax attention over equal head counts, `[B, heads, T, head_dim]` each.

    On a CPU the fused operator's backward pass takes a third of a training step at short lengths;
    there the plain products, which a compiler fuses, are 15 % faster per step.
    """
    if not causal or q.device.type != "cpu" or q.shape[2] > 256:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.head_dim = shape.head_dim
        self.group = shape.num_attention_heads // shape.num_key_value_heads
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None):
        """Returns the output `[B, T, hidden]` and the keys and values of all positions so far."""
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        # With a cache only one new position is fed at a time, and it may see everything.
        causal = past is None and length > 1
        keys, values = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)
        out = attend(q, keys, values, causal)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), (k, v)


class GatedMlp(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202, eq. 6)."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden]` to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Pre-norm transformer layer. `dropout` is the share of each branch's outputs dropped while training."""

    dropout = 0.0

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = GatedMlp(shape)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor] | None):
        """Residual attention, then residual feed-forward."""
        attended, present = self.self_attn(self.input_layernorm(x), rotary, past)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training), present


class Trunk(nn.Module):
    """Embedding, layers and final norm; a module of its own so that names match Hugging Face's."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    """Llama with tied embeddings."""

    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits `[B, T, V]` of `ids [B, T]`, and the cache grown by `T` positions.

        With a `cache`, `T` must be 1.
        """
        start = cache[0][0].shape[2] if cache else 0
        rotary = self.cos[start : start + ids.shape[1]], self.sin[start : start + ids.shape[1]]
        x = self.model.embed_tokens(ids)
        grown = []
        for number, layer in enumerate(self.model.layers):
            x, present = layer(x, rotary, cache[number] if cache else None)
            grown.append(present)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight), grown

    def drop(self, share: float) -> None:
        """Sets every layer's dropout."""
        for layer in self.model.layers:
            layer.dropout = share

    def initialise(self, seed: int) -> None:
        """Draws fresh weights: normal, output projections scaled down by depth (as in GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.ndim == 1:
                    weight.fill_(1.0)
                    continue
                depth = (2 * self.shape.num_hidden_layers) ** -0.5
                scale = depth if "o_proj" in name or "down_proj" in name else 1.0
                weight.normal_(0.0, scale * weight.shape[1] ** -0.5, generator=generator)
