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
    /// Its first row within the rows that attend.
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

/// How the rows of a segment are cut.
#[derive(Clone, Copy, Debug, Default)]
struct SegmentTiles {
    /// Position of its first row that attends.
    start: usize,
    /// Number of its first tile.
    first: usize,
    /// Tiles per key/value head.
    num: usize,
    /// Rows of all tiles but the last one.
    rows: usize,
}

/// All tiles of a step. Reused from step to step.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// By segment, key/value head, rows: neighbours read the same keys and values.
    tiles: Vec<Tile>,
    segments: Vec<SegmentTiles>,
    pieces: Vec<Piece>,
    queries_max: usize,
    /// Positions that queries see, added up.
    cost: usize,
    /// The same for the dearest tile.
    tile_cost_max: usize,
}

impl Plan {
    /// Cuts rows into tiles. Rows of a segment follow each other in order of position; segments
    /// may be left out.
    pub(super) fn make(&mut self, places: &[RowPlace], num_kv_heads: usize, group_len: usize) {
        let Self { tiles, segments, pieces, queries_max, cost, tile_cost_max } = self;
        (tiles.clear(), segments.clear(), pieces.clear());
        (*queries_max, *cost, *tile_cost_max) = (0, 0, 0);
        let rows_max = (TILE_QUERIES / group_len).clamp(*TILE_ROWS.start(), *TILE_ROWS.end());
        let mut first_row = 0;
        for part in places.chunk_by(|a, b| a.segment == b.segment) {
            let RowPlace { segment, position: start } = part[0];
            let num_rows = part.len();
            let num = num_rows.div_ceil(rows_max);
            let rows = num_rows.div_ceil(num);
            let num = num_rows.div_ceil(rows);
            segments.resize(segment, SegmentTiles::default());
            segments.push(SegmentTiles { start, first: tiles.len(), num, rows });
            *queries_max = (*queries_max).max(rows * group_len);
            for kv_head in 0..num_kv_heads {
                for row in (0..num_rows).step_by(rows) {
                    let tile = Tile {
                        segment,
                        kv_head,
                        first_row: first_row + row,
                        num_rows: rows.min(num_rows - row),
                        start: start + row,
                        first_piece: 0,
                    };
                    let tile_cost = tile.cost() * group_len;
                    *cost += tile_cost;
                    *tile_cost_max = (*tile_cost_max).max(tile_cost);
                    tiles.push(tile);
                }
            }
            first_row += num_rows;
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
    pub(super) fn find(&self, place: RowPlace, kv_head: usize) -> (usize, usize) {
        let SegmentTiles { start, first, num, rows } = self.segments[place.segment];
        let row = place.position - start;
        (first + kv_head * num + row / rows, row % rows)
    }
}
