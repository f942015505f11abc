//! Owns the bytes of one row of a tensor: floats, blocks of a loaded matrix, zeros, random numbers.
//! Knows formats; knows neither networks nor files.

use half::f16;

use super::MatrixFormat;
use crate::weights::Q8_0_BLOCK_LEN;

/// Separates this use of blake3 from every other; a change gives other random networks.
const RANDOM_CONTEXT: &str = "slipstream random weights v1";
/// Standard deviation of quants drawn uniformly from -127 ..= 127: sqrt((255^2 - 1) / 12).
const Q8_0_DEVIATION: f32 = 73.61;
/// Of quants drawn uniformly from -7 ..= 7: sqrt((15^2 - 1) / 12).
const Q4_0_DEVIATION: f32 = 4.32;

/// Appends 32-bit floats.
pub(super) fn floats(values: &[f32], out: &mut Vec<u8>) {
    values.iter().for_each(|value| out.extend(value.to_le_bytes()));
}

/// Appends Q8_0 blocks: `scales` is `[blocks]`, `quants` is `[blocks, 32]`.
pub(super) fn q8_0(scales: &[f16], quants: &[i8], out: &mut Vec<u8>) {
    for (scale, quants) in scales.iter().zip(quants.chunks_exact(Q8_0_BLOCK_LEN)) {
        out.extend(scale.to_le_bytes());
        out.extend(quants.iter().map(|quant| *quant as u8));
    }
}

/// Appends `len` zeros as Q8_0.
pub(super) fn q8_0_zeros(len: usize, out: &mut Vec<u8>) {
    out.extend(std::iter::repeat_n(0, len / Q8_0_BLOCK_LEN * (2 + Q8_0_BLOCK_LEN)));
}

/// An endless sequence of random numbers, the same on every machine.
pub(super) struct RandomRows {
    stream: blake3::OutputReader,
    drawn: Vec<u8>,
}

impl RandomRows {
    /// The sequence of a seed and a name.
    pub(super) fn new(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(RANDOM_CONTEXT);
        hasher.update(&seed.to_le_bytes());
        hasher.update(name.as_bytes());
        Self { stream: hasher.finalize_xof(), drawn: Vec::new() }
    }

    /// Appends `len` weights, a multiple of 32, with mean 0 and this standard deviation.
    pub(super) fn weights(
        &mut self,
        format: MatrixFormat,
        len: usize,
        deviation: f32,
        out: &mut Vec<u8>,
    ) {
        self.drawn.resize(len, 0);
        self.stream.fill(&mut self.drawn);
        for block in self.drawn.chunks_exact(Q8_0_BLOCK_LEN) {
            match format {
                MatrixFormat::Q8_0 => {
                    out.extend(f16::from_f32(deviation / Q8_0_DEVIATION).to_le_bytes());
                    // Few files hold -128, and some readers are not ready for it.
                    out.extend(block.iter().map(|byte| (*byte as i8).max(-127) as u8));
                }
                MatrixFormat::Q4_0 => {
                    out.extend(f16::from_f32(deviation / Q4_0_DEVIATION).to_le_bytes());
                    // Weight j is in the low half of byte j, weight j + 16 in the high half.
                    let (low, high) = block.split_at(Q8_0_BLOCK_LEN / 2);
                    let nibble = |byte: u8| 1 + (u16::from(byte) * 15 >> 8) as u8;
                    let pairs = low.iter().zip(high);
                    out.extend(pairs.map(|(low, high)| nibble(*low) | nibble(*high) << 4));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::{MatrixFormat, RandomRows};

    /// Mean and standard deviation of the numbers of a row, read as the format has them.
    fn moments(format: MatrixFormat) -> (f64, f64) {
        let mut bytes = Vec::new();
        RandomRows::new(1, "a").weights(format, 1 << 16, 0.1, &mut bytes);
        let mut weights = Vec::new();
        let block_bytes = if format == MatrixFormat::Q8_0 { 34 } else { 18 };
        assert_eq!(bytes.len(), (1 << 16) / 32 * block_bytes);
        for block in bytes.chunks_exact(block_bytes) {
            let scale = f16::from_le_bytes([block[0], block[1]]).to_f64();
            for byte in &block[2..] {
                match format {
                    MatrixFormat::Q8_0 => weights.push(scale * f64::from(*byte as i8)),
                    MatrixFormat::Q4_0 => {
                        let quants = [byte & 15, byte >> 4];
                        weights.extend(quants.map(|quant| scale * (f64::from(quant) - 8.0)));
                    }
                }
            }
        }
        let mean = weights.iter().sum::<f64>() / weights.len() as f64;
        let square = weights.iter().map(|weight| weight * weight).sum::<f64>();
        (mean, (square / weights.len() as f64 - mean * mean).sqrt())
    }

    #[test]
    fn random_weights_have_the_moments_asked_for() {
        for format in [MatrixFormat::Q8_0, MatrixFormat::Q4_0] {
            let (mean, deviation) = moments(format);
            assert!(mean.abs() < 0.002, "{format:?}: mean {mean}");
            assert!((deviation - 0.1).abs() < 0.002, "{format:?}: deviation {deviation}");
        }
    }

    #[test]
    fn the_same_name_gives_the_same_numbers() {
        let draw = |seed, name: &str| {
            let mut bytes = Vec::new();
            RandomRows::new(seed, name).weights(MatrixFormat::Q8_0, 32, 1.0, &mut bytes);
            bytes
        };
        assert_eq!(draw(1, "a"), draw(1, "a"));
        assert!(draw(1, "a") != draw(1, "b") && draw(1, "a") != draw(2, "a"));
    }
}
