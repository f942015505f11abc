"""Writes a Llama checkpoint as a GGUF file.

Owns the mapping from Hugging Face tensor names to GGUF names, the row order of Q and K that the
GGUF convention for `llama` asks for, Q8_0 quantisation, and the metadata. Knows nothing of training.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant

from . import quant4
from .shape import LlamaShape
from .tokenizer import END_OF_TEXT

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GLOBAL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


HEAD_TENSORS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Card:
    """The descriptive half of the metadata: what the file is, and under which licence."""

    name: str
    license: str
    description: str = ""


def gguf_name(name: str) -> str:
    """Returns the GGUF name of a Hugging Face tensor name, or raises `KeyError`."""
    stem = name.removesuffix(".weight")
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest]}.weight"


def permute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows `[heads * head_dim, in]` of Q or K from half-split to interleaved rotary pairs.

    Hugging Face rotates element `i` of a head with element `i + head_dim / 2`; GGUF's `llama`
    convention rotates `2 i` with `2 i + 1`. Row `(half, i)` of each head becomes row `(i, half)`.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def unpermute_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `permute_rows`."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


FILE_TYPES = {
    Quant.F32: gguf.LlamaFileType.ALL_F32,
    Quant.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Quant.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
}


def quantised_type(name: str, weight: np.ndarray, matrices: Quant) -> Quant:
    """Vectors (the norms) stay F32; every matrix is stored as `matrices`.

    The embedding, which is the output head as well, is never stored below Q8_0: its error reaches every logit.
    """
    if weight.ndim != 2:
        return Quant.F32
    return Quant.Q8_0 if matrices == Quant.Q4_0 and gguf_name(name) in HEAD_TENSORS else matrices


def packed(weight: np.ndarray, kind: Quant) -> np.ndarray:
    """The bytes of a tensor stored as `kind`."""
    return quant4.quantise(weight) if kind == Quant.Q4_0 else gguf.quants.quantize(weight, kind)


def dequantised_weights(weights: dict[str, np.ndarray], matrices: Quant) -> dict[str, np.ndarray]:
    """Returns the float32 values that a reader recovers from a file stored as `matrices`."""
    result = {}
    for name, weight in weights.items():
        kind = quantised_type(name, weight, matrices)
        result[name] = gguf.quants.dequantize(packed(weight, kind), kind).reshape(weight.shape)
    return result


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer_json: dict, rules: str) -> None:
    """Embeds a byte-level BPE tokenizer given as a parsed tokenizer.json; `rules` names how it splits text."""
    vocabulary = tokenizer_json["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("token ids are not 0..vocab_size without gaps")
    control = {token["content"] for token in tokenizer_json["added_tokens"] if token["special"]}
    kinds = [gguf.TokenType.CONTROL if token in control else gguf.TokenType.NORMAL for token in tokens]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer_json["model"]["merges"]]
    end_id = vocabulary[END_OF_TEXT]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(end_id)
    writer.add_bos_token_id(end_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def add_metadata(writer: gguf.GGUFWriter, shape: LlamaShape, card: Card) -> None:
    """Writes the `general.*` and `llama.*` keys."""
    writer.add_name(card.name)
    writer.add_license(card.license)
    if card.description:
        writer.add_description(card.description)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab_size)


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    shape: LlamaShape,
    tokenizer_json: dict,
    *,
    card: Card,
    matrices: Quant,
    rules: str = "gpt-2",
) -> None:
    """Writes `weights` (Hugging Face names, float32) to `path`; tied heads simply have no `lm_head.weight`."""
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, shape, card)
    writer.add_file_type(FILE_TYPES[matrices])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer_json, rules)
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    for name in sorted(weights):
        weight = np.ascontiguousarray(weights[name], dtype=np.float32)
        kind = quantised_type(name, weight, matrices)
        projection = name.split(".")[-2]
        if projection in heads:
            weight = permute_rows(weight, heads[projection])
        writer.add_tensor(gguf_name(name), packed(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
