//! Owns the products in AVX2: how outputs and rows are tiled over registers. The tiling cannot
//! change bits, because every output is one lane and one chain of operations. Needs no `unsafe`.

use std::arch::x86_64::*;

use super::super::packed::{F32Lanes, GROUP_LEN, QuantTile, StripOutput};
use super::super::{F32Strips, Q8Strips, QUANT_BLOCK_LEN, QuantRows};
use super::{load, load_i8, load_scales, store};

/// Row tiles share the loaded weights. Four rows of eight accumulators are what the 16 registers
/// hold beside weights and temporaries.
const ROW_TILE: usize = 4;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product_q8_0(weights: &Q8Strips<'_>, input: &QuantRows<'_>, out: &mut [StripOutput]) {
    let num_blocks = weights.num_blocks;
    let num_rows = input.scales.len() / num_blocks;
    if num_rows == 0 {
        return;
    }
    let strips = weights.tiles.chunks_exact(num_blocks).zip(weights.scales.chunks(num_blocks));
    for ((tiles, scales), out) in strips.zip(out.chunks_exact_mut(num_rows)) {
        let strip = Q8Strips { tiles, scales, num_blocks };
        for (tile, out) in out.chunks_mut(ROW_TILE).enumerate() {
            let first = tile * ROW_TILE;
            match out.len() {
                1 => q8_tile::<1>(&strip, input, first, out),
                2 => q8_tile::<2>(&strip, input, first, out),
                3 => q8_tile::<3>(&strip, input, first, out),
                _ => q8_tile::<ROW_TILE>(&strip, input, first, out),
            }
        }
    }
}

/// One strip times `ROWS` rows from `first` on.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn q8_tile<const ROWS: usize>(
    strip: &Q8Strips<'_>,
    input: &QuantRows<'_>,
    first: usize,
    out: &mut [StripOutput],
) {
    let num_blocks = strip.num_blocks;
    let (tiles, weight_scales) = (&strip.tiles[..num_blocks], &strip.scales[..num_blocks]);
    let (all_quants, _) = input.quants.as_chunks::<QUANT_BLOCK_LEN>();
    let mut quants = [all_quants; ROWS];
    let mut scales = [input.scales; ROWS];
    for r in 0..ROWS {
        // Cut to a length the compiler can compare, so that the loop needs no checks.
        quants[r] = &all_quants[(first + r) * num_blocks..][..num_blocks];
        scales[r] = &input.scales[(first + r) * num_blocks..][..num_blocks];
    }
    let mut sums = [_mm256_setzero_ps(); ROWS];
    for block in 0..num_blocks {
        let mut blocks = [&quants[0][block]; ROWS];
        for r in 1..ROWS {
            blocks[r] = &quants[r][block];
        }
        let products = integer_products(&tiles[block], &blocks);
        let weight_scales = load_scales(&weight_scales[block]);
        for r in 0..ROWS {
            let scale = _mm256_mul_ps(weight_scales, _mm256_set1_ps(scales[r][block]));
            sums[r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(products[r]), sums[r]);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        store(out, sum);
    }
}

/// Exact integer dot products of 8 outputs with one block of each row.
///
/// `maddubs` wants unsigned times signed bytes: |w| (at most 128, which fits) times x with the sign
/// of w. Its sums of two stay within 2 * 128 * 127 = 32512, so that nothing saturates.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn integer_products<const ROWS: usize>(
    tile: &QuantTile,
    blocks: &[&[i8; QUANT_BLOCK_LEN]; ROWS],
) -> [__m256i; ROWS] {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_si256(); ROWS];
    // A number the compiler cannot see keeps it from unrolling the groups: it would load all eight
    // first and spill them, which costs an eighth of the speed from two rows on.
    let num_groups = std::hint::black_box(tile.0.len());
    for (group, weights) in tile.0.iter().take(num_groups).enumerate() {
        let weights = load_i8(weights);
        let magnitudes = _mm256_abs_epi8(weights);
        for r in 0..ROWS {
            let inputs = four_inputs(blocks[r], group);
            let pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(inputs, weights));
            sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, ones));
        }
    }
    sums
}

/// The four inputs of one group, in every 32-bit lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn four_inputs(block: &[i8; QUANT_BLOCK_LEN], group: usize) -> __m256i {
    let at = group * GROUP_LEN;
    let bytes = [block[at] as u8, block[at + 1] as u8, block[at + 2] as u8, block[at + 3] as u8];
    _mm256_set1_epi32(i32::from_le_bytes(bytes))
}

/// Strips worked on side by side: they hide the latency of the single chain that each output is.
const STRIP_GROUP: usize = 4;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product_f32(weights: &F32Strips<'_>, input: &[f32], out: &mut [StripOutput]) {
    let F32Strips { lanes, in_len } = *weights;
    let num_rows = input.len() / in_len;
    if num_rows == 0 {
        return;
    }
    let groups = lanes.chunks(in_len * STRIP_GROUP).zip(out.chunks_mut(num_rows * STRIP_GROUP));
    for (weights, out) in groups {
        for first in (0..num_rows).step_by(ROW_TILE) {
            let at = F32Tile { in_len, num_rows, first };
            match (num_rows - first).min(ROW_TILE) {
                1 => f32_strips::<1, STRIP_GROUP>(weights, input, out, at),
                2 => f32_strips::<2, STRIP_GROUP>(weights, input, out, at),
                3 => f32_strips::<3, 2>(weights, input, out, at),
                _ => f32_strips::<ROW_TILE, 2>(weights, input, out, at),
            }
        }
    }
}

/// Where a tile of rows lies.
#[derive(Clone, Copy)]
struct F32Tile {
    in_len: usize,
    num_rows: usize,
    first: usize,
}

/// A group of strips times `ROWS` rows, `STRIPS` strips at a time and the rest one by one.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn f32_strips<const ROWS: usize, const STRIPS: usize>(
    weights: &[F32Lanes],
    input: &[f32],
    out: &mut [StripOutput],
    at: F32Tile,
) {
    let mut strips = weights.chunks_exact(at.in_len * STRIPS);
    let mut outs = out.chunks_exact_mut(at.num_rows * STRIPS);
    for (weights, out) in strips.by_ref().zip(outs.by_ref()) {
        f32_tile::<ROWS, STRIPS>(weights, input, out, at);
    }
    let rest = strips.remainder().chunks_exact(at.in_len);
    for (weights, out) in rest.zip(outs.into_remainder().chunks_exact_mut(at.num_rows)) {
        f32_tile::<ROWS, 1>(weights, input, out, at);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn f32_tile<const ROWS: usize, const STRIPS: usize>(
    weights: &[F32Lanes],
    input: &[f32],
    out: &mut [StripOutput],
    at: F32Tile,
) {
    let F32Tile { in_len, num_rows, first } = at;
    let mut strips = [weights; STRIPS];
    for s in 0..STRIPS {
        strips[s] = &weights[s * in_len..][..in_len];
    }
    let mut rows = [input; ROWS];
    for r in 0..ROWS {
        rows[r] = &input[(first + r) * in_len..][..in_len];
    }
    let mut sums = [[_mm256_setzero_ps(); STRIPS]; ROWS];
    for k in 0..in_len {
        let mut lanes = [_mm256_setzero_ps(); STRIPS];
        for s in 0..STRIPS {
            lanes[s] = load(&strips[s][k].0);
        }
        for r in 0..ROWS {
            let x = _mm256_set1_ps(rows[r][k]);
            for s in 0..STRIPS {
                sums[r][s] = _mm256_fmadd_ps(lanes[s], x, sums[r][s]);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (s, &sum) in sums.iter().enumerate() {
            store(&mut out[s * num_rows + first + r], sum);
        }
    }
}
