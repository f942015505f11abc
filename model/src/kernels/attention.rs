//! Owns the arithmetic of attention: scores of queries against a block of keys, the softmax of a
//! split, sums of a block's values, and keys and values on their way into half precision. Knows
//! lengths and layouts; knows no sequences, no block tables and no threads.
//!
//! Several queries share a call so that what is loaded of a block serves all of them. The bits of
//! one never depend on the others.

use half::f16;

use super::{Isa, SPLIT_LEN};
use crate::ids::BLOCK_LEN;

/// Floats from one query's scores to the next one's: those of a split, and a cache line more, so
/// that the same position of many queries does not fall into one set of the cache.
pub const SCORE_STRIDE: usize = SPLIT_LEN + 16;

/// Floats that follow the sums of a query: whoever merges splits keeps [`SplitSum`]s there.
pub const SUM_EXTRA: usize = 8;

/// One implementation. The functions may rely on the lengths that the entry points below check.
pub(super) struct AttentionKernels {
    pub(super) f32: KvKernels<f32>,
    pub(super) f16: KvKernels<f16>,
    pub(super) softmax: fn(&mut [f32]) -> SplitSum,
    pub(super) narrow: fn(&[f32], &mut [f16]),
}

/// What depends on the type of keys and values.
pub(super) struct KvKernels<T> {
    pub(super) scores: fn(&Queries<'_>, BlockNumbers<'_, T>, &mut [f32]),
    pub(super) accumulate: fn(&Probabilities<'_>, BlockNumbers<'_, T>, &mut [f32]),
}

/// Keys or values of one block and head as the kernels see them, and what comes after them.
#[derive(Clone, Copy)]
pub(super) struct BlockNumbers<'a, T> {
    pub(super) now: &'a [T],
    /// What the next call will read: fetched into the cache, never looked at.
    pub(super) next: &'a [T],
}

/// Keys or values of one block and head, `[16, head_dim]`, in the type of their pool. Half
/// precision is widened, which is exact, and then treated like single precision.
#[derive(Clone, Copy, Debug)]
pub enum KvNumbers<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
}

impl KvNumbers<'_> {
    /// How many there are.
    #[must_use]
    pub fn len(self) -> usize {
        match self {
            Self::F32(numbers) => numbers.len(),
            Self::F16(numbers) => numbers.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// A block, and the one that the next call will read if that is known: it is fetched meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct KvBlock<'a> {
    /// What to compute with.
    pub now: KvNumbers<'a>,
    /// What is needed next, in the same type; `now` again or something empty fetches nothing new.
    pub next: KvNumbers<'a>,
}

/// Queries that look at the same keys.
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// `[n, head_dim]`.
    pub numbers: &'a [f32],
    /// Width of a head.
    pub head_dim: usize,
    /// Factor of all scores.
    pub scale: f32,
    /// Position of the block within the split, a multiple of 16.
    pub column: usize,
}

/// What the values of a block are weighted with.
#[derive(Clone, Copy, Debug)]
pub struct Probabilities<'a> {
    /// `[n, SCORE_STRIDE]`.
    pub numbers: &'a [f32],
    /// Position of the block within the split.
    pub column: usize,
    /// Positions of the block to use, 1 to 16.
    pub len: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// What the softmax of one attention split leaves for merging.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SplitSum {
    /// Largest score; NaN scores are passed over, because they show in `sum` anyway.
    pub max: f32,
    /// Sum of `exp(score - max)`; NaN if any score is NaN or +infinity.
    pub sum: f32,
}

/// Attention scores of some queries against one KV block: for query `q` and position `j`
/// `out[q, column + j] = dot(query, keys[j]) * scale`. A dot product runs in 8 lanes
/// (lane = index % 8) of fused multiply-adds, added up by the fixed tree. All 16 are computed; the
/// caller uses those of valid positions, which do not depend on the others.
///
/// `keys` is `[16, head_dim]`, `out` is `[n, SCORE_STRIDE]`, of which nothing else is written.
///
/// # Panics
/// When the lengths disagree or `head_dim` is zero or no multiple of 8.
pub fn scores(isa: Isa, queries: &Queries<'_>, keys: KvBlock<'_>, out: &mut [f32]) {
    let head_dim = queries.head_dim;
    let num = check_rows(queries.numbers.len(), head_dim, head_dim);
    assert_eq!(Some(out.len()), num.checked_mul(SCORE_STRIDE), "one row of scores per query");
    assert_eq!(Some(keys.now.len()), head_dim.checked_mul(BLOCK_LEN), "keys are one block");
    assert!(queries.column <= SPLIT_LEN - BLOCK_LEN, "the block lies in the split");
    let kernels = &isa.kernels().attention;
    match (keys.now, keys.next) {
        (KvNumbers::F32(now), KvNumbers::F32(next)) => {
            (kernels.f32.scores)(queries, BlockNumbers { now, next }, out);
        }
        (KvNumbers::F16(now), KvNumbers::F16(next)) => {
            (kernels.f16.scores)(queries, BlockNumbers { now, next }, out);
        }
        (KvNumbers::F32(_), KvNumbers::F16(_)) | (KvNumbers::F16(_), KvNumbers::F32(_)) => {
            panic!("a pool has one type")
        }
    }
}

/// Turns the scores of one split into unnormalised probabilities in place,
/// `exp(score - max)`, and returns what merging needs. The sum runs in 8 lanes (lane = index % 8)
/// added up by the fixed tree.
///
/// # Panics
/// When there are no scores or more than [`SPLIT_LEN`].
pub fn softmax(isa: Isa, scores: &mut [f32]) -> SplitSum {
    assert!((1..=SPLIT_LEN).contains(&scores.len()), "a split has 1 to SPLIT_LEN positions");
    (isa.kernels().attention.softmax)(scores)
}

/// For every query `q` and every position `j` below `len`, in order:
/// `out[q, d] = fma(probabilities[q, column + j], values[j, d], out[q, d])`.
///
/// `values` is `[16, head_dim]`, `out` is `[n, head_dim + SUM_EXTRA]`, of which the last
/// `SUM_EXTRA` numbers of a row are left alone.
///
/// # Panics
/// When the lengths disagree or `head_dim` is zero or no multiple of 8.
pub fn accumulate(
    isa: Isa,
    probabilities: &Probabilities<'_>,
    values: KvBlock<'_>,
    out: &mut [f32],
) {
    let Probabilities { numbers, column, len, head_dim } = *probabilities;
    let num = check_rows(numbers.len(), SCORE_STRIDE, head_dim);
    assert_eq!(Some(out.len()), num.checked_mul(head_dim + SUM_EXTRA), "one output per query");
    assert_eq!(Some(values.now.len()), head_dim.checked_mul(BLOCK_LEN), "values are one block");
    assert!((1..=BLOCK_LEN).contains(&len), "1 to 16 positions of a block");
    assert!(column <= SPLIT_LEN - BLOCK_LEN, "the block lies in the split");
    let kernels = &isa.kernels().attention;
    match (values.now, values.next) {
        (KvNumbers::F32(now), KvNumbers::F32(next)) => {
            (kernels.f32.accumulate)(probabilities, BlockNumbers { now, next }, out);
        }
        (KvNumbers::F16(now), KvNumbers::F16(next)) => {
            (kernels.f16.accumulate)(probabilities, BlockNumbers { now, next }, out);
        }
        (KvNumbers::F32(_), KvNumbers::F16(_)) | (KvNumbers::F16(_), KvNumbers::F32(_)) => {
            panic!("a pool has one type")
        }
    }
}

/// Rounds to half precision, ties to even. What half precision cannot hold becomes NaN, not
/// infinity: a key of infinity could give a score of -infinity and be passed over in silence.
///
/// Both slices are `[n]`.
///
/// # Panics
/// When the lengths disagree.
pub fn narrow(isa: Isa, numbers: &[f32], out: &mut [f16]) {
    assert_eq!(numbers.len(), out.len(), "one output per number");
    (isa.kernels().attention.narrow)(numbers, out);
}

/// How many rows of `stride` numbers there are.
fn check_rows(len: usize, stride: usize, head_dim: usize) -> usize {
    assert!(head_dim > 0 && head_dim.is_multiple_of(8), "heads are whole lanes");
    assert!(len.is_multiple_of(stride), "queries are whole rows");
    len / stride
}
