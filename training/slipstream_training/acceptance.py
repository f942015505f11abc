"""How often a draft's proposal equals the verifier's token when both share one noise.

Owns the closed form and its gradient. `p` is the verifier's distribution, `q` the draft's, both
`[..., V]` and already shaped by the temperature.
"""

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


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """`1 - d`: the acceptance `[...]` of rejection sampling, the most that any coupling can reach."""
    return torch.minimum(p, q).sum(-1)
