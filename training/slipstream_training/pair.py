"""`training pair`: from nothing to the files that the repository ships, in one command.

Corpus, tokenizer, verifier, its own text, a sweep over draft shapes, the draft, figures, GGUF files, goldens
and model card. Everything that took long stays in --work-dir: the same command goes on where it stopped.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as Quant

from .baselines import NGram, xz_bits_per_byte
from .card import STRETCHED, completion_blocks, four_bit_loss, write_card
from .data import Windows, decode_stream, token_byte_lengths
from .distill import Student, distill, sample_pool
from .evaluate import NEW_TOKENS, PROMPT_TOKENS, acceptances, argmax_agreement, prediction
from .loop import Budget, Unfinished
from .network import Llama
from .plans import PLANS, Plan, miniature
from .prompts import COMPLETIONS
from .sampling import continue_prompts, gumbel
from .ship import Exported, as_stored, export, write_golden, write_pieces
from .text import Text, prepare_text
from .train import train_verifier

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STRETCH = 0.75
FOUR_BIT_LOSS_MAX = 0.01
COMPLETION_TOKENS = 96
COMPLETION_TEMPERATURE = 0.5


class Pair:
    """One run of a plan: what its steps share, and where they keep what they made."""

    def __init__(self, plan: Plan, arguments: argparse.Namespace):
        self.plan, self.arguments = plan, arguments
        self.work: Path = arguments.work_dir
        self.started = time.monotonic()
        self.claim_work()
        self.text: Text = prepare_text(REPOSITORY, plan.verifier.vocab_size, plan.rules, self.work)

    def claim_work(self) -> None:
        """Refuses a work folder that another plan, size or seed has begun in."""
        facts = {"plan": self.plan.title, "miniature": self.arguments.miniature, "seed": self.arguments.seed}
        path = self.work / "run.json"
        if path.exists() and json.loads(path.read_text()) != facts:
            raise ValueError(f"--work-dir: {self.work} holds another run, {path.read_text()}; take another folder")
        self.work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))

    def windows(self, seed: int) -> Windows:
        """Training windows on the device."""
        return Windows(self.text.streams["train"], self.arguments.seed + seed, self.arguments.device)

    def budget(self, seconds: float) -> Budget:
        """A step's time, within what is left of this process's part."""
        part = self.arguments.part_seconds
        return Budget(seconds, None if part is None else max(0.0, part - (time.monotonic() - self.started)))

    def fresh(self, role: str, seed: int) -> Llama:
        """A network with drawn weights, on the device."""
        network = Llama(self.plan.verifier if role == "verifier" else self.plan.drafts[role])
        network.initialise(self.arguments.seed + seed)
        return network.to(self.arguments.device)

    def keep(self, name: str, network: Llama, cost: dict) -> None:
        """Leaves a finished network in the work folder."""
        torch.save(network.state_dict(), self.work / f"{name}.pt")
        (self.work / f"{name}.json").write_text(json.dumps(cost))

    def kept(self, name: str) -> dict | None:
        """What a finished step cost; None when it has not finished."""
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def verifier(self) -> Llama:
        """The trained verifier: trains it first when it is not there."""
        network = self.fresh("verifier", 0)
        if self.kept("verifier") is None:
            budget = replace(self.budget(self.plan.verifier_seconds), tokens=self.plan.verifier_tokens)
            network.drop(self.plan.verifier_dropout)
            checkpoint = self.work / "verifier-run.pt"
            run = train_verifier(network, self.windows(0), self.plan.verifier_recipe, budget, checkpoint)
            self.keep("verifier", network, {"verifier_seconds": run.elapsed(), "verifier_tokens": run.tokens / 1e6})
        weights = torch.load(self.work / "verifier.pt", weights_only=True, map_location=self.arguments.device)
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False)

    def own_text(self, verifier: Llama) -> torch.Tensor:
        """The verifier's own continuations, which drafts learn from."""
        budget = self.budget(self.plan.sampling_seconds)
        vocabulary = self.plan.verifier.vocab_size
        path, rows = self.work / "own-text.pt", self.plan.sampled_rows
        return sample_pool(verifier, vocabulary, self.windows(1), budget, path, rows)

    def teach(self, students: list[Student], verifier: Llama, rows: torch.Tensor, seconds: float, name: str) -> dict:
        """Distils `students` side by side; returns what it cost."""
        checkpoint = self.work / f"{name}-run.pt"
        # Shapes are compared on short prompts, so the sweep's time all goes to short windows.
        short = ((1.0, self.plan.draft_recipe.stages[0][1]),)
        recipe = replace(self.plan.draft_recipe, stages=short) if len(students) > 1 else self.plan.draft_recipe
        run = distill(students, verifier, self.windows(2), rows, recipe, self.budget(seconds), checkpoint)
        return {f"{name}_seconds": run.elapsed(), f"{name}_tokens": run.tokens / 1e6}

    def sweep(self, verifier: Llama, rows: torch.Tensor) -> dict:
        """Acceptance on the validation crates by shape and by loss, after equal text."""
        if self.plan.sweep_seconds == 0:
            return {"rows": []}
        if (done := self.kept("sweep")) is not None:
            return done
        students = [Student(name, self.fresh(name, 1)) for name in self.plan.drafts]
        chosen = self.plan.chosen
        students.append(Student(chosen + STRETCHED, self.fresh(chosen, 1), STRETCH))
        cost = self.teach(students, verifier, rows, self.plan.sweep_seconds, "sweep")
        networks = {student.name: student.network.eval().requires_grad_(False) for student in students}
        table = []
        for name, found in self.measured(verifier, networks, "validation").items():
            parameters = networks[name].shape.parameters()
            table.append({"name": name, "parameters": parameters, "acceptance": found})
            print(f"{name:36} {parameters:9,} " + "  ".join(f"{k} {v['match']:.3f}" for k, v in found.items()))
        cost["rows"] = table
        (self.work / "sweep.json").write_text(json.dumps(cost))
        return cost

    def draft(self, verifier: Llama, rows: torch.Tensor, sweep: dict) -> Llama:
        """The distilled draft of the chosen shape; its loss is the one that won the sweep."""
        chosen = self.plan.chosen
        network = self.fresh(chosen, 3)
        if self.kept("draft") is None:
            student = Student(chosen, network, stretch_after(sweep, chosen))
            cost = self.teach([student], verifier, rows, self.plan.draft_seconds, "draft")
            self.keep("draft", network, cost | {"stretch": student.stretch})
        weights = torch.load(self.work / "draft.pt", weights_only=True, map_location=self.arguments.device)
        network.load_state_dict(weights)
        return network.eval().requires_grad_(False)

    def measured(self, verifier: Llama, drafts: dict[str, Llama], split: str) -> dict[str, dict]:
        """Acceptance on one split, by draft."""
        stream = self.text.streams[split]
        vocabulary, prompts = self.plan.verifier.vocab_size, self.plan.prompts
        return acceptances(verifier, drafts, stream, vocabulary, prompts, self.arguments.device)

    def figures(self, verifiers: dict[str, Llama], draft: Llama) -> dict:
        """All figures of the model card, on the test crates, of the weights as stored."""
        verifier, stream = verifiers["verifier"], self.text.streams["test"][: self.plan.report_tokens]
        lengths, context = token_byte_lengths(self.text.tokenizer), self.plan.verifier.max_position_embeddings
        crops = Windows(stream, 22, self.arguments.device).draw(32, 512)
        gram = NGram(self.text.streams["train"], self.plan.verifier.vocab_size)
        networks = verifiers | {"draft": draft}
        return {
            "prediction": {name: prediction(network, stream, lengths, context) for name, network in networks.items()},
            "five_gram": gram.bits_per_byte(stream, lengths),
            "xz": xz_bits_per_byte(decode_stream(self.text.tokenizer, stream)),
            "argmax_agreement_on_real_text": argmax_agreement(verifier, draft, crops),
            "acceptance": self.measured(verifier, {"draft": draft}, "test")["draft"],
        }

    def completions(self, verifier: Llama) -> list[tuple[str, str]]:
        """Prompts and what the verifier makes of them, cut at its end-of-text token."""
        generator = torch.Generator(self.arguments.device).manual_seed(31)
        shown = []
        for prompt in COMPLETIONS:
            ids = self.text.tokenizer.encode(prompt, add_special_tokens=False).ids
            noise = gumbel((1, COMPLETION_TOKENS, self.plan.verifier.vocab_size), generator)
            row = torch.tensor([ids], device=self.arguments.device)
            new = continue_prompts(verifier, row, noise, COMPLETION_TEMPERATURE)[0, len(ids) :].tolist()
            new = new[: new.index(0)] if 0 in new else new
            shown.append((prompt, self.text.tokenizer.decode(new)))
        return shown

    def write_files(self, verifier: Llama, draft: Llama) -> tuple[dict, dict[str, Llama]]:
        """Writes GGUF files and goldens; returns sizes and errors, and the networks as stored, by file stem."""
        out, fixtures, plan = self.arguments.out, self.arguments.fixtures, self.plan
        out.mkdir(parents=True, exist_ok=True)
        fixtures.mkdir(parents=True, exist_ok=True)
        files = [
            (verifier, Exported("verifier", Quant.Q8_0, out / "verifier.gguf")),
            (verifier, Exported("verifier", Quant.Q4_0, out / "verifier-q4_0.gguf")),
            (draft, Exported("draft", Quant.Q8_0, out / "draft.gguf")),
        ]
        facts, stored = {"errors": {}, "bytes": {}}, {}
        for network, exported in files:
            name = exported.path.stem
            export(network.cpu(), exported.role, plan.title, plan.rules, self.text.tokenizer, exported)
            golden = fixtures / f"{plan.folder}-{name}-golden.safetensors"
            facts["errors"][name] = write_golden(network, self.text.tokenizer, exported, golden)
            facts["bytes"][name] = exported.path.stat().st_size
            stored[name] = as_stored(network, exported.matrices).to(self.arguments.device)
        return facts, stored

    def ship(self, verifier: Llama, draft: Llama, sweep: dict) -> None:
        """Writes every file of the repository, and measures what was written."""
        out, plan = self.arguments.out, self.plan
        facts, stored = self.write_files(verifier, draft)
        figures = self.figures({name: stored[name] for name in ("verifier", "verifier-q4_0")}, stored["draft"])
        figures |= facts | {"sweep": sweep, "bytes_per_token": self.text.bytes_per_token("test")}
        figures["cost"] = (self.kept("verifier") or {}) | (self.kept("draft") or {})
        figures["q4_shipped"] = four_bit_loss(figures["prediction"]) < FOUR_BIT_LOSS_MAX
        if not figures["q4_shipped"]:
            (out / "verifier-q4_0.gguf").unlink()
            (self.arguments.fixtures / f"{plan.folder}-verifier-q4_0-golden.safetensors").unlink()
        print(json.dumps(figures, indent=1))
        (out / "tokenizer.json").write_text(self.text.tokenizer.to_str(pretty=False))
        (out / "corpus-manifest.json").write_text(json.dumps(self.text.manifest, indent=1) + "\n")
        (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
        shown = {
            "plan_name": self.arguments.plan, "prompts": plan.prompts, "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS, "temperature": COMPLETION_TEMPERATURE, "completion_tokens": COMPLETION_TOKENS,
            "completions": completion_blocks(self.completions(stored["verifier"])),
        }
        write_card(out, plan, figures, self.text.manifest, shown)


def stretch_after(sweep: dict, chosen: str) -> float:
    """From which share of the time on the draft learns on acceptance: as won the sweep; not at all without one."""
    means = {
        row["name"]: sum(found["match"] for found in row["acceptance"].values())
        for row in sweep["rows"] if row["name"].startswith(chosen)
    }
    return STRETCH if means and max(means, key=means.__getitem__) != chosen else 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `training pair`."""
    parser.add_argument("--plan", choices=PLANS, default="cpu", help="which pair")
    parser.add_argument("--miniature", action="store_true", help="seconds for minutes: a test of the pipeline itself")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for streams and checkpoints")
    parser.add_argument("--until", choices=["text", "verifier", "all"], default="all", help="stop after this step")
    parser.add_argument("--part-seconds", type=float, help="stop in time after this long; the same command goes on")
    parser.add_argument("--pieces", type=Path, help="also cut the shipped files into pieces of 16 MB in this folder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and windows")
    parser.add_argument("--out", type=Path, help="folder of the pair (default: the plan's, below models/)")
    fixtures = REPOSITORY / "tests" / "fixtures"
    parser.add_argument("--fixtures", type=Path, default=fixtures, help="folder of the goldens")


def run(arguments: argparse.Namespace) -> None:
    """Runs the pipeline as far as asked."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    plan = miniature(PLANS[arguments.plan]) if arguments.miniature else PLANS[arguments.plan]
    if arguments.part_seconds is not None and arguments.part_seconds <= 2 * plan.sampling_seconds:
        raise ValueError(f"--part-seconds: must be over {2 * plan.sampling_seconds:.0f}: sampling is not interrupted")
    arguments.out = arguments.out or REPOSITORY / "models" / plan.folder
    pair = Pair(plan, arguments)
    if arguments.until == "text":
        return
    try:
        verifier = pair.verifier()
        if arguments.until == "verifier":
            return
        rows = pair.own_text(verifier)
        sweep = pair.sweep(verifier, rows)
        pair.ship(verifier, pair.draft(verifier, rows, sweep), sweep)
    except Unfinished:
        print("this part's time is over; the same command goes on")
        return
    if arguments.pieces is not None:
        write_pieces(arguments.out, arguments.pieces, 16 * 1024 * 1024)
    print(f"done in {(time.monotonic() - pair.started) / 60:.1f} minutes")
