//! Owns the attention of one tile: scores, softmax, sums of values, split by split, and how splits
//! are merged. Knows one segment's block table at a time; knows no threads.

use super::plan::Tile;
use crate::aligned::Aligned;
use crate::batch::RaggedBatch;
use crate::ids::{BLOCK_LEN, BlockId};
use crate::kernels::attention::{
    self, KvBlock, KvNumbers, Probabilities, Queries, SCORE_STRIDE, SUM_EXTRA,
};
use crate::kernels::{Isa, SPLIT_LEN, exp};
use crate::kv_pool::KvPool;

/// Floats from one query's sums to the next one's: behind the `head_dim` sums stand the largest
/// score and the sum of probabilities.
pub(super) fn query_stride(head_dim: usize) -> usize {
    head_dim + SUM_EXTRA
}

/// Room that one thread works in.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// `[queries, head_dim]`.
    queries: Aligned<f32>,
    /// `[queries, SCORE_STRIDE]`.
    scores: Aligned<f32>,
    /// `[queries, head_dim + SUM_EXTRA]`.
    sums: Aligned<f32>,
}

impl Room {
    /// Makes room for tiles of so many queries.
    pub(super) fn make(&mut self, num_queries: usize, head_dim: usize) {
        self.queries.at_least(num_queries * head_dim);
        self.scores.at_least(num_queries * SCORE_STRIDE);
        self.sums.at_least(num_queries * query_stride(head_dim));
    }

    /// Room made so far.
    pub(super) fn num_floats(&self) -> usize {
        [&self.queries, &self.scores, &self.sums].iter().map(|part| part.as_slice().len()).sum()
    }
}

/// What all tiles read.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) isa: Isa,
    pub(super) pool: &'a KvPool,
    pub(super) layer: usize,
    pub(super) batch: &'a RaggedBatch,
    /// `[rows, num_heads, head_dim]`.
    pub(super) queries: &'a [f32],
    pub(super) head_dim: usize,
    pub(super) group_len: usize,
    pub(super) num_kv_heads: usize,
}

impl Work<'_> {
    /// All splits of a tile, merged. `total` is `[queries, head_dim + SUM_EXTRA]` at least.
    pub(super) fn whole(&self, tile: &Tile, room: &mut Room, total: &mut [f32]) {
        let stride = query_stride(self.head_dim);
        let num_queries = tile.num_rows * self.group_len;
        self.gather(tile, room);
        let totals = total.chunks_exact_mut(stride).take(num_queries);
        totals.for_each(|total| start(total, self.head_dim));
        for split in 0..tile.num_splits() {
            let Room { queries, scores, sums } = room;
            let queries = &queries.as_slice()[..num_queries * self.head_dim];
            self.split(tile, split, (queries, scores.as_mut_slice()), sums.as_mut_slice());
            let first = tile.first_row_at(split * SPLIT_LEN) * self.group_len;
            let sums = sums.as_slice().chunks_exact(stride);
            let totals = total.chunks_exact_mut(stride).zip(sums).take(num_queries);
            totals.skip(first).for_each(|(total, sums)| merge(total, sums, self.head_dim));
        }
    }

    /// One split of a tile. `sums` is `[queries, head_dim + SUM_EXTRA]` at least; rows that do not
    /// see the split write nothing.
    pub(super) fn piece(&self, tile: &Tile, split: usize, room: &mut Room, sums: &mut [f32]) {
        self.gather(tile, room);
        let Room { queries, scores, .. } = room;
        let queries = &queries.as_slice()[..tile.num_rows * self.group_len * self.head_dim];
        self.split(tile, split, (queries, scores.as_mut_slice()), sums);
    }

    /// Puts the queries of a tile one behind the other.
    fn gather(&self, tile: &Tile, room: &mut Room) {
        let group_floats = self.group_len * self.head_dim;
        let row_floats = self.num_kv_heads * group_floats;
        let rows = self.queries[tile.first_row * row_floats..].chunks_exact(row_floats);
        let to = room.queries.as_mut_slice().chunks_exact_mut(group_floats);
        for (row, to) in rows.zip(to).take(tile.num_rows) {
            to.copy_from_slice(&row[tile.kv_head * group_floats..][..group_floats]);
        }
    }

    fn split(
        &self,
        tile: &Tile,
        split: usize,
        (queries, scores): (&[f32], &mut [f32]),
        sums: &mut [f32],
    ) {
        let num_queries = tile.num_rows * self.group_len;
        let scores = &mut scores[..num_queries * SCORE_STRIDE];
        let sums = &mut sums[..num_queries * query_stride(self.head_dim)];
        let table = self.batch.block_table(&self.batch.segments()[tile.segment]);
        let first_position = split * SPLIT_LEN;
        let len = (tile.end() - first_position).min(SPLIT_LEN);
        let blocks = &table[first_position / BLOCK_LEN..][..len.div_ceil(BLOCK_LEN)];
        let part = SplitPart { tile, blocks, first_position };
        self.scores(&part, queries, scores);
        let first = tile.first_row_at(first_position) * self.group_len;
        let rows = scores.chunks_exact_mut(SCORE_STRIDE);
        let rows = rows.zip(sums.chunks_exact_mut(query_stride(self.head_dim)));
        for (query, (scores, sums)) in rows.enumerate().skip(first) {
            let position = tile.start + query / self.group_len;
            let len = (position + 1 - first_position).min(SPLIT_LEN);
            let sum = attention::softmax(self.isa, &mut scores[..len]);
            sums[..self.head_dim].fill(0.0);
            (sums[self.head_dim], sums[self.head_dim + 1]) = (sum.max, sum.sum);
        }
        self.accumulate(&part, scores, sums);
    }

    /// Scores of all rows against the blocks that they see any position of.
    fn scores(&self, part: &SplitPart<'_>, queries: &[f32], scores: &mut [f32]) {
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        let kv_head = part.tile.kv_head;
        for (index, &block) in part.blocks.iter().enumerate() {
            let column = index * BLOCK_LEN;
            let first = part.tile.first_row_at(part.first_position + column) * self.group_len;
            let next = match part.blocks.get(index + 1) {
                Some(&next) => self.pool.keys(self.layer, next, kv_head),
                None => self.pool.values(self.layer, part.blocks[0], kv_head),
            };
            let keys = KvBlock { now: self.pool.keys(self.layer, block, kv_head), next };
            let numbers = &queries[first * self.head_dim..];
            let queries = Queries { numbers, head_dim: self.head_dim, scale, column };
            attention::scores(self.isa, &queries, keys, &mut scores[first * SCORE_STRIDE..]);
        }
    }

    /// Sums of values, weighted. Rows that end inside a block go one by one: what lies behind a
    /// row's own position may be anything.
    fn accumulate(&self, part: &SplitPart<'_>, scores: &[f32], sums: &mut [f32]) {
        let Self { head_dim, group_len, layer, .. } = *self;
        let SplitPart { tile, blocks, first_position } = *part;
        for (index, &block) in blocks.iter().enumerate() {
            let column = index * BLOCK_LEN;
            let position = first_position + column;
            let now = self.pool.values(layer, block, tile.kv_head);
            let next = match blocks.get(index + 1) {
                Some(&next) => self.pool.values(layer, next, tile.kv_head),
                None => nothing(now),
            };
            let mut sum = |rows: std::ops::Range<usize>, len: usize| {
                let next = if rows.end == tile.num_rows { next } else { nothing(now) };
                let queries = rows.start * group_len..rows.end * group_len;
                let numbers = &scores[queries.start * SCORE_STRIDE..queries.end * SCORE_STRIDE];
                let probabilities = Probabilities { numbers, column, len, head_dim };
                let stride = query_stride(head_dim);
                let sums = &mut sums[queries.start * stride..queries.end * stride];
                attention::accumulate(self.isa, &probabilities, KvBlock { now, next }, sums);
            };
            let first_whole = tile.first_row_at(position + BLOCK_LEN - 1);
            for row in tile.first_row_at(position)..first_whole {
                sum(row..row + 1, tile.start + row + 1 - position);
            }
            if first_whole < tile.num_rows {
                sum(first_whole..tile.num_rows, BLOCK_LEN);
            }
        }
    }
}

/// One split of a tile.
#[derive(Clone, Copy)]
struct SplitPart<'a> {
    tile: &'a Tile,
    /// Blocks of the split, as far as the tile's last row sees.
    blocks: &'a [BlockId],
    /// The first position of the split.
    first_position: usize,
}

/// No numbers, of the same type.
fn nothing(numbers: KvNumbers<'_>) -> KvNumbers<'_> {
    match numbers {
        KvNumbers::F32(numbers) => KvNumbers::F32(&numbers[..0]),
        KvNumbers::F16(numbers) => KvNumbers::F16(&numbers[..0]),
    }
}

/// A query's total before any split.
pub(super) fn start(total: &mut [f32], head_dim: usize) {
    total.fill(0.0);
    total[head_dim] = f32::NEG_INFINITY;
}

/// Adds a split (the online softmax of arXiv 1805.02867, section 3, for blocks of scores) to what
/// was merged before. Also applied to the first split, with factors 0 and 1.
pub(super) fn merge(total: &mut [f32], split: &[f32], head_dim: usize) {
    let (total, total_sums) = total.split_at_mut(head_dim);
    let (split, split_sums) = split.split_at(head_dim);
    let (total_max, split_max) = (total_sums[0], split_sums[0]);
    let max = if split_max > total_max { split_max } else { total_max };
    let (before, now) = (exp(total_max - max), exp(split_max - max));
    total_sums[1] = total_sums[1] * before + split_sums[1] * now;
    for (total, &split) in total.iter_mut().zip(split) {
        *total = *total * before + split * now;
    }
    total_sums[0] = max;
}

/// Writes a finished row of a tile, `[group, head_dim]`.
pub(super) fn write_total(work: &Work<'_>, row: usize, total: &[f32], out: &mut [f32]) {
    let stride = query_stride(work.head_dim);
    let totals = total[row * work.group_len * stride..].chunks_exact(stride);
    for (out, total) in out.chunks_exact_mut(work.head_dim).zip(totals) {
        let scale = 1.0 / total[work.head_dim + 1];
        for (out, &total) in out.iter_mut().zip(total) {
            *out = total * scale;
        }
    }
}
