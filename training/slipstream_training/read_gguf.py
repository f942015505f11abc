"""Reads a GGUF Llama back and computes its logits by itself, in numpy float64.

A second opinion on `export_gguf` and `network`: shares no code with either, and rotates interleaved
pairs as the file stores them instead of undoing the row order.
"""

from pathlib import Path

import gguf
import numpy as np


class GgufLlama:
    """A parsed file: metadata by key, dequantised tensors by name."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        self.tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            for tensor in reader.tensors
        }

    def number(self, key: str) -> float:
        """A `llama.*` value."""
        return self.fields[f"llama.{key}"]

    def weight(self, name: str) -> np.ndarray:
        """A tensor in float64."""
        return self.tensors[f"{name}.weight"].astype(np.float64)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Root-mean-square norm over the last axis."""
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + self.number("attention.layer_norm_rms_epsilon"))
        return x / scale * self.weight(name)

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotates neighbours `(2 i, 2 i + 1)` as complex numbers; `x` is `[T, heads, head_dim]`."""
        width = x.shape[-1]
        rates = self.number("rope.freq_base") ** (-np.arange(0, width, 2) / width)
        turns = np.exp(1j * np.outer(np.arange(len(x)), rates))[:, None, :]
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    def attention(self, x: np.ndarray, layer: str) -> np.ndarray:
        """Causal grouped-query attention of `x [T, hidden]`."""
        length, width = len(x), self.number("attention.key_length")
        q, k, v = ((x @ self.weight(f"{layer}.attn_{part}").T).reshape(length, -1, width) for part in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        group = self.number("attention.head_count") // self.number("attention.head_count_kv")
        mask = np.triu(np.full((length, length), -np.inf), 1)
        heads = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(width) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // group])
        return np.concatenate(heads, axis=-1) @ self.weight(f"{layer}.attn_output").T

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits `[T, vocab]` of one sequence of ids `[T]`."""
        x = self.weight("token_embd")[ids]
        for number in range(self.number("block_count")):
            layer = f"blk.{number}"
            x = x + self.attention(self.norm(x, f"{layer}.attn_norm"), layer)
            inner = self.norm(x, f"{layer}.ffn_norm")
            gate, up = inner @ self.weight(f"{layer}.ffn_gate").T, inner @ self.weight(f"{layer}.ffn_up").T
            x = x + (gate / (1.0 + np.exp(-gate)) * up) @ self.weight(f"{layer}.ffn_down").T
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self.norm(x, "output_norm") @ self.weight(head).T
