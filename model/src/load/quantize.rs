//! Owns the rounding of 32-bit weights to Q8_0 and back. Knows blocks of 32 weights; knows neither
//! matrices' roles nor files.

use half::f16;

use crate::weights::Q8_0_BLOCK_LEN;

/// Largest magnitude of a quant that we write. Files may hold -128 too.
const Q8_0_MAX_QUANT: f32 = 127.0;

/// Scales and quants of a matrix in the Q8_0 format: `[len / 32]` and `[len]`.
pub type Q8Blocks = (Vec<f16>, Vec<i8>);

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

#[cfg(test)]
mod tests {
    use half::f16;

    use super::{dequantize_q8_0, quantize_q8_0};

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
}
