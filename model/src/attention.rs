//! Owns causal attention through block tables. Row-invariant: positions are taken in fixed splits
//! of [`SPLIT_LEN`] absolute positions whose partial results are merged in order, so that a row's
//! bits depend on its own sequence up to itself and on nothing else. Knows no layers' weights.

use crate::batch::RaggedBatch;
use crate::ids::{BLOCK_LEN, BlockId};
use crate::kernels::team::Team;
use crate::kernels::{self, Isa, SPLIT_LEN};
use crate::kv_pool::KvPool;

/// Widest head: a head's sums live on the stack.
pub const HEAD_DIM_MAX: usize = 1024;

/// Multiply-adds (keys and values together) below which the caller works alone.
const TEAM_MACS_MIN: usize = 1 << 20;

/// Where a row stands.
#[derive(Clone, Copy, Debug)]
pub struct RowPlace {
    /// Index of its segment in the batch.
    pub segment: usize,
    /// Its absolute position.
    pub position: usize,
}

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Implementation of the kernels.
    pub isa: Isa,
    /// Keys and values; those of the batch's own rows are written already.
    pub pool: &'a KvPool,
    /// Layer of the pool.
    pub layer: usize,
    /// The batch, for its block tables.
    pub batch: &'a RaggedBatch,
    /// Places of all rows, `[rows]`.
    pub places: &'a [RowPlace],
    /// Rotated queries, `[rows, num_heads, head_dim]`.
    pub queries: &'a [f32],
    /// Width of a head.
    pub head_dim: usize,
    /// Query heads per key/value head.
    pub group_len: usize,
}

impl Attention<'_> {
    /// Writes `[rows, num_heads, head_dim]`: for every row and head the values of positions up to
    /// the row's own, weighted by softmax of query times key over `sqrt(head_dim)`
    /// (arXiv 1706.03762, equation 1).
    ///
    /// # Panics
    /// When the shapes disagree.
    pub fn run(&self, team: &mut Team, out: &mut [f32]) {
        assert_eq!(self.queries.len(), out.len(), "one output per query");
        if out.is_empty() {
            return;
        }
        let group_floats = self.group_len * self.head_dim;
        let row_floats = out.len() / self.places.len();
        assert!(row_floats.is_multiple_of(group_floats), "a row is whole groups of heads");
        let groups_per_row = row_floats / group_floats;
        let one_group = |index: usize, out: &mut [f32]| {
            let queries = &self.queries[index * group_floats..(index + 1) * group_floats];
            let place = self.places[index / groups_per_row];
            let heads =
                queries.chunks_exact(self.head_dim).zip(out.chunks_exact_mut(self.head_dim));
            for (query, out) in heads {
                self.one_head(place, index % groups_per_row, query, out);
            }
        };
        let num_positions: usize = self.places.iter().map(|place| place.position + 1).sum();
        if num_positions.saturating_mul(2 * row_floats) >= TEAM_MACS_MIN {
            team.run_chunks(out, group_floats, one_group);
        } else {
            let chunks = out.chunks_exact_mut(group_floats).enumerate();
            chunks.for_each(|(index, out)| one_group(index, out));
        }
    }

    /// One row and head. `query` and `out` are `[head_dim]`.
    fn one_head(&self, place: RowPlace, kv_head: usize, query: &[f32], out: &mut [f32]) {
        let table = self.batch.block_table(&self.batch.segments()[place.segment]);
        let len = place.position + 1;
        out.fill(0.0);
        let mut merged = Merged { max: f32::NEG_INFINITY, sum: 0.0, out };
        let mut split_out = [0.0; HEAD_DIM_MAX];
        let split_out = &mut split_out[..self.head_dim];
        let blocks_per_split = SPLIT_LEN / BLOCK_LEN;
        let splits = table[..len.div_ceil(BLOCK_LEN)].chunks(blocks_per_split);
        for (split, blocks) in splits.enumerate() {
            let split_len = (len - split * SPLIT_LEN).min(SPLIT_LEN);
            self.one_split(
                &SplitInput { blocks, split_len, kv_head, query },
                split_out,
                &mut merged,
            );
        }
        let scale = 1.0 / merged.sum;
        merged.out.iter_mut().for_each(|out| *out *= scale);
    }

    fn one_split(&self, input: &SplitInput<'_>, split_out: &mut [f32], merged: &mut Merged<'_>) {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let mut scores = [0.0; SPLIT_LEN];
        let (score_blocks, _) = scores.as_chunks_mut::<BLOCK_LEN>();
        for (scores, &block) in score_blocks.iter_mut().zip(input.blocks) {
            let keys = self.pool.keys(self.layer, block, input.kv_head);
            kernels::scores(self.isa, input.query, keys, scale, scores);
        }
        let probabilities = &mut scores[..input.split_len];
        let sum = kernels::softmax(self.isa, probabilities);
        split_out.fill(0.0);
        for (probabilities, &block) in probabilities.chunks(BLOCK_LEN).zip(input.blocks) {
            let values = self.pool.values(self.layer, block, input.kv_head);
            let values = &values[..probabilities.len() * self.head_dim];
            kernels::accumulate(self.isa, probabilities, values, split_out);
        }
        merged.merge(sum, split_out);
    }
}

/// One split of one row and head.
struct SplitInput<'a> {
    blocks: &'a [BlockId],
    split_len: usize,
    kv_head: usize,
    query: &'a [f32],
}

/// The splits merged so far.
struct Merged<'a> {
    max: f32,
    sum: f32,
    /// `[head_dim]`, not yet divided by `sum`.
    out: &'a mut [f32],
}

impl Merged<'_> {
    /// Adds a split (the online softmax of arXiv 1805.02867, section 3, for blocks of scores). Also
    /// applied to the first split, with factors 0 and 1.
    fn merge(&mut self, split: kernels::SplitSum, split_out: &[f32]) {
        let max = if split.max > self.max { split.max } else { self.max };
        let (before, now) = (kernels::exp(self.max - max), kernels::exp(split.max - max));
        self.sum = self.sum * before + split.sum * now;
        for (out, &split_out) in self.out.iter_mut().zip(split_out) {
            *out = *out * before + split_out * now;
        }
        self.max = max;
    }
}
