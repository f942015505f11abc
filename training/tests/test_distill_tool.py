"""Tests `training distill` and `training export-hf` on the tiny checkpoints of tests/fixtures/.

Run with `PYTHONPATH=training python -m unittest discover -s training/tests`; a minute on one thread.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import unittest
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slipstream_training import distill_figures, distill_tool, gguf_tokenizer, hf_directory, own_corpus, teacher
from slipstream_training.distill_figures import Measured, Ratios
from slipstream_training.network import Llama
from slipstream_training.refusal import Refusal

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FIXTURES = REPOSITORY / "tests" / "fixtures"
GQA = FIXTURES / "llama-gqa"
SMALL = ["--share", "0.4", "--seconds", "10", "--prompts", "8", "--device", "cpu", "--threads", "1"]


def call(module, *words: str | Path) -> tuple[int, str, str]:
    """Runs a command as `cli.py` does: exit code, stdout, stderr."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.run(parser.parse_args([str(word) for word in words]))
        except ValueError as refusal:
            code = 2
            err.write(f"{refusal}\n")
    return code, out.getvalue(), err.getvalue()


class Folder(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self):
        torch.set_num_threads(1)
        self.folder = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def verifier(self, **config) -> Path:
        """A copy of `llama-gqa` without its GGUF files, with other values in config.json."""
        copy = self.folder / f"verifier-{len(list(self.folder.iterdir()))}"
        shutil.copytree(GQA, copy, ignore=shutil.ignore_patterns("*.gguf", "golden*"))
        values = json.loads((copy / "config.json").read_text()) | config
        (copy / "config.json").write_text(json.dumps(values))
        return copy

    def corpus(self, texts: int = 6) -> Path:
        """A folder of sources of this package."""
        folder = self.folder / "corpus"
        folder.mkdir(exist_ok=True)
        for path in sorted((REPOSITORY / "training" / "slipstream_training").glob("*.py"))[:texts]:
            shutil.copy(path, folder)
        return folder


class Teachers(Folder):
    def test_every_fixture_gives_its_golden_logits_with_and_without_a_cache(self):
        cases = [(path, name) for path in sorted(FIXTURES.glob("llama-*")) for name in ("config", "config.v4")]
        for folder, name in cases:
            if not (folder / f"{name}.json").exists():
                continue
            copy = self.folder / f"{folder.name}-{name}"
            copy.mkdir()
            shutil.copy(folder / f"{name}.json", copy / "config.json")
            shutil.copy(folder / "model.safetensors", copy)
            shutil.copy(GQA / "tokenizer.json", copy)
            golden = load_file(folder / "golden.safetensors")
            ids, verifier = torch.from_numpy(golden["input_ids"])[None], teacher.read_teacher(copy, "cpu")
            whole, _ = verifier(ids)
            head, cache = verifier(ids[:, :36])
            steps = [head]
            for position in range(36, 40):
                logits, cache = verifier(ids[:, position : position + 1], cache)
                steps.append(logits)
            for logits in (whole, torch.cat(steps, 1)):
                np.testing.assert_allclose(logits[0].numpy(), golden["logits"], atol=2e-4, err_msg=copy.name)

    def test_sharded_weights_are_read(self):
        whole, sharded = self.verifier(), self.folder / "sharded"
        model = AutoModelForCausalLM.from_pretrained(whole, local_files_only=True)
        model.save_pretrained(sharded, max_shard_size="200KB")
        shutil.copy(whole / "tokenizer.json", sharded)
        self.assertGreater(len(list(sharded.glob("*.safetensors"))), 1)
        ids = torch.arange(40)[None]
        left, right = (teacher.read_teacher(folder, "cpu")(ids)[0] for folder in (whole, sharded))
        self.assertTrue(torch.equal(left, right))

    def test_missing_weights_are_refused(self):
        folder = self.verifier(num_hidden_layers=3)
        with self.assertRaisesRegex(Refusal, "--verifier.*weights missing"):
            teacher.read_teacher(folder, "cpu")


class Exports(Folder):
    def test_a_gguf_file_becomes_the_directory_it_was_made_of(self):
        out = self.folder / "hf"
        code, said, _ = call(hf_directory, GQA / "model-f32.gguf", out)
        self.assertEqual((code, "vocabulary of 320" in said), (0, True))
        left, right = load_file(out / "model.safetensors"), load_file(GQA / "model.safetensors")
        self.assertEqual(left.keys(), right.keys())
        for name, weight in right.items():
            np.testing.assert_array_equal(left[name], weight, err_msg=name)
        self.assertEqual(AutoTokenizer.from_pretrained(out).eos_token, "<|endoftext|>")
        ours, theirs = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (out, GQA))
        self.assertEqual(ours.get_vocab(), theirs.get_vocab())
        text = (REPOSITORY / "README.md").read_text() + "\t 12345 é<|endoftext|>  \n\n x"
        self.assertEqual(ours.encode(text).ids, theirs.encode(text).ids)
        code, _, said = call(hf_directory, GQA / "model-f32.gguf", out)
        self.assertEqual((code, "not an empty folder" in said), (2, True))

    def test_quantised_weights_are_dequantised_exactly(self):
        out, golden = self.folder / "hf", load_file(GQA / "golden-q8_0.safetensors")
        hf_directory.export(GQA / "model-q8_0.gguf", out)
        logits, _ = teacher.read_teacher(out, "cpu")(torch.from_numpy(golden["input_ids"])[None])
        np.testing.assert_allclose(logits[0].numpy(), golden["logits"], atol=2e-4)

    def test_llama3_divisors_are_those_of_transformers(self):
        scaling = {"rope_type": "llama3", "factor": 32.0} | hf_directory.LLAMA3_ROPE
        parameters = {"rope_theta": 500000.0} | scaling
        config = LlamaConfig(head_dim=64, rope_parameters=parameters, max_position_embeddings=131072)
        rates, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        shape = distill_tool.LlamaShape(1, 1, 1, 1, 1, 1, 64, 131072, rope_theta=500000.0)
        plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
        np.testing.assert_allclose(plain / rates.numpy(), hf_directory.llama3_divisors(scaling, shape), rtol=1e-4)

    def test_sentence_piece_vocabularies_merge_by_score(self):
        # The case of tests/tokenizer.rs: "abc" is a|bc although `ab` comes first in the text.
        fields = {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.tokens":
                ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "c", "ab", "bc", "▁a", "<x>"],
            "tokenizer.ggml.scores": [0.0, 0, 0, 0, -9, -9, -9, -9, -3, -2, -4, 0],
            "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 4],
        }
        made = Tokenizer.from_str(json.dumps(gguf_tokenizer.tokenizer_json(fields)))
        self.assertEqual(made.encode("abc", add_special_tokens=False).ids, [10, 9])
        self.assertEqual(made.encode("babc").ids, [1, 4, 6, 5, 9])
        self.assertEqual(made.encode("a\nab", add_special_tokens=False).ids, [10, 3, 8])


class Corpora(Folder):
    def write(self, **texts: str | bytes) -> Path:
        folder = self.folder / "texts"
        for name, text in texts.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return folder

    def test_whole_files_are_held_out_and_always_the_same(self):
        folder = self.write(**{f"deep__{number}": f"text {number} " * 20 for number in range(40)})
        corpus = own_corpus.read_corpus(folder, ("text",))
        self.assertEqual((len(corpus.learn), len(corpus.held_out), corpus.split), (38, 2, "whole texts"))
        self.assertEqual(corpus, own_corpus.read_corpus(folder, ("text",)))

    def test_what_is_no_text_is_skipped_and_counted(self):
        folder = self.write(a="abc " * 99, b="abc " * 99, c=b"\xff\xfe", d="", e=b"a\0b", _hidden="x" * 300)
        (folder / "_hidden").rename(folder / ".hidden")
        corpus = own_corpus.read_corpus(folder, ("text",))
        self.assertEqual(corpus.skipped, {"repeated": 1, "not UTF-8 text": 2, "empty": 1})
        self.assertEqual("".join(corpus.learn + corpus.held_out), "abc " * 99)
        self.assertIn("end of every text", corpus.split)

    def test_records_give_their_first_field(self):
        lines = [{"prompt": "one", "text": "no"}, {"text": "two"}, {"other": "three"}, ["four"]]
        path = self.folder / "texts.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n")
        skipped = Counter()
        texts = [text for _, text in own_corpus.texts_of(path, ("prompt", "text"), skipped)]
        self.assertEqual((sorted(texts), sum(skipped.values())), (["one", "two"], 3))

    def test_streams_take_the_verifiers_own_ids(self):
        tokenizer = Tokenizer.from_file(str(GQA / "tokenizer.json"))
        small, large = (teacher.Vocabulary(tokenizer, size, 7, begin) for size, begin in ((320, None), (70000, 9)))
        ids = tokenizer.encode("a b").ids
        self.assertEqual(own_corpus.encode(small, ["a b", "a b"]).tolist(), [*ids, 7, *ids, 7])
        stream = own_corpus.encode(large, ["a b"])
        self.assertEqual((stream.tolist(), stream.dtype), ([9, *ids, 7], np.uint32))
        windows = own_corpus.TextWindows(np.arange(100, dtype=np.uint32), 1, "cpu", 9)
        drawn = windows.draw(4, 5)
        self.assertEqual(drawn[:, 0].tolist(), [9] * 4)
        self.assertTrue(torch.equal(drawn[:, 2:], drawn[:, 1:-1] + 1))


class Shapes(Folder):
    def derived(self, *flags: str) -> distill_tool.LlamaShape:
        parser = argparse.ArgumentParser()
        distill_tool.add_arguments(parser)
        arguments = parser.parse_args(["--verifier", "x", "--corpus", "x", "--out", "x", *flags])
        verifier = distill_tool.LlamaShape(4096, 256, 704, 6, 4, 2, 64, 2048)
        return distill_tool.draft_shape(arguments, verifier, 2048)

    def test_derived_shapes_fit_and_keep_whole_blocks(self):
        for flags in ([], ["--share", "0.3"], ["--layers", "1"], ["--head-dim", "64"], ["--ffn", "64"]):
            shape = self.derived(*flags)
            share = float(flags[1]) if "--share" in flags else 0.1
            self.assertLessEqual(shape.parameters(), share * 5_473_024)
            for length in (shape.hidden_size, shape.intermediate_size, shape.head_dim * shape.num_attention_heads):
                self.assertEqual(length % 32, 0)
        self.assertEqual((self.derived().hidden_size, self.derived().intermediate_size), (96, 160))

    def test_what_does_not_fit_says_what_would(self):
        with self.assertRaisesRegex(Refusal, r"--share 0.01 allows.*vocabulary of 4,096.*raise --share to 0.028"):
            self.derived("--share", "0.01")
        with self.assertRaisesRegex(Refusal, "--kv-heads 2: must divide the 3"):
            self.derived("--heads", "3", "--kv-heads", "2")


class Verdicts(unittest.TestCase):
    def measured(self, tokens: float) -> list[Measured]:
        steps = {length: 1.0 + tokens * length for length in distill_figures.DRAFT_LENS}
        return [Measured(temperature, 0.5, 0.5, 0.5, steps, [0.5] * 8) for temperature in (0.0, 0.8, 1.0)]

    def test_says_which_draft_len_pays_and_when_none_does(self):
        good, bad = Ratios(0.1, 1.0), Ratios(0.5, 1.5)
        self.assertIn("--draft-len 8, 2.78 x plain decoding", distill_figures.verdict(self.measured(0.5), good))
        self.assertIn("No draft_len pays at --cost-ratio 0.5", distill_figures.verdict(self.measured(0.4), bad))
        self.assertIn("| 2 | 2.00 | 1.67 |", distill_figures.speed_table(self.measured(0.5), good))


class Distilling(Folder):
    def test_a_draft_is_made_goes_on_after_a_stop_and_loads_in_transformers(self):
        verifier, out, work = self.verifier(), self.folder / "draft", self.folder / "work"
        words = ["--verifier", verifier, "--corpus", self.corpus(), "--out", out, "--work-dir", work, *SMALL]
        code, said, _ = call(distill_tool, *words, "--part-seconds", "0.5")
        self.assertEqual((code, out.exists()), (0, False), said)
        self.assertIn("stopped before its time was over; the same command goes on", said)
        early = torch.load(work / "draft.pt", weights_only=True)["counters"]
        code, _, said = call(distill_tool, *words, "--seed", "2")
        self.assertEqual((code, "--seed is 2, but --work-dir" in said), (2, True), said)
        code, said, _ = call(distill_tool, *words)
        self.assertEqual(code, 0)
        for part in ("shared noise", "| draft_len | greedy: tokens per step", "\n| 8 |", "x plain decoding"):
            self.assertIn(part, said)
        late = torch.load(work / "draft.pt", weights_only=True)
        self.assertGreater(late["counters"]["steps"], early["steps"])
        self.assertGreaterEqual(late["counters"]["elapsed"], 8.5)
        modes = {path.stat().st_mode for path in out.iterdir()}
        self.assertEqual(len(modes), 1, "a server may run as another user")
        self.check_written(verifier, out, late["parts"]["draft network"])
        code, again, _ = call(distill_tool, *words)
        self.assertEqual((code, again[-400:]), (0, said[-400:]))

    def check_written(self, verifier: Path, out: Path, weights: dict):
        config = json.loads((out / "config.json").read_text())
        self.assertEqual((config["vocab_size"], config["eos_token_id"], config["torch_dtype"]), (320, 0, "float32"))
        self.assertEqual((out / "tokenizer.json").read_bytes(), (verifier / "tokenizer.json").read_bytes())
        self.assertTrue((out / "README.md").read_text().startswith(distill_tool.CARD_BEGINS))
        model, report = AutoModelForCausalLM.from_pretrained(out, local_files_only=True, output_loading_info=True)
        self.assertFalse(report["missing_keys"] or report["unexpected_keys"])
        network = Llama(distill_tool.verifier_shape(config))
        network.load_state_dict(weights)
        ids = torch.randint(0, 320, (2, 200), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            np.testing.assert_allclose(model(ids).logits.numpy(), network(ids)[0].numpy(), atol=1e-4)


class Refusals(Folder):
    def refused(self, part: str, **changes):
        words = {"--verifier": GQA, "--corpus": self.corpus(), "--out": self.folder / "out", "--share": 0.4}
        words |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
        code, _, said = call(distill_tool, *(word for pair in words.items() for word in pair))
        self.assertEqual(code, 2, said)
        self.assertRegex(said, part)
        self.assertEqual(said.count("\n"), 1, said)
        self.assertFalse((self.folder / "out").exists())

    def test_numbers(self):
        self.refused("--seconds 0: must be above 0", seconds=0)
        self.refused("--cost-ratio -1: must be above 0", cost_ratio=-1)
        self.refused("--width 40: must be a multiple of 32", width=40)
        self.refused("--ffn 33: must be a multiple of 32", ffn=33)
        self.refused("--head-dim 16: must be 32 or 64", head_dim=16)
        self.refused("--layers 0: must be at least 1", layers=0)
        self.refused("--context 512: must be from 256 to the verifier's context of 256", context=512)
        self.refused("--share 0.1 allows a draft of 11,500 weights.*raise --share to 0.", share=0.1)
        if not torch.cuda.is_available():
            self.refused("--device cuda: PyTorch finds no CUDA device", device="cuda")

    def test_verifiers(self):
        self.refused("--verifier: .* does not exist", verifier=self.folder / "none")
        self.refused("neither a folder nor a GGUF file", verifier=GQA / "config.json")
        self.refused("has no config.json", verifier=self.corpus())
        self.refused("has no tokenizer.json", verifier=FIXTURES / "llama-tied")
        self.refused("model_type 'qwen2'; slipstream serves 'llama'", verifier=self.verifier(model_type="qwen2"))
        small = self.verifier(vocab_size=300)
        self.refused("vocabulary does not fit.*id 319, config.json says vocab_size 300", verifier=small)
        self.refused("names no end-of-text token", verifier=self.verifier(eos_token_id=None))
        self.refused("a context of 128; .* 256 at least", verifier=self.verifier(max_position_embeddings=128))

    def test_corpora_and_folders(self):
        self.refused("--corpus: .* does not exist", corpus=self.folder / "none")
        empty, records, short = self.folder / "empty", self.folder / "r.jsonl", self.folder / "short.txt"
        empty.mkdir()
        records.write_text('{"body": "text"}\n')
        short.write_text("too short")
        self.refused("no text found in .*it is empty", corpus=empty)
        self.refused("1 records without a text in prompt or text.; name the field with --field", corpus=records)
        self.refused("tokens to learn from; one window takes 257", corpus=short)
        self.refused("--work-dir: .* lies inside --corpus", work_dir=self.corpus())
        busy = self.folder / "busy"
        busy.mkdir()
        (busy / "note.txt").write_text("mine")
        self.refused("--work-dir: .* is not empty", work_dir=busy)
        self.refused("--out: .* holds what --work-dir names", work_dir=self.folder / "out" / "work")
        (self.folder / "full").mkdir()
        (self.folder / "full" / "model.safetensors").write_text("precious")
        code, _, said = call(distill_tool, "--verifier", GQA, "--corpus", empty, "--out", self.folder / "full")
        self.assertEqual((code, "holds no draft of this tool" in said), (2, True))


if __name__ == "__main__":
    unittest.main()
