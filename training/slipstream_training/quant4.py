"""Q4_0 blocks whose scale is searched for, instead of taken from the block's largest value.

Owns the search and the packing; a reader sees ordinary Q4_0: 32 weights as `scale * (nibble - 8)`, a
little-endian f16 scale, then 16 bytes with weight `i` in the low and weight `i + 16` in the high nibble.
"""

import numpy as np

BLOCK = 32
SHRINK = np.linspace(0.70, 1.10, 33, dtype=np.float32)


def nibbles(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The nearest of the sixteen levels, `[blocks, 32]`."""
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(blocks * inverse[:, None]) + 8, 0, 15)


def best_scales(blocks: np.ndarray) -> np.ndarray:
    """The f16 scale per block with the least squared error, of candidates of both signs around the usual one."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)[:, 0]
    best, least = np.zeros(len(blocks), np.float32), np.full(len(blocks), np.inf, np.float32)
    for factor in (*SHRINK, *-SHRINK):
        scales = (largest / -8.0 * factor).astype(np.float16).astype(np.float32)
        error = np.square((nibbles(blocks, scales) - 8) * scales[:, None] - blocks).sum(-1)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def quantise(weight: np.ndarray) -> np.ndarray:
    """`[rows, columns]` float32 to Q4_0 bytes `[rows, columns / 32 * 18]`; columns must be a multiple of 32."""
    rows, columns = weight.shape
    if columns % BLOCK:
        raise ValueError(f"rows of {columns} weights do not divide into blocks of {BLOCK}")
    blocks = np.ascontiguousarray(weight, np.float32).reshape(-1, BLOCK)
    scales = best_scales(blocks)
    levels = nibbles(blocks, scales).astype(np.uint8)
    packed = levels[:, : BLOCK // 2] | levels[:, BLOCK // 2 :] << 4
    return np.concatenate((scales.astype("<f2")[:, None].view(np.uint8), packed), axis=-1).reshape(rows, -1)
