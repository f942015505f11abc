"""`training distill`: a draft for an operator's own verifier, learnt from it on the operator's own text.

Owns the command: its flags, the draft's shape, what a work folder may be used for again, and what is
written. Losses, loop and measuring live in the modules it calls.
"""

import argparse
import hashlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from . import distill_figures, hf_directory, own_corpus, teacher
from .distill import PROMPT, SAMPLED, SAMPLED_ROWS, Student, distill, sample_pool
from .distill_figures import NEW_TOKENS, PROMPT_TOKENS, Measured, Ratios
from .loop import Budget, Run, Unfinished
from .network import Llama
from .own_corpus import Corpus, TextWindows
from .refusal import Refusal
from .shape import LlamaShape
from .teacher import Teacher, Vocabulary
from .train import Recipe

SAMPLING_SHARE = 0.15
# From here on the loss is the acceptance itself, and windows are long.
STRETCH = 0.75
SHORT_WINDOW = PROMPT + SAMPLED
LONGEST_WINDOW = 2048
# Rows hold whole Q8_0 blocks, so that the draft can be served with --quantize q8_0.
BLOCK = 32
HEAD_DIMS = (32, 64)
# The rates below were chosen on drafts up to this width.
WIDTH_OF_RATES = 256
# Compiling takes about a minute of the time; it pays from here on.
COMPILED_FROM = 300.0
# A step keeps about eight float32 numbers per token and vocabulary entry.
BYTES_PER_ENTRY = 32
CARD_BEGINS = "# A draft for "


@dataclass(frozen=True)
class Material:
    """What a run works on, before any network is loaded."""

    folder: Path
    config: dict
    vocabulary: Vocabulary
    corpus: Corpus
    learn: np.ndarray
    held_out: np.ndarray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `training distill`."""
    add = parser.add_argument
    add("--verifier", type=Path, required=True, help="Hugging Face directory or GGUF file that slipstream serves")
    add("--corpus", type=Path, required=True, help="folder of text files (or one), or a .jsonl file")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the draft, for --draft-model")
    add("--work-dir", type=Path, metavar="DIR", help="folder for checkpoints (default: OUT.work)")
    add("--seconds", type=float, default=1800.0, metavar="N", help="training time, sampling included (1800)")
    add("--part-seconds", type=float, metavar="N", help="train only this long now; the same command goes on later")
    add("--field", action="append", metavar="NAME", help="field of a JSONL record (default: prompt, else text)")
    for name, text in [
        ("layers", "layers (2)"), ("width", "hidden size, a multiple of 32"),
        ("ffn", "feed-forward size, a multiple of 32"), ("heads", "query heads"),
        ("kv-heads", "key-value heads"), ("head-dim", "size of a head: 32 or 64"),
    ]:
        add(f"--{name}", type=int, metavar="N", help=f"draft's {text}; derived when not given")
    add("--share", type=float, default=0.1, metavar="X", help="most weights of the draft, as a share of the verifier's")
    add("--context", type=int, metavar="N", help="longest window trained, and the draft's context (2048, or less)")
    add("--cost-ratio", type=float, default=0.1, metavar="X", help="time of a draft step over a verifier step (0.1)")
    add("--verify-ratio", type=float, default=1.0, metavar="X", help="time of verifying a run over a plain step (1.0)")
    add("--prompts", type=int, default=96, metavar="N", help="held-out prompts measured per temperature (96)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    add("--seed", type=int, default=1, metavar="N", help="seed of weights and windows (1)")


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuses values that no verifier could make right."""
    for flag in ("seconds", "part_seconds", "share", "cost_ratio", "verify_ratio"):
        value = getattr(arguments, flag)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise Refusal(f"--{flag.replace('_', '-')} {value:g}: must be above 0")
    for flag in ("layers", "width", "ffn", "heads", "kv_heads", "prompts", "threads", "context"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise Refusal(f"--{flag.replace('_', '-')} {value}: must be at least 1")
    for flag in ("width", "ffn"):
        value = getattr(arguments, flag)
        if value is not None and value % BLOCK:
            raise Refusal(f"--{flag} {value}: must be a multiple of {BLOCK}, the length of a Q8_0 block")
    if arguments.head_dim not in (None, *HEAD_DIMS):
        raise Refusal(f"--head-dim {arguments.head_dim}: must be 32 or 64")
    if arguments.share > 1.0:
        raise Refusal(f"--share {arguments.share:g}: must be at most 1")


def check_out(arguments: argparse.Namespace) -> None:
    """Refuses to write over anything but an earlier draft, which is replaced as a whole."""
    out = arguments.out
    for flag in ("verifier", "corpus", "work_dir"):
        path = getattr(arguments, flag)
        if path is not None and path.resolve().is_relative_to(out.resolve()):
            raise Refusal(f"--out: {out} holds what --{flag.replace('_', '-')} names; name a folder of its own")
    work = arguments.work_dir or out.with_name(out.name + ".work")
    for flag, path in (("out", out), ("work-dir", work)):
        if path.resolve().is_relative_to(arguments.corpus.resolve()):
            raise Refusal(f"--{flag}: {path} lies inside --corpus and would be learnt from; name a folder outside")
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out: {out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        card = out / "README.md"
        if not (card.is_file() and card.read_text(errors="replace").startswith(CARD_BEGINS)):
            raise Refusal(f"--out: {out} is not empty and holds no draft of this tool; name a new folder")


def chosen_device(name: str) -> str:
    """`cpu` or `cuda`."""
    if name == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: PyTorch finds no CUDA device here; say --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def as_directory(verifier: Path, work: Path) -> Path:
    """The verifier as a Hugging Face directory; a GGUF file becomes one inside `work`, once."""
    if not verifier.exists():
        raise Refusal(f"--verifier: {verifier} does not exist")
    if verifier.is_dir():
        return verifier
    with verifier.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise Refusal(f"--verifier: {verifier} is neither a folder nor a GGUF file")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = work / f"verifier-{digest}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        hf_directory.export(verifier, partial)
        partial.rename(folder)
    return folder


def verifier_shape(config: dict) -> LlamaShape:
    """What of the verifier's shape bounds the draft's."""
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        return LlamaShape(
            vocab_size=config["vocab_size"], hidden_size=width, intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"], num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise Refusal(f"--verifier: config.json has no {error.args[0]}") from None


def upwards(value: float) -> int:
    """The next multiple of `BLOCK`."""
    return math.ceil(value / BLOCK) * BLOCK


def candidate(arguments: argparse.Namespace, vocabulary: int, context: int, width: int) -> LlamaShape:
    """The smallest shape of this width; flags win over what is derived."""
    head_dim = arguments.head_dim or (64 if width >= 256 else 32)
    heads = arguments.heads or max(1, width // head_dim)
    halves = [count for count in range(1, heads + 1) if heads % count == 0 and count <= max(1, heads // 2)]
    kv_heads = arguments.kv_heads or halves[-1]
    if heads % kv_heads:
        raise Refusal(f"--kv-heads {kv_heads}: must divide the {heads} query heads (--heads)")
    ffn = arguments.ffn or upwards(1.5 * width)
    return LlamaShape(vocabulary, width, ffn, arguments.layers or 2, heads, kv_heads, head_dim, context)


def draft_shape(arguments: argparse.Namespace, verifier: LlamaShape, context: int) -> LlamaShape:
    """The widest shape within `--share`; what is left goes to the feed-forward part, to 8/3 of the width at most."""
    allowed = int(arguments.share * verifier.parameters())
    widest = max(BLOCK, verifier.hidden_size // BLOCK * BLOCK)
    widths = [arguments.width] if arguments.width else range(widest, 0, -BLOCK)
    for width in widths:
        shape = candidate(arguments, verifier.vocab_size, context, width)
        if shape.parameters() > allowed:
            continue
        while arguments.ffn is None and shape.intermediate_size < 8 / 3 * width:
            larger = replace(shape, intermediate_size=shape.intermediate_size + BLOCK)
            if larger.parameters() > allowed:
                break
            shape = larger
        return shape
    needed, embedding = shape.parameters(), verifier.vocab_size * shape.hidden_size
    share = math.ceil(1000 * needed / verifier.parameters()) / 1000
    way_out = f"raise --share to {share:g}" if share <= 1.0 else "this verifier is too small to have a draft like that"
    smaller = " or lower --width" if arguments.width and arguments.width > BLOCK else ""
    raise Refusal(
        f"--share {arguments.share:g} allows a draft of {allowed:,} weights; {shape.num_hidden_layers} layers of width "
        f"{shape.hidden_size} take {needed:,}, of which the vocabulary of {verifier.vocab_size:,} takes {embedding:,}: "
        f"{way_out}{smaller}"
    )


def batch_tokens(vocabulary: int, device: str) -> int:
    """Tokens of a step, as many as memory for their logits allows: whole windows of `SHORT_WINDOW`."""
    memory, most = 4 << 30, 4096
    if device == "cuda":
        memory, most = torch.cuda.get_device_properties(0).total_memory // 4, 65_536
    return max(SHORT_WINDOW, min(most, memory // (vocabulary * BYTES_PER_ENTRY)) // SHORT_WINDOW * SHORT_WINDOW)


def draft_context(arguments: argparse.Namespace, verifier: LlamaShape, batch: int) -> int:
    """The longest window: the verifier's context, but no more than fits into one step or `LONGEST_WINDOW`."""
    limit = verifier.max_position_embeddings
    if limit < SHORT_WINDOW:
        raise Refusal(f"--verifier: a context of {limit}; its own text takes {SHORT_WINDOW} at least")
    context = arguments.context or min(limit, LONGEST_WINDOW, batch)
    if not SHORT_WINDOW <= context <= limit:
        raise Refusal(f"--context {context}: must be from {SHORT_WINDOW} to the verifier's context of {limit}")
    return context


def read_material(arguments: argparse.Namespace, work: Path) -> Material:
    """Reads configuration, vocabulary and text; nothing large yet."""
    folder = as_directory(arguments.verifier, work)
    config = teacher.read_config(folder)
    vocabulary = teacher.read_vocabulary(folder, config)
    corpus = own_corpus.read_corpus(arguments.corpus, arguments.field or ("prompt", "text"))
    streams = [own_corpus.encode(vocabulary, texts) for texts in (corpus.learn, corpus.held_out)]
    return Material(folder, config, vocabulary, corpus, *streams)


def check_sizes(material: Material, context: int) -> None:
    """Refuses a corpus that has not one window for training and one prompt for measuring."""
    for stream, needed, use in (
        (material.learn, context, "to learn from"), (material.held_out, PROMPT_TOKENS, "held out for measuring"),
    ):
        if len(stream) <= needed:
            raise Refusal(f"--corpus: {len(stream)} tokens {use}; one window takes {needed + 1}: add text"
                          + (" or lower --context" if needed == context and context > SHORT_WINDOW else ""))


def claim_work(work: Path, facts: dict) -> None:
    """Takes `work` for a run of these `facts` by flag, or refuses it when it was begun with others."""
    record = work / "arguments.json"
    if record.exists():
        earlier = json.loads(record.read_text())
        for flag, value in facts.items():
            if earlier.get(flag) != value:
                raise Refusal(f"{flag} is {value}, but --work-dir {work} was begun with {earlier.get(flag)}: "
                              "say the same again or name another --work-dir")
        return
    if work.is_dir() and any(not path.name.startswith("verifier-") for path in work.iterdir()):
        raise Refusal(f"--work-dir: {work} is not empty and no earlier run's; name another")
    work.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(facts, indent=1) + "\n")


def facts_of(arguments: argparse.Namespace, material: Material, shape: LlamaShape, device: str) -> dict:
    """Everything that a resumed run must have in common with the one that began, by flag."""
    return {
        "--verifier": f"digest {teacher.digest(material.folder)}",
        "--corpus": f"digest {material.corpus.digest()}",
        "--seconds": arguments.seconds, "--seed": arguments.seed, "--device": device,
        "--layers": shape.num_hidden_layers, "--width": shape.hidden_size, "--ffn": shape.intermediate_size,
        "--heads": shape.num_attention_heads, "--kv-heads": shape.num_key_value_heads, "--head-dim": shape.head_dim,
        "--context": shape.max_position_embeddings,
    }


def train(
    arguments: argparse.Namespace, verifier: Teacher, draft: Llama, material: Material, work: Path, device: str
) -> Run:
    """Samples the verifier's own text and distils, both going on from what `work` holds."""
    vocabulary, shape = material.vocabulary, draft.shape
    batch = max(batch_tokens(vocabulary.size, device), shape.max_position_embeddings)
    windows = TextWindows(material.learn, arguments.seed, device, vocabulary.begin_id)
    prompts = max(4, min(SAMPLED_ROWS, (1 << 30) // (PROMPT * vocabulary.size * 4)))
    sampling = Budget(SAMPLING_SHARE * arguments.seconds)
    rows = sample_pool(verifier, vocabulary.size, windows, sampling, work / "samples.pt", prompts)
    recipe = Recipe(
        0.01, 0.02 * min(1.0, WIDTH_OF_RATES / shape.hidden_size) ** 0.5, batch,
        ((STRETCH, SHORT_WINDOW), (1.0 - STRETCH, shape.max_position_embeddings)),
        compiled=arguments.seconds >= COMPILED_FROM,
    )
    budget = Budget((1.0 - SAMPLING_SHARE) * arguments.seconds, arguments.part_seconds)
    student = Student("draft", draft, STRETCH)
    return distill([student], verifier, windows, rows.to(device), recipe, budget, work / "draft.pt")


def write_draft(arguments: argparse.Namespace, material: Material, draft: Llama, card: str) -> None:
    """Writes the draft's folder beside its place, tokenizer files included, then moves it there."""
    config, out = material.config, arguments.out.resolve()
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    described = hf_directory.config_json(draft.shape, config.get("eos_token_id"), config.get("bos_token_id"), None)
    weights = {name: weight.detach().float().cpu().numpy() for name, weight in draft.named_parameters()}
    hf_directory.write_network(partial, described, weights)
    for name in teacher.TOKENIZER_FILES:
        if (material.folder / name).exists():
            shutil.copyfile(material.folder / name, partial / name)
    (partial / "README.md").write_text(card)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def card_of(
    arguments: argparse.Namespace, material: Material, shape: LlamaShape, verifier: Teacher, run: Run,
    measured: list[Measured], device: str,
) -> str:
    """The README of the draft."""
    ratios = Ratios(arguments.cost_ratio, arguments.verify_ratio)
    cut = "" if shape.max_position_embeddings == verifier.context else f" (the verifier's is {verifier.context})"
    return distill_figures.CARD.format(
        verifier=arguments.verifier.resolve().name, folder=arguments.out.resolve().name,
        shape=distill_figures.describe(shape),
        share=shape.parameters() / verifier.parameters, parameters=verifier.parameters,
        context=shape.max_position_embeddings, cut=cut, seconds=arguments.seconds, device=device,
        tokens=run.tokens / 1e6, steps=run.steps, learn_tokens=len(material.learn), prompts=arguments.prompts,
        given=PROMPT_TOKENS, new=NEW_TOKENS,
        acceptance=distill_figures.acceptance_table(measured), cost=ratios.cost, verify=ratios.verify,
        speed=distill_figures.speed_table(measured, ratios), verdict=distill_figures.verdict(measured, ratios),
    )


def prepare(arguments: argparse.Namespace, work: Path, device: str) -> tuple[Material, LlamaShape]:
    """Everything that can be refused is refused here, before a network is loaded."""
    material = read_material(arguments, work)
    print(material.corpus.summary())
    print(f"tokens: {len(material.learn):,} to learn from, {len(material.held_out):,} held out", flush=True)
    known = verifier_shape(material.config)
    context = draft_context(arguments, known, batch_tokens(known.vocab_size, device))
    shape = draft_shape(arguments, known, context)
    check_sizes(material, context)
    claim_work(work, facts_of(arguments, material, shape, device))
    print(f"draft: {distill_figures.describe(shape)}; {shape.parameters() / known.parameters():.1%} of the verifier")
    if 2 * shape.vocab_size * shape.hidden_size > shape.parameters():
        print(f"the vocabulary of {shape.vocab_size:,} takes most of the draft: width {shape.hidden_size} is "
              + ("what --width says" if arguments.width else f"the widest within --share {arguments.share:g}"))
    print(f"context: {context}, the longest window trained; the verifier's is {known.max_position_embeddings}",
          flush=True)
    return material, shape


def run(arguments: argparse.Namespace) -> None:
    """`training distill`; raises `Refusal` on bad input."""
    check_numbers(arguments)
    check_out(arguments)
    device = chosen_device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    work = arguments.work_dir or arguments.out.resolve().with_name(f"{arguments.out.resolve().name}.work")
    material, shape = prepare(arguments, work, device)
    verifier = teacher.read_teacher(material.folder, device)
    draft = Llama(shape)
    draft.initialise(arguments.seed)
    draft.to(device)
    try:
        done = train(arguments, verifier, draft, material, work, device)
    except Unfinished:
        print(f"stopped before its time was over; the same command goes on from {work}")
        return
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from {work}")
        raise SystemExit(130) from None
    draft.eval().requires_grad_(False)
    prompts = TextWindows(material.held_out, 20, device, material.vocabulary.begin_id)
    drawn = prompts.draw(arguments.prompts, PROMPT_TOKENS)
    measured = distill_figures.measure(verifier, draft, drawn, material.vocabulary.size)
    card = card_of(arguments, material, shape, verifier, done, measured, device)
    write_draft(arguments, material, draft, card)
    print("\n" + card[card.index("## Acceptance") :])
    print(f"{arguments.out}: ready for --draft-model; {work} can be deleted")
