"""Trains a verifier on the token stream for a given wall-clock time.

Owns the optimiser and the learning-rate schedule, which the draft's distillation uses too.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import Windows
from .loop import Budget, Run
from .network import Llama


@dataclass(frozen=True)
class Recipe:
    """How fast to learn. `stages` are (share of the time, window length); a step sees `batch_tokens` tokens."""

    matrix_lr: float
    vector_lr: float
    batch_tokens: int
    stages: tuple[tuple[float, int], ...]
    warmup: float = 0.01
    decay_from: float = 0.4
    compiled: bool = True

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
            (matrices if weight.ndim == 2 and "layers" in name else others).append(weight)
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

    def state_dict(self) -> dict:
        """The state of both parts."""
        return {str(number): optimiser.state_dict() for number, (optimiser, _) in enumerate(self.parts)}

    def load_state_dict(self, state: dict) -> None:
        """Takes over a state of `state_dict`."""
        for number, (optimiser, _) in enumerate(self.parts):
            optimiser.load_state_dict(state[str(number)])


def compiled(function: Callable, wanted: bool) -> Callable:
    """`function` through PyTorch's compiler, or as it is where unwanted or no C++ compiler is at hand."""
    if not wanted or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return function
    return torch.compile(function, dynamic=False)


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats of `ids [B, T + 1]`, each token from those before it."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, _ = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train_verifier(model: Llama, windows: Windows, recipe: Recipe, budget: Budget, checkpoint: Path | None) -> Run:
    """Trains in place until the budget is used up, going on from `checkpoint` if it exists.

    Returns the counters, or raises `loop.Unfinished`.
    """
    optimiser = Optimiser(model, recipe)
    run = Run("verifier", budget, checkpoint, {"model": model, "optimiser": optimiser, "windows": windows})
    loss_of = compiled(next_token_loss, recipe.compiled)
    while run.goes_on():
        share = run.share()
        length = recipe.length_at(share)
        ids = windows.draw(recipe.batch_tokens // length, length + 1)
        loss = loss_of(model, ids)
        optimiser.step(loss, share)
        run.note(loss.item(), ids.shape[0] * length)
    run.require_finished()
    return run
