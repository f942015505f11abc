//! Owns every bound that untrusted model files are held to, and the relations between the sizes of
//! a Llama network. Knows no file format.

use crate::config::{LlamaConfig, RopeScaling};
use crate::error::LoadError;

/// Default of [`LoadOptions::memory_budget_bytes`](super::LoadOptions::memory_budget_bytes).
pub const DEFAULT_MEMORY_BUDGET_BYTES: u64 = 64 << 30;
/// Longest `config.json` or `generation_config.json`.
pub const MAX_CONFIG_JSON_BYTES: u64 = 1 << 20;
/// Longest `tokenizer.json`; those of 128,000 entries take about 17 MB.
pub const MAX_TOKENIZER_JSON_BYTES: u64 = 64 << 20;
/// Longest header of a safetensors file; a thousand tensors take about 100 KB.
pub const MAX_SAFETENSORS_HEADER_BYTES: u64 = 16 << 20;
/// Longest header of a GGUF file (everything before tensor data).
pub const MAX_GGUF_HEADER_BYTES: usize = 256 << 20;
/// Most metadata entries of a GGUF file.
pub const MAX_GGUF_KEYS: u64 = 1 << 14;
/// Longest metadata key or tensor name of a GGUF file.
pub const MAX_GGUF_NAME_BYTES: u64 = 256;
/// Longest string in a GGUF file; chat templates and licences are the long ones.
pub const MAX_GGUF_STRING_BYTES: u64 = 4 << 20;
/// Most array elements in a GGUF file, all arrays together. Vocabularies have four arrays.
pub const MAX_GGUF_ARRAY_ELEMENTS: u64 = 4 << 20;
/// Most tensors of a model file.
pub const MAX_TENSORS: u64 = 1 << 14;
/// Most dimensions of a tensor.
pub const MAX_TENSOR_DIMS: usize = 4;
/// Largest vocabulary.
pub const MAX_VOCAB: usize = 1 << 20;
/// Longest token in bytes.
pub const MAX_TOKEN_BYTES: usize = 1024;
/// Most layers.
pub const MAX_LAYERS: usize = 1024;
/// Widest residual stream.
pub const MAX_HIDDEN_LEN: usize = 1 << 16;
/// Widest feed-forward network.
pub const MAX_FFN_LEN: usize = 1 << 19;
/// Most query heads.
pub const MAX_HEADS: usize = 1024;
/// Widest head.
pub const MAX_HEAD_DIM: usize = crate::attention::HEAD_DIM_MAX;
/// Longest context in positions.
pub const MAX_CONTEXT_LEN: usize = 1 << 21;
/// Most ids that end a completion.
pub const MAX_EOS_IDS: usize = 64;
/// Heads are processed in groups of this many lanes.
pub const HEAD_DIM_MULTIPLE: usize = 8;

/// Checks the relations that [`LlamaConfig`] promises. Single values were checked by whoever read
/// them, under the names their file gives them.
pub(super) fn check_relations(config: &LlamaConfig) -> Result<(), LoadError> {
    if !config.num_heads.is_multiple_of(config.num_kv_heads) {
        return Err(LoadError::mismatch(
            "number of key/value heads",
            format!("{} does not divide {} query heads", config.num_kv_heads, config.num_heads),
        ));
    }
    if !config.head_dim.is_multiple_of(HEAD_DIM_MULTIPLE) {
        return Err(LoadError::unsupported(
            format!("head dimension {}", config.head_dim),
            format!("it must be a multiple of {HEAD_DIM_MULTIPLE}"),
        ));
    }
    for id in &config.eos_ids {
        if id.index() >= config.vocab_size {
            return Err(LoadError::mismatch(
                format!("end-of-sequence id {id}"),
                format!("the vocabulary has {} entries", config.vocab_size),
            ));
        }
    }
    check_rope(config)
}

fn check_rope(config: &LlamaConfig) -> Result<(), LoadError> {
    let bad =
        |what: &str, reason: &str| Err(LoadError::malformed(format!("rotary {what}"), reason));
    if !(config.rope_theta.is_finite() && config.rope_theta >= 1.0) {
        return bad("base", "it must be finite and at least 1");
    }
    let is_factor = |x: f64| x.is_finite() && x >= 1.0;
    match config.rope_scaling {
        RopeScaling::None => {}
        RopeScaling::Linear { factor } if is_factor(factor) => {}
        RopeScaling::Linear { .. } => return bad("factor", "it must be finite and at least 1"),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_len } => {
            let ordered = low_freq_factor > 0.0
                && high_freq_factor > low_freq_factor
                && high_freq_factor.is_finite();
            if !is_factor(factor) || !ordered || original_context_len == 0 {
                return bad(
                    "scaling `llama3`",
                    "wanted factor >= 1, 0 < low_freq_factor < high_freq_factor, a context above 0",
                );
            }
        }
        RopeScaling::Divisors => {
            let divisors = &config.rope_freq_divisors;
            if divisors.len() != config.head_dim / 2 {
                return bad("divisors", "there must be one per pair of head dimensions");
            }
            if !divisors.iter().all(|d| d.is_finite() && *d > 0.0) {
                return bad("divisors", "each must be finite and above 0");
            }
        }
    }
    Ok(())
}
