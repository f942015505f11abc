"""Teaches drafts to agree with a verifier: any network that maps ids to logits over the same vocabulary.

Owns the losses, the verifier's own text that they are taken on, and the loop. Several drafts can learn
side by side: the verifier's logits cost the most and are shared, and shapes compare on equal text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .acceptance import coarse_acceptance
from .data import Windows
from .loop import Budget, Run
from .network import Llama
from .sampling import StepNoise, continue_prompts
from .train import Optimiser, Recipe, compiled

Verifier = Callable[[Tensor], tuple[Tensor, object]]
TEMPERATURES = (0.0, 0.8, 1.0)
PROMPT = 64
SAMPLED = 192
SAMPLED_ROWS = 128


@dataclass
class Student:
    """A draft that learns. From `stretch` (share of the time) on, the loss is the coupled acceptance itself."""

    name: str
    network: Llama
    stretch: float = 1.0


def sample_pool(
    verifier: Verifier, vocabulary: int, windows: Windows, budget: Budget, path: Path | None, batch: int = SAMPLED_ROWS
) -> Tensor:
    """The verifier's continuations of corpus prompts at all `TEMPERATURES`: `[rows, PROMPT + SAMPLED]`.

    Kept at `path`, and read from there when an earlier run has left it.
    """
    if path is not None and path.exists():
        return torch.load(path, weights_only=True, map_location=windows.stream.device)
    device = windows.stream.device
    generator = torch.Generator(device).manual_seed(11)
    run = Run("samples", budget, None, {})
    rows: list[Tensor] = []
    while run.goes_on() or len(rows) < len(TEMPERATURES):
        temperature = TEMPERATURES[len(rows) % len(TEMPERATURES)]
        prompts = windows.draw(batch, PROMPT)
        noise = StepNoise((batch, SAMPLED, vocabulary), generator)
        with torch.autocast(device.type, torch.bfloat16):
            rows.append(continue_prompts(verifier, prompts, noise, temperature))
        run.note(0.0, batch * SAMPLED)
    run.require_finished()
    pool = torch.cat(rows)
    pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(12)).to(device)]
    if path is not None:
        torch.save(pool, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return pool


def divergence_loss(draft: Llama, ids: Tensor, target: Tensor) -> Tensor:
    """Mean KL(verifier || draft) in nats over all positions; `target` are the verifier's logits `[B, T, V]`."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, _ = draft(ids)
    p, q = target.log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


def acceptance_loss(draft: Llama, ids: Tensor, target: Tensor) -> Tensor:
    """One minus the mean chance of acceptance at T 0.8 and T 1.0, and a little divergence to hold the tail."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, _ = draft(ids)
    logits = logits.float()
    lost = sum(
        1.0 - coarse_acceptance((target / temperature).softmax(-1), (logits / temperature).softmax(-1)).mean()
        for temperature in TEMPERATURES[1:]
    )
    p, q = target.log_softmax(-1), logits.log_softmax(-1)
    return lost / 2 + 0.1 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()


class Lesson:
    """One student with its optimiser and compiled losses."""

    def __init__(self, student: Student, recipe: Recipe):
        self.student = student
        self.optimiser = Optimiser(student.network, recipe)
        self.divergence = compiled(divergence_loss, recipe.compiled)
        self.acceptance = compiled(acceptance_loss, recipe.compiled)

    def step(self, ids: Tensor, target: Tensor, share: float) -> float:
        """One update; returns the loss."""
        loss_of = self.divergence if share < self.student.stretch else self.acceptance
        loss = loss_of(self.student.network, ids, target)
        self.optimiser.step(loss, share)
        return loss.item()


class Pool:
    """Random rows of the verifier's own text, from a seeded generator."""

    def __init__(self, rows: Tensor):
        self.rows, self.generator = rows, torch.Generator().manual_seed(13)

    def draw(self, batch_tokens: int) -> Tensor:
        """Ids `[batch_tokens / row length, row length]`."""
        rows = torch.randint(0, len(self.rows), (batch_tokens // self.rows.shape[1],), generator=self.generator)
        return self.rows[rows.to(self.rows.device)]

    def state_dict(self) -> dict:
        """Where the generator is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state of `state_dict`."""
        self.generator.set_state(state["generator"])


def distill(
    students: list[Student], verifier: Verifier, windows: Windows, rows: Tensor, recipe: Recipe, budget: Budget,
    checkpoint: Path | None,
) -> Run:
    """Trains all `students` in place, by turns on corpus windows and on `rows` of the verifier's own text.

    Goes on from `checkpoint` if it exists. Returns the counters, or raises `loop.Unfinished`; the loss shown is
    the first student's.
    """
    lessons, pool = [Lesson(student, recipe) for student in students], Pool(rows)
    state: dict = {"windows": windows, "pool": pool}
    for lesson in lessons:
        state |= {f"{lesson.student.name} network": lesson.student.network}
        state |= {f"{lesson.student.name} optimiser": lesson.optimiser}
    run = Run("draft", budget, checkpoint, state)
    logits_of = compiled(lambda ids: verifier(ids)[0], recipe.compiled)
    while run.goes_on():
        share = run.share()
        length = recipe.length_at(share)
        if run.steps % 2 == 0:
            ids = windows.draw(recipe.batch_tokens // length, length)
        else:
            ids = pool.draw(recipe.batch_tokens)
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
            target = logits_of(ids).float()
        losses = [lesson.step(ids, target, share) for lesson in lessons]
        run.note(losses[0], ids.numel())
    run.require_finished()
    return run
