"""Writes the model card of a trained pair from its figures, so that no number is typed by hand."""

import hashlib
from pathlib import Path

TEMPLATE = """# The micro pair

A draft and a verifier that complete Rust code a little: enough to run every path of slipstream on real
text without a download, and to see proposals accepted far more often than chance. Not a coding
assistant.

| | verifier | draft |
|---|---|---|
| file | `verifier.gguf` | `draft.gguf` |
| parameters | {verifier_parameters:,} | {draft_parameters:,} |
| layers x width, feed-forward | {verifier_form} | {draft_form} |
| heads (query / key-value) x size | {verifier_heads} | {draft_heads} |
| size, Q8_0 | {verifier_bytes:,} bytes | {draft_bytes:,} bytes |
| bits per byte on unseen crates | {verifier_bpb:.3f} | {draft_bpb:.3f} |

Both are Llama networks (RMSNorm, RoPE base 10,000, grouped-query attention, SwiGLU, tied embedding) with
a context of {context} tokens and one byte-level BPE vocabulary of {vocabulary} entries
(`tokenizer.json`, embedded in both files; {bytes_per_token:.2f} bytes per token on unseen crates). Id 0 is
`<|endoftext|>`, which ends a file; there is no beginning-of-text token and no chat template.

## Acceptance

On the verifier's own continuations of {prompts} prompts of unseen crates (128 tokens given, 128 continued),
measured on the shipped Q8_0 weights in float32.

| | shared noise | closed form of it | rejection sampling would have | tokens per step at draft_len 4 |
|---|---|---|---|---|
{acceptance_rows}

Chance would be {chance:.4f}. These models like to repeat themselves, greedy above all, and repetition is
easy to guess: read the first row with that in mind. On real text of the unseen crates both rank the same
token first at {agreement:.3f} of the positions. {beta_note}

## Data

Rust sources, comments and docs of {crates} crates that this workspace depends on, as cargo has them on
disk: {train_mb:.1f} MB to learn from and {validation_mb:.1f} MB unseen ({validation}). Only crates that
can be used under permissive licences; generated tables, bindings, vendored code and duplicates are left
out. `corpus-manifest.json` names every crate with version, licence, size and digest. Manifest digest
(SHA-256): `{corpus_digest}`.

## Training

{cost} by `training/micro_pair.py` on two CPU cores: the verifier {verifier_seconds:.0f} s
({verifier_tokens:.1f} M tokens), the draft {draft_seconds:.0f} s ({draft_tokens:.1f} M tokens; sampling its
on-policy text included). The draft learns from the verifier's distribution by KL divergence,
half on corpus text and half on text sampled from the verifier (greedy, T 0.8 and T 1.0).
The schedule follows the clock, so another run gives other weights, and a busier machine worse ones.
The unseen crates also served to choose the draft's loss and learning rates among a handful of trials, so
their figures are slightly flattering.

## Limits

Completions look like Rust and rarely compile. The models know no facts, follow no instructions, and may
repeat short passages of their training text. Use them for tests, demonstrations and benchmarks.

## Licence and digests

Licence of the weights: MIT OR Apache-2.0, as the rest of the repository.

| file | SHA-256 |
|---|---|
{digest_rows}
"""


def form(shape) -> dict[str, str]:
    """The two descriptive cells of a network."""
    return {
        "form": f"{shape.num_hidden_layers} x {shape.hidden_size}, {shape.intermediate_size}",
        "heads": f"{shape.num_attention_heads} / {shape.num_key_value_heads} x {shape.head_dim}",
    }


def acceptance_rows(figures: dict) -> str:
    """One table row per temperature."""
    rows = []
    for label, values in figures["acceptance"].items():
        name = "greedy" if label == "T 0.0" else label
        rows.append(f"| {name} | {values['match']:.3f} | {values['coupled']:.3f} | {values['rejection']:.3f} "
                    f"| {values['tokens_per_step_4']:.2f} |")
    return "\n".join(rows)


def beta_note(figures: dict) -> str:
    """Says whether sharpening or flattening the draft would help."""
    notes = [
        f"{values['coupled_at_that_beta']:.3f} at beta {values['best_other_beta']} for {label}"
        for label, values in figures["acceptance"].items() if "best_other_beta" in values
    ]
    return f"The best other\nsharpening of the draft gives {' and '.join(notes)}."


def write_card(folder: Path, facts: dict, figures: dict, corpus: dict, shapes: dict) -> None:
    """Writes README.md into `folder`, beside the files whose digests it records."""
    validation = [row["name"] for row in corpus["crates"] if row["split"] == "validation"]
    names = ["verifier.gguf", "draft.gguf", "tokenizer.json", "corpus-manifest.json"]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    values = dict(facts)
    for role, shape in shapes.items():
        values |= {f"{role}_{key}": value for key, value in form(shape).items()}
        values[f"{role}_bytes"] = (folder / f"{role}.gguf").stat().st_size
        values[f"{role}_bpb"] = figures["bits_per_byte"][role]
    text = TEMPLATE.format(
        **values,
        acceptance_rows=acceptance_rows(figures),
        beta_note=beta_note(figures),
        agreement=figures["argmax_agreement_on_real_text"],
        chance=1 / shapes["verifier"].vocab_size,
        context=shapes["verifier"].max_position_embeddings,
        vocabulary=shapes["verifier"].vocab_size,
        crates=len(corpus["crates"]),
        train_mb=corpus["bytes"]["train"] / 1e6,
        validation_mb=corpus["bytes"]["validation"] / 1e6,
        validation=", ".join(validation),
        corpus_digest=corpus["sha256"],
        digest_rows="\n".join(f"| `{name}` | `{digest}` |" for name, digest in digests.items()),
    )
    (folder / "README.md").write_text(text)
