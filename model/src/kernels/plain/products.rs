//! Owns the plain twins of the products and of the quantisation: the definition of their bits.

use half::f16;

use super::super::packed::{BlockTile, FloatStrips, Lanes, QuantStrips, STRIP_LEN};
use super::super::products::{Epilogue, QuantBlock, QuantRows};
use super::super::tile::Tile;
use super::super::{AMAX_MIN, QUANT_BLOCK_LEN};
use super::swiglu_one;

/// Bits of +infinity: the bits of a magnitude at or above these mean infinity or NaN.
const INFINITY_BITS: u32 = 0x7F80_0000;

pub(super) fn floats<L: Lanes>(
    weights: &FloatStrips<'_, L>,
    input: &[f32],
    epilogue: Epilogue,
    out: &mut Tile<'_>,
) {
    for (row, input) in input.chunks_exact(weights.in_len).enumerate() {
        let strips = weights.lanes.chunks_exact(weights.in_len);
        for (strip, out) in strips.zip(out.row_mut(row).chunks_mut(STRIP_LEN)) {
            let mut sums = [0.0_f32; STRIP_LEN];
            for (lanes, &x) in strip.iter().zip(input) {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum = lanes.get(lane).mul_add(x, *sum);
                }
            }
            finish(epilogue, out, &sums);
        }
    }
}

pub(super) fn quants<T: BlockTile>(
    weights: &QuantStrips<'_, T>,
    input: &QuantRows<'_>,
    epilogue: Epilogue,
    out: &mut Tile<'_>,
) {
    let num_blocks = weights.num_blocks;
    for (row, input) in input.blocks.chunks_exact(num_blocks).enumerate() {
        let strips = weights.tiles.chunks_exact(num_blocks).zip(weights.scales.chunks(num_blocks));
        for ((tiles, scales), out) in strips.zip(out.row_mut(row).chunks_mut(STRIP_LEN)) {
            let mut sums = [0.0_f32; STRIP_LEN];
            for ((tile, scales), block) in tiles.iter().zip(scales).zip(input) {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    let weight_scale = f16::from_bits(scales.0[lane]).to_f32();
                    let product = integer_product(tile, lane, &block.quants);
                    *sum = (weight_scale * block.scale).mul_add(product as f32, *sum);
                }
            }
            finish(epilogue, out, &sums);
        }
    }
}

/// Exact dot product of one block with one output: at most `32 * 128 * 127`, so that the
/// conversion to f32 is exact too.
fn integer_product<T: BlockTile>(tile: &T, lane: usize, quants: &[i8; QUANT_BLOCK_LEN]) -> i32 {
    let terms = quants.iter().enumerate();
    terms.map(|(input, &quant)| i32::from(tile.get(lane, input)) * i32::from(quant)).sum()
}

/// What becomes of the sums of one strip; `out` is shorter where the strip is padded.
pub(in super::super) fn finish(epilogue: Epilogue, out: &mut [f32], sums: &[f32; STRIP_LEN]) {
    for (out, &sum) in out.iter_mut().zip(sums) {
        *out = match epilogue {
            Epilogue::Store => sum,
            Epilogue::Add => *out + sum,
            Epilogue::SwiGlu => swiglu_one(*out, sum),
        };
    }
}

pub(super) fn quantise(values: &[f32], blocks: &mut [QuantBlock]) {
    for (values, block) in values.chunks_exact(QUANT_BLOCK_LEN).zip(blocks) {
        // Magnitudes are compared as integers: the order is the same, and NaN is the largest.
        let amax_bits = values.iter().fold(0, |max, value| max.max(value.abs().to_bits()));
        let inverse;
        (block.scale, inverse) = block_scale(amax_bits);
        for (quant, &value) in block.quants.iter_mut().zip(values) {
            // Cannot leave -127 ..= 127: x * (127 / amax) exceeds 127 by two roundings at most.
            *quant = if inverse == 0.0 { 0 } else { (value * inverse).round_ties_even() as i8 };
        }
        block.offset = -8 * block.quants.iter().map(|&quant| i32::from(quant)).sum::<i32>();
    }
}

/// Scale of an activation block and the factor that gives its quants; factor 0 means all are 0.
pub(in super::super) fn block_scale(amax_bits: u32) -> (f32, f32) {
    let amax = f32::from_bits(amax_bits);
    if amax_bits >= INFINITY_BITS {
        (f32::NAN, 0.0)
    } else if amax < AMAX_MIN {
        (0.0, 0.0)
    } else {
        (amax / 127.0, 127.0 / amax)
    }
}
