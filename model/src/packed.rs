//! Owns a network ready to run: configuration, packed weights and frozen rotary tables, immutable
//! and shared by whoever runs it. Knows no steps, no KV and no threads.

use crate::attention::HEAD_DIM_MAX;
use crate::config::LlamaConfig;
use crate::linear::Linear;
use crate::rope::{RopeTable, inverse_frequencies};
use crate::weights::{LayerWeights, LlamaWeights, Matrix};

/// Why a network could not be built from what was loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A tensor does not have the shape that the configuration implies.
    #[error("tensor `{tensor}` has {found}; the configuration needs {shape:?}")]
    Shape {
        /// Field path of the tensor in [`LlamaWeights`].
        tensor: String,
        /// What it has.
        found: String,
        /// `[out, in]`; a vector has `out` 1.
        shape: [usize; 2],
    },
    /// Rows of a quantised matrix must be whole blocks.
    #[error("tensor `{tensor}` is quantised with rows of {in_len} numbers, no multiple of 32")]
    PartialBlock {
        /// Field path of the tensor in [`LlamaWeights`].
        tensor: String,
        /// Length of its rows.
        in_len: usize,
    },
    /// The number of layers is not the configured one.
    #[error("{found} layers of weights; the configuration has {expected}")]
    NumLayers {
        /// Layers of weights.
        found: usize,
        /// Layers configured.
        expected: usize,
    },
    /// A configured value is outside what the network can compute.
    #[error("{field} is {value}; {limit}")]
    Config {
        /// Field of [`LlamaConfig`].
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be accepted.
        limit: String,
    },
    /// Memory ran out.
    #[error("no memory for {what}, about {bytes} bytes")]
    OutOfMemory {
        /// What it was for.
        what: String,
        /// Bytes asked for, at least.
        bytes: usize,
    },
    /// The system refused a thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// A Llama network packed for the kernels.
#[derive(Debug)]
pub struct PackedLlama {
    config: LlamaConfig,
    pub(crate) embedding: Linear,
    pub(crate) layers: Vec<PackedLayer>,
    pub(crate) output_norm: Vec<f32>,
    /// `None` when the embedding serves.
    output: Option<Linear>,
    pub(crate) rope: RopeTable,
}

/// One layer of [`PackedLlama`]; the fields are those of [`LayerWeights`].
#[derive(Debug)]
pub(crate) struct PackedLayer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) attention_output: Linear,
    pub(crate) ffn_norm: Vec<f32>,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

impl PackedLlama {
    /// Packs matrix by matrix, each original dropped before the next one is packed, so that memory
    /// holds the network once and one matrix more.
    ///
    /// # Errors
    /// When a shape disagrees with `config`, a configured value is out of range, or memory runs
    /// out.
    pub fn pack(config: LlamaConfig, weights: LlamaWeights) -> Result<Self, ModelError> {
        check(&config)?;
        let rope = RopeTable::new(&config)
            .map_err(|bytes| ModelError::OutOfMemory { what: "rotary tables".to_owned(), bytes })?;
        let LlamaWeights { embedding, layers, output_norm, output } = weights;
        if layers.len() != config.num_layers {
            return Err(ModelError::NumLayers { found: layers.len(), expected: config.num_layers });
        }
        let vocab_shape = [config.vocab_size, config.hidden_len];
        let embedding = Linear::pack("embedding", embedding, vocab_shape)?;
        let layers = layers.into_iter().enumerate();
        let layers = layers.map(|(index, layer)| PackedLayer::pack(&config, index, layer));
        let layers = layers.collect::<Result<_, _>>()?;
        let output_norm = norm("output_norm".to_owned(), output_norm, config.hidden_len)?;
        let output =
            output.map(|output| Linear::pack("output", output, vocab_shape)).transpose()?;
        Ok(Self { config, embedding, layers, output_norm, output, rope })
    }

    /// The configuration that the network was packed with.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The output projection, `[vocab, hidden]`.
    pub(crate) fn output(&self) -> &Linear {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Memory held by weights and rotary tables, in bytes.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let layers = self.layers.iter().map(PackedLayer::num_bytes).sum::<usize>();
        let output = self.output.as_ref().map_or(0, Linear::num_bytes);
        self.embedding.num_bytes() + layers + output + self.rope.num_bytes()
    }
}

impl PackedLayer {
    fn pack(config: &LlamaConfig, index: usize, layer: LayerWeights) -> Result<Self, ModelError> {
        let name = |field: &str| format!("layers.{index}.{field}");
        let pack = |field: &str, matrix: Matrix, shape: [usize; 2]| {
            Linear::pack(&name(field), matrix, shape)
        };
        let LlamaConfig { hidden_len, ffn_len, .. } = *config;
        let (query_len, kv_len) = (config.query_len(), config.kv_len());
        Ok(Self {
            attention_norm: norm(name("attention_norm"), layer.attention_norm, hidden_len)?,
            query: pack("query", layer.query, [query_len, hidden_len])?,
            key: pack("key", layer.key, [kv_len, hidden_len])?,
            value: pack("value", layer.value, [kv_len, hidden_len])?,
            attention_output: pack(
                "attention_output",
                layer.attention_output,
                [hidden_len, query_len],
            )?,
            ffn_norm: norm(name("ffn_norm"), layer.ffn_norm, hidden_len)?,
            gate: pack("gate", layer.gate, [ffn_len, hidden_len])?,
            up: pack("up", layer.up, [ffn_len, hidden_len])?,
            down: pack("down", layer.down, [hidden_len, ffn_len])?,
        })
    }

    fn num_bytes(&self) -> usize {
        let all = [
            &self.query,
            &self.key,
            &self.value,
            &self.attention_output,
            &self.gate,
            &self.up,
            &self.down,
        ];
        all.into_iter().map(Linear::num_bytes).sum()
    }
}

fn norm(tensor: String, weight: Vec<f32>, len: usize) -> Result<Vec<f32>, ModelError> {
    if weight.len() == len {
        return Ok(weight);
    }
    Err(ModelError::Shape { tensor, found: format!("{} numbers", weight.len()), shape: [1, len] })
}

/// What the kernels rely on, checked again because a configuration can be built by hand.
fn check(config: &LlamaConfig) -> Result<(), ModelError> {
    let refuse = |field: &'static str, value: String, limit: &str| {
        Err(ModelError::Config { field, value, limit: limit.to_owned() })
    };
    let head_dim = config.head_dim;
    if head_dim == 0 || !head_dim.is_multiple_of(8) || head_dim > HEAD_DIM_MAX {
        let limit = format!("heads are multiples of 8 up to {HEAD_DIM_MAX} wide");
        return refuse("head_dim", head_dim.to_string(), &limit);
    }
    let (num_heads, num_kv_heads) = (config.num_heads, config.num_kv_heads);
    if num_kv_heads == 0 || num_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
        let limit = "it divides the number of query heads";
        return refuse("num_kv_heads", format!("{num_kv_heads} of {num_heads} heads"), limit);
    }
    if config.num_layers == 0 {
        return refuse("num_layers", "0".to_owned(), "at least one is needed");
    }
    if config.context_len == 0 {
        return refuse("context_len", "0".to_owned(), "at least one position is needed");
    }
    let num_divisors = config.rope_freq_divisors.len();
    let has_divisors = config.rope_scaling == crate::config::RopeScaling::Divisors;
    if has_divisors && num_divisors != head_dim / 2 {
        return refuse("rope_freq_divisors", num_divisors.to_string(), "one per rotary pair");
    }
    let frequencies = inverse_frequencies(config);
    if let Some(bad) = frequencies.iter().find(|frequency| !frequency.is_finite()) {
        return refuse("rope_scaling", bad.to_string(), "rotary frequencies are finite");
    }
    Ok(())
}
