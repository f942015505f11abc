"""The pairs that this repository knows how to train: shapes, vocabularies, times and rates.

Owns numbers only. A plan's `gpu` twin differs in numbers, never in code.
"""

from dataclasses import dataclass, replace

from .shape import LlamaShape
from .train import Recipe


@dataclass(frozen=True)
class Plan:
    """Everything that distinguishes one pair from another.

    `drafts` are the shapes of the sweep by name; `chosen` is the one that is trained to the end and shipped.
    Seconds are wall-clock: `verifier_seconds`, `sampling_seconds` (text of the verifier itself),
    `sweep_seconds` (all shapes side by side) and `draft_seconds`. The verifier stops at `verifier_tokens`.
    `sampled_rows` texts are sampled at once; acceptance is measured on `prompts`, and predictions on the first
    `report_tokens` of the test crates (None: all).
    """

    title: str
    folder: str
    rules: str
    verifier: LlamaShape
    drafts: dict[str, LlamaShape]
    chosen: str
    verifier_recipe: Recipe
    draft_recipe: Recipe
    verifier_seconds: float
    sampling_seconds: float
    sweep_seconds: float
    draft_seconds: float
    verifier_tokens: float = float("inf")
    verifier_dropout: float = 0.0
    sampled_rows: int = 128
    prompts: int = 96
    report_tokens: int | None = None


def llama(vocabulary: int, context: int, width: int, ffn: int, layers: int, heads: tuple[int, int, int]) -> LlamaShape:
    """A shape; `heads` are query heads, key-value heads and the size of one."""
    return LlamaShape(vocabulary, width, ffn, layers, *heads, max_position_embeddings=context)


def stages(short: int, long: int) -> tuple[tuple[float, int], ...]:
    """Most of the time goes to short windows, where a token costs least; the last ones teach positions."""
    return ((0.70, short), (0.18, long // 2), (0.12, long))


MICRO = Plan(
    title="micro", folder="micro", rules="gpt-2",
    verifier=llama(1024, 1024, 128, 416, 4, (4, 2, 32)),
    drafts={"1x64": llama(1024, 1024, 64, 96, 1, (4, 2, 16))}, chosen="1x64",
    verifier_recipe=Recipe(0.01, 0.02, 4096, stages(256, 1024)),
    draft_recipe=Recipe(0.01, 0.02, 4096, stages(256, 1024)),
    verifier_seconds=560, sampling_seconds=48, sweep_seconds=0, draft_seconds=272,
)

# At most a tenth of the verifier's 5.5 M weights, of which the shared vocabulary takes 4096 x width.
CPU = Plan(
    title="Rust 5M", folder="rust", rules="qwen2",
    verifier=llama(4096, 2048, 256, 704, 6, (4, 2, 64)),
    drafts={
        "2x96": llama(4096, 2048, 96, 160, 2, (3, 1, 32)),
        "3x64": llama(4096, 2048, 64, 384, 3, (2, 1, 32)),
        "1x64": llama(4096, 2048, 64, 256, 1, (2, 1, 32)),
    },
    chosen="2x96",
    verifier_recipe=Recipe(0.008, 0.012, 8192, stages(256, 2048)),
    draft_recipe=Recipe(0.01, 0.02, 4096, ((0.75, 256), (0.25, 2048))),
    verifier_seconds=4500, sampling_seconds=150, sweep_seconds=330, draft_seconds=1500,
)

# 51 M weights, so that both files in Q8_0 stay under 64 MB; at most half an hour of one large accelerator.
# The corpus is read a dozen times, hence the limit on tokens and the dropout.
GPU = Plan(
    title="Rust 50M", folder="rust", rules="qwen2",
    verifier=llama(16384, 2048, 640, 1728, 9, (10, 5, 64)),
    drafts={
        "2x224": llama(16384, 2048, 224, 512, 2, (7, 1, 32)),
        "1x256": llama(16384, 2048, 256, 768, 1, (8, 2, 32)),
        "3x192": llama(16384, 2048, 192, 576, 3, (6, 2, 32)),
    },
    chosen="2x224",
    verifier_recipe=Recipe(0.006, 0.01, 131_072, ((0.55, 512), (0.20, 1024), (0.25, 2048))),
    draft_recipe=Recipe(0.01, 0.02, 65_536, ((0.75, 256), (0.25, 2048))),
    verifier_seconds=1020, sampling_seconds=60, sweep_seconds=120, draft_seconds=240,
    verifier_tokens=240e6, verifier_dropout=0.1,
)

PLANS = {"micro": MICRO, "cpu": CPU, "gpu": GPU}


def miniature(plan: Plan) -> Plan:
    """The same plan with seconds for minutes and less of everything, for a test of the pipeline itself on a CPU."""
    shares = {
        name: max(5.0, 150.0 * getattr(plan, name) / (plan.verifier_seconds + plan.draft_seconds)) 
        for name in ("verifier_seconds", "sampling_seconds", "draft_seconds")
    }
    recipes = {
        name: replace(recipe, batch_tokens=min(recipe.batch_tokens, 4096), compiled=False)
        for name, recipe in (("verifier_recipe", plan.verifier_recipe), ("draft_recipe", plan.draft_recipe))
    }
    sweep_seconds = 20.0 if plan.sweep_seconds else 0.0
    return replace(
        plan, sweep_seconds=sweep_seconds, sampled_rows=16, prompts=16, report_tokens=20_000, **shares, **recipes
    )
