"""Teaches a draft to agree with a verifier.

KL on the verifier's distribution, half over corpus text and half over the verifier's own samples. A last
stretch on `coupled_acceptance` itself was tried: with minutes to train, it lost to more steps of KL.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Windows
from .network import Llama
from .sampling import continue_prompts, gumbel
from .train import Optimiser, Progress, Recipe

TEMPERATURES = (0.0, 0.8, 1.0)
PROMPT = 64
SAMPLED = 192
SAMPLING_SHARE = 0.15


def sample_pool(verifier: Llama, windows: Windows, seconds: float, seed: int) -> Tensor:
    """The verifier's continuations of corpus prompts at all `TEMPERATURES`: `[rows, PROMPT + SAMPLED]`."""
    generator = torch.Generator().manual_seed(seed)
    progress = Progress("samples", seconds)
    rows: list[Tensor] = []
    while progress.share() < 1.0 or len(rows) < len(TEMPERATURES):
        temperature = TEMPERATURES[len(rows) % len(TEMPERATURES)]
        prompts = windows.draw(96, PROMPT)
        noise = gumbel((96, SAMPLED, verifier.shape.vocab_size), generator)
        rows.append(continue_prompts(verifier, prompts, noise, temperature))
        progress.note(0.0, 96 * SAMPLED)
    pool = torch.cat(rows)
    return pool[torch.randperm(len(pool), generator=generator)]


def divergence(target: Tensor, draft: Tensor) -> Tensor:
    """Mean KL(verifier || draft) in nats over all positions; logits `[B, T, V]`."""
    return F.kl_div(draft.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()


def distill_draft(draft: Llama, verifier: Llama, windows: Windows, recipe: Recipe) -> Progress:
    """Trains `draft` in place until the time is used up, sampling included; returns the counters."""
    pool = sample_pool(verifier, windows, SAMPLING_SHARE * recipe.seconds, seed=11)
    own = torch.Generator().manual_seed(12)
    optimiser = Optimiser(draft, recipe)
    progress = Progress("draft", (1.0 - SAMPLING_SHARE) * recipe.seconds)
    while (share := progress.share()) < 1.0:
        length = recipe.length_at(share)
        ids = windows.draw(recipe.batch_tokens // length, length)
        if progress.steps % 2 == 1:
            rows = torch.randint(0, len(pool), (recipe.batch_tokens // pool.shape[1],), generator=own)
            ids = pool[rows]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            target = verifier(ids)[0].float()
        loss = divergence(target, draft(ids)[0])
        optimiser.step(loss, share)
        progress.note(loss.item(), ids.numel())
    return progress
