//! Owns the rounding of 32-bit weights to Q8_0 and Q4_0, and the exact way back from every format.
//! Knows blocks of 32 weights; knows neither matrices' roles nor files. Plain operations on 32-bit
//! floats in a fixed order: the same weights give the same quants on every machine.

use half::f16;

use crate::weights::{MatrixData, Q4_0_BLOCK_LEN, Q4_0_ZERO, Q8_0_BLOCK_LEN};

/// Largest magnitude of a quant that we write. Files may hold -128 too.
const Q8_0_MAX_QUANT: f32 = 127.0;
/// Smallest and largest number that a nibble stands for.
const Q4_0_LEVELS: (f32, f32) = (-8.0, 7.0);
/// Where the search for a scale begins: the weight of largest magnitude is put at minus this many
/// scales. Under 8 the whole range is used and a little cut off, over 8 all of it is kept. On
/// normally distributed weights these five come within 0.7 % of the error that 38 starts reach.
const Q4_0_STARTS: [f32; 5] = [7.2, 7.7, 8.2, 8.7, 9.2];
/// Blocks whose largest weight is smaller become zeros: their scale would be less than half of the
/// smallest half-precision number, `2^-24`.
const Q4_0_MIN_LARGEST: f32 = 1.0 / (1 << 22) as f32;
/// Adding and subtracting it rounds floats under `2^22` to integers, halves to the even one.
const ROUNDER: f32 = (3 << 22) as f32;
/// Partial sums of a block.
const LANES: usize = 8;

/// Scales and quants of a matrix in the Q8_0 format: `[len / 32]` and `[len]`.
pub type Q8Blocks = (Vec<f16>, Vec<i8>);

/// Scales and nibbles of a matrix in the Q4_0 format: `[len / 32]` and `[len / 2]`.
pub type Q4Blocks = (Vec<f16>, Vec<u8>);

/// Rounds `[out * in]` weights, `in` a multiple of 32, block by block: `d = max|x| / 127` kept as
/// half precision, `q = round(x * (1 / d))` with the unrounded `d`, halves away from zero. This is
/// the reference rule of ggml for its Q8_0 type, so that files it wrote can be reproduced.
///
/// `None` when a block is too large for a half-precision scale.
///
/// # Panics
/// When the length is no multiple of 32: callers check row lengths first.
#[must_use]
pub fn quantize_q8_0(weights: &[f32]) -> Option<Q8Blocks> {
    assert!(weights.len().is_multiple_of(Q8_0_BLOCK_LEN), "weights end inside a block");
    let mut scales = Vec::with_capacity(weights.len() / Q8_0_BLOCK_LEN);
    let mut quants = Vec::with_capacity(weights.len());
    for block in weights.chunks_exact(Q8_0_BLOCK_LEN) {
        let largest = block.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let scale = largest / Q8_0_MAX_QUANT;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let stored = f16::from_f32(scale);
        if !stored.is_finite() {
            return None;
        }
        scales.push(stored);
        // A subnormal scale has an infinite inverse; the clamp keeps even that in range.
        quants.extend(
            block
                .iter()
                .map(|x| (x * inverse).round().clamp(-Q8_0_MAX_QUANT, Q8_0_MAX_QUANT) as i8),
        );
    }
    Some((scales, quants))
}

/// `scale * quant` for every weight, `[len]`. Exact: 11 bits times 8 bits fit `f32`.
#[must_use]
pub fn dequantize_q8_0(scales: &[f16], quants: &[i8]) -> Vec<f32> {
    let mut weights = Vec::with_capacity(quants.len());
    for (scale, block) in scales.iter().zip(quants.chunks_exact(Q8_0_BLOCK_LEN)) {
        let scale = scale.to_f32();
        weights.extend(block.iter().map(|q| scale * f32::from(*q)));
    }
    weights
}

/// Rounds `[out * in]` weights, `in` a multiple of 32, block by block, to the scale and quants with
/// the least sum of squared errors that a search finds. From each start it rounds the weights,
/// takes the scale that fits those quants best (`sum(x * q) / sum(q * q)`), keeps it as half
/// precision and rounds the weights anew; the first of the best is taken.
///
/// `None` when a block is too large for a half-precision scale.
///
/// # Panics
/// When the length is no multiple of 32: callers check row lengths first.
#[must_use]
pub fn quantize_q4_0(weights: &[f32]) -> Option<Q4Blocks> {
    let (blocks, rest) = weights.as_chunks::<Q4_0_BLOCK_LEN>();
    assert!(rest.is_empty(), "weights end inside a block");
    let mut scales = Vec::with_capacity(blocks.len());
    let mut quants = Vec::with_capacity(weights.len() / 2);
    for block in blocks {
        let (scale, levels) = fit_q4_0(block)?;
        scales.push(scale);
        let (lower, upper) = levels.split_at(Q4_0_BLOCK_LEN / 2);
        let nibble = |level: f32| (level as i8 + Q4_0_ZERO) as u8;
        quants.extend(lower.iter().zip(upper).map(|(l, u)| nibble(*l) | nibble(*u) << 4));
    }
    Some((scales, quants))
}

/// The scale of a block and its quants as floats, see [`quantize_q4_0`].
fn fit_q4_0(block: &[f32; Q4_0_BLOCK_LEN]) -> Option<(f16, [f32; Q4_0_BLOCK_LEN])> {
    let larger = |max: f32, x: &f32| if x.abs() > max.abs() { *x } else { max };
    let largest = block.iter().fold(0.0, larger);
    if largest.abs() < Q4_0_MIN_LARGEST {
        return Some((f16::ZERO, [0.0; Q4_0_BLOCK_LEN]));
    }
    let mut best: Option<(f32, f16, [f32; Q4_0_BLOCK_LEN])> = None;
    for start in Q4_0_STARTS {
        let first = levels_q4_0(block, -start / largest);
        let products = sum_q4_0(|i| block[i] * first[i]);
        let squares = sum_q4_0(|i| first[i] * first[i]);
        let stored = f16::from_f32(products / squares);
        let scale = stored.to_f32();
        if !scale.is_finite() {
            return None;
        }
        if scale == 0.0 {
            continue; // it underflows
        }
        let levels = levels_q4_0(block, 1.0 / scale);
        let error = sum_q4_0(|i| {
            let difference = block[i] - scale * levels[i];
            difference * difference
        });
        if best.is_none_or(|(least, ..)| error < least) {
            best = Some((error, stored, levels));
        }
    }
    Some(best.map_or((f16::ZERO, [0.0; Q4_0_BLOCK_LEN]), |(_, scale, levels)| (scale, levels)))
}

/// Weights in units of the scale, rounded to what a nibble can stand for.
fn levels_q4_0(block: &[f32; Q4_0_BLOCK_LEN], inverse: f32) -> [f32; Q4_0_BLOCK_LEN] {
    let (min, max) = Q4_0_LEVELS;
    block.map(|x| ((x * inverse).clamp(min, max) + ROUNDER) - ROUNDER)
}

/// Sums over a block in eight lanes: an order that vector units can keep.
fn sum_q4_0(term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for start in (0..Q4_0_BLOCK_LEN).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// The numbers that the nibbles of whole blocks stand for, in the order of the weights: `[len / 2]`
/// bytes give `[len]` quants of -8 to 7. With the same scales they are the same weights in Q8_0.
#[must_use]
pub fn unpack_q4_0(quants: &[u8]) -> Vec<i8> {
    let mut unpacked = Vec::with_capacity(quants.len().saturating_mul(2));
    for block in quants.as_chunks::<{ Q4_0_BLOCK_LEN / 2 }>().0 {
        unpacked.extend(block.iter().map(|byte| (byte & 0xF) as i8 - Q4_0_ZERO));
        unpacked.extend(block.iter().map(|byte| (byte >> 4) as i8 - Q4_0_ZERO));
    }
    unpacked
}

/// The weights of any format as 32-bit floats, `[len]`. Exact.
#[must_use]
pub fn widen(data: &MatrixData) -> Vec<f32> {
    match data {
        MatrixData::F32(numbers) => numbers.clone(),
        MatrixData::F16(numbers) => numbers.iter().map(|x| x.to_f32()).collect(),
        MatrixData::Bf16(numbers) => numbers.iter().map(|x| x.to_f32()).collect(),
        MatrixData::Q8_0 { scales, quants } => dequantize_q8_0(scales, quants),
        MatrixData::Q4_0 { scales, quants } => dequantize_q8_0(scales, &unpack_q4_0(quants)),
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::{dequantize_q8_0, quantize_q4_0, quantize_q8_0, unpack_q4_0, widen};
    use crate::weights::MatrixData;

    #[test]
    fn known_blocks_round_as_ggml_rounds_them() {
        // max |x| = 127, so the scale is exactly 1 and quants are the rounded weights.
        let mut block = [0.0f32; 32];
        block[..6].copy_from_slice(&[127.0, -127.0, 0.5, -0.5, 1.49, -2.5]);
        let (scales, quants) = quantize_q8_0(&block).expect("small weights");
        assert_eq!(scales, [f16::ONE]);
        assert_eq!(quants[..6], [127, -127, 1, -1, 1, -3]);
        assert!(quants[6..].iter().all(|q| *q == 0));
        let back = dequantize_q8_0(&scales, &quants);
        assert_eq!(back[..3], [127.0, -127.0, 1.0]);
    }

    #[test]
    fn quants_use_the_unrounded_scale() {
        // d = 0.3 / 127 = 0.0023622...; 0.1 / d = 42.33, 0.2999 / d = 126.96.
        let mut block = [0.0f32; 32];
        block[..3].copy_from_slice(&[0.3, -0.1, 0.2999]);
        let (scales, quants) = quantize_q8_0(&block).expect("small weights");
        assert_eq!(scales, [f16::from_f32(0.3 / 127.0)]);
        assert_eq!(quants[..3], [127, -42, 127]);
    }

    #[test]
    fn extreme_blocks_are_defined() {
        let (scales, quants) = quantize_q8_0(&[0.0; 32]).expect("zeros");
        assert_eq!((scales[0], quants[0]), (f16::ZERO, 0));
        let (scales, quants) = quantize_q8_0(&[f32::MIN_POSITIVE / 8.0; 32]).expect("subnormals");
        assert_eq!(scales, [f16::ZERO]);
        assert!(quants.iter().all(|q| *q >= -127));
        assert!(quantize_q8_0(&[1e9; 32]).is_none());
    }

    #[test]
    fn nibbles_stand_where_gguf_files_have_them() {
        // Weights that are whole multiples of a half-precision scale come back exactly.
        let block: Vec<f32> = (0..32).map(|i| (i % 16 - 8) as f32 * 0.5).collect();
        let (scales, quants) = quantize_q4_0(&block).expect("small weights");
        assert_eq!(scales, [f16::from_f32(0.5)]);
        let wanted: Vec<u8> = (0..16).map(|j| j | j << 4).collect();
        assert_eq!(quants, wanted);
        let mut other = block.clone();
        other[16..].fill(-4.0);
        let (_, quants) = quantize_q4_0(&other).expect("small weights");
        assert_eq!(quants, (0..16).collect::<Vec<u8>>(), "the second half is in upper nibbles");
        assert_eq!(unpack_q4_0(&quants)[14..18], [6, 7, -8, -8]);
        let data = MatrixData::Q4_0 { scales, quants };
        assert_eq!(widen(&data), other);
    }

    #[test]
    fn the_search_beats_the_plain_rule() {
        // A line of weights that ends at -8 scales would waste nothing; this one has a far end.
        let block: Vec<f32> = (0..32).map(|i| (i * 37 % 23) as f32 / 11.5 - 0.7).collect();
        let (scales, quants) = quantize_q4_0(&block).expect("small weights");
        let error =
            |back: &[f32]| -> f32 { block.iter().zip(back).map(|(x, y)| (x - y) * (x - y)).sum() };
        let found = error(&widen(&MatrixData::Q4_0 { scales, quants }));
        let largest =
            block.iter().fold(0.0f32, |max, x| if x.abs() > max.abs() { *x } else { max });
        let scale = f16::from_f32(largest / -8.0).to_f32();
        let plain: Vec<f32> =
            block.iter().map(|x| (x / scale).round().clamp(-8.0, 7.0) * scale).collect();
        assert!(found < error(&plain), "{found} against {}", error(&plain));
    }

    #[test]
    fn extreme_q4_0_blocks_are_defined() {
        for tiny in [0.0, f32::MIN_POSITIVE / 8.0, 1e-8] {
            let (scales, quants) = quantize_q4_0(&[tiny; 32]).expect("next to nothing");
            assert_eq!((scales[0], quants[0]), (f16::ZERO, 0x88), "{tiny}");
        }
        // Every scale that would fit underflows, although the largest weight alone would not.
        let mut block = [0.51 / 7.2 * 2.0_f32.powi(-22); 32];
        block[3] = 2.0_f32.powi(-22);
        let (scales, quants) = quantize_q4_0(&block).expect("next to nothing");
        assert_eq!((scales[0], quants[0]), (f16::ZERO, 0x88));
        let (scales, _) = quantize_q4_0(&[1e-6; 32]).expect("a subnormal scale");
        assert!(scales[0] != f16::ZERO);
        for large in [1e6, 1e30, f32::MAX, f32::INFINITY, f32::NAN] {
            let mut block = [1.0; 32];
            block[5] = large;
            let found = quantize_q4_0(&block);
            assert!(found.is_none(), "{large}");
        }
    }
}
