"""What a distilled draft is worth: acceptance on the held-out text, replayed steps, expected speed-up, and its card.

Owns the measuring and the words for it. Knows no files but the card's text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from .acceptance import coupled_acceptance, overlap, walk_steps
from .distill import Verifier
from .network import Llama
from .sampling import continue_prompts, gumbel
from .shape import LlamaShape

TEMPERATURES = (0.0, 0.8, 1.0)
DRAFT_LENS = tuple(range(1, 9))
PROMPT_TOKENS = 128
NEW_TOKENS = 128
# Noise and two sets of logits per prompt stay below this many bytes.
GROUP_BYTES = 3 << 30


@dataclass(frozen=True)
class Ratios:
    """`cost`: one draft step, `verify`: a step over draft_len + 1 rows; both over the time of a plain verifier step."""

    cost: float
    verify: float


@dataclass(frozen=True)
class Measured:
    """One temperature. `match` is counted under shared noise, `coupled` its closed form, `rejection` the other rule's.

    `tokens_per_step` is replayed over the texts for each of `DRAFT_LENS`; `by_position` at the longest.
    """

    temperature: float
    match: float
    coupled: float
    rejection: float
    tokens_per_step: dict[int, float]
    by_position: list[float]

    @property
    def name(self) -> str:
        """How tables call it."""
        return "greedy" if self.temperature == 0.0 else f"T {self.temperature}"

    def speed_up(self, draft_len: int, ratios: Ratios) -> float:
        """Replayed tokens per step over what the step costs in plain verifier steps."""
        return self.tokens_per_step[draft_len] / (ratios.verify + draft_len * ratios.cost)

    def best(self, ratios: Ratios) -> int:
        """The draft_len with the largest speed-up, the shorter one of equals."""
        return max(DRAFT_LENS, key=lambda draft_len: self.speed_up(draft_len, ratios))


def group_size(vocabulary: int) -> int:
    """Prompts measured at once: 128 rows of noise (with its 64-bit steps) and two times 256 rows of logits each."""
    return max(1, min(32, GROUP_BYTES // (vocabulary * (NEW_TOKENS * 24 + 2 * (PROMPT_TOKENS + NEW_TOKENS) * 4))))


@torch.no_grad()
def measure_group(verifier: Verifier, draft: Llama, prompts: Tensor, noise: Tensor, temperature: float) -> list[Tensor]:
    """Where both choose alike, its closed form, and the overlap, each `[prompts, NEW_TOKENS]`."""
    text = continue_prompts(verifier, prompts, noise, temperature)
    rows = slice(prompts.shape[1] - 1, -1)
    target, proposed = verifier(text)[0][:, rows].float(), draft(text)[0][:, rows].float()
    chosen = text[:, prompts.shape[1] :]
    if temperature == 0.0:
        agree = proposed.argmax(-1) == chosen
        return [agree, agree.float(), agree.float()]
    agree = (proposed / temperature + noise).argmax(-1) == chosen
    p, q = (target / temperature).softmax(-1), (proposed / temperature).softmax(-1)
    return [agree, coupled_acceptance(p, q), overlap(p, q)]


def measure(verifier: Verifier, draft: Llama, prompts: Tensor, vocabulary: int) -> list[Measured]:
    """Measures all `TEMPERATURES` on the verifier's continuations of `prompts [B, T]`."""
    results = []
    for temperature in TEMPERATURES:
        generator = torch.Generator(prompts.device).manual_seed(21)
        parts = []
        for group in tqdm(prompts.split(group_size(vocabulary)), desc=f"measuring T {temperature}", leave=False):
            noise = gumbel((len(group), NEW_TOKENS, vocabulary if temperature > 0 else 0), generator)
            parts.append(measure_group(verifier, draft, group, noise, temperature))
        agree, coupled, kept = (torch.cat(columns) for columns in zip(*parts, strict=True))
        results.append(Measured(
            temperature, agree.float().mean().item(), coupled.mean().item(), kept.mean().item(),
            {draft_len: walk_steps(agree, draft_len).tokens_per_step for draft_len in DRAFT_LENS},
            walk_steps(agree, DRAFT_LENS[-1]).by_position,
        ))
    return results


def acceptance_table(measured: list[Measured]) -> str:
    """Acceptance by temperature, in Markdown."""
    lines = ["| | shared noise | its closed form | rejection sampling would have | by position in a run of 8 |",
             "|---|---|---|---|---|"]
    for one in measured:
        positions = " ".join(f"{share:.2f}" for share in one.by_position)
        lines.append(f"| {one.name} | {one.match:.3f} | {one.coupled:.3f} | {one.rejection:.3f} | {positions} |")
    return "\n".join(lines)


def speed_table(measured: list[Measured], ratios: Ratios) -> str:
    """Tokens per verifier step and expected speed-up by draft_len, in Markdown."""
    heads = " | ".join(f"{one.name}: tokens per step | speed-up" for one in measured)
    lines = [f"| draft_len | {heads} |", "|---" * (1 + 2 * len(measured)) + "|"]
    for draft_len in DRAFT_LENS:
        cells = [f"{one.tokens_per_step[draft_len]:.2f} | {one.speed_up(draft_len, ratios):.2f}" for one in measured]
        lines.append(f"| {draft_len} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(measured: list[Measured], ratios: Ratios) -> str:
    """What to serve with, in words; says so where nothing pays."""
    given = f"at --cost-ratio {ratios.cost:g} and --verify-ratio {ratios.verify:g}"
    pays, lines = [], []
    for one in measured:
        best = one.best(ratios)
        gain = one.speed_up(best, ratios)
        pays.append(gain > 1.0)
        lines.append(f"{one.name}: best draft_len {best}, {gain:.2f} x plain decoding" if gain > 1.0 else
                     f"{one.name}: no draft_len pays; the best, {best}, gives {gain:.2f} x plain decoding")
    if not any(pays):
        return "\n".join([*lines, f"No draft_len pays {given}: serve this verifier with --draft-model none."])
    overall = max(DRAFT_LENS, key=lambda draft_len: sum(one.speed_up(draft_len, ratios) for one in measured))
    mean = sum(one.speed_up(overall, ratios) for one in measured) / len(measured)
    if mean > 1.0:
        lines.append(f"Over all three: --draft-len {overall}, {mean:.2f} x plain decoding {given}.")
    else:
        lines.append(f"Over all three no draft_len pays {given}: use the draft only where one does.")
    return "\n".join(lines)


def describe(shape: LlamaShape) -> str:
    """A shape in one line."""
    embedding = shape.vocab_size * shape.hidden_size
    return (f"{shape.num_hidden_layers} layers, width {shape.hidden_size}, feed-forward {shape.intermediate_size}, "
            f"{shape.num_attention_heads} / {shape.num_key_value_heads} heads of {shape.head_dim}; "
            f"{shape.parameters():,} weights, {embedding / shape.parameters():.0%} of them in the embedding")


CARD = """# A draft for {verifier}

Written by `training distill`. Made for one verifier: acceptance with another one is not known, and a server
refuses one with another vocabulary. Serve the pair with

    slipstream serve --model VERIFIER --draft-model {folder}

- Shape: {shape}; {share:.1%} of the verifier's {parameters:,}.
- Context (`max_position_embeddings`): {context}, the longest window it was trained on{cut}.
  Further into a sequence the server decodes plainly.
- Training: {seconds:.0f} s on {device}, {tokens:.2f} M tokens in {steps:,} steps, half of them the verifier's own
  text, half from {learn_tokens:,} tokens of the operator's.

## Acceptance

On the verifier's own continuations of {prompts} held-out prompts ({given} tokens given, {new} continued), in float32.

{acceptance}

## Expected speed-up

Tokens per step are replayed over the same texts; the speed-up divides them by `verify_ratio + draft_len x
cost_ratio` with cost_ratio {cost:g} and verify_ratio {verify:g}. Measure both on the machine that serves.

{speed}

{verdict}
"""
