"""Measures a pair on unseen text: bits per byte, and acceptance on text sampled from the verifier."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .acceptance import coupled_acceptance, overlap
from .data import Windows
from .network import Llama
from .sampling import continue_prompts, gumbel


@torch.no_grad()
def bits_per_byte(model: Llama, stream: np.ndarray, byte_lengths: np.ndarray, tokens: int) -> float:
    """Bits per UTF-8 byte on windows spread evenly over `stream`, each of the model's full context.

    A window's first token is given, not scored; the end-of-text token costs bits and gives no bytes.
    """
    length = model.shape.max_position_embeddings
    starts = np.linspace(0, len(stream) - length - 1, tokens // length).astype(int)
    nats, count = 0.0, 0
    for start in starts:
        ids = torch.from_numpy(stream[start : start + length].astype(np.int64))
        logits, _ = model(ids[None, :-1])
        nats += F.cross_entropy(logits[0], ids[1:], reduction="sum").item()
        count += int(byte_lengths[ids[1:].numpy()].sum())
    return nats / math.log(2.0) / count


@torch.no_grad()
def argmax_agreement(verifier: Llama, draft: Llama, windows: Tensor) -> float:
    """Share of positions of real text `windows [B, T]` where both rank the same token first."""
    return (verifier(windows)[0].argmax(-1) == draft(windows)[0].argmax(-1)).float().mean().item()


def tokens_per_step(agrees: Tensor, draft_len: int) -> float:
    """Mean tokens per verifier step when `draft_len` tokens are proposed; `agrees [B, T]` per position."""
    steps = tokens = 0
    for row in agrees.tolist():
        position = 0
        while position + draft_len + 1 <= len(row):
            run = row[position : position + draft_len]
            kept = run.index(False) if False in run else draft_len
            position += kept + 1
            tokens += kept + 1
            steps += 1
    return tokens / steps


@torch.no_grad()
def acceptance(verifier: Llama, draft: Llama, prompts: Tensor, temperature: float, new: int) -> dict[str, float]:
    """Acceptance of the draft's proposals on the verifier's own continuations of `prompts`.

    `match` counts equal choices under one shared noise; `coupled` is its closed form, `rejection`
    what rejection sampling would accept. At temperature 0 all three are the share of equal argmax.
    """
    generator = torch.Generator().manual_seed(21)
    noise = gumbel((len(prompts), new, verifier.shape.vocab_size), generator)
    text = continue_prompts(verifier, prompts, noise, temperature)
    rows = slice(prompts.shape[1] - 1, -1)
    target, proposed = verifier(text)[0][:, rows], draft(text)[0][:, rows]
    chosen = text[:, prompts.shape[1] :]
    if temperature == 0:
        agrees = proposed.argmax(-1) == chosen
        share = agrees.float().mean().item()
        return {"match": share, "coupled": share, "rejection": share, "tokens_per_step_4": tokens_per_step(agrees, 4)}
    agrees = (proposed / temperature + noise).argmax(-1) == chosen
    p, q = (target / temperature).softmax(-1), (proposed / temperature).softmax(-1)
    betas = {beta: coupled_acceptance(p, (beta * proposed / temperature).softmax(-1)).mean().item()
             for beta in (0.7, 0.85, 1.2, 1.5, 2.0)}
    best = max(betas, key=betas.__getitem__)
    return {
        "match": agrees.float().mean().item(),
        "coupled": coupled_acceptance(p, q).mean().item(),
        "rejection": overlap(p, q).mean().item(),
        "best_other_beta": best,
        "coupled_at_that_beta": betas[best],
        "tokens_per_step_4": tokens_per_step(agrees, 4),
    }


def evaluate_pair(verifier: Llama, draft: Llama, stream: np.ndarray, byte_lengths: np.ndarray) -> dict:
    """All figures of the model card, on unseen text."""
    prompts = Windows(stream, seed=20).draw(96, 128)
    return {
        "bits_per_byte": {
            "verifier": bits_per_byte(verifier, stream, byte_lengths, 200_000),
            "draft": bits_per_byte(draft, stream, byte_lengths, 200_000),
        },
        "argmax_agreement_on_real_text": argmax_agreement(verifier, draft, Windows(stream, seed=22).draw(64, 512)),
        "acceptance": {
            f"T {temperature}": acceptance(verifier, draft, prompts, temperature, new=128)
            for temperature in (0.0, 0.8, 1.0)
        },
    }
