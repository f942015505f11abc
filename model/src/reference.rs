//! Owns the forward pass in plain candle tensor operations: a whole sequence at once, no KV cache,
//! nothing fused. It reads like the paper and is the model-level twin that tests compare the fast
//! network with, by tolerance. Knows nothing of kernels; shares no arithmetic with them.

use candle_core::{D, DType, Device, Tensor};

use crate::config::{LlamaConfig, RopeScaling};
use crate::ids::TokenId;
use crate::load::widen;
use crate::weights::{LlamaWeights, Matrix};

/// Why the reference forward could not be computed.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// A token id is not in the vocabulary, or there is no token.
    #[error("token {index} is outside the vocabulary, or the sequence is empty or too long")]
    BadTokens {
        /// Index of the first bad token.
        index: usize,
    },
    /// candle refused.
    #[error("reference forward failed: {0}")]
    Candle(#[from] candle_core::Error),
}

/// A Llama network (Touvron et al., arXiv 2302.13971) with 32-bit weights.
pub struct ReferenceModel {
    config: LlamaConfig,
    /// `[vocab, hidden]`.
    embedding: Tensor,
    layers: Vec<Layer>,
    /// `[hidden]`.
    output_norm: Tensor,
    /// `[vocab, hidden]`.
    output: Tensor,
    /// Rotary angle per position and frequency, `[head_dim / 2]` per unit of position.
    frequencies: Vec<f64>,
}

struct Layer {
    attention_norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_output: Tensor,
    ffn_norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl ReferenceModel {
    /// Copies the weights into candle tensors, widened exactly.
    ///
    /// # Errors
    /// [`ReferenceError::Candle`] when lengths and shapes disagree.
    pub fn new(config: &LlamaConfig, weights: &LlamaWeights) -> Result<Self, ReferenceError> {
        let embedding = matrix(&weights.embedding)?;
        let output = match &weights.output {
            Some(output) => matrix(output)?,
            None => embedding.clone(),
        };
        let layers = weights
            .layers
            .iter()
            .map(|layer| {
                Ok(Layer {
                    attention_norm: vector(&layer.attention_norm)?,
                    query: matrix(&layer.query)?,
                    key: matrix(&layer.key)?,
                    value: matrix(&layer.value)?,
                    attention_output: matrix(&layer.attention_output)?,
                    ffn_norm: vector(&layer.ffn_norm)?,
                    gate: matrix(&layer.gate)?,
                    up: matrix(&layer.up)?,
                    down: matrix(&layer.down)?,
                })
            })
            .collect::<Result<_, ReferenceError>>()?;
        Ok(Self {
            config: config.clone(),
            embedding,
            layers,
            output_norm: vector(&weights.output_norm)?,
            output,
            frequencies: frequencies(config),
        })
    }

    /// Logits after every token of a sequence, `[tokens, vocab]`, row-major.
    ///
    /// # Errors
    /// [`ReferenceError::BadTokens`] for ids outside the vocabulary, an empty sequence or one
    /// longer than the context.
    pub fn logits(&self, tokens: &[TokenId]) -> Result<Vec<f32>, ReferenceError> {
        let vocab_size = self.config.vocab_size;
        if tokens.is_empty() || tokens.len() > self.config.context_len {
            return Err(ReferenceError::BadTokens { index: tokens.len() });
        }
        if let Some(index) = tokens.iter().position(|token| token.index() >= vocab_size) {
            return Err(ReferenceError::BadTokens { index });
        }
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        let ids = Tensor::from_vec(ids, tokens.len(), &Device::Cpu)?;
        let rotary = self.rotary(tokens.len())?;
        let mut hidden = self.embedding.index_select(&ids, 0)?; // [tokens, hidden]
        for layer in &self.layers {
            let normed = self.rms_norm(&hidden, &layer.attention_norm)?;
            hidden = (&hidden + self.attention(layer, &normed, &rotary)?)?;
            let normed = self.rms_norm(&hidden, &layer.ffn_norm)?;
            hidden = (&hidden + feed_forward(layer, &normed)?)?;
        }
        let normed = self.rms_norm(&hidden, &self.output_norm)?;
        Ok(project(&normed, &self.output)?.flatten_all()?.to_vec1()?)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight`: Zhang and Sennrich, arXiv 1910.07467, equation 4.
    /// `x` is `[tokens, hidden]`.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?; // [tokens, 1]
        let root = (mean_square + f64::from(self.config.norm_eps))?.sqrt()?;
        x.broadcast_div(&root)?.broadcast_mul(weight)
    }

    /// Causal grouped-query attention: `softmax(Q K^T / sqrt(head_dim)) V` (Vaswani et al.,
    /// arXiv 1706.03762, equation 1; Ainslie et al., arXiv 2305.13245). `x` is `[tokens, hidden]`.
    fn attention(&self, layer: &Layer, x: &Tensor, rotary: &Rotary) -> candle_core::Result<Tensor> {
        let config = &self.config;
        let len = x.dim(0)?;
        let heads = |projected: Tensor, num_heads: usize| {
            projected.reshape((len, num_heads, config.head_dim))?.transpose(0, 1)?.contiguous()
        };
        let query = rotary.apply(&heads(project(x, &layer.query)?, config.num_heads)?)?;
        let key = rotary.apply(&heads(project(x, &layer.key)?, config.num_kv_heads)?)?;
        let value = heads(project(x, &layer.value)?, config.num_kv_heads)?;
        // Each key/value head serves `group_len` query heads: [heads, tokens, head_dim].
        let widen = |kv: Tensor| {
            kv.unsqueeze(1)?
                .broadcast_as((config.num_kv_heads, config.group_len(), len, config.head_dim))?
                .reshape((config.num_heads, len, config.head_dim))
        };
        let (key, value) = (widen(key)?.contiguous()?, widen(value)?.contiguous()?);
        let scale = 1.0 / (config.head_dim as f64).sqrt();
        let scores = (query.matmul(&key.t()?.contiguous()?)? * scale)?; // [heads, tokens, tokens]
        let mixed = softmax(&scores.broadcast_add(&causal_mask(len)?)?)?.matmul(&value)?;
        let joined = mixed.transpose(0, 1)?.contiguous()?.reshape((len, config.query_len()))?;
        project(&joined, &layer.attention_output)
    }

    /// Rotary embedding for positions `0 .. len`.
    fn rotary(&self, len: usize) -> candle_core::Result<Rotary> {
        let half = self.frequencies.len();
        let angles: Vec<f64> = (0..len)
            .flat_map(|position| self.frequencies.iter().map(move |f| position as f64 * f))
            .collect();
        let angles = Tensor::from_vec(angles, (len, half), &Device::Cpu)?;
        let twice = |half: Tensor| Tensor::cat(&[&half, &half], 1)?.to_dtype(DType::F32);
        Ok(Rotary { cos: twice(angles.cos()?)?, sin: twice(angles.sin()?)? })
    }
}

/// Cosines and sines by position, `[tokens, head_dim]`; frequency `i` stands at `i` and at
/// `i + head_dim / 2`.
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// Su et al., arXiv 2104.09864, equation 34, with dimensions `i` and `i + head_dim / 2` as a
    /// pair. `x` is `[heads, tokens, head_dim]`.
    fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let half = x.dim(D::Minus1)? / 2;
        let (first, second) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let turned = Tensor::cat(&[&second.neg()?, &first], D::Minus1)?;
        x.broadcast_mul(&self.cos)? + turned.broadcast_mul(&self.sin)?
    }
}

/// SwiGLU: `down(silu(gate x) * up x)`; Shazeer, arXiv 2002.05202, equation 6.
fn feed_forward(layer: &Layer, x: &Tensor) -> candle_core::Result<Tensor> {
    let gate = project(x, &layer.gate)?.silu()?; // [tokens, ffn]
    project(&(gate * project(x, &layer.up)?)?, &layer.down)
}

/// `x W^T`: `[tokens, in]` times `[out, in]` gives `[tokens, out]`.
fn project(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    x.matmul(&weight.t()?)
}

/// Over the last dimension.
fn softmax(scores: &Tensor) -> candle_core::Result<Tensor> {
    let largest = scores.max_keepdim(D::Minus1)?;
    let exponentials = scores.broadcast_sub(&largest)?.exp()?;
    exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)
}

/// 0 where a row may look, minus infinity at later positions, `[tokens, tokens]`.
fn causal_mask(len: usize) -> candle_core::Result<Tensor> {
    let entry = |row: usize, column: usize| if column > row { f32::NEG_INFINITY } else { 0.0 };
    let mask = (0..len).flat_map(|row| (0..len).map(move |column| entry(row, column))).collect();
    Tensor::from_vec::<_, f32>(mask, (len, len), &Device::Cpu)
}

fn matrix(matrix: &Matrix) -> candle_core::Result<Tensor> {
    Tensor::from_vec(widen(&matrix.data), (matrix.out_len, matrix.in_len), &Device::Cpu)
}

fn vector(weights: &[f32]) -> candle_core::Result<Tensor> {
    Tensor::from_vec(weights.to_vec(), weights.len(), &Device::Cpu)
}

/// Angle per position of each pair of dimensions, `[head_dim / 2]`: `theta^(-2 i / head_dim)`,
/// scaled. Written apart from `rope.rs` on purpose: a twin must not share its mistakes.
fn frequencies(config: &LlamaConfig) -> Vec<f64> {
    let plain = |i: usize| libm::pow(config.rope_theta, -2.0 * i as f64 / config.head_dim as f64);
    let scaled = |i: usize| match config.rope_scaling {
        RopeScaling::None => plain(i),
        RopeScaling::Linear { factor } => plain(i) / factor,
        RopeScaling::Divisors => plain(i) / f64::from(config.rope_freq_divisors[i]),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_len } => {
            // Turns within the original context: many are kept, few are stretched.
            let turns = original_context_len as f64 * plain(i) / std::f64::consts::TAU;
            let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let kept = kept.clamp(0.0, 1.0);
            plain(i) * (kept + (1.0 - kept) / factor)
        }
    };
    (0..config.head_dim / 2).map(scaled).collect()
}
