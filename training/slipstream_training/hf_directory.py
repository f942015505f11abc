"""Hugging Face directories: writes them, and makes one of a GGUF file (`training export-hf`).

Owns config.json, the tensor names and row order on the way back from GGUF, and the files' names. Weights
come out in float32 exactly as a reader of the GGUF file recovers them. Knows nothing of training.
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

from . import gguf_tokenizer
from .export_gguf import GLOBAL_NAMES, LAYER_NAMES, unpermute_rows
from .refusal import Refusal
from .shape import LlamaShape

# Keys under `llama.` that are read, or mean nothing to the computation, as in `model/src/load/gguf.rs`.
LLAMA_KEYS = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear",
    "expert_count", "expert_used_count", "tensor_data_layout",
}
# The only divisors in the wild are Llama 3's: these three are the same in all of its releases.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_json(shape: LlamaShape, eos: int | list[int] | None, bos: int | None, rope_scaling: dict | None) -> dict:
    """A config.json in the keys of transformers 4, which its later versions and slipstream read as well."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": rope_scaling,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def write_network(folder: Path, config: dict, weights: dict[str, np.ndarray]) -> None:
    """Writes config.json and model.safetensors; `weights` are float32 under Hugging Face's names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "model.safetensors"
    save_file({name: np.ascontiguousarray(weight, dtype=np.float32) for name, weight in weights.items()}, path,
              metadata={"format": "pt"})
    # The library leaves it to its owner alone; a server often runs as somebody else.
    path.chmod((folder / "config.json").stat().st_mode & 0o666)


class GgufFile:
    """An opened GGUF file of the `llama` architecture: metadata by key, tensors on demand."""

    def __init__(self, path: Path):
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, OSError) as error:
            raise Refusal(f"{path} cannot be read as a GGUF file: {error}") from None
        fields = self.reader.fields.items()
        self.fields = {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        if self.fields.get("general.architecture") != "llama":
            raise Refusal(f"{path}: architecture {self.fields.get('general.architecture')!r}; only 'llama' is known")
        keys = {key.removeprefix("llama.") for key in self.fields if key.startswith("llama.")}
        if unknown := sorted(keys - LLAMA_KEYS):
            raise Refusal(f"{path}: key llama.{unknown[0]} could change the computation and is not known")
        if self.fields.get("llama.expert_count") or self.fields.get("llama.expert_used_count"):
            raise Refusal(f"{path}: mixtures of experts are not supported")

    def number(self, key: str, default: float | None = None) -> float:
        """A `llama.*` value; refused when it is absent and has no default."""
        value = self.fields.get(f"llama.{key}", default)
        if value is None:
            raise Refusal(f"the GGUF file has no key llama.{key}")
        return value

    def array(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, outermost dimension first."""
        tensor = self.tensors[name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(values, dtype=np.float32).reshape(tensor.shape[::-1])

    def shape(self) -> LlamaShape:
        """The network's shape; the sizes that follow from others are checked."""
        width, heads = int(self.number("embedding_length")), int(self.number("attention.head_count"))
        head_dim = int(self.number("attention.key_length", width // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.number(key, head_dim) != head_dim:
                raise Refusal(f"llama.{key} = {self.number(key)}: only the head size, {head_dim}, is supported")
        if "token_embd.weight" not in self.tensors:
            raise Refusal("the GGUF file has no tensor token_embd.weight")
        return LlamaShape(
            vocab_size=int(self.tensors["token_embd.weight"].shape[1]), hidden_size=width,
            intermediate_size=int(self.number("feed_forward_length")),
            num_hidden_layers=int(self.number("block_count")), num_attention_heads=heads,
            num_key_value_heads=int(self.number("attention.head_count_kv", heads)), head_dim=head_dim,
            max_position_embeddings=int(self.number("context_length")),
            rms_norm_eps=shortest(self.number("attention.layer_norm_rms_epsilon")),
            rope_theta=shortest(self.number("rope.freq_base", 10000.0)), tied="output.weight" not in self.tensors,
        )

    def rope_scaling(self, shape: LlamaShape) -> dict | None:
        """What config.json says of rotary scaling: none, linear, or Llama 3's, recognised by its divisors."""
        kind = self.fields.get("llama.rope.scaling.type")
        factor = self.fields.get("llama.rope.scaling.factor", self.fields.get("llama.rope.scale_linear"))
        divisors = self.array("rope_freqs.weight") if "rope_freqs.weight" in self.tensors else None
        if kind not in (None, "none", "linear") or (kind == "linear" and factor is None):
            raise Refusal(f"llama.rope.scaling.type = {kind!r} without what it needs; none and linear are known")
        linear = kind == "linear" or (kind is None and factor is not None)
        if divisors is None:
            return {"rope_type": "linear", "factor": shortest(factor)} if linear else None
        scaling = {"rope_type": "llama3", "factor": shortest(divisors.max())} | LLAMA3_ROPE
        if linear or not np.allclose(divisors, llama3_divisors(scaling, shape), rtol=1e-4):
            raise Refusal("tensor rope_freqs.weight holds divisors that config.json has no words for")
        return scaling


def shortest(value: float) -> float:
    """The shortest decimal that means the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def llama3_divisors(scaling: dict, shape: LlamaShape) -> np.ndarray:
    """What Llama 3's scaling divides each rotary frequency by, as transformers computes it."""
    lengths = 2 * np.pi * shape.rope_theta ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((scaling["original_max_position_embeddings"] / lengths - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - kept) / scaling["factor"] + kept)


def hf_weights(file: GgufFile, shape: LlamaShape) -> dict[str, np.ndarray]:
    """All weights in float32 under Hugging Face's names, rows of Q and K in its order."""
    outside = {short: long for long, short in GLOBAL_NAMES.items()}
    inside = {short: long for long, short in LAYER_NAMES.items()}
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}
    weights = {}
    for name in file.tensors:
        stem = name.removesuffix(".weight")
        if stem == "rope_freqs":
            continue
        _, layer, short = stem.split(".", 2) if stem.startswith("blk.") else (None, None, stem)
        known = inside if layer is not None else outside
        if short not in known:
            raise Refusal(f"tensor {name} is no part of a Llama network")
        array = file.array(name)
        array = unpermute_rows(array, heads[short]) if short in heads else array
        weights[f"model.layers.{layer}.{known[short]}.weight" if layer else f"{known[short]}.weight"] = array
    return weights


def tokenizer_config(tokenizer: dict, eos: list[int], bos: int | None, context: int) -> dict:
    """The few keys that transformers wants beside tokenizer.json."""
    name_of = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    named = {"eos_token": name_of[eos[0]]} if eos else {}
    named |= {"bos_token": name_of[bos]} if bos is not None else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, **named}


def export(path: Path, folder: Path) -> LlamaShape:
    """Writes the GGUF file `path` as a Hugging Face directory and returns the network's shape."""
    file = GgufFile(path)
    shape = file.shape()
    eos, bos = gguf_tokenizer.end_ids(file.fields), file.fields.get("tokenizer.ggml.bos_token_id")
    tokenizer = gguf_tokenizer.tokenizer_json(file.fields)
    config = config_json(shape, eos[0] if len(eos) == 1 else eos or None, bos, file.rope_scaling(shape))
    write_network(folder, config, hf_weights(file, shape))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    settings = tokenizer_config(tokenizer, eos, bos, shape.max_position_embeddings)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    return shape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `training export-hf`."""
    parser.add_argument("model", type=Path, metavar="MODEL.GGUF", help="a GGUF file of the llama architecture")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write; must be new or empty")


def run(arguments: argparse.Namespace) -> None:
    """`training export-hf`; raises `Refusal` on bad input."""
    if not arguments.model.is_file():
        raise Refusal(f"MODEL.GGUF: {arguments.model} is not a file")
    if arguments.folder.exists() and (not arguments.folder.is_dir() or any(arguments.folder.iterdir())):
        raise Refusal(f"DIR: {arguments.folder} exists and is not an empty folder")
    shape = export(arguments.model, arguments.folder)
    print(f"{arguments.folder}: {shape.parameters():,} weights in float32, vocabulary of {shape.vocab_size:,}")
