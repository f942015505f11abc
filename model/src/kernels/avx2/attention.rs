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
    /// The CPU has AVX2, FMA and F16C.
    unsafe fn load(from: &[Self; 8]) -> __m256;
}

impl KvLanes for f32 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(from: &[Self; 8]) -> __m256 {
        load(from)
    }
}

impl KvLanes for f16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(from: &[Self; 8]) -> __m256 {
        // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
        let halves = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
        _mm256_cvtph_ps(halves)
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn widened<T: KvLanes>(from: &[T; 8]) -> __m256 {
    // SAFETY: the features are enabled here.
    unsafe { T::load(from) }
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
    let num_parts = head_dim / 8;
    let (numbers, _) = numbers.as_chunks::<8>();
    let (parts, _) = keys.now.as_chunks::<8>();
    let scale = _mm256_set1_ps(scale);
    let tiles =
        numbers.chunks(QUERY_TILE * num_parts).zip(out.chunks_mut(QUERY_TILE * SCORE_STRIDE));
    let mut ahead = keys.next.chunks(fetch_len(keys.next.len(), tiles.len()));
    for (queries, out) in tiles {
        fetch(ahead.next().unwrap_or_default());
        if queries.len() == num_parts {
            let (outs, _) = out[column..].as_chunks_mut::<8>();
            for (keys, out) in parts.chunks_exact(8 * num_parts).zip(outs) {
                store(out, _mm256_mul_ps(fold(dots_of_one(queries, keys)), scale));
            }
            continue;
        }
        let (first, second) = out.split_at_mut(SCORE_STRIDE);
        let (firsts, _) = first[column..].as_chunks_mut::<4>();
        let (seconds, _) = second[column..].as_chunks_mut::<4>();
        let outs = firsts.iter_mut().zip(seconds);
        for (keys, (first, second)) in parts.chunks_exact(4 * num_parts).zip(outs) {
            let dots = _mm256_mul_ps(fold(dots_of_two(queries, keys)), scale);
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

/// Lanes of the dot products of one query with eight keys, side by side to hide latency.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn dots_of_one<T: KvLanes>(query: &[[f32; 8]], keys: &[[T; 8]]) -> [__m256; 8] {
    let num_parts = query.len();
    let mut rows = [keys; 8];
    for (row, key) in rows.iter_mut().zip(keys.chunks_exact(num_parts)) {
        // Cut to a length the compiler can compare, so that the loop needs no checks.
        *row = &key[..num_parts];
    }
    let mut sums = [_mm256_setzero_ps(); 8];
    for (part, query) in query.iter().enumerate() {
        let query = load(query);
        for (sum, key) in sums.iter_mut().zip(rows) {
            *sum = _mm256_fmadd_ps(query, widened(&key[part]), *sum);
        }
    }
    sums
}

/// Lanes of the dot products of two queries with four keys, all of the first query first.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn dots_of_two<T: KvLanes>(queries: &[[f32; 8]], keys: &[[T; 8]]) -> [__m256; 8] {
    let num_parts = queries.len() / 2;
    let (first, second) = (&queries[..num_parts], &queries[num_parts..][..num_parts]);
    let mut rows = [keys; 4];
    for (row, key) in rows.iter_mut().zip(keys.chunks_exact(num_parts)) {
        *row = &key[..num_parts];
    }
    let mut sums = [_mm256_setzero_ps(); 8];
    for part in 0..num_parts {
        let (first, second) = (load(&first[part]), load(&second[part]));
        for (at, key) in rows.into_iter().enumerate() {
            let key = widened(&key[part]);
            sums[at] = _mm256_fmadd_ps(first, key, sums[at]);
            sums[4 + at] = _mm256_fmadd_ps(second, key, sums[4 + at]);
        }
    }
    sums
}

/// The fixed tree for eight dot products at once. Each step adds the same lanes as `plain::tree`
/// and packs two registers into one; the order of the pairs makes dot product j end in lane j.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn fold(sums: [__m256; 8]) -> __m256 {
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
    let [s0, s1, s2, s3, s4, s5, s6, s7] = sums;
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

/// Where a tile of sums lies in the head.
#[derive(Clone, Copy)]
struct SumTile {
    /// Vectors of a head.
    num_parts: usize,
    /// First vector of the tile.
    first: usize,
}

#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<T: KvLanes>(
    probabilities: &Probabilities<'_>,
    values: BlockNumbers<'_, T>,
    out: &mut [f32],
) {
    let Probabilities { numbers, column, len, head_dim } = *probabilities;
    let num_parts = head_dim / 8;
    let (parts, _) = values.now.as_chunks::<8>();
    let parts = &parts[..len * num_parts];
    let rows = numbers.chunks(QUERY_TILE * SCORE_STRIDE);
    let tiles = rows.zip(out.chunks_mut(QUERY_TILE * (head_dim + SUM_EXTRA)));
    let mut ahead = values.next.chunks(fetch_len(values.next.len(), tiles.len()));
    for (probabilities, out) in tiles {
        fetch(ahead.next().unwrap_or_default());
        if probabilities.len() == SCORE_STRIDE {
            let (out, _) = out.as_chunks_mut::<8>();
            one_query(&probabilities[column..][..len], parts, &mut out[..num_parts]);
            continue;
        }
        let (first, second) = probabilities.split_at(SCORE_STRIDE);
        let probabilities = [&first[column..][..len], &second[column..][..len]];
        let (first, second) = out.split_at_mut(head_dim + SUM_EXTRA);
        let (first, _) = first.as_chunks_mut::<8>();
        let (second, _) = second.as_chunks_mut::<8>();
        two_queries(probabilities, parts, [&mut first[..num_parts], &mut second[..num_parts]]);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn one_query<T: KvLanes>(probabilities: &[f32], values: &[[T; 8]], out: &mut [[f32; 8]]) {
    let num_parts = out.len();
    let mut at = SumTile { num_parts, first: 0 };
    while at.first < num_parts {
        let left = num_parts - at.first;
        at.first += if left >= 8 {
            sum_tile::<T, 1, 8>([probabilities], values, [&mut *out], at)
        } else if left >= 4 {
            sum_tile::<T, 1, 4>([probabilities], values, [&mut *out], at)
        } else {
            sum_tile::<T, 1, 1>([probabilities], values, [&mut *out], at)
        };
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn two_queries<T: KvLanes>(
    probabilities: [&[f32]; 2],
    values: &[[T; 8]],
    [first, second]: [&mut [[f32; 8]]; 2],
) {
    let num_parts = first.len();
    let mut at = SumTile { num_parts, first: 0 };
    while at.first < num_parts {
        let out = [&mut *first, &mut *second];
        at.first += if num_parts - at.first >= 4 {
            sum_tile::<T, 2, 4>(probabilities, values, out, at)
        } else {
            sum_tile::<T, 2, 1>(probabilities, values, out, at)
        };
    }
}

/// `PARTS` vectors of the outputs of `QUERIES` queries. Returns `PARTS`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn sum_tile<T: KvLanes, const QUERIES: usize, const PARTS: usize>(
    probabilities: [&[f32]; QUERIES],
    values: &[[T; 8]],
    outs: [&mut [[f32; 8]]; QUERIES],
    at: SumTile,
) -> usize {
    let mut sums = [[_mm256_setzero_ps(); PARTS]; QUERIES];
    for (sums, out) in sums.iter_mut().zip(&outs) {
        for (sum, out) in sums.iter_mut().zip(&out[at.first..][..PARTS]) {
            *sum = load(out);
        }
    }
    let len = probabilities[0].len();
    let probabilities = probabilities.map(|numbers| &numbers[..len]);
    for (position, values) in values.chunks_exact(at.num_parts).take(len).enumerate() {
        let values = &values[at.first..][..PARTS];
        let mut wide = [_mm256_setzero_ps(); QUERIES];
        for (wide, probabilities) in wide.iter_mut().zip(probabilities) {
            *wide = _mm256_set1_ps(probabilities[position]);
        }
        for (part, value) in values.iter().enumerate() {
            let value = widened(value);
            for (sums, wide) in sums.iter_mut().zip(wide) {
                sums[part] = _mm256_fmadd_ps(wide, value, sums[part]);
            }
        }
    }
    for (sums, out) in sums.into_iter().zip(outs) {
        for (sum, out) in sums.into_iter().zip(&mut out[at.first..][..PARTS]) {
            store(out, sum);
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
