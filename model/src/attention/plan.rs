//! Owns how the attention of a step is cut: tiles, and the splits of tiles where there are too few
//! of them. Knows lengths; computes nothing and cannot change a bit.

use super::RowPlace;
use crate::kernels::SPLIT_LEN;

/// Queries of a tile, about: what is computed between two passes over keys and values stays in the
/// nearer caches.
const TILE_QUERIES: usize = 128;

/// Rows of a tile: at least as many as the longest proposal has with the row before it, so that a
/// step of plain or speculative decoding reads the keys and values of a sequence once.
const TILE_ROWS: std::ops::RangeInclusive<usize> = 9..=16;

/// Some rows of a segment with the query heads of one key/value head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    /// Index of the segment in the batch.
    pub(super) segment: usize,
    /// The key/value head.
    pub(super) kv_head: usize,
    /// Its first row among those to compute.
    pub(super) first_row: usize,
    /// Rows.
    pub(super) num_rows: usize,
    /// Position of its first row.
    pub(super) start: usize,
    /// Number of its first piece, once it is cut.
    pub(super) first_piece: usize,
}

impl Tile {
    /// Positions that its last row sees.
    pub(super) fn end(&self) -> usize {
        self.start + self.num_rows
    }

    /// Splits that its last row sees.
    pub(super) fn num_splits(&self) -> usize {
        self.end().div_ceil(SPLIT_LEN)
    }

    /// Splits that one of its rows sees.
    pub(super) fn num_splits_of(&self, row: usize) -> usize {
        (self.start + row + 1).div_ceil(SPLIT_LEN)
    }

    /// Its first row that sees a position; the number of its rows when none does.
    pub(super) fn first_row_at(&self, position: usize) -> usize {
        position.saturating_sub(self.start).min(self.num_rows)
    }

    /// Positions that its rows see, added up.
    fn cost(&self) -> usize {
        self.num_rows * (2 * self.start + self.num_rows + 1) / 2
    }
}

/// One split of a tile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) tile: usize,
    pub(super) split: usize,
}

/// How consecutive rows of one segment are cut.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// Its first row among those to compute.
    first_row: usize,
    /// Number of its first tile.
    first_tile: usize,
    /// Tiles per key/value head.
    num: usize,
    /// Rows of all tiles but the last one.
    rows: usize,
}

/// All tiles of a step. Reused from step to step.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// By run, key/value head, rows: neighbours read the same keys and values.
    tiles: Vec<Tile>,
    runs: Vec<Run>,
    pieces: Vec<Piece>,
    queries_max: usize,
    /// Positions that queries see, added up.
    cost: usize,
    /// The same for the dearest tile.
    tile_cost_max: usize,
}

impl Plan {
    /// Cuts rows into tiles.
    pub(super) fn make(&mut self, places: &[RowPlace], num_kv_heads: usize, group_len: usize) {
        self.tiles.clear();
        self.runs.clear();
        self.pieces.clear();
        (self.queries_max, self.cost, self.tile_cost_max) = (0, 0, 0);
        let mut first_row = 0;
        let follows =
            |a: &RowPlace, b: &RowPlace| a.segment == b.segment && a.position + 1 == b.position;
        for run in places.chunk_by(follows) {
            self.add_run(run, first_row, (num_kv_heads, group_len));
            first_row += run.len();
        }
    }

    fn add_run(
        &mut self,
        run: &[RowPlace],
        first_row: usize,
        (num_kv_heads, group_len): (usize, usize),
    ) {
        let rows_max = (TILE_QUERIES / group_len).clamp(*TILE_ROWS.start(), *TILE_ROWS.end());
        let num_rows = run.len();
        let rows = num_rows.div_ceil(num_rows.div_ceil(rows_max));
        let num = num_rows.div_ceil(rows);
        self.runs.push(Run { first_row, first_tile: self.tiles.len(), num, rows });
        self.queries_max = self.queries_max.max(rows * group_len);
        for kv_head in 0..num_kv_heads {
            for row in (0..num_rows).step_by(rows) {
                let RowPlace { segment, position: start } = run[row];
                let tile = Tile {
                    segment,
                    kv_head,
                    first_row: first_row + row,
                    num_rows: rows.min(num_rows - row),
                    start,
                    first_piece: 0,
                };
                let cost = tile.cost() * group_len;
                self.cost += cost;
                self.tile_cost_max = self.tile_cost_max.max(cost);
                self.tiles.push(tile);
            }
        }
    }

    /// Cuts the tiles into their splits.
    pub(super) fn cut(&mut self) {
        self.pieces.clear();
        for (index, tile) in self.tiles.iter_mut().enumerate() {
            tile.first_piece = self.pieces.len();
            let splits = 0..tile.num_splits();
            self.pieces.extend(splits.map(|split| Piece { tile: index, split }));
        }
    }

    /// Whether whole tiles can keep so many threads busy, or splits would not be better.
    pub(super) fn is_balanced(&self, num_threads: usize) -> bool {
        let is_fine = self.tile_cost_max.saturating_mul(2 * num_threads) <= self.cost;
        is_fine || self.tiles.iter().all(|tile| tile.num_splits() == 1)
    }

    /// The tiles.
    pub(super) fn tiles(&self) -> &[Tile] {
        &self.tiles
    }

    /// The splits of all tiles, those of one in order and one after the other.
    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Most queries of a tile.
    pub(super) fn queries_max(&self) -> usize {
        self.queries_max
    }

    /// Positions that all queries see, added up.
    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// Where a row is computed for a key/value head: the tile and the row in it.
    pub(super) fn find(&self, row: usize, kv_head: usize) -> (usize, usize) {
        let run = self.runs.partition_point(|run| run.first_row <= row) - 1;
        let Run { first_row, first_tile, num, rows } = self.runs[run];
        let row = row - first_row;
        (first_tile + kv_head * num + row / rows, row % rows)
    }
}
