"""An operator's verifier, read through transformers, behind the interface that the training code uses.

Owns loading, the ids that texts begin and end with, and one vocabulary's agreement with its network. Knows
nothing of drafts.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .refusal import Refusal

NEEDED = ("config.json", "tokenizer.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def read_json(path: Path) -> dict:
    """A JSON object, or a refusal that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"--verifier: {path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(f"--verifier: {path} holds no JSON object")
    return value


def first_id(value: int | list[int] | None) -> int | None:
    """One id of a key that may hold one, several or none."""
    return value[0] if isinstance(value, list) and value else value if isinstance(value, int) else None


@dataclass(frozen=True)
class Vocabulary:
    """How the verifier reads text: its tokenizer, the id before every text (if its template adds one), and after."""

    tokenizer: Tokenizer
    size: int
    end_id: int
    begin_id: int | None

    @property
    def dtype(self) -> type:
        """The smallest type that holds every id."""
        return np.uint16 if self.size <= 1 << 16 else np.uint32


def end_of_text(folder: Path, config: dict, tokenizer: Tokenizer) -> int:
    """The id that ends a text: of config.json, else generation_config.json, else the name in tokenizer_config.json."""
    found = first_id(config.get("eos_token_id"))
    if found is None and (folder / "generation_config.json").exists():
        found = first_id(read_json(folder / "generation_config.json").get("eos_token_id"))
    if found is None and (folder / "tokenizer_config.json").exists():
        name = read_json(folder / "tokenizer_config.json").get("eos_token")
        name = name.get("content") if isinstance(name, dict) else name
        found = tokenizer.token_to_id(name) if name else None
    if found is None:
        raise Refusal(f"--verifier: {folder} names no end-of-text token (eos_token_id in config.json)")
    return found


def read_vocabulary(folder: Path, config: dict) -> Vocabulary:
    """The tokenizer, checked against the rows of the network's embedding."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # The tokenizers crate raises bare exceptions.
        raise Refusal(f"--verifier: {folder / 'tokenizer.json'} cannot be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size, highest = config.get("vocab_size"), max(tokenizer.get_vocab().values())
    end_id = end_of_text(folder, config, tokenizer)
    if not isinstance(size, int) or max(highest, end_id) >= size:
        raise Refusal(f"--verifier: its vocabulary does not fit its network: tokenizer.json and eos_token_id go up to "
                      f"id {max(highest, end_id)}, config.json says vocab_size {size}")
    plain, framed = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    begins = len(framed) > len(plain) and framed[0] != plain[0]
    return Vocabulary(tokenizer, size, end_id, framed[0] if begins else None)


class Teacher:
    """A frozen causal language model: `teacher(ids, cache=None) -> (logits, cache)`, as `network.Llama` is called.

    Weights are float32 whatever the files hold, as slipstream itself widens them.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model.eval().requires_grad_(False)
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self.context = int(getattr(model.config, "max_position_embeddings", 2048))

    # The compiler of the training step would trace all of transformers for a graph that never changes.
    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: object | None = None) -> tuple[Tensor, object]:
        """Logits `[B, T, V]` of `ids [B, T]` after what `cache` holds, and the cache grown by them."""
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values


def read_config(folder: Path) -> dict:
    """config.json of a Hugging Face directory that slipstream could serve."""
    if not folder.is_dir():
        raise Refusal(f"--verifier: {folder} is neither a folder nor a GGUF file")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise Refusal(f"--verifier: {folder} has no {name}")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "llama":
        raise Refusal(f"--verifier: model_type {config.get('model_type')!r}; slipstream serves 'llama'")
    return config


def read_teacher(folder: Path, device: str) -> Teacher:
    """Loads the verifier of a Hugging Face directory onto `device`; never reaches for a network."""
    # Takes seconds to import, which the other commands need not wait for.
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    read_config(folder)  # refuses what slipstream does not serve
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True,
        )
    except Exception as error:  # Whatever is wrong with files from outside ends in one line.
        raise Refusal(f"--verifier: {folder} cannot be loaded: {error}") from None
    # Older files repeat the rotary frequencies that the configuration gives.
    unknown = [name for name in report["unexpected_keys"] if not name.endswith(".rotary_emb.inv_freq")]
    if wrong := sorted([*report["missing_keys"], *unknown, *map(str, report["mismatched_keys"])]):
        raise Refusal(f"--verifier: {folder}: weights missing, unknown or of another shape: {', '.join(wrong[:3])}")
    return Teacher(model.to(device))


def digest(folder: Path) -> str:
    """Identity of a verifier's folder: configuration, tokenizer and weights, by content."""
    total = hashlib.sha256()
    for path in [*(folder / name for name in NEEDED), *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]
