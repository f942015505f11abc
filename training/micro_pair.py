#!/usr/bin/env python3
"""Trains slipstream's micro pair from nothing and writes the files that the repository ships.

Corpus -> tokenizer -> verifier -> draft -> figures -> GGUF, golden logits and model card. Writes
models/micro/ and tests/fixtures/micro-*-golden.safetensors; everything else goes to --work-dir.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

# Spinning OpenMP threads make small networks several times slower on a machine that is not idle.
# Must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant
from safetensors.torch import save_file
from tokenizers import Tokenizer

from slipstream_training import corpus
from slipstream_training.card import write_card
from slipstream_training.data import Windows, encode_stream, token_byte_lengths
from slipstream_training.distill import distill_draft
from slipstream_training.evaluate import evaluate_pair
from slipstream_training.export_gguf import Card, LlamaShape, dequantised_weights, write_gguf
from slipstream_training.network import Llama
from slipstream_training.read_gguf import GgufLlama
from slipstream_training.tokenizer import train_tokenizer
from slipstream_training.train import Recipe, train_verifier

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = 1024
CONTEXT = 1024
SHAPES = {
    "verifier": LlamaShape(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=416, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT,
    ),
    "draft": LlamaShape(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT,
    ),
}
GOLDEN_PROMPT = """/// Returns the number of elements in the queue.
pub fn len(&self) -> usize {
    match self.inner.lock() {
        Ok(guard) => guard.items.len(),
        Err(error) => error.into_inner().items.len(),
    }
}
"""


@dataclass(frozen=True)
class Text:
    """What the networks learn from and are measured on."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    manifest: dict


def prepare_text(work: Path) -> Text:
    """Reads the corpus, learns the tokenizer, encodes both splits and keeps the streams in `work`."""
    crates = corpus.collect(REPOSITORY)
    record = corpus.manifest(crates)
    print(f"corpus: {len(crates)} crates, {record['bytes']['train'] / 1e6:.1f} MB to learn from, "
          f"{record['bytes']['validation'] / 1e6:.1f} MB unseen")
    cache = work / record["sha256"][:16]
    if not (cache / "validation.npy").exists():
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(corpus.texts(crates, "train"), VOCABULARY)
        tokenizer.save(str(cache / "tokenizer.json"), pretty=False)
        for split in ("train", "validation"):
            np.save(cache / f"{split}.npy", encode_stream(tokenizer, corpus.texts(crates, split)))
    text = Text(
        Tokenizer.from_file(str(cache / "tokenizer.json")),
        np.load(cache / "train.npy"), np.load(cache / "validation.npy"), record,
    )
    print(f"tokens: {len(text.train) / 1e6:.1f} M to learn from, {bytes_per_token(text):.2f} bytes each when unseen")
    return text


def bytes_per_token(text: Text) -> float:
    """Mean bytes per token on the unseen crates."""
    return float(token_byte_lengths(text.tokenizer)[text.validation].mean())


def recipe_for(seconds: float) -> Recipe:
    """Most of the time goes to short windows, where a token costs least; the last ones teach positions."""
    stages = ((0.65, 256), (0.15, 512), (0.20, CONTEXT))
    return Recipe(seconds, matrix_lr=0.01, vector_lr=0.02, batch_tokens=4096, stages=stages)


def load_earlier(role: str, work: Path) -> tuple[Llama, dict]:
    """A network that an earlier run left in the work folder, and what it cost."""
    network = Llama(SHAPES[role])
    network.load_state_dict(torch.load(work / f"{role}.pt", weights_only=True))
    return network.eval().requires_grad_(False), json.loads((work / f"{role}.json").read_text())


def keep(network: Llama, role: str, cost: dict, work: Path) -> tuple[Llama, dict]:
    """Leaves a trained network in the work folder, ready for `load_earlier`."""
    torch.save(network.state_dict(), work / f"{role}.pt")
    (work / f"{role}.json").write_text(json.dumps(cost))
    return network.eval().requires_grad_(False), cost


def obtain_verifier(text: Text, arguments: argparse.Namespace) -> tuple[Llama, dict]:
    """Trains the verifier, or takes the earlier one."""
    if arguments.reuse is not None:
        return load_earlier("verifier", arguments.work_dir)
    verifier = Llama(SHAPES["verifier"])
    verifier.initialise(arguments.seed)
    seconds = arguments.verifier_seconds
    learned = train_verifier(verifier, Windows(text.train, arguments.seed), recipe_for(seconds))
    cost = {"verifier_seconds": seconds, "verifier_tokens": learned.tokens / 1e6}
    return keep(verifier, "verifier", cost, arguments.work_dir)


def obtain_draft(verifier: Llama, text: Text, arguments: argparse.Namespace) -> tuple[Llama, dict]:
    """Distils the draft from `verifier`, or takes the earlier one."""
    if arguments.reuse == "pair":
        return load_earlier("draft", arguments.work_dir)
    draft = Llama(SHAPES["draft"])
    draft.initialise(arguments.seed + 1)
    seconds = arguments.draft_seconds
    taught = distill_draft(draft, verifier, Windows(text.train, arguments.seed + 1), recipe_for(seconds))
    cost = {"draft_seconds": seconds, "draft_tokens": taught.tokens / 1e6}
    return keep(draft, "draft", cost, arguments.work_dir)


def as_stored(network: Llama) -> Llama:
    """The same network with the weights that a reader of its Q8_0 file recovers."""
    weights = {name: weight.detach().numpy() for name, weight in network.named_parameters()}
    stored = {name: torch.from_numpy(np.array(w)) for name, w in dequantised_weights(weights, Quant.Q8_0).items()}
    copy = Llama(network.shape)
    copy.load_state_dict(stored)
    return copy.eval().requires_grad_(False)


def export(network: Llama, role: str, tokenizer: Tokenizer, folder: Path) -> Path:
    """Writes `<role>.gguf` and returns its path."""
    weights = {name: weight.detach().numpy() for name, weight in network.named_parameters()}
    card = Card(
        name=f"slipstream micro {role}", license="MIT OR Apache-2.0",
        description=f"Rust completion, {role} of the micro pair, {network.parameter_count():,} parameters",
    )
    path = folder / f"{role}.gguf"
    write_gguf(path, weights, network.shape, json.loads(tokenizer.to_str()), card=card, matrices=Quant.Q8_0)
    return path


def write_golden(network: Llama, tokenizer: Tokenizer, gguf_path: Path, path: Path) -> None:
    """Saves ids and float32 logits of real text, after an independent reader of the file has agreed."""
    ids = torch.tensor(tokenizer.encode(GOLDEN_PROMPT, add_special_tokens=False).ids)
    with torch.no_grad():
        logits = network(ids[None])[0][0].contiguous()
    again = GgufLlama(gguf_path).logits(ids.numpy())
    error = np.abs(again - logits.numpy()).max() / np.abs(again).max()
    if error > 1e-5:
        raise ValueError(f"{gguf_path.name} read back gives other logits: {error:.1e}")
    save_file({"input_ids": ids, "logits": logits}, path)
    print(f"{gguf_path.name}: {gguf_path.stat().st_size:,} bytes, read back within {error:.1e} on {len(ids)} tokens")


def ship(networks: dict[str, Llama], text: Text, facts: dict, arguments: argparse.Namespace) -> None:
    """Measures the pair as stored and writes every file of the repository."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.fixtures.mkdir(parents=True, exist_ok=True)
    stored = {role: as_stored(network) for role, network in networks.items()}
    figures = evaluate_pair(stored["verifier"], stored["draft"], text.validation, token_byte_lengths(text.tokenizer))
    print(json.dumps(figures, indent=2))
    (arguments.out / "corpus-manifest.json").write_text(json.dumps(text.manifest, indent=1) + "\n")
    (arguments.out / "tokenizer.json").write_text(text.tokenizer.to_str(pretty=False))
    for role, network in networks.items():
        path = export(network, role, text.tokenizer, arguments.out)
        write_golden(stored[role], text.tokenizer, path, arguments.fixtures / f"micro-{role}-golden.safetensors")
        facts[f"{role}_parameters"] = network.parameter_count()
    facts |= {"prompts": 96, "bytes_per_token": bytes_per_token(text)}
    write_card(arguments.out, facts, figures, text.manifest, SHAPES)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for token streams and checkpoints")
    parser.add_argument("--verifier-seconds", type=float, default=560, help="training time of the verifier")
    parser.add_argument("--draft-seconds", type=float, default=320, help="sampling and training time of the draft")
    parser.add_argument("--reuse", choices=["verifier", "pair"], help="take what an earlier run left in --work-dir")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and windows")
    pair, goldens = REPOSITORY / "models" / "micro", REPOSITORY / "tests" / "fixtures"
    parser.add_argument("--out", type=Path, default=pair, help="folder of the pair")
    parser.add_argument("--fixtures", type=Path, default=goldens, help="folder of the goldens")
    return parser.parse_args()


def main() -> None:
    """Runs the whole pipeline."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    text = prepare_text(arguments.work_dir)
    verifier, facts = obtain_verifier(text, arguments)
    draft, draft_cost = obtain_draft(verifier, text, arguments)
    facts |= draft_cost
    minutes = (facts["verifier_seconds"] + facts["draft_seconds"]) / 60
    facts["cost"] = f"{minutes:.0f} minutes of training"
    ship({"verifier": verifier, "draft": draft}, text, facts, arguments)
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
