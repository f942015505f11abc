//! Owns the AVX2 implementation of the kernels. Must equal `plain.rs` bit for bit: an f32 lane here
//! is a lane there, and every lane sees the same operations in the same order. Only how many
//! outputs and rows are worked on side by side is free. Lengths were checked by the entry points.
//!
//! `unsafe` appears for two reasons: memory is read and written through vector loads and stores,
//! each behind a reference to an array of just that size; and functions that need the CPU's
//! features are called from ones that do not, with the [`Avx2`] proof in hand.
#![allow(unsafe_code)] // vector loads and stores, and calls into functions that need AVX2

mod attention;
pub(super) mod peak;
mod products;

use std::arch::x86_64::*;

use super::packed::{GROUP_LEN, STRIP_LEN};
use super::plain::{self, EXP_MAX, EXP_MIN, EXP_SERIES, LN2_HI, LN2_LO};
use super::products::{Epilogue, QuantBlock};
use super::{Kernels, QUANT_BLOCK_LEN};

/// Bytes that memory is fetched in.
const CACHE_LINE_BYTES: usize = 64;

/// Proof that this CPU has AVX2, FMA and F16C. Only detection makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    /// Asks the CPU.
    pub(super) fn detect() -> Option<Self> {
        let has_all = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has_all.then_some(Self(()))
    }

    /// The kernels, which nobody gets at without the proof.
    pub(super) fn kernels(self) -> &'static Kernels {
        &KERNELS
    }
}

static KERNELS: Kernels = TABLE;

// SAFETY (all entries): the table is handed out by `Avx2::kernels`, and by `Avx512::kernels` as
// part of another, only, so whoever calls these holds the proof that the CPU has the features.
pub(super) const TABLE: Kernels = Kernels {
    product_f32: |weights, input, epilogue, out| {
        // SAFETY: see the table.
        unsafe { products::floats(weights, input, epilogue, out) }
    },
    product_f16: |weights, input, epilogue, out| {
        // SAFETY: see the table.
        unsafe { products::floats(weights, input, epilogue, out) }
    },
    product_bf16: |weights, input, epilogue, out| {
        // SAFETY: see the table.
        unsafe { products::floats(weights, input, epilogue, out) }
    },
    product_q8_0: |weights, input, epilogue, out| {
        // SAFETY: see the table.
        unsafe { products::quants(weights, input, epilogue, out) }
    },
    product_q4_0: |weights, input, epilogue, out| {
        // SAFETY: see the table.
        unsafe { products::quants(weights, input, epilogue, out) }
    },
    quantise: |values, blocks| {
        // SAFETY: see the table.
        unsafe { quantise(values, blocks) }
    },
    rms_norm: |x, weight, eps, out| {
        // SAFETY: see the table.
        unsafe { rms_norm(x, weight, eps, out) }
    },
    swiglu: |gate, up| {
        // SAFETY: see the table.
        unsafe { swiglu(gate, up) }
    },
    attention: &attention::KERNELS,
    exp: |values| {
        // SAFETY: see the table.
        unsafe { exp_slice(values) }
    },
    scan: &super::scan::AVX2,
    peak: Some(|mix, rounds| {
        // SAFETY: see the table.
        unsafe { peak::peak(mix, rounds) }
    }),
};

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load(from: &[f32; 8]) -> __m256 {
    // SAFETY: the reference is to 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store(to: &mut [f32; 8], value: __m256) {
    // SAFETY: the reference is to 32 writable bytes; the store needs no alignment.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), value) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_i8(from: &[i8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_i8(to: &mut [i8; 32], value: __m256i) {
    // SAFETY: the reference is to 32 writable bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), value) }
}

/// Widens 8 half-precision floats, given as bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn load_halves(from: &[u16; 8]) -> __m256 {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    let halves = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
    _mm256_cvtph_ps(halves)
}

/// Asks for an item of a slice, or for what lies behind it, before it is needed.
#[inline(always)]
pub(super) fn prefetch<T>(items: &[T], index: usize) {
    let item = items.as_ptr().wrapping_add(index).cast::<i8>();
    for line in 0..size_of::<T>().div_ceil(CACHE_LINE_BYTES) {
        // SAFETY: prefetching neither faults nor changes anything, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(item.wrapping_add(line * CACHE_LINE_BYTES)) };
    }
}

/// The four quants of one group of a block, as one 32-bit number.
#[inline(always)]
pub(super) fn group_bits(block: &QuantBlock, group: usize) -> i32 {
    let at = group * GROUP_LEN;
    let quants = &block.quants;
    let bytes =
        [quants[at] as u8, quants[at + 1] as u8, quants[at + 2] as u8, quants[at + 3] as u8];
    i32::from_le_bytes(bytes)
}

/// The epilogue of a whole strip, for implementations with wider sums.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn put_strip(epilogue: Epilogue, out: &mut [f32; STRIP_LEN], sums: &[f32; STRIP_LEN]) {
    let (outs, _) = out.as_chunks_mut::<8>();
    for (out, sums) in outs.iter_mut().zip(sums.as_chunks::<8>().0) {
        products::put_register(epilogue, out, load(sums));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantise(values: &[f32], blocks: &mut [QuantBlock]) {
    let (all_values, _) = values.as_chunks::<QUANT_BLOCK_LEN>();
    for (values, block) in all_values.iter().zip(blocks) {
        let (parts, _) = values.as_chunks::<8>();
        let inverse;
        (block.scale, inverse) = plain::products::block_scale(largest_magnitude_bits(parts));
        if inverse == 0.0 {
            (block.quants, block.offset) = ([0; QUANT_BLOCK_LEN], 0);
            continue;
        }
        let inverse = _mm256_set1_ps(inverse);
        let rounded = |part: &[f32; 8]| {
            // The conversion rounds ties to even: nothing changes the CPU's rounding mode.
            _mm256_cvtps_epi32(_mm256_mul_ps(load(part), inverse))
        };
        let low = _mm256_packs_epi32(rounded(&parts[0]), rounded(&parts[1]));
        let high = _mm256_packs_epi32(rounded(&parts[2]), rounded(&parts[3]));
        // Packing works on 128-bit halves: 32-bit groups come out as 0 2 4 6 1 3 5 7.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        store_i8(&mut block.quants, bytes);
        // Sums of absolute differences to -128, in four 64-bit lanes: exact.
        let raised = _mm256_xor_si256(bytes, _mm256_set1_epi8(i8::MIN));
        let sums = _mm256_sad_epu8(raised, _mm256_setzero_si256());
        let pair = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        let one = _mm_add_epi64(pair, _mm_unpackhi_epi64(pair, pair));
        let raised_by = 128 * QUANT_BLOCK_LEN as i32;
        block.offset = -8 * (_mm_cvtsi128_si32(one) - raised_by);
    }
}

/// Bits of the largest magnitude, compared as integers, so that NaN is the largest.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn largest_magnitude_bits(parts: &[[f32; 8]]) -> u32 {
    let magnitude_mask = _mm256_set1_epi32(i32::MAX);
    let mut max = _mm256_setzero_si256();
    for part in parts {
        let bits = _mm256_and_si256(_mm256_castps_si256(load(part)), magnitude_mask);
        max = _mm256_max_epi32(max, bits);
    }
    let quad = _mm_max_epi32(_mm256_castsi256_si128(max), _mm256_extracti128_si256::<1>(max));
    let pair = _mm_max_epi32(quad, _mm_shuffle_epi32::<0b01_00_11_10>(quad));
    let one = _mm_max_epi32(pair, _mm_shuffle_epi32::<0b10_11_00_01>(pair));
    _mm_cvtsi128_si32(one) as u32
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (parts, tail) = x.as_chunks::<8>();
    let mut sums = _mm256_setzero_ps();
    for part in parts {
        let part = load(part);
        sums = _mm256_fmadd_ps(part, part, sums);
    }
    let mut lanes = [0.0; 8];
    store(&mut lanes, sums);
    for (lane, x) in lanes.iter_mut().zip(tail) {
        *lane = x.mul_add(*x, *lane);
    }
    let scale = plain::norm_scale(plain::tree(lanes), x.len(), eps);
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = (x * scale) * weight;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn swiglu(gate: &mut [f32], up: &[f32]) {
    let (gates, gate_tail) = gate.as_chunks_mut::<8>();
    let (ups, up_tail) = up.as_chunks::<8>();
    for (gate, up) in gates.iter_mut().zip(ups) {
        let value = _mm256_mul_ps(silu(load(gate)), load(up));
        store(gate, value);
    }
    for (gate, &up) in gate_tail.iter_mut().zip(up_tail) {
        *gate = plain::swiglu_one(*gate, up);
    }
}

/// `x / (1 + exp(-x))`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn silu(x: __m256) -> __m256 {
    let (one, sign) = (_mm256_set1_ps(1.0), _mm256_set1_ps(-0.0));
    _mm256_div_ps(x, _mm256_add_ps(one, exp(_mm256_xor_ps(x, sign))))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn exp_slice(values: &mut [f32]) {
    let (parts, tail) = values.as_chunks_mut::<8>();
    for part in parts {
        let result = exp(load(part));
        store(part, result);
    }
    for value in tail {
        *value = plain::exp(*value);
    }
}

/// The plain twin's exponential in eight lanes. Comparisons return their second operand when one is
/// NaN, so that NaN passes through.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn exp(x: __m256) -> __m256 {
    let x = _mm256_min_ps(_mm256_set1_ps(EXP_MAX), x);
    let x = _mm256_max_ps(_mm256_set1_ps(EXP_MIN), x);
    let k = _mm256_mul_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E));
    let k = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(k);
    let r = _mm256_fnmadd_ps(k, _mm256_set1_ps(LN2_HI), x);
    let r = _mm256_fnmadd_ps(k, _mm256_set1_ps(LN2_LO), r);
    let mut series = _mm256_set1_ps(EXP_SERIES[0]);
    for &coefficient in &EXP_SERIES[1..] {
        series = _mm256_fmadd_ps(series, r, _mm256_set1_ps(coefficient));
    }
    let k = _mm256_cvtps_epi32(k);
    let half = _mm256_srai_epi32::<1>(k);
    let scaled = _mm256_mul_ps(series, power_of_two(half));
    _mm256_mul_ps(scaled, power_of_two(_mm256_sub_epi32(k, half)))
}

/// `2^k` in every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn power_of_two(k: __m256i) -> __m256 {
    let biased = _mm256_add_epi32(k, _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
}
