"""Writes the model card of a trained pair from its figures, so that no number is typed by hand."""

import hashlib
from pathlib import Path

from .plans import Plan
from .shape import LlamaShape

TEMPLATE = """# The pair {title}

A verifier that completes Rust code and a draft distilled from it, {share:.1%} of its size, for running slipstream
without a download. Not a coding assistant.

| | verifier | verifier, 4 bits | draft |
|---|---|---|---|
| file | `verifier.gguf` | {q4_file} | `draft.gguf` |
| parameters | {verifier_parameters:,} | the same | {draft_parameters:,} |
| layers x width, feed-forward | {verifier_form} | | {draft_form} |
| heads (query / key-value) x size | {verifier_heads} | | {draft_heads} |
| stored as | Q8_0 | Q4_0, embedding Q8_0 | Q8_0 |
| size in bytes | {verifier_bytes:,} | {q4_bytes:,} | {draft_bytes:,} |
| bits per byte | {verifier_bpb:.3f} | {q4_bpb:.3f} ({q4_loss:+.2%}) | {draft_bpb:.3f} |
| next token right | {verifier_accuracy:.1%} | {q4_accuracy:.1%} | {draft_accuracy:.1%} |
| largest change by quantisation over largest logit | {verifier_error:.2%} | {q4_error:.2%} | {draft_error:.2%} |

All figures are of the stored weights in float32, on crates that neither network has seen and that nothing was
chosen by ({test}).
Each token is predicted once, from a quarter to all of a context of {context} tokens. On the same text a 5-gram model
over the same tokens needs {five_gram:.3f} bits per byte, `xz -9` {xz_each:.3f} on each file by itself and
{xz_one:.3f} on all of it as one file of {test_mb:.1f} MB, where it looks back over everything before.{xz_note}

Both are Llama networks (RMSNorm, RoPE base 10,000, grouped-query attention, SwiGLU, tied embedding) with
a context of {context} tokens and one byte-level BPE vocabulary of {vocabulary} entries (`tokenizer.json`, embedded
in all files; {bytes_per_token:.2f} bytes per token; split by the rules that GGUF files call `{rules}`). Id 0 is
`<|endoftext|>`, which ends a file; there is no beginning-of-text token and no chat template: chat gets the
documented plain fallback.

## Acceptance

On the verifier's own continuations of {prompts} prompts of the unseen crates ({prompt_tokens} tokens given,
{new_tokens} continued).

| | shared noise | closed form of it | rejection sampling | tokens per step at draft_len 4 | with rejection sampling |
|---|---|---|---|---|---|
{acceptance_rows}

Acceptance by position of the proposal at draft_len 8, of those that all earlier positions let through:

{position_table}

Tokens per step by draft_len:

{length_table}

Models of this size like to repeat themselves, greedy above all, and repetition is easy to guess: read the first
rows with that in mind. On real text of the unseen crates both rank the same token first at {agreement:.3f} of the
positions.
{sweep}
## Completions

Ten prompts that are in no crate, and what the verifier makes of them at temperature {temperature}, first try,
at most {completion_tokens} tokens, unedited.

{completions}
## Data

Rust sources, comments and docs of {crates} crates: those that this workspace depends on, as cargo has them on
disk, and the standard library, from the source pages that the toolchain ships. {train_mb:.1f} MB to learn from,
{validation_mb:.1f} MB to choose by ({validation}) and {test_mb:.1f} MB to report on. Only crates that can be used
under permissive licences; generated tables, bindings, vendored code and duplicates are left out.
`corpus-manifest.json` names every crate with version, licence, size and digest. Manifest digest (SHA-256):
`{corpus_digest}`.

## Training

By `training pair --plan {plan_name}` (see `training/README.md`): the verifier {verifier_seconds:.0f} s
({verifier_tokens:.1f} M tokens), the draft {draft_seconds:.0f} s ({draft_tokens:.1f} M tokens)
after {sampling_seconds:.0f} s of sampling the verifier's own text (greedy, T 0.8 and T 1.0). The draft learns by
turns from corpus text and from that text: KL divergence from the verifier{stretch_note}.
The schedule follows the clock, so another run gives other weights, and a busier machine worse ones.

## Limits

Completions look like Rust and rarely compile. The models know no facts, follow no instructions, and may
repeat short passages of their training text. Use them for tests, demonstrations and benchmarks.

## Licence and digests

Licence of the weights: MIT OR Apache-2.0, as the rest of the repository.

| file | SHA-256 |
|---|---|
{digest_rows}
"""

SWEEP = """
### Shapes

All of these learned side by side on the same {tokens:.2f} M tokens, in {seconds:.0f} s together; acceptance on the
validation crates. Equal text, so larger shapes, which take longer for it, look a little better than at equal time.

| draft | parameters | greedy | T 0.8 | T 1.0 |
|---|---|---|---|---|
{rows}

The shape was fixed beforehand, the loss is the one with the higher sum. Shipped, after far more text: {chosen}.
"""


# How a sweep calls a draft whose last stretch is on the chance of acceptance itself.
STRETCHED = ", last quarter on acceptance"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def form(role: str, shape: LlamaShape) -> dict[str, str | int]:
    """The descriptive cells of a network."""
    return {
        f"{role}_form": f"{shape.num_hidden_layers} x {shape.hidden_size}, {shape.intermediate_size}",
        f"{role}_heads": f"{shape.num_attention_heads} / {shape.num_key_value_heads} x {shape.head_dim}",
        f"{role}_parameters": shape.parameters(),
    }


def temperature_name(label: str) -> str:
    """How a card calls a temperature."""
    return "greedy" if label == "T 0.0" else label


def acceptance_rows(acceptance: dict) -> str:
    """One table row per temperature."""
    return "\n".join(
        f"| {temperature_name(label)} | {values['match']:.3f} | {values['coupled']:.3f} | {values['rejection']:.3f} "
        f"| {values['tokens_per_step']['4']:.2f} | {values['rejection_tokens_per_step_4']:.2f} |"
        for label, values in acceptance.items()
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def position_tables(acceptance: dict) -> dict[str, str]:
    """Acceptance by position, and tokens per step by draft_len."""
    first = next(iter(acceptance.values()))
    by_position = [
        [temperature_name(k)] + [f"{share:.2f}" for share in v["by_position"]] for k, v in acceptance.items()
    ]
    by_length = [
        [temperature_name(k)] + [f"{tokens:.2f}" for tokens in v["tokens_per_step"].values()]
        for k, v in acceptance.items()
    ]
    return {
        "position_table": table(["position"] + [str(n + 1) for n in range(len(first["by_position"]))], by_position),
        "length_table": table(["draft_len", *first["tokens_per_step"]], by_length),
    }


def sweep_section(sweep: dict, chosen: str) -> str:
    """The section on shapes; empty for a plan without a sweep."""
    if not sweep["rows"]:
        return ""
    rows = "\n".join(
        f"| {row['name']} | {row['parameters']:,} | "
        + " | ".join(f"{values['match']:.3f}" for values in row["acceptance"].values()) + " |"
        for row in sweep["rows"]
    )
    return SWEEP.format(seconds=sweep["sweep_seconds"], tokens=sweep["sweep_tokens"], rows=rows, chosen=chosen)


def completion_blocks(completions: list[tuple[str, str]]) -> str:
    """Prompt and continuation of each, in a fence longer than any inside."""
    blocks = []
    for number, (prompt, continuation) in enumerate(completions, start=1):
        given, made = prompt.removesuffix("\n"), continuation.removesuffix("\n")
        blocks.append(f"{number}. Prompt:\n\n````rust\n{given}\n````\n\nContinuation:\n\n````rust\n{made}\n````\n")
    return "\n".join(blocks)


def prediction_cells(figures: dict) -> dict[str, float | int]:
    """Size, bits per byte, accuracy and quantisation error of each file."""
    cells: dict[str, float | int] = {}
    for role, stem in (("verifier", "verifier"), ("q4", "verifier-q4_0"), ("draft", "draft")):
        cells |= {
            f"{role}_bytes": figures["bytes"][stem],
            f"{role}_bpb": figures["prediction"][stem]["bits_per_byte"],
            f"{role}_accuracy": figures["prediction"][stem]["accuracy"],
            f"{role}_error": figures["errors"][stem]["quantisation"],
        }
    shipped = figures["q4_shipped"]
    return cells | {
        "q4_loss": four_bit_loss(figures["prediction"]),
        "q4_file": "`verifier-q4_0.gguf`" if shipped else "not shipped: loses 1 % or more",
    }


def four_bit_loss(prediction: dict) -> float:
    """Share by which four bits raise the verifier's bits per byte."""
    return prediction["verifier-q4_0"]["bits_per_byte"] / prediction["verifier"]["bits_per_byte"] - 1.0


def split_names(manifest: dict, split: str) -> str:
    """The crates of one split."""
    return ", ".join(row["name"] for row in manifest["crates"] if row["split"] == split)


def write_card(folder: Path, plan: Plan, figures: dict, manifest: dict, shown: dict) -> None:
    """Writes README.md into `folder`, beside the files whose digests it records.

    `shown` holds the plan's name, the completions, and the numbers that the figures were taken with.
    """
    names = ["verifier.gguf", "verifier-q4_0.gguf", "draft.gguf", "tokenizer.json", "corpus-manifest.json"]
    digests = {name: digest(folder / name) for name in names if (folder / name).exists()}
    draft, xz, cost = plan.drafts[plan.chosen], figures["xz"], figures["cost"]
    cells = prediction_cells(figures)
    beaten = cells["verifier_bpb"] < xz["one_file"]
    stretches = cost.get("stretch", 1.0) < 1.0
    text = TEMPLATE.format(
        **shown, **cells, **form("verifier", plan.verifier), **form("draft", draft),
        **position_tables(figures["acceptance"]),
        title=plan.title, rules=plan.rules, share=draft.parameters() / plan.verifier.parameters(),
        test=split_names(manifest, "test"), validation=split_names(manifest, "validation"),
        five_gram=figures["five_gram"], xz_each=xz["each_file"], xz_one=xz["one_file"],
        xz_note="" if beaten else "\nThe verifier does not reach that last figure.",
        context=plan.verifier.max_position_embeddings, vocabulary=plan.verifier.vocab_size,
        bytes_per_token=figures["bytes_per_token"], acceptance_rows=acceptance_rows(figures["acceptance"]),
        agreement=figures["argmax_agreement_on_real_text"],
        sweep=sweep_section(figures["sweep"], plan.chosen + STRETCHED * stretches),
        crates=len(manifest["crates"]), corpus_digest=manifest["sha256"],
        **{f"{split}_mb": size / 1e6 for split, size in manifest["bytes"].items()},
        **{name: cost[name] for name in ("verifier_seconds", "verifier_tokens", "draft_seconds", "draft_tokens")},
        sampling_seconds=plan.sampling_seconds,
        stretch_note=", and in the last quarter of the time\nthe chance of acceptance itself" if stretches else "",
        digest_rows="\n".join(f"| `{name}` | `{value}` |" for name, value in digests.items()),
    )
    (folder / "README.md").write_text(text)
