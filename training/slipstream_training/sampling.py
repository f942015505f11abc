"""Continues prompts with a network, by shared-noise sampling, on a batch of equal lengths."""

import torch
from torch import Tensor

from .network import Llama


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise; 64-bit uniforms, since 24 bits would cut the tail off."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).clamp_min(1e-300)
    return -(-uniform.log()).log().float()


class StepNoise:
    """Gumbel noise `[B, new, V]` drawn position by position: a large vocabulary's would not fit in memory at once."""

    def __init__(self, shape: tuple[int, int, int], generator: torch.Generator):
        self.shape, self.generator = shape, generator

    def __getitem__(self, index: tuple) -> Tensor:
        """The noise `[B, V]` of the next position; each may be asked for once, in order."""
        return gumbel((self.shape[0], self.shape[2]), self.generator)


@torch.no_grad()
def continue_prompts(model: Llama, prompts: Tensor, noise: Tensor | StepNoise, temperature: float) -> Tensor:
    """Appends `noise.shape[1]` tokens to `prompts [B, T]`; `noise` is `[B, new, V]`, unused at temperature 0.

    Token `t` is `argmax(logits / temperature + noise_t)`, which draws from the softmax exactly.
    """
    logits, cache = model(prompts)
    pieces = [prompts]
    for position in range(noise.shape[1]):
        scores = logits[:, -1]
        if temperature > 0:
            scores = scores / temperature + noise[:, position]
        chosen = scores.argmax(-1, keepdim=True)
        pieces.append(chosen)
        if position + 1 < noise.shape[1]:
            logits, cache = model(chosen, cache)
    return torch.cat(pieces, dim=1)
