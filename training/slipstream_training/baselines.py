"""What a language model must beat: a 5-gram model over the same tokens, and a general-purpose compressor.

Owns both baselines. The 5-gram model interpolates absolute discounting down to single tokens and the
uniform distribution, with one discount per order (Ney, Essen and Kneser 1994, section 3).
"""

import lzma
from dataclasses import dataclass

import numpy as np

ORDER = 5


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places of `wanted` among the sorted `keys`; -1 where absent."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, places, -1)


@dataclass(frozen=True)
class Level:
    """All runs of one length. A run's key is `number of its history * vocabulary + last token`.

    A history's number is its own place among the keys of the level below, 0 for the empty one.
    `totals` and `kinds` are per entry of `histories`: occurrences, and different tokens that followed.
    """

    keys: np.ndarray
    counts: np.ndarray
    histories: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discount: float


def level_of(keys: np.ndarray, counts: np.ndarray, vocabulary: int) -> Level:
    """Groups the runs by history; the discount is `n1 / (n1 + 2 n2)` (Ney, Essen and Kneser 1994)."""
    histories, first = np.unique(keys // vocabulary, return_index=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / max(1, once + 2 * twice)
    totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(keys)))
    return Level(keys, counts, histories, totals, kinds, discount)


class NGram:
    """Counts of all runs of 1 to `ORDER` tokens of a training stream."""

    def __init__(self, train: np.ndarray, vocabulary: int):
        self.vocabulary = vocabulary
        self.levels = []
        tokens, history = train.astype(np.int64), np.zeros(len(train), dtype=np.int64)
        for _ in range(ORDER):
            keys, runs, counts = np.unique(history * vocabulary + tokens, return_inverse=True, return_counts=True)
            self.levels.append(level_of(keys, counts, vocabulary))
            history, tokens = runs[:-1], tokens[1:]

    def chances(self, stream: np.ndarray) -> np.ndarray:
        """Probability of each token of `stream` from the fifth on, given the four before it."""
        chance = np.full(len(stream), 1.0 / self.vocabulary)
        tokens, history = stream.astype(np.int64), np.zeros(len(stream), dtype=np.int64)
        for order, level in enumerate(self.levels, start=1):
            if order > 1:
                history, tokens, chance = runs[:-1], tokens[1:], chance[1:]
            runs = find(level.keys, np.where(history < 0, -1, history * self.vocabulary + tokens))
            groups = find(level.histories, history)
            total = np.where(groups < 0, 1, level.totals[groups])
            seen = np.where(runs < 0, 0, level.counts[runs])
            known = np.maximum(seen - level.discount, 0.0) / total
            mixed = known + level.discount * level.kinds[groups] / total * chance
            chance = np.where(groups < 0, chance, mixed)
        return chance

    def bits_per_byte(self, stream: np.ndarray, byte_lengths: np.ndarray) -> float:
        """Bits per UTF-8 byte of `stream`; the first four tokens are given."""
        return float(-np.log2(self.chances(stream)).sum() / byte_lengths[stream[ORDER - 1 :]].sum())


def xz_bits_per_byte(texts: list[str]) -> dict[str, float]:
    """Bits per byte of `xz -9`: on all texts as one file, and on each text by itself (headers counted)."""
    raw = [text.encode() for text in texts]
    size = sum(map(len, raw))
    each = sum(len(lzma.compress(content, preset=9)) for content in raw)
    return {"one_file": 8 * len(lzma.compress(b"".join(raw), preset=9)) / size, "each_file": 8 * each / size}
