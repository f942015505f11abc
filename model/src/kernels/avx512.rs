//! Owns the quantised products in AVX-512 with VNNI. Must equal `plain.rs` bit for bit, see
//! `avx2.rs`; everything else runs on the AVX2 kernels. Lengths were checked by the entry points.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes and adds four products to a 32-bit lane without
//! saturating. Weights become unsigned by adding 8 (nibbles are so already) or 128; the sum of the
//! inputs times that, which every block carries as its offset, is taken off again: exact integers.
#![allow(unsafe_code)] // vector loads, and calls into functions that need AVX-512

mod peak;

use std::arch::x86_64::*;

use super::Kernels;
use super::avx2::{self, Avx2, group_bits, prefetch};
use super::packed::{GroupLanes, NUM_GROUPS, Q4Tile, Q8Tile, QuantStrips, STRIP_LEN, ScaleLanes};
use super::plain::products::finish;
use super::products::{Epilogue, QuantBlock, QuantRows, ROWS_MAX, StripPlace};
use super::tile::Tile;

/// Proof that this CPU has AVX-512 (F, BW, VL, VNNI) and what AVX2 kernels need. Only detection
/// makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

impl Avx512 {
    /// Asks the CPU.
    pub(super) fn detect() -> Option<Self> {
        let has_all = Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni");
        has_all.then_some(Self(()))
    }

    /// The kernels, which nobody gets at without the proof.
    pub(super) fn kernels(self) -> &'static Kernels {
        &KERNELS
    }
}

// SAFETY (all entries): the table is private and handed out by `Avx512::kernels` only, so whoever
// calls these holds the proof that the CPU has the features, those of AVX2 included.
static KERNELS: Kernels = Kernels {
    product_q8_0: |weights, input, epilogue, out| {
        // SAFETY: see the table.
        unsafe { quants(weights, input, epilogue, out) }
    },
    product_q4_0: |weights, input, epilogue, out| {
        // SAFETY: see the table.
        unsafe { quants(weights, input, epilogue, out) }
    },
    peak: Some(|mix, rounds| {
        // SAFETY: see the table.
        unsafe { peak::peak(mix, rounds) }
    }),
    ..avx2::TABLE
};

/// Blocks of a strip that are asked for ahead of time: 4 KiB of 8-bit weights.
const AHEAD: usize = 8;

/// What a format of quantised weights does with one block.
trait BlockProduct: Sized {
    /// Exact integer dot products of the 16 outputs with a block of each row.
    ///
    /// # Safety
    /// The CPU has AVX-512 with VNNI.
    unsafe fn products<const ROWS: usize>(&self, blocks: &[&QuantBlock; ROWS]) -> [__m512i; ROWS];
}

impl BlockProduct for Q8Tile {
    #[inline(always)]
    unsafe fn products<const ROWS: usize>(&self, blocks: &[&QuantBlock; ROWS]) -> [__m512i; ROWS] {
        // SAFETY: the caller has the features.
        unsafe {
            let plus_128 = _mm512_set1_epi8(i8::MIN);
            let mut sums = [_mm512_setzero_si512(); ROWS];
            for r in 0..ROWS {
                sums[r] = _mm512_slli_epi32::<4>(_mm512_set1_epi32(blocks[r].offset));
            }
            for group in 0..NUM_GROUPS {
                let weights = _mm512_xor_si512(load_group(&self.0[group]), plus_128);
                for r in 0..ROWS {
                    let inputs = _mm512_set1_epi32(group_bits(blocks[r], group));
                    sums[r] = _mm512_dpbusd_epi32(sums[r], weights, inputs);
                }
            }
            sums
        }
    }
}

impl BlockProduct for Q4Tile {
    #[inline(always)]
    unsafe fn products<const ROWS: usize>(&self, blocks: &[&QuantBlock; ROWS]) -> [__m512i; ROWS] {
        // SAFETY: the caller has the features.
        unsafe {
            let nibble = _mm512_set1_epi8(0x0F);
            let mut sums = [_mm512_setzero_si512(); ROWS];
            for r in 0..ROWS {
                sums[r] = _mm512_set1_epi32(blocks[r].offset);
            }
            for group in 0..NUM_GROUPS / 2 {
                let both = load_group(&self.0[group]);
                let low = _mm512_and_si512(both, nibble);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), nibble);
                for r in 0..ROWS {
                    let x = _mm512_set1_epi32(group_bits(blocks[r], group));
                    let y = _mm512_set1_epi32(group_bits(blocks[r], group + NUM_GROUPS / 2));
                    sums[r] = _mm512_dpbusd_epi32(sums[r], low, x);
                    sums[r] = _mm512_dpbusd_epi32(sums[r], high, y);
                }
            }
            sums
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn load_group(group: &GroupLanes) -> __m512i {
    // SAFETY: the reference is to 64 readable bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(group.0.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn load_scales(scales: &ScaleLanes) -> __m512 {
    // SAFETY: the reference is to 32 readable bytes; the load needs no alignment.
    let halves = unsafe { _mm256_loadu_si256(scales.0.as_ptr().cast()) };
    _mm512_cvtph_ps(halves)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn quants<T: BlockProduct>(
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
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
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
    let mut sums = [_mm512_setzero_ps(); ROWS];
    for block in 0..num_blocks {
        // Rows that follow find the strip in the caches.
        if at.first_row == 0 {
            prefetch(tiles, block + AHEAD);
            prefetch(weight_scales, block + AHEAD);
        }
        let mut blocks = [&rows[0][block]; ROWS];
        for r in 1..ROWS {
            blocks[r] = &rows[r][block];
        }
        // SAFETY: this function has the features.
        let products = unsafe { tiles[block].products(&blocks) };
        let weight_scales = load_scales(&weight_scales[block]);
        for r in 0..ROWS {
            let scale = _mm512_mul_ps(weight_scales, _mm512_set1_ps(blocks[r].scale));
            sums[r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(products[r]), sums[r]);
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        put(at, out, r, sums);
    }
}

/// Hands the sums of one row and strip to the epilogue.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn put(at: &StripPlace, out: &mut Tile<'_>, row: usize, sums: __m512) {
    let mut lanes = [0.0; STRIP_LEN];
    // SAFETY: the array is 64 writable bytes; the store needs no alignment.
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
    let out = &mut out.row_mut(at.first_row + row)[at.index * STRIP_LEN..];
    let Some((whole, _)) = out.split_first_chunk_mut::<STRIP_LEN>() else {
        return finish(at.epilogue, out, &lanes);
    };
    avx2::put_strip(at.epilogue, whole, &lanes);
}
