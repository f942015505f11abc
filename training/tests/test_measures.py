"""What the figures of a model card rest on: acceptance, baselines, splitting of source pages, stored weights."""

import unittest

import gguf
import numpy as np
import torch

from slipstream_training import acceptance, baselines, quant4
from slipstream_training.corpus import is_permissive, page_text
from slipstream_training.sampling import gumbel


class Acceptance(unittest.TestCase):
    """The closed form, its short form, and the replay of steps."""

    def test_the_closed_form_is_what_shared_noise_gives(self) -> None:
        generator = torch.Generator().manual_seed(5)
        p, q = (torch.randn(2, 12, generator=generator)).softmax(-1)
        noise = gumbel((400_000, 12), generator)
        found = ((p.log() + noise).argmax(-1) == (q.log() + noise).argmax(-1)).float().mean().item()
        self.assertAlmostEqual(acceptance.coupled_acceptance(p, q).item(), found, delta=0.004)

    def test_the_short_form_is_close_and_not_below_on_its_tokens(self) -> None:
        p, q = (3 * torch.randn(2, 50, 400, generator=torch.Generator().manual_seed(6))).softmax(-1)
        exact, coarse = acceptance.coupled_acceptance(p, q), acceptance.coarse_acceptance(p, q, kept=300)
        self.assertLess((exact - coarse).abs().max().item(), 0.02)

    def test_equal_distributions_are_always_accepted(self) -> None:
        p = torch.randn(3, 9, generator=torch.Generator().manual_seed(7)).softmax(-1)
        self.assertTrue(torch.allclose(acceptance.coupled_acceptance(p, p), torch.ones(3), atol=1e-5))

    def test_steps_are_replayed_by_hand(self) -> None:
        agrees = torch.tensor([[True, True, False, True, False, False, True, True]])
        steps = acceptance.walk_steps(agrees, 2)
        # Starts at 0 (two kept), 3 (one kept), 5 (none kept); a fourth would run off the end.
        self.assertAlmostEqual(steps.tokens_per_step, (3 + 2 + 1) / 3)
        self.assertEqual(steps.by_position, [2 / 3, 1 / 2])

    def test_certain_chances_are_drawn_as_they_are(self) -> None:
        agrees = torch.rand(4, 90, generator=torch.Generator().manual_seed(10)) < 0.6
        self.assertEqual(acceptance.walk_steps(acceptance.drawn(agrees.float()), 4), acceptance.walk_steps(agrees, 4))


class Baselines(unittest.TestCase):
    """The 5-gram model is a distribution, and uses its history."""

    def test_chances_sum_to_one(self) -> None:
        train = np.random.default_rng(8).integers(0, 6, 500).astype(np.uint16)
        model = baselines.NGram(train, 6)
        for history in ([0, 1, 2, 3], list(train[7:11]), [5, 5, 5, 5]):
            total = sum(model.chances(np.asarray([*history, token], dtype=np.uint16))[0] for token in range(6))
            self.assertAlmostEqual(total, 1.0, places=9)

    def test_a_cycle_is_learnt(self) -> None:
        cycle = np.tile(np.arange(7, dtype=np.uint16), 60)
        self.assertGreater(baselines.NGram(cycle, 7).chances(cycle[:40]).min(), 0.95)


class Corpus(unittest.TestCase):
    """Licences and source pages."""

    def test_licences(self) -> None:
        self.assertTrue(is_permissive("MIT/Apache-2.0"))
        self.assertTrue(is_permissive("(MIT OR GPL-3.0) AND Zlib"))
        self.assertFalse(is_permissive("MPL-2.0"))
        self.assertFalse(is_permissive("MIT AND GPL-2.0"))
        self.assertFalse(is_permissive(None))

    def test_a_source_page_becomes_its_source(self) -> None:
        number = "<a href=#{0} id={0} data-nosnippet>{0}</a>"
        page = ('<nav></nav><pre class="rust"><code>' + number.format(1)
                + '<span class="kw">fn </span>f(a: <b>&amp;T</b>) {\n' + number.format(2)
                + "    a &lt; 1\n" + number.format(3) + "}</code></pre></main>")
        self.assertEqual(page_text(page), "fn f(a: &T) {\n    a < 1\n}\n")


class FourBits(unittest.TestCase):
    """The searched blocks are ordinary Q4_0, and no worse than the usual ones."""

    def test_a_reader_recovers_less_error_than_usual(self) -> None:
        weight = np.random.default_rng(9).standard_normal((64, 96)).astype(np.float32)
        weight[0, :32] = 0.0
        kind = gguf.GGMLQuantizationType.Q4_0
        usual = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind).reshape(weight.shape)
        searched = gguf.quants.dequantize(quant4.quantise(weight), kind).reshape(weight.shape)
        self.assertLess(np.square(searched - weight).sum(), np.square(usual - weight).sum())
        self.assertTrue((searched[0, :32] == 0).all())


if __name__ == "__main__":
    unittest.main()
