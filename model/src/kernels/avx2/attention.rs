//! Owns attention's kernels in AVX2: how queries, positions and head dimensions are tiled over
//! registers. The tiling cannot change bits, because every lane of a score and every number of an
//! output is one chain of operations of its own.
#![allow(unsafe_code)] // loads of half-precision numbers, prefetches, and calls that need AVX2

use std::arch::x86_64::*;

use half::f16;

use super::super::attention::{
    AttentionKernels, BlockNumbers, KvKernels, Probabilities, Queries, SCORE_STRIDE, SUM_EXTRA,
    SplitSum,
};
use super::super::plain;
use super::{exp, load, store};
use crate::ids::BLOCK_LEN;

// SAFETY (all entries): only tables of implementations that need a proof of the CPU's features hold
// this one, so whoever calls these has the proof that the CPU has AVX2, FMA and F16C.
pub(super) static KERNELS: AttentionKernels = AttentionKernels {
    f32: KvKernels {
        scores: |queries, keys, out| {
            // SAFETY: see the table.
            unsafe { scores(queries, keys, out) }
        },
        accumulate: |probabilities, values, out| {
            // SAFETY: see the table.
            unsafe { accumulate(probabilities, values, out) }
        },
    },
    f16: KvKernels {
        scores: |queries, keys, out| {
            // SAFETY: see the table.
            unsafe { scores(queries, keys, out) }
        },
        accumulate: |probabilities, values, out| {
            // SAFETY: see the table.
            unsafe { accumulate(probabilities, values, out) }
        },
    },
    softmax: |scores| {
        // SAFETY: see the table.
        unsafe { softmax(scores) }
    },
    narrow: |numbers, out| {
        // SAFETY: see the table.
        unsafe { narrow(numbers, out) }
    },
};

/// A type of keys and values.
trait KvLanes: Copy + 'static {
    /// Eight of them, widened.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C, and eight numbers can be read there.
    unsafe fn load(from: *const Self) -> __m256;
}

impl KvLanes for f32 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise; the load needs no alignment.
        unsafe { _mm256_loadu_ps(from) }
    }
}

impl KvLanes for f16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(from: *const Self) -> __m256 {
        // SAFETY: the caller's promise; the load needs no alignment.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

/// Fetches numbers into the nearest cache.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fetch<T>(numbers: &[T]) {
    for line in numbers.chunks(64 / size_of::<T>()) {
        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
    }
}

/// Queries that share what is loaded of a block. Two times four keys are the eight chains that
/// keep both multipliers busy, and leave registers for what they multiply.
const QUERY_TILE: usize = 2;

#[target_feature(enable = "avx2,fma,f16c")]
fn scores<T: KvLanes>(queries: &Queries<'_>, keys: BlockNumbers<'_, T>, out: &mut [f32]) {
    let Queries { numbers, head_dim, scale, column } = *queries;
    assert!(keys.now.len() == BLOCK_LEN * head_dim && head_dim.is_multiple_of(8), "one block");
    let scale = _mm256_set1_ps(scale);
    let tiles =
        numbers.chunks(QUERY_TILE * head_dim).zip(out.chunks_mut(QUERY_TILE * SCORE_STRIDE));
    let mut ahead = keys.next.chunks(fetch_len(keys.next.len(), tiles.len()));
    for (queries, out) in tiles {
        fetch(ahead.next().unwrap_or_default());
        if queries.len() < QUERY_TILE * head_dim {
            assert_eq!(queries.len(), head_dim, "queries are whole");
            let (outs, _) = out[column..].as_chunks_mut::<8>();
            for (keys, out) in keys.now.chunks_exact(8 * head_dim).zip(outs) {
                // SAFETY: one query and eight keys of `head_dim` numbers, a multiple of 8.
                let dots = unsafe { dots::<T, 1, 8>(queries.as_ptr(), keys.as_ptr(), head_dim) };
                store(out, _mm256_mul_ps(fold(dots.as_flattened()), scale));
            }
            continue;
        }
        let (first, second) = out.split_at_mut(SCORE_STRIDE);
        let (firsts, _) = first[column..].as_chunks_mut::<4>();
        let (seconds, _) = second[column..].as_chunks_mut::<4>();
        let outs = firsts.iter_mut().zip(seconds);
        for (keys, (first, second)) in keys.now.chunks_exact(4 * head_dim).zip(outs) {
            // SAFETY: two queries and four keys of `head_dim` numbers, a multiple of 8.
            let dots = unsafe { dots::<T, 2, 4>(queries.as_ptr(), keys.as_ptr(), head_dim) };
            let dots = _mm256_mul_ps(fold(dots.as_flattened()), scale);
            store_four(first, _mm256_castps256_ps128(dots));
            store_four(second, _mm256_extractf128_ps::<1>(dots));
        }
    }
}

/// Numbers of the next block to fetch with every one of `num_tiles` tiles.
fn fetch_len(len: usize, num_tiles: usize) -> usize {
    len.div_ceil(num_tiles.max(1)).next_multiple_of(64).max(64)
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn store_four(to: &mut [f32; 4], value: __m128) {
    // SAFETY: the reference is to 16 writable bytes; the store needs no alignment.
    unsafe { _mm_storeu_ps(to.as_mut_ptr(), value) }
}

/// Lanes of the dot products of some queries with some keys, side by side to hide latency.
///
/// Pointers, because the checks of slices take more time here than the arithmetic.
///
/// # Safety
/// `queries` is `[QUERIES, head_dim]`, `keys` is `[KEYS, head_dim]`, `head_dim` a multiple of 8.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn dots<T: KvLanes, const QUERIES: usize, const KEYS: usize>(
    queries: *const f32,
    keys: *const T,
    head_dim: usize,
) -> [[__m256; KEYS]; QUERIES] {
    let mut sums = [[_mm256_setzero_ps(); KEYS]; QUERIES];
    for at in (0..head_dim).step_by(8) {
        let mut wide = [_mm256_setzero_ps(); QUERIES];
        for (query, wide) in wide.iter_mut().enumerate() {
            // SAFETY: eight numbers from `at` on are within each query.
            *wide = unsafe { f32::load(queries.add(query * head_dim + at)) };
        }
        for key in 0..KEYS {
            // SAFETY: eight numbers from `at` on are within each key.
            let numbers = unsafe { T::load(keys.add(key * head_dim + at)) };
            for (sums, wide) in sums.iter_mut().zip(wide) {
                sums[key] = _mm256_fmadd_ps(wide, numbers, sums[key]);
            }
        }
    }
    sums
}

/// The fixed tree for eight dot products at once. Each step adds the same lanes as `plain::tree`
/// and packs two registers into one; the order of the pairs makes dot product j end in lane j.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fold(sums: &[__m256]) -> __m256 {
    let fold_four = |a: __m256, b: __m256| {
        let low = _mm256_permute2f128_ps::<0x20>(a, b);
        let high = _mm256_permute2f128_ps::<0x31>(a, b);
        _mm256_add_ps(low, high)
    };
    let fold_two = |a: __m256, b: __m256| {
        let (a, b) = (_mm256_castps_pd(a), _mm256_castps_pd(b));
        let low = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        let high = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
        _mm256_add_ps(low, high)
    };
    let &[s0, s1, s2, s3, s4, s5, s6, s7] = sums else { panic!("eight dot products") };
    let even = fold_two(fold_four(s0, s4), fold_four(s1, s5));
    let odd = fold_two(fold_four(s2, s6), fold_four(s3, s7));
    _mm256_add_ps(
        _mm256_shuffle_ps::<0b10_00_10_00>(even, odd),
        _mm256_shuffle_ps::<0b11_01_11_01>(even, odd),
    )
}

#[target_feature(enable = "avx2,fma,f16c")]
fn softmax(scores: &mut [f32]) -> SplitSum {
    let max = largest(scores);
    let wide_max = _mm256_set1_ps(max);
    let mut sums = _mm256_setzero_ps();
    let (parts, tail) = scores.as_chunks_mut::<8>();
    for part in parts {
        let probabilities = exp(_mm256_sub_ps(load(part), wide_max));
        store(part, probabilities);
        sums = _mm256_add_ps(sums, probabilities);
    }
    let mut lanes = [0.0; 8];
    store(&mut lanes, sums);
    for (lane, score) in lanes.iter_mut().zip(tail) {
        *score = plain::exp(*score - max);
        *lane += *score;
    }
    SplitSum { max, sum: plain::tree(lanes) }
}

/// Largest number, NaN passed over, -infinity when there is none; never -0.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn largest(values: &[f32]) -> f32 {
    let (parts, tail) = values.as_chunks::<8>();
    let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
    for part in parts {
        // Of two operands, the second is returned when one is NaN.
        max = _mm256_max_ps(load(part), max);
    }
    let mut lanes = [0.0; 8];
    store(&mut lanes, max);
    let all = lanes.iter().chain(tail);
    all.fold(f32::NEG_INFINITY, |max, &s| if s > max { s } else { max }) + 0.0
}

/// What sums of values are made of.
///
/// The pointers are to rows that lie apart by what stands beside them.
#[derive(Clone, Copy)]
struct SumInput<T> {
    /// `[queries, SCORE_STRIDE]`, from the block's first position on.
    probabilities: *const f32,
    /// `[len, head_dim]`.
    values: *const T,
    len: usize,
    head_dim: usize,
}

#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<T: KvLanes>(
    probabilities: &Probabilities<'_>,
    values: BlockNumbers<'_, T>,
    out: &mut [f32],
) {
    let Probabilities { numbers, column, len, head_dim } = *probabilities;
    assert!(head_dim.is_multiple_of(8) && column + len <= SCORE_STRIDE, "what tiles rely on");
    assert!(values.now.len() >= len * head_dim, "values of every position");
    let stride = head_dim + SUM_EXTRA;
    let rows = numbers.chunks(QUERY_TILE * SCORE_STRIDE);
    let tiles = rows.zip(out.chunks_mut(QUERY_TILE * stride));
    let mut ahead = values.next.chunks(fetch_len(values.next.len(), tiles.len()));
    for (probabilities, out) in tiles {
        fetch(ahead.next().unwrap_or_default());
        let num = probabilities.len() / SCORE_STRIDE;
        assert!(num * stride == out.len() && num * SCORE_STRIDE == probabilities.len(), "rows");
        let probabilities = probabilities[column..].as_ptr();
        let input = SumInput { probabilities, values: values.now.as_ptr(), len, head_dim };
        let out = out.as_mut_ptr();
        // SAFETY: `num` rows of probabilities, from `column` on, and of outputs; `len` positions of
        // values. Each tile of `PARTS` vectors begins at a multiple of 8 and ends in the head.
        unsafe {
            let mut at = 0;
            while at < head_dim {
                let left = (head_dim - at) / 8;
                at += 8 * match (num, left) {
                    (2.., 4..) => sum_tile::<T, 2, 4>(input, out, at),
                    (2.., 2..) => sum_tile::<T, 2, 2>(input, out, at),
                    (2.., _) => sum_tile::<T, 2, 1>(input, out, at),
                    (_, 8..) => sum_tile::<T, 1, 8>(input, out, at),
                    (_, 4..) => sum_tile::<T, 1, 4>(input, out, at),
                    (_, _) => sum_tile::<T, 1, 1>(input, out, at),
                };
            }
        }
    }
}

/// `PARTS` vectors of the outputs of `QUERIES` queries, from number `at` of the head on. Returns
/// `PARTS`.
///
/// # Safety
/// The input has `QUERIES` rows of `len` probabilities and `len` rows of values, `out` is
/// `[QUERIES, head_dim + SUM_EXTRA]`, and `at + 8 * PARTS` is within `head_dim`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn sum_tile<T: KvLanes, const QUERIES: usize, const PARTS: usize>(
    input: SumInput<T>,
    out: *mut f32,
    at: usize,
) -> usize {
    let SumInput { probabilities, values, len, head_dim } = input;
    let mut sums = [[_mm256_setzero_ps(); PARTS]; QUERIES];
    for (query, sums) in sums.iter_mut().enumerate() {
        for (part, sum) in sums.iter_mut().enumerate() {
            // SAFETY: within the query's row of outputs.
            *sum = unsafe { f32::load(out.add(query * (head_dim + SUM_EXTRA) + at + 8 * part)) };
        }
    }
    for position in 0..len {
        let mut wide = [_mm256_setzero_ps(); QUERIES];
        for (query, wide) in wide.iter_mut().enumerate() {
            // SAFETY: one of the query's probabilities.
            *wide = _mm256_set1_ps(unsafe { *probabilities.add(query * SCORE_STRIDE + position) });
        }
        for part in 0..PARTS {
            // SAFETY: within the position's row of values.
            let value = unsafe { T::load(values.add(position * head_dim + at + 8 * part)) };
            for (sums, wide) in sums.iter_mut().zip(wide) {
                sums[part] = _mm256_fmadd_ps(wide, value, sums[part]);
            }
        }
    }
    for (query, sums) in sums.iter().enumerate() {
        for (part, &sum) in sums.iter().enumerate() {
            let to = query * (head_dim + SUM_EXTRA) + at + 8 * part;
            // SAFETY: within the query's row of outputs.
            unsafe { _mm256_storeu_ps(out.add(to), sum) };
        }
    }
    PARTS
}

#[target_feature(enable = "avx2,fma,f16c")]
fn narrow(numbers: &[f32], out: &mut [f16]) {
    let (parts, tail) = numbers.as_chunks::<8>();
    let (outs, out_tail) = out.as_chunks_mut::<8>();
    for (part, out) in parts.iter().zip(outs) {
        let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load(part));
        // A quiet bit in the fraction makes NaN of infinity.
        let magnitude = _mm_and_si128(halves, _mm_set1_epi16(0x7FFF));
        let is_infinite = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7C00));
        let quiet = _mm_and_si128(is_infinite, _mm_set1_epi16(0x0200));
        // SAFETY: the reference is to 16 writable bytes; the store needs no alignment.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_or_si128(halves, quiet)) };
    }
    for (out, &number) in out_tail.iter_mut().zip(tail) {
        *out = plain::narrow_one(number);
    }
}
