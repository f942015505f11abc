//! Owns rectangles of a row-major matrix that different threads write at the same time. Knows rows
//! and columns; knows nothing of what is written.
#![allow(unsafe_code)] // parts of one matrix are handed out by number

use std::marker::PhantomData;
use std::ops::Range;

/// Some rows and columns of a matrix, for writing.
#[derive(Debug)]
pub struct Tile<'a> {
    /// First number of the first row.
    first: *mut f32,
    /// From one row to the next.
    stride: usize,
    num_rows: usize,
    row_len: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

impl<'a> Tile<'a> {
    /// All of a matrix `[rows, row_len]`.
    ///
    /// # Panics
    /// When `data` is not whole rows.
    #[must_use]
    pub fn whole(data: &'a mut [f32], row_len: usize) -> Self {
        assert!(row_len > 0 && data.len().is_multiple_of(row_len), "a matrix is whole rows");
        let num_rows = data.len() / row_len;
        Self { first: data.as_mut_ptr(), stride: row_len, num_rows, row_len, matrix: PhantomData }
    }

    /// Some of its columns.
    ///
    /// # Panics
    /// When it does not have them.
    #[must_use]
    pub fn columns(self, columns: Range<usize>) -> Self {
        assert!(columns.start <= columns.end && columns.end <= self.row_len, "columns of the tile");
        // Wrapping, because a tile without rows has nothing to point into.
        let first = self.first.wrapping_add(columns.start);
        Self { first, row_len: columns.len(), ..self }
    }

    /// Rows of the tile.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// Columns of the tile.
    #[must_use]
    pub fn row_len(&self) -> usize {
        self.row_len
    }

    /// One row of the tile, `[row_len]`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.num_rows, "the row is in the tile");
        // SAFETY: whoever made the tile holds all its rows mutably for 'a and handed them to
        // nobody else; the row is one of them, and the borrow of the tile keeps it the only one.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.stride), self.row_len) }
    }
}

/// How a matrix is cut into tiles.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Rows of the matrix.
    pub num_rows: usize,
    /// Columns of the matrix.
    pub row_len: usize,
    /// Rows per tile, the last may have fewer; at least 1.
    pub tile_rows: usize,
    /// Columns per tile, the last may have fewer; at least 1.
    pub tile_columns: usize,
}

/// Where a tile lies in its matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its rows.
    pub rows: Range<usize>,
    /// Its columns.
    pub columns: Range<usize>,
}

impl Grid {
    /// Number of tiles.
    #[must_use]
    pub fn num_tiles(&self) -> usize {
        self.num_rows.div_ceil(self.tile_rows) * self.row_len.div_ceil(self.tile_columns)
    }

    /// Where a tile lies. Tiles of the same columns follow each other.
    fn place(&self, tile: usize) -> Place {
        let tiles_down = self.num_rows.div_ceil(self.tile_rows);
        let (row, column) =
            (tile % tiles_down * self.tile_rows, tile / tiles_down * self.tile_columns);
        Place {
            rows: row..(row + self.tile_rows).min(self.num_rows),
            columns: column..(column + self.tile_columns).min(self.row_len),
        }
    }
}

/// A matrix that is handed out tile by tile.
pub(super) struct SharedMatrix<'a> {
    first: *mut f32,
    grid: Grid,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only thing done with a shared one is to derive tiles, which is the unsafe method
// below; numbers may be written from any thread.
unsafe impl Sync for SharedMatrix<'_> {}

impl<'a> SharedMatrix<'a> {
    /// Takes the matrix for as long as tiles of it are written.
    ///
    /// # Panics
    /// When `data` has another shape than the grid, or tiles are empty.
    pub(super) fn new(data: &'a mut [f32], grid: Grid) -> Self {
        assert_eq!(Some(data.len()), grid.num_rows.checked_mul(grid.row_len), "the grid's shape");
        assert!(grid.tile_rows > 0 && grid.tile_columns > 0, "a tile holds something");
        Self { first: data.as_mut_ptr(), grid, matrix: PhantomData }
    }

    pub(super) fn num_tiles(&self) -> usize {
        self.grid.num_tiles()
    }

    /// One tile and where it lies.
    ///
    /// # Safety
    /// Each number is asked for once.
    pub(super) unsafe fn tile(&self, tile: usize) -> (Place, Tile<'_>) {
        assert!(tile < self.num_tiles(), "the tile is in the grid");
        let place = self.grid.place(tile);
        let stride = self.grid.row_len;
        // SAFETY: the place lies within the matrix, whose length was checked.
        let first = unsafe { self.first.add(place.rows.start * stride + place.columns.start) };
        let (num_rows, row_len) = (place.rows.len(), place.columns.len());
        (place, Tile { first, stride, num_rows, row_len, matrix: PhantomData })
    }
}
