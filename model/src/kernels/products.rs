//! Owns matrix products as everybody else calls them: the types of what is multiplied, checks of
//! every length, and what becomes of the sums. How they are computed is in the implementations.

use super::packed::{
    Bf16Lanes, BlockTile, F16Lanes, F32Lanes, FloatStrips, Lanes, Q4Tile, Q8Tile, QuantStrips,
    STRIP_LEN,
};
use super::tile::Tile;
use super::{Isa, QUANT_BLOCK_LEN};

/// What becomes of the sums of a product, element by element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = sum`.
    Store,
    /// `out = out + sum`: the residual stream.
    Add,
    /// `out = swiglu(out, sum)`: `out` holds the gate, the product is the other half. See
    /// [`swiglu`](super::swiglu).
    SwiGlu,
}

/// Rows that share loaded quantised weights, at most: as many integer and as many float sums take
/// 16 of the 32 registers that AVX-512 has.
pub const ROWS_MAX: usize = 8;

/// Where the sums of a strip go.
pub(super) struct StripPlace {
    /// The strip.
    pub(super) index: usize,
    /// First row of the tile in hand.
    pub(super) first_row: usize,
    /// What becomes of them.
    pub(super) epilogue: Epilogue,
}

/// A block of 32 quantised activations: value = scale * quant.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct QuantBlock {
    /// The scale; NaN when a value was not finite.
    pub scale: f32,
    /// -8 times the sum of the quants. Kernels that multiply weights made unsigned by adding 8
    /// start their integer sums here; those that add 128, at 16 times this.
    pub offset: i32,
    /// Each within -127 ..= 127.
    pub quants: [i8; QUANT_BLOCK_LEN],
}

/// Quantised rows.
#[derive(Clone, Copy, Debug)]
pub struct QuantRows<'a> {
    /// `[rows, blocks]`.
    pub blocks: &'a [QuantBlock],
}

/// A product with float weights, in the table of an implementation.
pub(super) type FloatProduct<L> = fn(&FloatStrips<'_, L>, &[f32], Epilogue, &mut Tile<'_>);

/// A product with quantised weights, in the table of an implementation.
pub(super) type QuantProduct<T> = fn(&QuantStrips<'_, T>, &QuantRows<'_>, Epilogue, &mut Tile<'_>);

/// Float weights that there are kernels for.
pub trait FloatWeights: Lanes + sealed::FloatKernel {}

/// Quantised weights that there are kernels for.
pub trait QuantWeights: BlockTile + sealed::QuantKernel {}

impl FloatWeights for F32Lanes {}
impl FloatWeights for F16Lanes {}
impl FloatWeights for Bf16Lanes {}
impl QuantWeights for Q8Tile {}
impl QuantWeights for Q4Tile {}

/// Which entry of a table is whose. Private, so that nobody else adds weights without kernels.
mod sealed {
    use super::super::Isa;
    use super::{Bf16Lanes, F16Lanes, F32Lanes, FloatProduct, Q4Tile, Q8Tile, QuantProduct};

    /// Where the kernel of float weights is.
    pub trait FloatKernel: Sized {
        fn of(isa: Isa) -> FloatProduct<Self>;
    }

    /// Where the kernel of quantised weights is.
    pub trait QuantKernel: Sized {
        fn of(isa: Isa) -> QuantProduct<Self>;
    }

    impl FloatKernel for F32Lanes {
        fn of(isa: Isa) -> FloatProduct<Self> {
            isa.kernels().product_f32
        }
    }

    impl FloatKernel for F16Lanes {
        fn of(isa: Isa) -> FloatProduct<Self> {
            isa.kernels().product_f16
        }
    }

    impl FloatKernel for Bf16Lanes {
        fn of(isa: Isa) -> FloatProduct<Self> {
            isa.kernels().product_bf16
        }
    }

    impl QuantKernel for Q8Tile {
        fn of(isa: Isa) -> QuantProduct<Self> {
            isa.kernels().product_q8_0
        }
    }

    impl QuantKernel for Q4Tile {
        fn of(isa: Isa) -> QuantProduct<Self> {
            isa.kernels().product_q4_0
        }
    }
}

/// Product with float weights: `sum[row, o] = sum over k of weights[o, k] * input[row, k]`,
/// starting from 0, with one fused multiply-add per `k`, in order; half-precision weights are
/// widened first, which is exact. Then the epilogue.
///
/// `input` is `[rows, in]`; `out` has as many rows, and columns for all but the padding of the last
/// strip.
///
/// # Panics
/// When the lengths disagree.
pub fn product_floats<L: FloatWeights>(
    isa: Isa,
    weights: FloatStrips<'_, L>,
    input: &[f32],
    epilogue: Epilogue,
    out: &mut Tile<'_>,
) {
    let FloatStrips { lanes, in_len } = weights;
    assert!(in_len > 0 && lanes.len().is_multiple_of(in_len), "weights are whole strips");
    assert_eq!(Some(input.len()), out.num_rows().checked_mul(in_len), "one input per output row");
    assert_eq!(lanes.len() / in_len, out.row_len().div_ceil(STRIP_LEN), "out has the strips");
    L::of(isa)(&weights, input, epilogue, out);
}

/// Product with quantised weights: for every block of 32 inputs, in order,
/// `sum = fma(weight_scale * input_scale, exact integer dot product, sum)`, starting from 0. Then
/// the epilogue.
///
/// `out` has as many rows as the input, and columns for all but the padding of the last strip.
///
/// # Panics
/// When the lengths disagree.
pub fn product_quants<T: QuantWeights>(
    isa: Isa,
    weights: QuantStrips<'_, T>,
    input: QuantRows<'_>,
    epilogue: Epilogue,
    out: &mut Tile<'_>,
) {
    let QuantStrips { tiles, scales, num_blocks } = weights;
    assert!(num_blocks > 0 && tiles.len().is_multiple_of(num_blocks), "whole strips");
    assert_eq!(tiles.len(), scales.len(), "one group of scales per tile");
    let input_len = out.num_rows().checked_mul(num_blocks);
    assert_eq!(Some(input.blocks.len()), input_len, "one input per output row");
    assert_eq!(tiles.len() / num_blocks, out.row_len().div_ceil(STRIP_LEN), "out has the strips");
    T::of(isa)(&weights, &input, epilogue, out);
}

/// Quantises activations, block by block of 32. With `amax` the largest magnitude of a block:
/// `scale = amax / 127`, `quant = round_ties_even(x * (127 / amax))`. A block with a NaN or an
/// infinity gets scale NaN and quants 0, one with `amax <` [`AMAX_MIN`](super::AMAX_MIN) gets scale
/// 0 and quants 0.
///
/// `values` is `[n]`, `blocks` is `[n / 32]`.
///
/// # Panics
/// When the lengths disagree or are no multiple of 32.
pub fn quantise(isa: Isa, values: &[f32], blocks: &mut [QuantBlock]) {
    let num_values = blocks.len().checked_mul(QUANT_BLOCK_LEN);
    assert_eq!(Some(values.len()), num_values, "values are whole blocks");
    (isa.kernels().quantise)(values, blocks);
}
