//! Owns the products in AVX2: how outputs and rows are tiled over registers. The tiling cannot
//! change bits, because every output is one lane and one chain of operations. A strip of 16 outputs
//! is two registers wide, so that it is worked on in two passes; the first brings it into the L1
//! cache for the second.

use std::arch::x86_64::*;

use super::super::packed::{
    Bf16Lanes, F16Lanes, F32Lanes, FloatStrips, GroupLanes, NUM_GROUPS, Q4Tile, Q8Tile,
    QuantStrips, STRIP_LEN, ScaleLanes,
};
use super::super::plain::products::finish;
use super::super::products::{Epilogue, QuantBlock, QuantRows, ROWS_MAX, StripPlace};
use super::super::tile::Tile;
use super::{group_bits, load, load_halves, load_i8, prefetch, silu, store};

/// Outputs per register.
const LANES: usize = 8;

/// Blocks of a strip that are asked for ahead of time: a few hundred nanoseconds of memory latency
/// at the speed the weights are used up.
const AHEAD: usize = 8;

/// What a format of quantised weights does with one block.
pub(super) trait BlockProduct: Sized {
    /// Exact integer dot products of 8 outputs, the `half`th of the strip, with a block of each
    /// row.
    ///
    /// # Safety
    /// The CPU has AVX2.
    unsafe fn products<const ROWS: usize>(
        &self,
        half: usize,
        blocks: &[&QuantBlock; ROWS],
    ) -> [__m256i; ROWS];
}

/// The `half`th register of one group of a tile.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn half_of(group: &GroupLanes, half: usize) -> __m256i {
    let (halves, _) = group.0.as_chunks::<32>();
    load_i8(&halves[half])
}

impl BlockProduct for Q8Tile {
    /// `maddubs` wants unsigned times signed bytes: |w| (at most 128, which fits) times x with the
    /// sign of w. Its sums of two stay within 2 * 128 * 127 = 32512, so that nothing saturates.
    #[inline(always)]
    unsafe fn products<const ROWS: usize>(
        &self,
        half: usize,
        blocks: &[&QuantBlock; ROWS],
    ) -> [__m256i; ROWS] {
        // SAFETY: the caller has AVX2.
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let mut sums = [_mm256_setzero_si256(); ROWS];
            for group in 0..NUM_GROUPS {
                let weights = half_of(&self.0[group], half);
                let magnitudes = _mm256_abs_epi8(weights);
                for r in 0..ROWS {
                    let inputs = _mm256_set1_epi32(group_bits(blocks[r], group));
                    let signed = _mm256_sign_epi8(inputs, weights);
                    let pairs = _mm256_maddubs_epi16(magnitudes, signed);
                    sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(pairs, ones));
                }
            }
            sums
        }
    }
}

impl BlockProduct for Q4Tile {
    /// Nibbles are unsigned as they are; the block's offset takes the 8 off again. Sixteen products
    /// of at most 15 * 127 fit 16 bits.
    #[inline(always)]
    unsafe fn products<const ROWS: usize>(
        &self,
        half: usize,
        blocks: &[&QuantBlock; ROWS],
    ) -> [__m256i; ROWS] {
        // SAFETY: the caller has AVX2.
        unsafe {
            let (ones, nibble) = (_mm256_set1_epi16(1), _mm256_set1_epi8(0x0F));
            let mut pairs = [_mm256_setzero_si256(); ROWS];
            for group in 0..NUM_GROUPS / 2 {
                let both = half_of(&self.0[group], half);
                let low = _mm256_and_si256(both, nibble);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), nibble);
                for r in 0..ROWS {
                    let x = _mm256_set1_epi32(group_bits(blocks[r], group));
                    let y = _mm256_set1_epi32(group_bits(blocks[r], group + NUM_GROUPS / 2));
                    let sum = _mm256_add_epi16(
                        _mm256_maddubs_epi16(low, x),
                        _mm256_maddubs_epi16(high, y),
                    );
                    pairs[r] = _mm256_add_epi16(pairs[r], sum);
                }
            }
            let mut sums = [_mm256_setzero_si256(); ROWS];
            for r in 0..ROWS {
                let offset = _mm256_set1_epi32(blocks[r].offset);
                sums[r] = _mm256_add_epi32(_mm256_madd_epi16(pairs[r], ones), offset);
            }
            sums
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quants<T: BlockProduct>(
    weights: &QuantStrips<'_, T>,
    input: &QuantRows<'_>,
    epilogue: Epilogue,
    out: &mut Tile<'_>,
) {
    let num_blocks = weights.num_blocks;
    let strips = weights.tiles.chunks_exact(num_blocks).zip(weights.scales.chunks(num_blocks));
    for (index, (tiles, scales)) in strips.enumerate() {
        let strip = QuantStrips { tiles, scales, num_blocks };
        for (tile, rows) in input.blocks.chunks(num_blocks * ROWS_MAX).enumerate() {
            let at = StripPlace { index, first_row: tile * ROWS_MAX, epilogue };
            match rows.len() / num_blocks {
                1 => quant_rows::<T, 1>(&strip, rows, &at, out),
                2 => quant_rows::<T, 2>(&strip, rows, &at, out),
                3 => quant_rows::<T, 3>(&strip, rows, &at, out),
                4 => quant_rows::<T, 4>(&strip, rows, &at, out),
                5 => quant_rows::<T, 5>(&strip, rows, &at, out),
                6 => quant_rows::<T, 6>(&strip, rows, &at, out),
                7 => quant_rows::<T, 7>(&strip, rows, &at, out),
                _ => quant_rows::<T, ROWS_MAX>(&strip, rows, &at, out),
            }
        }
    }
}

/// One strip times `ROWS` rows.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn quant_rows<T: BlockProduct, const ROWS: usize>(
    strip: &QuantStrips<'_, T>,
    input: &[QuantBlock],
    at: &StripPlace,
    out: &mut Tile<'_>,
) {
    let num_blocks = strip.num_blocks;
    let (tiles, weight_scales) = (&strip.tiles[..num_blocks], &strip.scales[..num_blocks]);
    let mut rows = [input; ROWS];
    for r in 0..ROWS {
        // Cut to a length the compiler can compare, so that the loop needs no checks.
        rows[r] = &input[r * num_blocks..][..num_blocks];
    }
    let mut halves = [[_mm256_setzero_ps(); ROWS]; STRIP_LEN / LANES];
    for (half, sums) in halves.iter_mut().enumerate() {
        for block in 0..num_blocks {
            if half == 0 && at.first_row == 0 {
                prefetch(tiles, block + AHEAD);
                prefetch(weight_scales, block + AHEAD);
            }
            let mut blocks = [&rows[0][block]; ROWS];
            for r in 1..ROWS {
                blocks[r] = &rows[r][block];
            }
            // SAFETY: this function has AVX2.
            let products = unsafe { tiles[block].products(half, &blocks) };
            let weight_scales = load_scales(&weight_scales[block], half);
            for r in 0..ROWS {
                let scale = _mm256_mul_ps(weight_scales, _mm256_set1_ps(blocks[r].scale));
                sums[r] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(products[r]), sums[r]);
            }
        }
    }
    let [low, high] = halves;
    for (r, (low, high)) in low.into_iter().zip(high).enumerate() {
        put(at, out, r, [low, high]);
    }
}

/// The `half`th of the scales of a strip.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_scales(from: &ScaleLanes, half: usize) -> __m256 {
    let (halves, _) = from.0.as_chunks::<LANES>();
    load_halves(&halves[half])
}

/// Hands the sums of one row and strip to the epilogue.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn put(at: &StripPlace, out: &mut Tile<'_>, row: usize, sums: [__m256; 2]) {
    let out = &mut out.row_mut(at.first_row + row)[at.index * STRIP_LEN..];
    let Some((whole, _)) = out.split_first_chunk_mut::<STRIP_LEN>() else {
        let mut lanes = [0.0; STRIP_LEN];
        let (parts, _) = lanes.as_chunks_mut::<LANES>();
        for (part, sum) in parts.iter_mut().zip(sums) {
            store(part, sum);
        }
        return finish(at.epilogue, out, &lanes);
    };
    let (parts, _) = whole.as_chunks_mut::<LANES>();
    for (part, sum) in parts.iter_mut().zip(sums) {
        put_register(at.epilogue, part, sum);
    }
}

/// The epilogue of 8 outputs.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(in super::super) fn put_register(epilogue: Epilogue, out: &mut [f32; LANES], sum: __m256) {
    let value = match epilogue {
        Epilogue::Store => sum,
        Epilogue::Add => _mm256_add_ps(load(out), sum),
        Epilogue::SwiGlu => _mm256_mul_ps(silu(load(out)), sum),
    };
    store(out, value);
}

/// Float weights that widen to f32 exactly.
pub(super) trait WidenLanes: Sized {
    /// 8 of the strip's 16 weights, the `half`th of them.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn widen(&self, half: usize) -> __m256;
}

impl WidenLanes for F32Lanes {
    #[inline(always)]
    unsafe fn widen(&self, half: usize) -> __m256 {
        let (halves, _) = self.0.as_chunks::<LANES>();
        // SAFETY: the caller has AVX2.
        unsafe { load(&halves[half]) }
    }
}

impl WidenLanes for F16Lanes {
    #[inline(always)]
    unsafe fn widen(&self, half: usize) -> __m256 {
        let (halves, _) = self.0.as_chunks::<LANES>();
        // SAFETY: the caller has AVX2 and F16C.
        unsafe { load_halves(&halves[half]) }
    }
}

impl WidenLanes for Bf16Lanes {
    #[inline(always)]
    unsafe fn widen(&self, half: usize) -> __m256 {
        let (halves, _) = self.0.as_chunks::<LANES>();
        // SAFETY: the caller has AVX2; the reference is to 16 readable bytes.
        unsafe {
            let bits = _mm_loadu_si128(halves[half].as_ptr().cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
        }
    }
}

/// Rows that share loaded float weights: with the two registers of a strip, four rows are eight
/// independent chains.
const FLOAT_ROWS: usize = 4;

/// Inputs of a strip of floats that are asked for ahead of time: 2 KiB of 32-bit ones.
const FLOATS_AHEAD: usize = 32;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn floats<L: WidenLanes>(
    weights: &FloatStrips<'_, L>,
    input: &[f32],
    epilogue: Epilogue,
    out: &mut Tile<'_>,
) {
    let in_len = weights.in_len;
    for (index, strip) in weights.lanes.chunks_exact(in_len).enumerate() {
        for (tile, rows) in input.chunks(in_len * FLOAT_ROWS).enumerate() {
            let at = StripPlace { index, first_row: tile * FLOAT_ROWS, epilogue };
            match rows.len() / in_len {
                1 => float_rows::<L, 1>(strip, rows, &at, out),
                2 => float_rows::<L, 2>(strip, rows, &at, out),
                3 => float_rows::<L, 3>(strip, rows, &at, out),
                _ => float_rows::<L, FLOAT_ROWS>(strip, rows, &at, out),
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn float_rows<L: WidenLanes, const ROWS: usize>(
    strip: &[L],
    input: &[f32],
    at: &StripPlace,
    out: &mut Tile<'_>,
) {
    let in_len = strip.len();
    let mut rows = [input; ROWS];
    for r in 0..ROWS {
        rows[r] = &input[r * in_len..][..in_len];
    }
    let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
    for k in 0..in_len {
        if at.first_row == 0 {
            prefetch(strip, k + FLOATS_AHEAD);
        }
        // SAFETY: this function has AVX2 and F16C.
        let lanes = unsafe { [strip[k].widen(0), strip[k].widen(1)] };
        for r in 0..ROWS {
            let x = _mm256_set1_ps(rows[r][k]);
            for half in 0..2 {
                sums[r][half] = _mm256_fmadd_ps(lanes[half], x, sums[r][half]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        put(at, out, r, sums);
    }
}
