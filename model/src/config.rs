//! Owns the architecture facts of a Llama network, validated once. Knows no file format: the
//! loaders in `load/` fill it in.

use crate::ids::TokenId;

/// How rotary embeddings stretch beyond the trained context.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain rotary embedding.
    None,
    /// Positions divided by `factor` (position interpolation).
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// The frequency-dependent scaling of Llama 3.
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original_context_len / low_freq_factor` are stretched fully.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original_context_len / high_freq_factor` are left alone.
        high_freq_factor: f64,
        /// Context the model was first trained with, in positions.
        original_context_len: usize,
    },
    /// One divisor per rotary frequency, as `rope_freqs.weight` in GGUF files, is kept in
    /// [`LlamaConfig::rope_freq_divisors`].
    Divisors,
}

/// Architecture facts. All lengths are in elements; the loader has checked every relation:
/// `num_heads % num_kv_heads == 0`, `head_dim % 8 == 0`, no length zero, `context_len` at least 1.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Vocabulary size: rows of the embedding and columns of the logits.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_len: usize,
    /// Width of the feed-forward network.
    pub ffn_len: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Positions the model may attend over, after any limit the operator configured.
    pub context_len: usize,
    /// Added to the mean square inside RMSNorm.
    pub norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Rotary scaling.
    pub rope_scaling: RopeScaling,
    /// Divisors of the rotary frequencies, `[head_dim / 2]`, only with [`RopeScaling::Divisors`].
    pub rope_freq_divisors: Vec<f32>,
    /// Tokens that end a completion. May be empty.
    pub eos_ids: Vec<TokenId>,
}

impl LlamaConfig {
    /// Width of all key (or value) heads together.
    #[must_use]
    pub fn kv_len(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Width of all query heads together.
    #[must_use]
    pub fn query_len(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Query heads that share one key/value head.
    #[must_use]
    pub fn group_len(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }
}
