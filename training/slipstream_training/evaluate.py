"""Measures a pair on unseen text: bits per byte, next-token accuracy, and acceptance on the verifier's own text."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .acceptance import coupled_acceptance, drawn, overlap, walk_steps
from .data import Windows
from .network import Llama
from .sampling import continue_prompts, gumbel

TEMPERATURES = (0.0, 0.8, 1.0)
PROMPT_TOKENS = 128
NEW_TOKENS = 128
DRAFT_LENS = (1, 2, 3, 4, 6, 8)


@torch.no_grad()
def prediction(model: Llama, stream: np.ndarray, byte_lengths: np.ndarray, context: int) -> dict[str, float]:
    """Bits per UTF-8 byte and next-token accuracy over all of `stream`, each token scored once.

    Windows of `context` tokens advance by three quarters of that, and only the tokens not yet scored count,
    so that each has at least a quarter of a context before it, as it would in use. The first token is given.
    The end-of-text token costs bits and gives no bytes.
    """
    device = next(model.parameters()).device
    nats, right, scored = 0.0, 0, 1
    for start in range(0, len(stream), 3 * context // 4):
        ids = torch.from_numpy(stream[start : start + context].astype(np.int64)).to(device)
        wanted = ids[scored - start :]
        logits = model(ids[None])[0][0, scored - start - 1 : -1].float()
        nats += F.cross_entropy(logits, wanted, reduction="sum").item()
        right += (logits.argmax(-1) == wanted).sum().item()
        scored += len(wanted)
        if scored >= len(stream):
            break
    size = int(byte_lengths[stream[1:]].sum())
    return {"bits_per_byte": nats / math.log(2.0) / size, "accuracy": right / (len(stream) - 1)}


@torch.no_grad()
def argmax_agreement(verifier: Llama, draft: Llama, windows: Tensor) -> float:
    """Share of positions of real text `windows [B, T]` where both rank the same token first."""
    return (verifier(windows)[0].argmax(-1) == draft(windows)[0].argmax(-1)).float().mean().item()


@dataclass
class Tally:
    """What one draft's proposals came to, part by part: shapes `[rows, new tokens]`."""

    agree: list[Tensor] = field(default_factory=list)
    coupled: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)

    def figures(self) -> dict:
        """`match` counts equal choices under one shared noise; `coupled` is its closed form, `rejection` what
        rejection sampling would accept. At temperature 0 all three are the share of equal argmax.

        `tokens_per_step` and `by_position` come from replaying steps over the texts (`by_position` at the
        longest draft_len), `rejection_tokens_per_step_4` from acceptances drawn with the chance at each position.
        """
        agree = torch.cat(self.agree)
        chances = torch.cat(self.kept) if self.kept else agree.float()
        coupled = torch.cat(self.coupled) if self.coupled else agree.float()
        return {
            "match": agree.float().mean().item(),
            "coupled": coupled.mean().item(),
            "rejection": chances.mean().item(),
            "by_position": walk_steps(agree, DRAFT_LENS[-1]).by_position,
            "tokens_per_step": {str(length): walk_steps(agree, length).tokens_per_step for length in DRAFT_LENS},
            "rejection_tokens_per_step_4": walk_steps(drawn(chances), 4).tokens_per_step,
        }


@torch.no_grad()
def acceptance(
    verifier: Llama, drafts: dict[str, Llama], prompts: Tensor, vocabulary: int, temperature: float
) -> dict[str, dict]:
    """Acceptance of each draft's proposals on the verifier's own continuations of `prompts`, by draft."""
    generator = torch.Generator(prompts.device).manual_seed(21)
    greedy = temperature == 0.0
    noise = gumbel((len(prompts), NEW_TOKENS, 0 if greedy else vocabulary), generator)
    text = continue_prompts(verifier, prompts, noise, temperature)
    rows = slice(prompts.shape[1] - 1, -1)
    tallies = {name: Tally() for name in drafts}
    for part, part_noise in zip(text.split(16), noise.split(16), strict=True):
        chosen = part[:, prompts.shape[1] :]
        p = None if greedy else (verifier(part)[0][:, rows].float() / temperature).softmax(-1)
        for name, draft in drafts.items():
            proposed, tally = draft(part)[0][:, rows].float(), tallies[name]
            if p is None:
                tally.agree.append(proposed.argmax(-1) == chosen)
                continue
            q = (proposed / temperature).softmax(-1)
            tally.agree.append((proposed / temperature + part_noise).argmax(-1) == chosen)
            tally.coupled.append(coupled_acceptance(p, q))
            tally.kept.append(overlap(p, q))
    return {name: tally.figures() for name, tally in tallies.items()}


def acceptances(
    verifier: Llama, drafts: dict[str, Llama], stream: np.ndarray, vocabulary: int, prompts: int, device: str
) -> dict[str, dict]:
    """`acceptance` at every temperature, by draft, on `prompts` prompts drawn from one split's `stream`."""
    drawn = Windows(stream, 20, device).draw(prompts, PROMPT_TOKENS)
    found = {
        f"T {temperature}": acceptance(verifier, drafts, drawn, vocabulary, temperature) for temperature in TEMPERATURES
    }
    return {name: {label: by_draft[name] for label, by_draft in found.items()} for name in drafts}
