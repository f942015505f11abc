"""llama.cpp reads the shipped files and says the same as our own reader: tokens, and their log-probabilities.

Needs `pip install xllamacpp`; skipped, and said so, without it.
"""

import importlib.util
import unittest
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from slipstream_training.read_gguf import GgufLlama

MODELS = Path(__file__).resolve().parent.parent.parent / "models"
PROMPT = "/// Returns the number of elements, 0 for none.\npub fn len(&self) -> usize {\n    if self.is_empty() {\n"
NEW_TOKENS = 24
# llama.cpp multiplies Q8_0 weights with activations rounded to eight bits; ours reads in float64.
LOGPROB_TOLERANCE = 0.1


def complete(path: Path) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities of llama.cpp's greedy completion."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 256
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    request = {"prompt": PROMPT, "n_predict": NEW_TOKENS, "temperature": 0, "n_probs": 1}
    content = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    return [token["id"] for token in content], [token["logprob"] for token in content]


@unittest.skipUnless(importlib.util.find_spec("xllamacpp"), "llama.cpp is not here: pip install xllamacpp")
class LlamaCpp(unittest.TestCase):
    """Every GGUF file below models/."""

    def test_it_reads_what_we_ship(self) -> None:
        for path in sorted(MODELS.glob("*/*.gguf")):
            with self.subTest(file=str(path.relative_to(MODELS))):
                tokenizer = Tokenizer.from_str((path.parent / "tokenizer.json").read_text())
                prompt = tokenizer.encode(PROMPT, add_special_tokens=False).ids
                ids, found = complete(path)
                logits = GgufLlama(path).logits(np.asarray(prompt + ids))[len(prompt) - 1 : -1]
                largest = logits.max(-1, keepdims=True)
                wanted = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
                chosen = wanted[np.arange(len(ids)), ids]
                self.assertGreaterEqual(len(ids), 8)
                self.assertLess(np.abs(chosen - found).max(), LOGPROB_TOLERANCE)
                self.assertLess((wanted.max(-1) - chosen).max(), LOGPROB_TOLERANCE)


if __name__ == "__main__":
    unittest.main()
