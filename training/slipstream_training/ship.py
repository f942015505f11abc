"""Turns trained networks into the files that are shipped, and proves that these files say the same.

Owns GGUF export of a pair, the goldens that the Rust tests compare with, and pieces for narrow channels.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from .export_gguf import Card, dequantised_weights, write_gguf
from .network import Llama
from .read_gguf import GgufLlama
from .shape import LlamaShape

LICENSE = "MIT OR Apache-2.0"
GOLDEN_ROWS = 16
GOLDEN_PROMPT = """/// Returns the number of elements in the queue, 0 for one that was never filled.
pub fn len(&self) -> usize {
    match self.inner.lock() {
        Ok(guard) => guard.items.len() + 120,
        Err(error) => error.into_inner().items.len(),
    }
}
"""


@dataclass(frozen=True)
class Exported:
    """One shipped file: which network it holds, how its matrices are stored, and where it lies."""

    role: str
    matrices: Quant
    path: Path


def weights_of(network: Llama) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face name."""
    return {name: weight.detach().cpu().numpy() for name, weight in network.named_parameters()}


def as_stored(network: Llama, matrices: Quant) -> Llama:
    """The same network with the weights that a reader of its file recovers."""
    stored = dequantised_weights(weights_of(network), matrices)
    copy = Llama(network.shape)
    copy.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in stored.items()})
    return copy.eval().requires_grad_(False)


def transformers_logits(network: Llama, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[T, V]` of one sequence `ids [T]`, computed by `transformers` in float32."""
    shape: LlamaShape = network.shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings, rms_norm_eps=shape.rms_norm_eps,
        rope_theta=shape.rope_theta, tie_word_embeddings=True, attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(network.state_dict(), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights do not fit transformers' Llama: missing {missing}, unexpected {unexpected}")
    with torch.no_grad():
        return model(ids[None]).logits[0].float()


def relative_distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest magnitude wanted."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def export(network: Llama, role: str, title: str, rules: str, tokenizer: Tokenizer, exported: Exported) -> None:
    """Writes one GGUF file."""
    parameters = network.shape.parameters()
    card = Card(
        name=f"slipstream {title} {role}", license=LICENSE,
        description=f"Rust completion, {role} of slipstream's pair {title}, {parameters:,} parameters",
    )
    tokenizer_json = json.loads(tokenizer.to_str())
    write_gguf(
        exported.path, weights_of(network), network.shape, tokenizer_json, card=card, matrices=exported.matrices,
        rules=rules,
    )


def write_golden(network: Llama, tokenizer: Tokenizer, exported: Exported, path: Path) -> dict[str, float]:
    """Saves rows of `transformers`' logits on the original and on the stored weights.

    Returns the file's error against `transformers` on the stored weights, as read back by an independent
    reader (`read_back`, must be tiny), and what quantisation cost (`quantisation`).
    """
    ids = torch.tensor(tokenizer.encode(GOLDEN_PROMPT, add_special_tokens=False).ids)
    original, stored = (transformers_logits(n, ids) for n in (network, as_stored(network, exported.matrices)))
    read_back = relative_distance(GgufLlama(exported.path).logits(ids.numpy()), stored.numpy())
    if read_back > 1e-5:
        raise ValueError(f"{exported.path.name} read back gives other logits than transformers: {read_back:.1e}")
    positions = torch.linspace(0, len(ids) - 1, GOLDEN_ROWS).long()
    rows = {"original": original[positions].contiguous(), "stored": stored[positions].contiguous()}
    save_file({"input_ids": ids, "positions": positions, **rows}, path)
    path.chmod(0o644)
    quantisation = relative_distance(rows["stored"].numpy(), rows["original"].numpy())
    print(f"{exported.path.name}: {exported.path.stat().st_size:,} bytes, read back within {read_back:.1e}, "
          f"quantisation moves logits by {quantisation:.1e} of the largest")
    return {"read_back": read_back, "quantisation": quantisation}


def write_pieces(folder: Path, out: Path, size: int) -> None:
    """Cuts every file of `folder` into pieces of at most `size` bytes named `NAME.00`, `NAME.01`, ... in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(file for file in folder.iterdir() if file.is_file()):
        content = path.read_bytes()
        for number, start in enumerate(range(0, max(1, len(content)), size)):
            (out / f"{path.name}.{number:02}").write_bytes(content[start : start + size])
