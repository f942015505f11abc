"""How often a draft's proposal equals the verifier's token when both share one noise.

Owns the closed form, its short form for training, and the tokens per step that follow. `p` is the verifier's
distribution, `q` the draft's, both `[..., V]` and already shaped by the temperature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-12


def coupled_acceptance(p: Tensor, q: Tensor) -> Tensor:
    """Chance `[...]` that both pick the same token under shared Gumbel noise; differentiable in `q`.

    `sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)` (from the coupling of arXiv 2408.07978). With the
    tokens sorted by p/q, the maximum is `p_j / p_i` up to `i` and `q_j / q_i` after it, so that two
    running sums replace the double loop.
    """
    p, q = p.clamp_min(TINY), q.clamp_min(TINY)
    order = (p / q).detach().argsort(dim=-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    after = (q.sum(-1, keepdim=True) - q.cumsum(-1)).clamp_min(0.0)
    return (1.0 / (p.cumsum(-1) / p + after / q)).sum(-1)


def coarse_acceptance(p: Tensor, q: Tensor, kept: int = 32) -> Tensor:
    """`coupled_acceptance` over the verifier's `kept` likeliest tokens and one entry for all the others.

    Sorting whole vocabularies costs more than the networks; here nearly all of the sum is in the first
    few tokens. Bounds the exact sum over those tokens from above, since merging tokens `j` can only lower
    `sum_j max(..)`. The entry of all the others counts as never accepted.
    """
    top = p.topk(kept, dim=-1)
    near, far = q.gather(-1, top.indices), 1.0 - q.gather(-1, top.indices).sum(-1, keepdim=True)
    p = torch.cat((top.values, 1.0 - top.values.sum(-1, keepdim=True)), -1).clamp_min(TINY)
    q = torch.cat((near, far), -1).clamp_min(TINY)
    larger = torch.maximum(p[..., None, :] / p[..., :-1, None], q[..., None, :] / q[..., :-1, None])
    return (1.0 / larger.sum(-1)).sum(-1)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """`1 - d`: the acceptance `[...]` of rejection sampling, the most that any coupling can reach."""
    return torch.minimum(p, q).sum(-1)


@dataclass(frozen=True)
class Steps:
    """What a verifier's steps at one draft_len yield: tokens per step, and acceptance by position.

    `by_position[i]` is the share accepted of the proposals at position `i` that all of the earlier ones let through.
    """

    tokens_per_step: float
    by_position: list[float]


def walk_steps(agrees: Tensor, draft_len: int) -> Steps:
    """Replays steps of `draft_len` proposals over texts; `agrees [B, T]` says where draft and verifier agree."""
    steps = tokens = 0
    reached, accepted = [0] * draft_len, [0] * draft_len
    for row in agrees.tolist():
        start = 0
        while start + draft_len + 1 <= len(row):
            run = row[start : start + draft_len]
            kept = run.index(False) if False in run else draft_len
            for position in range(min(kept + 1, draft_len)):
                reached[position] += 1
                accepted[position] += position < kept
            start += kept + 1
            tokens += kept + 1
            steps += 1
    shares = [hit / max(1, seen) for hit, seen in zip(accepted, reached, strict=True)]
    return Steps(tokens / max(1, steps), shares)


def drawn(chances: Tensor) -> Tensor:
    """Accepted or not, `[B, T]`, drawn with the chance at each position: what `walk_steps` replays."""
    return torch.rand(chances.shape, generator=torch.Generator().manual_seed(41)) < chances.cpu()
