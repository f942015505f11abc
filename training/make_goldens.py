#!/usr/bin/env python3
"""Writes tests/fixtures/llama-*/: tiny random Llama checkpoints with logits by `transformers`.

Every logit is computed in float32 on exactly the weights that the file beside it holds (rounded to
bf16 or f16, or dequantised from Q8_0), so that a reader is compared and never the rounding.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream_training.export_gguf import Card, dequantised_weights, write_gguf
from slipstream_training.shape import LlamaShape
from slipstream_training.tokenizer import END_OF_TEXT_ID, train_tokenizer

TOKENS = 40
TOKENIZER_TEXT = [
    "fn main() {\n    let mut total = 0;\n    for item in items.iter() {\n        total += item;\n    }\n}\n",
    "/// Returns the length.\npub fn len(&self) -> usize {\n    self.items.len()\n}\n",
    "impl<T> Default for Stack<T> {\n    fn default() -> Self {\n        Self::new()\n    }\n}\n",
]


@dataclass(frozen=True)
class Case:
    """One checkpoint; what is not named here is the same for all (hidden 64, ffn 96, 4 query heads)."""

    name: str
    kv_heads: int
    layers: int = 2
    vocab_size: int = 128
    head_dim: int = 16
    tied: bool = True
    rms_norm_eps: float = 1e-5
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})


LLAMA3_ROPE = {
    # Wave lengths of head_dim 16 are 6.3, 19.9, 62.8, ...: one lies under 32 / 4 and is kept, one
    # lies between and is blended, the others are stretched. All three branches act by position 40.
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

CASES = [
    Case("tied", kv_heads=2),
    Case("untied", kv_heads=4, tied=False, rms_norm_eps=1e-6),
    Case("gqa", kv_heads=2, head_dim=24, vocab_size=320, tied=False),
    Case("llama3", kv_heads=1, layers=1, rope=LLAMA3_ROPE),
    Case("linear", kv_heads=2, layers=1, rope=LINEAR_ROPE),
]


def llama_config(case: Case) -> LlamaConfig:
    """The configuration as transformers 5 holds and writes it."""
    return LlamaConfig(
        vocab_size=case.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=256,
        rms_norm_eps=case.rms_norm_eps,
        tie_word_embeddings=case.tied,
        rope_parameters=dict(case.rope),
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
        attn_implementation="eager",
        dtype="float32",
    )


def randomise(model: LlamaForCausalLM, seed: int) -> None:
    """Draws weights wide enough that attention is peaked and a forgotten norm weight shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                std = 0.3 if "embed" in name or "lm_head" in name else 0.15
                weight.normal_(0.0, std, generator=generator)


def build(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """A float32 model holding exactly `weights`; raises on a missing or unknown name."""
    model = LlamaForCausalLM(config).float().eval()
    missing, unknown = model.load_state_dict(weights, strict=False)
    tied_away = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied_away or unknown:
        raise ValueError(f"weights do not fit: missing {missing}, unknown {unknown}")
    model.tie_weights()
    return model


def stored_weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The tensors a checkpoint file holds: a tied head is not stored."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def write_golden(path: Path, model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Saves `input_ids [T]` i64 and `logits [T, vocab]` f32, and prints how exact float32 is here."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0].float().contiguous()
        exact = build(model.config, stored_weights(model)).double()(ids[None]).logits[0]
    error = ((logits - exact).abs().max() / exact.abs().max()).item()
    save_file({"input_ids": ids, "logits": logits}, path)
    print(f"{path.parent.name}/{path.name}: |logit| <= {exact.abs().max():.2f}, "
          f"std {exact.std():.2f}, float32 off float64 by {error:.1e}")


def write_checkpoint(folder: Path, model: LlamaForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Writes model.safetensors and the config.json that `save_pretrained` of transformers 5 writes."""
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict() | {"dtype": str(weights["model.norm.weight"].dtype)[6:]}
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_v4_config(folder: Path, *, legacy_type_key: bool) -> None:
    """Writes config.v4.json: the same model as transformers 4 described it."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if legacy_type_key:
        rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.38.0" if legacy_type_key else "4.46.0"
    (folder / "config.v4.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_v4_config(folder: Path, model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Proves that the older description means the same network."""
    config = LlamaConfig(**json.loads((folder / "config.v4.json").read_text()), attn_implementation="eager")
    with torch.no_grad():
        same = torch.equal(build(config, stored_weights(model))(ids[None]).logits, model(ids[None]).logits)
    if not same:
        raise ValueError(f"{folder.name}: config.v4.json gives other logits")


def write_gguf_twins(folder: Path, model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Writes tokenizer.json, model-f32.gguf, model-q8_0.gguf and the golden of the latter."""
    config = model.config
    tokenizer = train_tokenizer(TOKENIZER_TEXT, config.vocab_size, "gpt-2")
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
    names = set(LlamaShape.__annotations__) - {"rope_theta", "tied"}
    shape = LlamaShape(**{name: getattr(config, name) for name in names}, tied=config.tie_word_embeddings)
    weights = {name: tensor.numpy() for name, tensor in stored_weights(model).items()}
    for kind, stem in [(Quant.F32, "model-f32"), (Quant.Q8_0, "model-q8_0")]:
        card = Card(name=f"slipstream fixture {folder.name} {kind.name}", license="MIT OR Apache-2.0")
        write_gguf(folder / f"{stem}.gguf", weights, shape, json.loads(tokenizer.to_str()), card=card, matrices=kind)
    rounded = {name: torch.from_numpy(np.array(w)) for name, w in dequantised_weights(weights, Quant.Q8_0).items()}
    write_golden(folder / "golden-q8_0.safetensors", build(config, rounded), ids)


def write_rounded(root: Path, model: LlamaForCausalLM, ids: torch.Tensor, dtype: torch.dtype, name: str) -> None:
    """Writes the same weights stored in 16 bits, with the golden of the rounded weights."""
    rounded = {key: tensor.to(dtype) for key, tensor in stored_weights(model).items()}
    exact = build(model.config, {key: tensor.float() for key, tensor in rounded.items()})
    folder = root / f"llama-{name}"
    write_checkpoint(folder, exact, rounded)
    write_golden(folder / "golden.safetensors", exact, ids)


def write_case(root: Path, case: Case, seed: int) -> None:
    """Writes one folder, and the variants that hang on it."""
    folder = root / f"llama-{case.name}"
    model = LlamaForCausalLM(llama_config(case)).float().eval()
    randomise(model, seed)
    ids = torch.randint(0, case.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(seed + 1))
    write_checkpoint(folder, model, stored_weights(model))
    write_golden(folder / "golden.safetensors", model, ids)
    if case.name in ("tied", "llama3", "linear"):
        write_v4_config(folder, legacy_type_key=case.name == "linear")
        check_v4_config(folder, model, ids)
    if case.name == "gqa":
        write_gguf_twins(folder, model, ids)
    if case.name == "tied":
        write_rounded(root, model, ids, torch.bfloat16, "bf16")
        write_rounded(root, model, ids, torch.float16, "f16")


def main() -> None:
    """Rewrites every llama-* folder under the fixtures root."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parent.parent / "tests" / "fixtures"
    parser.add_argument("--out", type=Path, default=default, help="fixtures root (default: tests/fixtures)")
    parser.add_argument("--seed", type=int, default=20240, help="seed of all weights and token ids")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for old in arguments.out.glob("llama-*"):
        shutil.rmtree(old)
    for number, case in enumerate(CASES):
        write_case(arguments.out, case, arguments.seed + 10 * number)


if __name__ == "__main__":
    main()
