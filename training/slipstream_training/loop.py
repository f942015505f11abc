"""The clock of a training run: how far it is, what it prints, and how it goes on after a stop.

Owns progress, its bar, and checkpoints. Knows nothing of losses or networks.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

SAVE_EVERY = 120.0


class Unfinished(Exception):
    """This process's part of the time is over; a later one goes on from the checkpoint."""


@dataclass(frozen=True)
class Budget:
    """How long a run may take in all (`seconds`), and in this process (`part_seconds`, None: no limit).

    `tokens` ends it earlier: on a fast machine a small corpus would otherwise be read too many times.
    """

    seconds: float
    part_seconds: float | None = None
    tokens: float = float("inf")


class Run:
    """A training run that the clock drives, so that a busy machine sees fewer tokens but finishes its decay.

    `state` names what a checkpoint holds: objects with `state_dict` and `load_state_dict`. Time spent by
    an interrupted process after its last checkpoint is repeated, not lost to the schedule.
    """

    def __init__(self, label: str, budget: Budget, path: Path | None, state: dict):
        self.budget, self.path, self.state = budget, path, state
        self.tokens = self.steps = 0
        self.before = 0.0
        self.smooth: float | None = None
        if path is not None and path.exists():
            self.restore(torch.load(path, weights_only=True, map_location="cpu"))
        self.start = self.saved = time.monotonic()
        self.bar = tqdm(
            total=budget.seconds, initial=min(self.before, budget.seconds), desc=label, leave=True,
            bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n:.0f}/{total:.0f} s {postfix}",
            mininterval=0.5 if os.isatty(2) else 30.0,
        )

    def elapsed(self) -> float:
        """Seconds of training so far, earlier parts included."""
        return self.before + time.monotonic() - self.start

    def share(self) -> float:
        """0 at the start, 1 when the budget is used up."""
        return max(self.elapsed() / self.budget.seconds, self.tokens / self.budget.tokens)

    def goes_on(self) -> bool:
        """Whether another step fits in; saves when the answer is no."""
        part = self.budget.part_seconds
        more = self.share() < 1.0 and (part is None or time.monotonic() - self.start < part)
        if not more:
            self.bar.close()
            self.save()
        return more

    def require_finished(self) -> None:
        """Raises `Unfinished` when only this process's part is used up, and not the whole budget."""
        if self.share() < 1.0:
            raise Unfinished

    def note(self, loss: float, tokens: int) -> None:
        """Counts one step; draws the bar and saves every so often."""
        self.tokens += tokens
        self.steps += 1
        self.smooth = loss if self.smooth is None else 0.98 * self.smooth + 0.02 * loss
        rate = self.tokens / self.elapsed()
        self.bar.set_postfix_str(
            f"step {self.steps}  {self.tokens / 1e6:.2f} M tokens ({rate:,.0f}/s)  loss {self.smooth:.4f}",
            refresh=False,
        )
        self.bar.update(min(self.elapsed(), self.budget.seconds) - self.bar.n)
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Writes the checkpoint beside its place, then moves it there."""
        self.saved = time.monotonic()
        if self.path is None:
            return
        parts = {name: part.state_dict() for name, part in self.state.items()}
        counters = {"elapsed": self.elapsed(), "tokens": self.tokens, "steps": self.steps, "smooth": self.smooth}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".partial")
        torch.save({"counters": counters, "parts": parts}, fresh)
        fresh.replace(self.path)

    def restore(self, saved: dict) -> None:
        """Goes on from a checkpoint's parts and counters."""
        for name, part in self.state.items():
            part.load_state_dict(saved["parts"][name])
        counters = saved["counters"]
        self.before, self.tokens = counters["elapsed"], counters["tokens"]
        self.steps, self.smooth = counters["steps"], counters["smooth"]
