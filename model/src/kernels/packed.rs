//! Owns the order in which weights lie in memory for the kernels: strips of 16 outputs, interleaved
//! so that one vector register holds the same inputs of all of them, and a strip is one stream.
//! Knows shapes; checks that they are consistent; knows no tensor names and no arithmetic.

use std::collections::TryReserveError;
use std::ops::Range;

use half::{bf16, f16};

use super::QUANT_BLOCK_LEN;
use super::memory::filled;

/// Outputs per strip: one f32 lane each. The last strip of a matrix is padded with zero weights.
pub const STRIP_LEN: usize = 16;

/// Inputs that lie side by side in a tile: what one 32-bit lane holds.
pub const GROUP_LEN: usize = 4;

/// Groups of a block of inputs.
pub const NUM_GROUPS: usize = QUANT_BLOCK_LEN / GROUP_LEN;

/// Half of a block: what the low nibbles of a [`Q4Tile`] hold; the high ones hold the other.
const HALF_LEN: usize = QUANT_BLOCK_LEN / 2;

/// Weights of one strip for one input.
pub trait Lanes: Copy + Default + Send + Sync {
    /// A weight as it is stored.
    type Weight: Copy;
    /// Sets the weight of one output.
    fn set(&mut self, lane: usize, weight: Self::Weight);
    /// The weight of one output, exactly.
    fn get(&self, lane: usize) -> f32;
}

/// Weights of a strip for one input, 32-bit floats.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C, align(64))]
pub struct F32Lanes(pub [f32; STRIP_LEN]);

/// Weights of a strip for one input, bits of half-precision floats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct F16Lanes(pub [u16; STRIP_LEN]);

/// Weights of a strip for one input, bits of bfloat16: the upper half of a 32-bit float.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct Bf16Lanes(pub [u16; STRIP_LEN]);

impl Lanes for F32Lanes {
    type Weight = f32;
    fn set(&mut self, lane: usize, weight: f32) {
        self.0[lane] = weight;
    }
    fn get(&self, lane: usize) -> f32 {
        self.0[lane]
    }
}

impl Lanes for F16Lanes {
    type Weight = f16;
    fn set(&mut self, lane: usize, weight: f16) {
        self.0[lane] = weight.to_bits();
    }
    fn get(&self, lane: usize) -> f32 {
        f16::from_bits(self.0[lane]).to_f32()
    }
}

impl Lanes for Bf16Lanes {
    type Weight = bf16;
    fn set(&mut self, lane: usize, weight: bf16) {
        self.0[lane] = weight.to_bits();
    }
    fn get(&self, lane: usize) -> f32 {
        bf16::from_bits(self.0[lane]).to_f32()
    }
}

/// Bits of the half-precision scales of a strip for one block of inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct ScaleLanes(pub [u16; STRIP_LEN]);

/// Quantised weights of a strip for one block of 32 inputs.
pub trait BlockTile: Copy + Default + Send + Sync {
    /// Part of a block of one output as files hold it.
    type Stored: Copy;
    /// Parts that make a block.
    const STORED_LEN: usize;
    /// Sets the block of one output, `[STORED_LEN]`.
    fn set(&mut self, lane: usize, block: &[Self::Stored]);
    /// The weight of one output and input without its scale.
    fn get(&self, lane: usize, input: usize) -> i8;
}

/// 8-bit weights of a strip for one block: 8 groups of 4 inputs, `[group][output * 4 + input]`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Q8Tile(pub [GroupLanes; NUM_GROUPS]);

/// Bytes of one group for all outputs of a strip, `[output * 4 + input]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct GroupLanes(pub [i8; STRIP_LEN * GROUP_LEN]);

impl Default for GroupLanes {
    fn default() -> Self {
        Self([0; STRIP_LEN * GROUP_LEN])
    }
}

impl BlockTile for Q8Tile {
    type Stored = i8;
    const STORED_LEN: usize = QUANT_BLOCK_LEN;
    fn set(&mut self, lane: usize, block: &[i8]) {
        for (group, from) in self.0.iter_mut().zip(block.chunks_exact(GROUP_LEN)) {
            group.0[lane * GROUP_LEN..][..GROUP_LEN].copy_from_slice(from);
        }
    }
    fn get(&self, lane: usize, input: usize) -> i8 {
        self.0[input / GROUP_LEN].0[lane * GROUP_LEN + input % GROUP_LEN]
    }
}

/// 4-bit weights of a strip for one block: byte `[group][output * 4 + input]` holds the weight of
/// input `4 * group + input` in its low nibble and that of input `16 + 4 * group + input` in its
/// high one, each 8 too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Q4Tile(pub [GroupLanes; NUM_GROUPS / 2]);

impl Default for Q4Tile {
    /// All weights zero, which nibbles write as 8.
    fn default() -> Self {
        Self([GroupLanes([0x88_u8 as i8; STRIP_LEN * GROUP_LEN]); NUM_GROUPS / 2])
    }
}

impl BlockTile for Q4Tile {
    /// Weight `j` in the low nibble of byte `j`, weight `16 + j` in the high one: GGUF's order.
    type Stored = u8;
    const STORED_LEN: usize = HALF_LEN;
    fn set(&mut self, lane: usize, block: &[u8]) {
        for (group, from) in self.0.iter_mut().zip(block.chunks_exact(GROUP_LEN)) {
            let to = &mut group.0[lane * GROUP_LEN..][..GROUP_LEN];
            for (to, &from) in to.iter_mut().zip(from) {
                *to = from as i8;
            }
        }
    }
    fn get(&self, lane: usize, input: usize) -> i8 {
        let at = input % HALF_LEN;
        let byte = self.0[at / GROUP_LEN].0[lane * GROUP_LEN + at % GROUP_LEN] as u8;
        let nibble = if input < HALF_LEN { byte & 0x0F } else { byte >> 4 };
        nibble as i8 - 8
    }
}

/// Some strips of a matrix of floats.
#[derive(Clone, Copy, Debug)]
pub struct FloatStrips<'a, L> {
    /// Weights, `[strips, in]`.
    pub lanes: &'a [L],
    /// Inputs per strip.
    pub in_len: usize,
}

/// Some strips of a quantised matrix.
#[derive(Clone, Copy, Debug)]
pub struct QuantStrips<'a, T> {
    /// Weights, `[strips, blocks]`.
    pub tiles: &'a [T],
    /// Half-precision scales, `[strips, blocks]` of one scale per output.
    pub scales: &'a [ScaleLanes],
    /// Blocks of 32 inputs per strip.
    pub num_blocks: usize,
}

/// A matrix of floats in strips.
#[derive(Debug)]
pub struct PackedFloats<L> {
    out_len: usize,
    in_len: usize,
    /// `[strips, in]`.
    lanes: Vec<L>,
}

impl<L: Lanes> PackedFloats<L> {
    /// Packs `[out, in]` row-major numbers.
    ///
    /// # Errors
    /// When the memory is not there.
    ///
    /// # Panics
    /// When the lengths disagree or one is zero.
    pub fn pack(
        out_len: usize,
        in_len: usize,
        data: &[L::Weight],
    ) -> Result<Self, TryReserveError> {
        assert!(out_len > 0 && in_len > 0, "a matrix has rows and columns");
        assert_eq!(Some(data.len()), out_len.checked_mul(in_len), "data has the shape");
        let mut lanes = filled(out_len.div_ceil(STRIP_LEN) * in_len, L::default())?;
        for (strip, rows) in lanes.chunks_mut(in_len).zip(data.chunks(in_len * STRIP_LEN)) {
            for (lane, row) in rows.chunks_exact(in_len).enumerate() {
                for (to, &from) in strip.iter_mut().zip(row) {
                    to.set(lane, from);
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

    /// Some strips.
    #[must_use]
    pub fn strips(&self, strips: Range<usize>) -> FloatStrips<'_, L> {
        let lanes = &self.lanes[strips.start * self.in_len..strips.end * self.in_len];
        FloatStrips { lanes, in_len: self.in_len }
    }

    /// Copies one row of the matrix, `[in]`, out.
    ///
    /// # Panics
    /// When there is no such row or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.out_len && out.len() == self.in_len, "the row exists and fits");
        let strip = row / STRIP_LEN;
        for (to, from) in out.iter_mut().zip(self.strips(strip..strip + 1).lanes) {
            *to = from.get(row % STRIP_LEN);
        }
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.lanes.as_slice())
    }
}

/// A quantised matrix in strips: weight = scale * quant, one scale per 32 inputs of an output.
#[derive(Debug)]
pub struct PackedQuants<T> {
    out_len: usize,
    num_blocks: usize,
    /// `[strips, blocks]`.
    tiles: Vec<T>,
    /// `[strips, blocks]`.
    scales: Vec<ScaleLanes>,
}

impl<T: BlockTile> PackedQuants<T> {
    /// Packs `[out, in]` row-major weights as files hold them, block by block, with
    /// `[out, in / 32]` scales.
    ///
    /// # Errors
    /// When the memory is not there.
    ///
    /// # Panics
    /// When the lengths disagree, one is zero, or `in_len` is no multiple of 32.
    pub fn pack(
        out_len: usize,
        in_len: usize,
        stored: &[T::Stored],
        scales: &[f16],
    ) -> Result<Self, TryReserveError> {
        assert!(out_len > 0 && in_len > 0, "a matrix has rows and columns");
        assert!(in_len.is_multiple_of(QUANT_BLOCK_LEN), "rows are whole blocks");
        let num_blocks = in_len / QUANT_BLOCK_LEN;
        assert_eq!(Some(scales.len()), out_len.checked_mul(num_blocks), "scales have the shape");
        assert_eq!(Some(stored.len()), scales.len().checked_mul(T::STORED_LEN), "so do blocks");
        let num_tiles = out_len.div_ceil(STRIP_LEN) * num_blocks;
        let mut tiles = filled(num_tiles, T::default())?;
        let mut lanes = filled(num_tiles, ScaleLanes::default())?;
        let rows = stored.chunks_exact(num_blocks * T::STORED_LEN);
        for (row, (stored, scales)) in rows.zip(scales.chunks_exact(num_blocks)).enumerate() {
            let (strip, lane) = (row / STRIP_LEN * num_blocks, row % STRIP_LEN);
            let tiles = &mut tiles[strip..strip + num_blocks];
            for (tile, block) in tiles.iter_mut().zip(stored.chunks_exact(T::STORED_LEN)) {
                tile.set(lane, block);
            }
            for (to, from) in lanes[strip..strip + num_blocks].iter_mut().zip(scales) {
                to.0[lane] = from.to_bits();
            }
        }
        Ok(Self { out_len, num_blocks, tiles, scales: lanes })
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

    /// Some strips.
    #[must_use]
    pub fn strips(&self, strips: Range<usize>) -> QuantStrips<'_, T> {
        let tiles = strips.start * self.num_blocks..strips.end * self.num_blocks;
        QuantStrips {
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
            for (input, to) in out.iter_mut().enumerate() {
                *to = scale * f32::from(tile.get(lane, input));
            }
        }
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.tiles.as_slice()) + size_of_val(self.scales.as_slice())
    }
}
