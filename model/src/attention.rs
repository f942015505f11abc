//! Owns causal attention through block tables. Row-invariant: positions are taken in fixed splits
//! of [`SPLIT_LEN`](crate::kernels) absolute positions whose partial results are merged in
//! order, so that a row's bits depend on its own sequence up to itself and on nothing else. Knows
//! no layers' weights.
//!
//! Work is cut into tiles: some rows of one segment with the query heads of one key/value head,
//! which read their keys and values once for all of them (`attention/tile.rs`). Where there are too
//! few tiles for the team, the splits of a tile are computed apart and merged afterwards
//! (`attention/plan.rs` decides). How work is cut cannot change a bit.

mod plan;
mod tile;

use std::sync::{Mutex, MutexGuard, TryLockError};

use self::plan::{Piece, Plan};
use self::tile::{Room, Work, merge, query_stride, start, write_total};
use crate::aligned::Aligned;
use crate::batch::RaggedBatch;
use crate::kernels::Isa;
use crate::kernels::team::Team;
use crate::kv_pool::KvPool;

/// Widest head. A bound for what loaders accept.
pub const HEAD_DIM_MAX: usize = 1024;

/// Multiply-adds (keys and values together) below which the caller works alone.
const TEAM_MACS_MIN: usize = 1 << 20;

/// Numbers of output below which the caller writes them alone.
const TEAM_OUTPUT_MIN: usize = 1 << 16;

/// Most floats of results that wait to be merged, unless the team needs more to be busy: 32 MiB.
const PARTIAL_FLOATS_MAX: usize = 8 << 20;

/// Where a row stands.
#[derive(Clone, Copy, Debug)]
pub struct RowPlace {
    /// Index of its segment in the batch.
    pub segment: usize,
    /// Its absolute position.
    pub position: usize,
}

/// What attention reads, and the room it works in.
#[derive(Debug)]
pub struct Attention<'a> {
    /// Implementation of the kernels.
    pub isa: Isa,
    /// Keys and values; those of the batch's own rows are written already.
    pub pool: &'a KvPool,
    /// Layer of the pool.
    pub layer: usize,
    /// The batch, for its segments and block tables.
    pub batch: &'a RaggedBatch,
    /// Places of the rows to compute, `[rows]`: all of the batch, or those that are still wanted.
    pub places: &'a [RowPlace],
    /// Rotated queries, `[rows, num_heads, head_dim]`.
    pub queries: &'a [f32],
    /// Width of a head.
    pub head_dim: usize,
    /// Query heads per key/value head.
    pub group_len: usize,
    /// Room to work in, kept from step to step.
    pub scratch: &'a mut AttentionScratch,
}

/// Room that attention works in. Grows to what the largest step needed and keeps it: linear in the
/// rows of a step and in the threads.
#[derive(Debug)]
pub struct AttentionScratch {
    plan: Plan,
    /// One per thread; whoever is free is taken.
    rooms: Vec<Mutex<Room>>,
    /// What the rows have so far, `[tiles, queries, head_dim + SUM_EXTRA]`.
    totals: Aligned<f32>,
    /// Splits to be merged, `[pieces, queries, head_dim + SUM_EXTRA]`.
    partials: Aligned<f32>,
    /// Multiply-adds from which work is shared.
    team_macs_min: usize,
    /// See [`PARTIAL_FLOATS_MAX`].
    partial_floats_max: usize,
}

impl Default for AttentionScratch {
    fn default() -> Self {
        Self {
            plan: Plan::default(),
            rooms: Vec::new(),
            totals: Aligned::default(),
            partials: Aligned::default(),
            team_macs_min: TEAM_MACS_MIN,
            partial_floats_max: PARTIAL_FLOATS_MAX,
        }
    }
}

impl AttentionScratch {
    /// Shares work from `macs` multiply-adds on with the team, and lets at most `partial_floats`
    /// wait to be merged. For tests and measurements: it cannot change a bit.
    pub fn share_from(&mut self, macs: usize, partial_floats: usize) {
        self.team_macs_min = macs;
        self.partial_floats_max = partial_floats;
    }

    /// Memory held for results and the threads' work, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let rooms = self.rooms.iter().map(|room| match room.lock() {
            Ok(room) => room.num_floats(),
            Err(poisoned) => poisoned.into_inner().num_floats(),
        });
        let floats = self.totals.as_slice().len() + self.partials.as_slice().len();
        (floats + rooms.sum::<usize>()) * size_of::<f32>()
    }
}

impl Attention<'_> {
    /// Writes `[rows, num_heads, head_dim]`: for every row and head the values of positions up to
    /// the row's own, weighted by softmax of query times key over `sqrt(head_dim)`
    /// (arXiv 1706.03762, equation 1).
    ///
    /// # Panics
    /// When the shapes disagree or memory for the scratch runs out.
    pub fn run(self, team: &mut Team, out: &mut [f32]) {
        assert_eq!(self.queries.len(), out.len(), "one output per query");
        if out.is_empty() {
            return;
        }
        let group_floats = self.group_len * self.head_dim;
        let row_floats = out.len() / self.places.len();
        assert!(row_floats.is_multiple_of(group_floats), "a row is whole groups of heads");
        let num_kv_heads = row_floats / group_floats;
        let scratch = self.scratch;
        scratch.plan.make(self.places, num_kv_heads, self.group_len);
        let work = Work {
            isa: self.isa,
            pool: self.pool,
            layer: self.layer,
            batch: self.batch,
            queries: self.queries,
            head_dim: self.head_dim,
            group_len: self.group_len,
            num_kv_heads,
        };
        Shared { work, scratch }.run(team, out);
    }
}

/// One run: the work and the room for it.
struct Shared<'a> {
    work: Work<'a>,
    scratch: &'a mut AttentionScratch,
}

impl Shared<'_> {
    fn run(self, team: &mut Team, out: &mut [f32]) {
        let Self { work, scratch } = self;
        let AttentionScratch { plan, rooms, totals, partials, .. } = scratch;
        let num_threads = team.num_threads();
        if rooms.len() < num_threads {
            rooms.resize_with(num_threads, Mutex::default);
        }
        for room in rooms.iter_mut() {
            let room = room.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
            room.make(plan.queries_max(), work.head_dim);
        }
        let record_len = plan.queries_max() * query_stride(work.head_dim);
        let totals = totals.at_least(plan.tiles().len() * record_len);
        let macs = plan.cost().saturating_mul(2 * work.head_dim);
        let is_shared = num_threads > 1 && macs >= scratch.team_macs_min;
        if !is_shared {
            let mut room = take(rooms);
            for (tile, total) in plan.tiles().iter().zip(totals.chunks_exact_mut(record_len)) {
                work.whole(tile, &mut room, total);
            }
        } else if plan.is_balanced(num_threads) {
            team.run_chunks(totals, record_len, |tile, total| {
                work.whole(&plan.tiles()[tile], &mut take(rooms), total);
            });
        } else {
            plan.cut();
            let waiting_max = (scratch.partial_floats_max / record_len).max(2 * num_threads);
            let pieces = Pieces { work, plan, rooms, record_len };
            for (wave, pieces_of_wave) in plan.pieces().chunks(waiting_max).enumerate() {
                let partials = partials.at_least(pieces_of_wave.len() * record_len);
                pieces.compute(team, pieces_of_wave, partials);
                pieces.merge(team, pieces_of_wave, wave * waiting_max, (partials, totals));
            }
        }
        let totals = &*totals;
        let row_floats = work.num_kv_heads * work.group_len * work.head_dim;
        let write_row = |row: usize, out: &mut [f32]| {
            for (kv_head, out) in out.chunks_exact_mut(work.head_dim * work.group_len).enumerate() {
                let (tile, row) = plan.find(row, kv_head);
                let total = &totals[tile * record_len..][..record_len];
                write_total(&work, row, total, out);
            }
        };
        if is_shared && out.len() >= TEAM_OUTPUT_MIN {
            team.run_chunks(out, row_floats, write_row);
        } else {
            let rows = out.chunks_exact_mut(row_floats).enumerate();
            rows.for_each(|(row, out)| write_row(row, out));
        }
    }
}

/// Splits computed apart.
struct Pieces<'a> {
    work: Work<'a>,
    plan: &'a Plan,
    rooms: &'a [Mutex<Room>],
    record_len: usize,
}

impl Pieces<'_> {
    /// `partials` is `[pieces, queries, head_dim + SUM_EXTRA]`.
    fn compute(&self, team: &mut Team, pieces: &[Piece], partials: &mut [f32]) {
        team.run_chunks(partials, self.record_len, |index, sums| {
            let Piece { tile, split } = pieces[index];
            self.work.piece(&self.plan.tiles()[tile], split, &mut take(self.rooms), sums);
        });
    }

    /// Merges the splits of a wave, in order, into the totals of their tiles; the first tile's
    /// first splits may have been merged before, its last tile's may follow later.
    /// `first_piece` is the number of the wave's first piece.
    fn merge(
        &self,
        team: &mut Team,
        pieces: &[Piece],
        first_piece: usize,
        (partials, totals): (&[f32], &mut [f32]),
    ) {
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return };
        let totals = &mut totals[first.tile * self.record_len..(last.tile + 1) * self.record_len];
        let stride = query_stride(self.work.head_dim);
        team.run_chunks(totals, stride, |index, total| {
            let (tile_index, query) =
                (first.tile + index / self.plan.queries_max(), index % self.plan.queries_max());
            let tile = &self.plan.tiles()[tile_index];
            if query >= tile.num_rows * self.work.group_len {
                return;
            }
            let first_split = if tile_index == first.tile { first.split } else { 0 };
            if first_split == 0 {
                start(total, self.work.head_dim);
            }
            let num_splits = tile.num_splits_of(query / self.work.group_len);
            for split in first_split..num_splits {
                let piece = tile.first_piece + split - first_piece;
                if piece >= pieces.len() {
                    return;
                }
                let sums = &partials[piece * self.record_len + query * stride..][..stride];
                merge(total, sums, self.work.head_dim);
            }
        });
    }
}

/// A room that nobody is in. There is one for every thread.
fn take(rooms: &[Mutex<Room>]) -> MutexGuard<'_, Room> {
    loop {
        for room in rooms {
            match room.try_lock() {
                Ok(room) => return room,
                // A panic left it in the middle: what is in a room is written before it is read.
                Err(TryLockError::Poisoned(room)) => return room.into_inner(),
                Err(TryLockError::WouldBlock) => {}
            }
        }
    }
}
