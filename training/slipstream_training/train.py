"""Trains the verifier on the token stream for a given wall-clock time.

Owns the optimiser and the learning-rate schedule, which the draft's distillation uses too. Time, not
steps, drives the schedule: a busy machine sees fewer tokens, but always finishes its decay.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Windows
from .network import Llama


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to learn. `stages` are (share of the time, window length)."""

    seconds: float
    matrix_lr: float
    vector_lr: float
    batch_tokens: int
    stages: tuple[tuple[float, int], ...]
    warmup: float = 0.01
    decay_from: float = 0.4

    def length_at(self, progress: float) -> int:
        """Window length at `progress` in 0..1."""
        for share, length in self.stages:
            progress -= share
            if progress < 0:
                return length
        return self.stages[-1][1]

    def rate_at(self, progress: float) -> float:
        """Factor on the learning rates: warm-up, plateau, linear decay to a hundredth."""
        if progress < self.warmup:
            return progress / self.warmup
        if progress < self.decay_from:
            return 1.0
        return max(0.01, (1.0 - progress) / (1.0 - self.decay_from))


class Optimiser:
    """Muon on the matrices inside the layers, AdamW on the embedding and the norms."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        matrices, others = [], []
        for name, weight in model.named_parameters():
            (matrices if weight.ndim == 2 and "embed" not in name else others).append(weight)
        self.recipe = recipe
        self.weights = matrices + others
        self.parts = [
            (torch.optim.Muon(matrices, lr=0.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"), recipe.matrix_lr),
            (torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0), recipe.vector_lr),
        ]

    def step(self, loss: Tensor, progress: float) -> None:
        """One update by the gradient of `loss`."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimiser, rate in self.parts:
            for group in optimiser.param_groups:
                group["lr"] = rate * self.recipe.rate_at(progress)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


class Progress:
    """Elapsed share of a time budget, and a printed line every so often."""

    def __init__(self, label: str, seconds: float):
        self.label, self.seconds = label, seconds
        self.start = self.printed = time.monotonic()
        self.tokens = self.steps = 0
        self.smooth: float | None = None

    def share(self) -> float:
        """0 at the start, 1 when the time is used up."""
        return (time.monotonic() - self.start) / self.seconds

    def note(self, loss: float, tokens: int) -> None:
        """Counts one step and prints every fifteen seconds."""
        self.tokens += tokens
        self.steps += 1
        self.smooth = loss if self.smooth is None else 0.95 * self.smooth + 0.05 * loss
        now = time.monotonic()
        if now - self.printed > 15:
            self.printed = now
            rate = self.tokens / (now - self.start)
            print(f"  {self.label} {now - self.start:5.0f} s  step {self.steps:5d}  {self.tokens / 1e6:6.2f} M tokens "
                  f"({rate:,.0f}/s)  loss {self.smooth:.4f}", flush=True)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `ids [B, T + 1]`, each token from those before it."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train_verifier(model: Llama, windows: Windows, recipe: Recipe) -> Progress:
    """Trains in place until the time is used up; returns the counters."""
    optimiser = Optimiser(model, recipe)
    progress = Progress("verifier", recipe.seconds)
    while (share := progress.share()) < 1.0:
        length = recipe.length_at(share)
        ids = windows.draw(recipe.batch_tokens // length, length + 1)
        loss = next_token_loss(model, ids)
        optimiser.step(loss, share)
        progress.note(loss.item(), ids.shape[0] * length)
    return progress
