//! Owns the order in which weights lie in memory for the kernels: strips of 8 outputs, interleaved
//! so that one vector register holds the same inputs of 8 outputs. Knows shapes; checks that they
//! are consistent; knows no tensor names and no arithmetic.

use std::collections::TryReserveError;
use std::ops::Range;

use half::f16;

use super::{F32Strips, Q8Strips, QUANT_BLOCK_LEN};

/// Outputs per strip: one f32 lane each. The last strip of a matrix is padded with zero weights.
pub const STRIP_LEN: usize = 8;

/// Inputs that lie side by side in a [`QuantTile`]: what one 32-bit lane holds.
pub const GROUP_LEN: usize = 4;

/// Results of one strip for one row.
pub type StripOutput = [f32; STRIP_LEN];

/// Weights of 8 outputs for one input.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(32))]
pub struct F32Lanes(pub [f32; STRIP_LEN]);

/// Bits of the half-precision scales of 8 outputs for one block of inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct ScaleLanes(pub [u16; STRIP_LEN]);

/// Quantised weights of 8 outputs for one block of 32 inputs: 8 groups of 4 consecutive inputs,
/// `[group][output * 4 + input]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct QuantTile(pub [[i8; STRIP_LEN * GROUP_LEN]; QUANT_BLOCK_LEN / GROUP_LEN]);

impl QuantTile {
    const ZERO: Self = Self([[0; STRIP_LEN * GROUP_LEN]; QUANT_BLOCK_LEN / GROUP_LEN]);
}

/// A matrix of 32-bit floats in strips.
#[derive(Debug)]
pub struct PackedF32 {
    out_len: usize,
    in_len: usize,
    /// `[strips, in]`.
    lanes: Vec<F32Lanes>,
}

impl PackedF32 {
    /// Packs `[out, in]` row-major numbers.
    ///
    /// # Errors
    /// When the memory is not there.
    ///
    /// # Panics
    /// When the lengths disagree or one is zero.
    pub fn pack(out_len: usize, in_len: usize, data: &[f32]) -> Result<Self, TryReserveError> {
        assert!(out_len > 0 && in_len > 0, "a matrix has rows and columns");
        assert_eq!(Some(data.len()), out_len.checked_mul(in_len), "data has the shape");
        let mut lanes = filled(out_len.div_ceil(STRIP_LEN) * in_len, F32Lanes::default())?;
        for (strip, rows) in lanes.chunks_mut(in_len).zip(data.chunks(in_len * STRIP_LEN)) {
            for (lane, row) in rows.chunks_exact(in_len).enumerate() {
                for (to, &from) in strip.iter_mut().zip(row) {
                    to.0[lane] = from;
                }
            }
        }
        Ok(Self { out_len, in_len, lanes })
    }

    /// Rows of the matrix.
    #[must_use]
    pub fn out_len(&self) -> usize {
        self.out_len
    }

    /// Columns of the matrix.
    #[must_use]
    pub fn in_len(&self) -> usize {
        self.in_len
    }

    /// Number of strips, the padded one included.
    #[must_use]
    pub fn num_strips(&self) -> usize {
        self.out_len.div_ceil(STRIP_LEN)
    }

    /// Some strips.
    #[must_use]
    pub fn strips(&self, strips: Range<usize>) -> F32Strips<'_> {
        let lanes = &self.lanes[strips.start * self.in_len..strips.end * self.in_len];
        F32Strips { lanes, in_len: self.in_len }
    }

    /// Copies one row of the matrix, `[in]`, out.
    ///
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.out_len && out.len() == self.in_len, "the row exists and fits");
        let strip = row / STRIP_LEN;
        for (to, from) in out.iter_mut().zip(self.strips(strip..strip + 1).lanes) {
            *to = from.0[row % STRIP_LEN];
        }
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.lanes.as_slice())
    }
}

/// A Q8_0 matrix in strips: weight = scale * quant, one scale per 32 inputs of an output.
#[derive(Debug)]
pub struct PackedQ8 {
    out_len: usize,
    num_blocks: usize,
    /// `[strips, blocks]`.
    tiles: Vec<QuantTile>,
    /// `[strips, blocks]`.
    scales: Vec<ScaleLanes>,
}

impl PackedQ8 {
    /// Packs `[out, in]` row-major quants with `[out, in / 32]` scales.
    ///
    /// # Errors
    /// When the memory is not there.
    ///
    /// # Panics
    /// When the lengths disagree, one is zero, or `in_len` is no multiple of 32.
    pub fn pack(
        out_len: usize,
        in_len: usize,
        quants: &[i8],
        scales: &[f16],
    ) -> Result<Self, TryReserveError> {
        assert!(out_len > 0 && in_len > 0, "a matrix has rows and columns");
        assert!(in_len.is_multiple_of(QUANT_BLOCK_LEN), "rows are whole blocks");
        assert_eq!(Some(quants.len()), out_len.checked_mul(in_len), "quants have the shape");
        assert_eq!(quants.len() / QUANT_BLOCK_LEN, scales.len(), "one scale per block");
        let num_blocks = in_len / QUANT_BLOCK_LEN;
        let num_tiles = out_len.div_ceil(STRIP_LEN) * num_blocks;
        let mut packed = Self {
            out_len,
            num_blocks,
            tiles: filled(num_tiles, QuantTile::ZERO)?,
            scales: filled(num_tiles, ScaleLanes::default())?,
        };
        for (row, (quants, scales)) in
            quants.chunks_exact(in_len).zip(scales.chunks_exact(num_blocks)).enumerate()
        {
            packed.write_row(row, quants, scales);
        }
        Ok(packed)
    }

    fn write_row(&mut self, row: usize, quants: &[i8], scales: &[f16]) {
        let tiles = row / STRIP_LEN * self.num_blocks..(row / STRIP_LEN + 1) * self.num_blocks;
        let lane = row % STRIP_LEN;
        for (to, from) in self.scales[tiles.clone()].iter_mut().zip(scales) {
            to.0[lane] = from.to_bits();
        }
        for (tile, block) in self.tiles[tiles].iter_mut().zip(quants.chunks(QUANT_BLOCK_LEN)) {
            for (group, from) in tile.0.iter_mut().zip(block.chunks(GROUP_LEN)) {
                group[lane * GROUP_LEN..(lane + 1) * GROUP_LEN].copy_from_slice(from);
            }
        }
    }

    /// Rows of the matrix.
    #[must_use]
    pub fn out_len(&self) -> usize {
        self.out_len
    }

    /// Columns of the matrix.
    #[must_use]
    pub fn in_len(&self) -> usize {
        self.num_blocks * QUANT_BLOCK_LEN
    }

    /// Number of strips, the padded one included.
    #[must_use]
    pub fn num_strips(&self) -> usize {
        self.out_len.div_ceil(STRIP_LEN)
    }

    /// Some strips.
    #[must_use]
    pub fn strips(&self, strips: Range<usize>) -> Q8Strips<'_> {
        let tiles = strips.start * self.num_blocks..strips.end * self.num_blocks;
        Q8Strips {
            tiles: &self.tiles[tiles.clone()],
            scales: &self.scales[tiles],
            num_blocks: self.num_blocks,
        }
    }

    /// Writes one row of the matrix, `[in]`, as floats: scale * quant, which is exact.
    ///
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.out_len && out.len() == self.in_len(), "the row exists and fits");
        let strip = self.strips(row / STRIP_LEN..row / STRIP_LEN + 1);
        let lane = row % STRIP_LEN;
        let blocks = out.chunks_exact_mut(QUANT_BLOCK_LEN).zip(strip.tiles).zip(strip.scales);
        for ((out, tile), scales) in blocks {
            let scale = f16::from_bits(scales.0[lane]).to_f32();
            for (out, group) in out.chunks_exact_mut(GROUP_LEN).zip(&tile.0) {
                for (to, &from) in out.iter_mut().zip(&group[lane * GROUP_LEN..]) {
                    *to = scale * f32::from(from);
                }
            }
        }
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.tiles.as_slice()) + size_of_val(self.scales.as_slice())
    }
}

/// A vector of `len` copies, or an error when the memory is not there.
fn filled<T: Copy>(len: usize, value: T) -> Result<Vec<T>, TryReserveError> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len)?;
    vec.resize(len, value);
    Ok(vec)
}
