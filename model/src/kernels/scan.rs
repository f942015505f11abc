//! Owns looking at a whole row of logits for token choice: the maxima of its blocks, which noise is
//! large enough, sums of exponentials. Knows rows and noise keys; knows no parameters.
//!
//! The sums are written once, as plain Rust in a fixed order, and compiled twice: as the plain twin
//! and for AVX2, where the compiler may use wider registers but has to keep every result. What it
//! does not find by itself is written out.

use super::Isa;
use crate::ids::TokenId;
use crate::math;
use crate::noise::NoiseRow;

/// Logits whose maximum is kept together: blocks that cannot matter are passed over whole.
pub const SCAN_LEN: usize = 32;

/// Terms of sums that are worked on side by side.
const LANES: usize = 8;

/// One implementation of the scans.
pub(super) struct ScanKernels {
    block_maxima: fn(&[f32], &mut [f32]) -> bool,
    noise_hits: fn(&NoiseRow, TokenId, u64) -> u32,
    exp_sum: fn(&[f32], f64) -> f64,
    estimate_exp_sum: fn(&[f32], f64, f64) -> f64,
}

pub(super) static PLAIN: ScanKernels = ScanKernels {
    block_maxima: block_maxima_plain,
    noise_hits: noise_hits_plain,
    exp_sum: exp_sum_body,
    estimate_exp_sum: estimate_exp_sum_body,
};

/// Blocks of a row of `vocab_size` logits.
#[must_use]
pub fn num_blocks(vocab_size: usize) -> usize {
    vocab_size.div_ceil(SCAN_LEN)
}

/// The largest logit of every block of [`SCAN_LEN`], zeros without their sign. `row` is `[vocab]`,
/// `maxima` is `[vocab / SCAN_LEN]`, rounded up. Returns whether no logit is NaN or positive
/// infinity; if one is, the maxima are arbitrary.
///
/// # Panics
/// When the lengths disagree.
pub fn block_maxima(isa: Isa, row: &[f32], maxima: &mut [f32]) -> bool {
    assert_eq!(num_blocks(row.len()), maxima.len(), "one maximum per block");
    (isa.kernels().scan.block_maxima)(row, maxima)
}

/// Which of the [`SCAN_LEN`] tokens from `first` on have a hash of at least `limit`: bit i stands
/// for token `first + i`. The high 53 bits of a hash are [`NoiseRow::bits`].
#[must_use]
pub fn noise_hits(isa: Isa, noise: &NoiseRow, first: TokenId, limit: u64) -> u32 {
    (isa.kernels().scan.noise_hits)(noise, first, limit)
}

/// Sum of `math::exp(logit - max)` over the row, in order, bit for bit.
#[must_use]
pub fn exp_sum(isa: Isa, row: &[f32], max: f64) -> f64 {
    (isa.kernels().scan.exp_sum)(row, max)
}

/// About the sum of `exp(logit * scale - max)` over the row, for logits that are not NaN. With
/// every `logit * scale - max` at most 0 and `max` at most 1e5 in magnitude its relative error, and
/// the error of the same sum over [`math::exp`], are below 1e-9 as long as the sum is at least 1.
#[must_use]
pub fn estimate_exp_sum(isa: Isa, row: &[f32], scale: f64, max: f64) -> f64 {
    (isa.kernels().scan.estimate_exp_sum)(row, scale, max)
}

fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

fn is_unsound(logit: f32) -> bool {
    logit.is_nan() || logit == f32::INFINITY
}

fn block_maxima_plain(row: &[f32], maxima: &mut [f32]) -> bool {
    for (block, maximum) in row.chunks(SCAN_LEN).zip(maxima) {
        *maximum = block.iter().fold(f32::NEG_INFINITY, |max, &logit| larger(max, logit)) + 0.0;
    }
    !row.iter().any(|&logit| is_unsound(logit))
}

fn noise_hits_plain(noise: &NoiseRow, first: TokenId, limit: u64) -> u32 {
    let is_hit = |offset: u32| noise.hash(u64::from(first.0) + u64::from(offset)) >= limit;
    (0..SCAN_LEN as u32).fold(0, |hits, offset| hits | (u32::from(is_hit(offset)) << offset))
}

#[inline(always)]
fn exp_sum_body(row: &[f32], max: f64) -> f64 {
    let (blocks, tail) = row.as_chunks::<SCAN_LEN>();
    let term = |logit: f32| math::exp_branchless(f64::from(logit) - max);
    let mut sum = 0.0;
    for block in blocks {
        // Terms side by side, their sum one after the other: its order is part of the bits.
        let terms: [f64; SCAN_LEN] = std::array::from_fn(|offset| term(block[offset]));
        for term in terms {
            sum += term;
        }
    }
    for &logit in tail {
        sum += term(logit);
    }
    sum
}

#[inline(always)]
fn estimate_exp_sum_body(row: &[f32], scale: f64, max: f64) -> f64 {
    let (blocks, tail) = row.as_chunks::<SCAN_LEN>();
    let term = |logit: f32| rough_exp(f64::from(logit) * scale - max);
    let mut sums = [0.0; LANES];
    for block in blocks {
        let terms: [f64; SCAN_LEN] = std::array::from_fn(|offset| term(block[offset]));
        for part in terms.as_chunks::<LANES>().0 {
            for lane in 0..LANES {
                sums[lane] += part[lane];
            }
        }
    }
    for (index, &logit) in tail.iter().enumerate() {
        sums[index % LANES] += term(logit);
    }
    sums.iter().sum()
}

/// The exponential of numbers up to 0, to a relative error of 1e-11; at least `exp(-708)`.
#[inline(always)]
fn rough_exp(x: f64) -> f64 {
    /// Added and taken away again, it rounds to a whole number, which is then in its low bits.
    const ROUNDER: f64 = 6_755_399_441_055_744.0;
    const SERIES: [f64; 8] =
        [1.0 / 40_320.0, 1.0 / 5_040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let x = if x > -708.0 { x } else { -708.0 };
    let shifted = x * std::f64::consts::LOG2_E + ROUNDER;
    let r = x - (shifted - ROUNDER) * std::f64::consts::LN_2;
    let mut sum = 1.0 / 362_880.0;
    for factor in SERIES {
        sum = sum * r + factor;
    }
    sum = sum * r + 1.0;
    sum * f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52)
}

#[cfg(target_arch = "x86_64")]
pub(super) use avx2::AVX2;

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)] // calls into functions that need AVX2
mod avx2 {
    use std::arch::x86_64::*;

    use super::{
        LANES, SCAN_LEN, ScanKernels, block_maxima_plain, estimate_exp_sum_body, exp_sum_body,
    };
    use crate::ids::TokenId;
    use crate::noise::{MIXERS, NoiseRow, TOKEN_STEP};

    // SAFETY (all entries): the table is reached through `Avx2` and `Avx512` only, so whoever calls
    // these holds the proof that the CPU has the feature.
    pub(in crate::kernels) static AVX2: ScanKernels = ScanKernels {
        block_maxima: |row, maxima| {
            // SAFETY: see the table.
            unsafe { block_maxima(row, maxima) }
        },
        noise_hits: |noise, first, limit| {
            // SAFETY: see the table.
            unsafe { noise_hits(noise, first, limit) }
        },
        exp_sum: |row, max| {
            // SAFETY: see the table.
            unsafe { exp_sum(row, max) }
        },
        estimate_exp_sum: |row, scale, max| {
            // SAFETY: see the table.
            unsafe { estimate_exp_sum(row, scale, max) }
        },
    };

    #[target_feature(enable = "avx2")]
    fn block_maxima(row: &[f32], maxima: &mut [f32]) -> bool {
        let (blocks, tail) = row.as_chunks::<SCAN_LEN>();
        let (whole, last) = maxima.split_at_mut(blocks.len());
        let infinity = _mm256_set1_ps(f32::INFINITY);
        let mut unsound = _mm256_setzero_ps();
        for (block, maximum) in blocks.iter().zip(whole) {
            let mut lanes = _mm256_set1_ps(f32::NEG_INFINITY);
            for part in block.as_chunks::<LANES>().0 {
                let [a, b, c, d, e, f, g, h] = *part;
                let part = _mm256_setr_ps(a, b, c, d, e, f, g, h);
                lanes = _mm256_max_ps(lanes, part);
                // True for NaN too.
                let is_unsound = _mm256_cmp_ps::<_CMP_NLT_UQ>(part, infinity);
                unsound = _mm256_or_ps(unsound, is_unsound);
            }
            let high = _mm256_extractf128_ps::<1>(lanes);
            let halves = _mm_max_ps(_mm256_castps256_ps128(lanes), high);
            let pairs = _mm_max_ps(halves, _mm_movehl_ps(halves, halves));
            let one = _mm_max_ss(pairs, _mm_movehdup_ps(pairs));
            *maximum = _mm_cvtss_f32(one) + 0.0;
        }
        let is_tail_sound = block_maxima_plain(tail, last);
        is_tail_sound && _mm256_testz_ps(unsound, unsound) == 1
    }

    /// The low 64 bits of products with a constant.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn multiply(a: __m256i, factor: u64) -> __m256i {
        let low = _mm256_set1_epi64x(factor.cast_signed());
        let high = _mm256_set1_epi64x((factor >> 32).cast_signed());
        let high_of_a = _mm256_srli_epi64::<32>(a);
        let cross = _mm256_add_epi64(_mm256_mul_epu32(a, high), _mm256_mul_epu32(high_of_a, low));
        _mm256_add_epi64(_mm256_mul_epu32(a, low), _mm256_slli_epi64::<32>(cross))
    }

    /// As [`NoiseRow::hash`], four tokens at a time.
    #[target_feature(enable = "avx2")]
    fn noise_hits(noise: &NoiseRow, first: TokenId, limit: u64) -> u32 {
        const STEP: i64 = TOKEN_STEP.cast_signed();
        let [key_start, key_middle] = noise.key();
        let start = key_start.wrapping_add(u64::from(first.0).wrapping_mul(TOKEN_STEP));
        let steps = [0, STEP, STEP.wrapping_mul(2), STEP.wrapping_mul(3)];
        let steps = _mm256_setr_epi64x(steps[0], steps[1], steps[2], steps[3]);
        let mut next = _mm256_add_epi64(_mm256_set1_epi64x(start.cast_signed()), steps);
        let key_middle = _mm256_set1_epi64x(key_middle.cast_signed());
        // Comparisons are signed: turning the highest bit around makes them the ones wanted.
        let sign = _mm256_set1_epi64x(i64::MIN);
        let limit = _mm256_xor_si256(_mm256_set1_epi64x(limit.cast_signed()), sign);
        let mut hits = 0;
        for part in 0..SCAN_LEN / 4 {
            let h = _mm256_xor_si256(next, _mm256_srli_epi64::<30>(next));
            let h = _mm256_xor_si256(multiply(h, MIXERS[0]), key_middle);
            let h = _mm256_xor_si256(h, _mm256_srli_epi64::<27>(h));
            let h = multiply(h, MIXERS[1]);
            let h = _mm256_xor_si256(h, _mm256_srli_epi64::<31>(h));
            let is_below = _mm256_cmpgt_epi64(limit, _mm256_xor_si256(h, sign));
            let below = _mm256_movemask_pd(_mm256_castsi256_pd(is_below)).cast_unsigned();
            hits |= (below ^ 0b1111) << (part * 4);
            next = _mm256_add_epi64(next, _mm256_set1_epi64x(STEP.wrapping_mul(4)));
        }
        hits
    }

    #[target_feature(enable = "avx2")]
    fn exp_sum(row: &[f32], max: f64) -> f64 {
        exp_sum_body(row, max)
    }

    #[target_feature(enable = "avx2")]
    fn estimate_exp_sum(row: &[f32], scale: f64, max: f64) -> f64 {
        estimate_exp_sum_body(row, scale, max)
    }
}
