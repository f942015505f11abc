//! Owns the plain twins of attention's kernels. They define the bits, one query at a time.

use half::f16;

use super::super::attention::{
    AttentionKernels, BlockNumbers, KvKernels, Probabilities, Queries, SCORE_STRIDE, SUM_EXTRA,
    SplitSum,
};
use super::{exp, tree};

pub(super) static KERNELS: AttentionKernels = AttentionKernels {
    f32: KvKernels {
        scores: |queries, keys, out| scores(queries, keys, out, |x| x),
        accumulate: |probabilities, values, out| accumulate(probabilities, values, out, |x| x),
    },
    f16: KvKernels {
        scores: |queries, keys, out| scores(queries, keys, out, f16::to_f32),
        accumulate: |probabilities, values, out| {
            accumulate(probabilities, values, out, f16::to_f32);
        },
    },
    softmax,
    narrow,
};

fn scores<T: Copy>(
    queries: &Queries<'_>,
    keys: BlockNumbers<'_, T>,
    out: &mut [f32],
    widen: impl Fn(T) -> f32,
) {
    let Queries { numbers, head_dim, scale, column } = *queries;
    for (query, out) in numbers.chunks_exact(head_dim).zip(out.chunks_exact_mut(SCORE_STRIDE)) {
        for (out, key) in out[column..].iter_mut().zip(keys.now.chunks_exact(head_dim)) {
            let mut lanes = [0.0_f32; 8];
            for (query, key) in query.chunks(8).zip(key.chunks(8)) {
                for (lane, (&query, &key)) in lanes.iter_mut().zip(query.iter().zip(key)) {
                    *lane = query.mul_add(widen(key), *lane);
                }
            }
            *out = tree(lanes) * scale;
        }
    }
}

fn softmax(scores: &mut [f32]) -> SplitSum {
    // Adding zero makes a maximum of -0 the same as one of +0, whichever came first.
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &s| if s > max { s } else { max }) + 0.0;
    let mut lanes = [0.0_f32; 8];
    for scores in scores.chunks_mut(8) {
        for (lane, score) in lanes.iter_mut().zip(scores) {
            *score = exp(*score - max);
            *lane += *score;
        }
    }
    SplitSum { max, sum: tree(lanes) }
}

fn accumulate<T: Copy>(
    probabilities: &Probabilities<'_>,
    values: BlockNumbers<'_, T>,
    out: &mut [f32],
    widen: impl Fn(T) -> f32,
) {
    let Probabilities { numbers, column, len, head_dim } = *probabilities;
    let rows = numbers.chunks_exact(SCORE_STRIDE);
    for (probabilities, out) in rows.zip(out.chunks_exact_mut(head_dim + SUM_EXTRA)) {
        let positions = probabilities[column..][..len].iter();
        for (&probability, values) in positions.zip(values.now.chunks_exact(head_dim)) {
            for (out, &value) in out.iter_mut().zip(values) {
                *out = probability.mul_add(widen(value), *out);
            }
        }
    }
}

fn narrow(numbers: &[f32], out: &mut [f16]) {
    for (out, &number) in out.iter_mut().zip(numbers) {
        *out = narrow_one(number);
    }
}

/// Rounds one number to half precision; NaN when it is too large.
pub(in super::super) fn narrow_one(number: f32) -> f16 {
    let half = f16::from_f32(number);
    if half.is_infinite() { f16::NAN } else { half }
}
