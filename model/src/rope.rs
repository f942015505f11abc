//! Owns rotary position embeddings: frequencies, the tables frozen when a network is packed, and
//! their application. Knows positions and heads; knows no sequences.

use crate::config::{LlamaConfig, RopeScaling};

/// Cosines and sines of every position a network may see, up to the context limit it was loaded
/// with. Computed once with the pinned `libm`, so that every machine has the same bits.
#[derive(Debug)]
pub struct RopeTable {
    half_len: usize,
    /// Cosines, `[context, head_dim / 2]`. Apart from the sines, so that vectors of both load
    /// whole.
    cos: Vec<f32>,
    /// Sines, `[context, head_dim / 2]`.
    sin: Vec<f32>,
}

impl RopeTable {
    /// Tables for positions `0 .. context_len`.
    ///
    /// # Errors
    /// When the memory is not there; holds the bytes needed.
    pub fn new(config: &LlamaConfig) -> Result<Self, usize> {
        let frequencies = inverse_frequencies(config);
        let half_len = frequencies.len();
        let len = config.context_len.checked_mul(half_len).ok_or(usize::MAX)?;
        let num_bytes = len.saturating_mul(2 * size_of::<f32>());
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        cosines.try_reserve_exact(len).map_err(|_| num_bytes)?;
        sines.try_reserve_exact(len).map_err(|_| num_bytes)?;
        for position in 0..config.context_len {
            for frequency in &frequencies {
                let (sin, cos) = libm::sincos(position as f64 * frequency);
                cosines.push(cos as f32);
                sines.push(sin as f32);
            }
        }
        Ok(Self { half_len, cos: cosines, sin: sines })
    }

    /// Rotates every head of one row in place (arXiv 2104.09864, equation 34, with the two
    /// coordinates of a pair half a head apart, as Hugging Face checkpoints store them).
    ///
    /// `heads` is `[num_heads, head_dim]`.
    ///
    /// # Panics
    /// When the position lies past the table or `heads` is not whole heads.
    pub fn rotate(&self, position: usize, heads: &mut [f32]) {
        let half_len = self.half_len;
        let cos = &self.cos[position * half_len..][..half_len];
        let sin = &self.sin[position * half_len..][..half_len];
        assert!(heads.len().is_multiple_of(2 * half_len), "a row is whole heads");
        for head in heads.chunks_exact_mut(2 * half_len) {
            let (first, second) = head.split_at_mut(half_len);
            for ((x, y), (&cos, &sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                (*x, *y) = (*x * cos - *y * sin, *y * cos + *x * sin);
            }
        }
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        size_of_val(self.cos.as_slice()) + size_of_val(self.sin.as_slice())
    }
}

/// Radians per position of every rotary pair, `[head_dim / 2]`, scaling applied:
/// `theta^(-2i / head_dim)` (arXiv 2104.09864, section 3.2.2) before it.
#[must_use]
pub fn inverse_frequencies(config: &LlamaConfig) -> Vec<f64> {
    let plain = (0..config.head_dim / 2).map(|pair| {
        let exponent = (2 * pair) as f64 / config.head_dim as f64;
        1.0 / libm::pow(config.rope_theta, exponent)
    });
    match config.rope_scaling {
        RopeScaling::None => plain.collect(),
        // Position interpolation, arXiv 2306.15595, equation 4.
        RopeScaling::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_len } => {
            let scaling = Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                context_len: original_context_len as f64,
            };
            plain.map(|frequency| scaling.apply(frequency)).collect()
        }
        RopeScaling::Divisors => {
            let divisors = config.rope_freq_divisors.iter();
            plain.zip(divisors).map(|(frequency, &by)| frequency / f64::from(by)).collect()
        }
    }
}

/// The scaling of Llama 3.1: low frequencies are stretched, high ones kept, those between
/// interpolated linearly in `context / wavelength`. Published as code with the model
/// (meta-llama/llama-models, `apply_scaling` of the Llama 3 reference implementation).
struct Llama3 {
    factor: f64,
    low_freq_factor: f64,
    high_freq_factor: f64,
    context_len: f64,
}

impl Llama3 {
    fn apply(&self, frequency: f64) -> f64 {
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        if wavelength < self.context_len / self.high_freq_factor {
            return frequency;
        }
        if wavelength > self.context_len / self.low_freq_factor {
            return frequency / self.factor;
        }
        let range = self.high_freq_factor - self.low_freq_factor;
        let smooth = (self.context_len / wavelength - self.low_freq_factor) / range;
        (1.0 - smooth) * frequency / self.factor + smooth * frequency
    }
}
