//! Owns the way from a network to a GGUF file, row by row, so that none need ever be in memory to
//! be written: larger networks with the function of a given one (`grow.rs`) and networks of
//! random numbers (`random_model.rs`). Knows nothing of how files are read back, except the names
//! and shapes of tensors, which it shares with the loader.
//!
//! Read `grow.rs` first; `container.rs` is the format, `rows.rs` one row of it.

mod container;
pub mod grow;
mod random_model;
mod rows;
pub mod shape;

use std::io::{self, Write};
use std::ops::ControlFlow;

pub use candle_core::quantized::gguf_file::Value as MetadataValue;

pub use self::container::MatrixFormat;
use self::container::{Tensor, header};
pub use self::random_model::random_model;
use crate::config::{LlamaConfig, RopeScaling};
use crate::load::{Role, slots};
use crate::rope::inverse_frequencies;

/// Keys and values of a GGUF file.
pub type Metadata = Vec<(String, MetadataValue)>;

/// Bytes of rows that are gathered before they are handed on.
const CHUNK_BYTES: usize = 1 << 20;
/// The divisors of the rotary frequencies.
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// Appends the bytes of one row of a tensor. Norms have one row.
type RowSource<'a> = Box<dyn FnMut(Place, usize, &mut Vec<u8>) + 'a>;

/// Which tensor of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    role: Role,
    /// 0 outside the layers.
    layer: usize,
}

/// What a file says about its network.
struct Description {
    config: LlamaConfig,
    is_tied: bool,
    format: MatrixFormat,
    /// Everything but the architecture: names, tokenizer.
    metadata: Metadata,
}

/// A file to be written: its header, and where its rows come from.
pub struct NetworkFile<'a> {
    config: LlamaConfig,
    header: Vec<u8>,
    tensors: Vec<(Option<Place>, Tensor)>,
    rows: RowSource<'a>,
    num_weights: u64,
}

impl<'a> NetworkFile<'a> {
    fn new(description: Description, rows: RowSource<'a>) -> Self {
        let Description { config, is_tied, format, metadata } = description;
        let divisors = rope_divisors(&config);
        let mut tensors = Vec::new();
        if !divisors.is_empty() {
            tensors.push((None, Tensor::floats(ROPE_DIVISORS.to_owned(), divisors.len())));
        }
        for (role, layer) in slots(&config, !is_tied) {
            let shape = role.shape(&config);
            let name = role.gguf_name(layer);
            let tensor = match shape[..] {
                [out_len, in_len] => Tensor::matrix(name, format, [out_len, in_len]),
                _ => Tensor::floats(name, shape.iter().product()),
            };
            tensors.push((Some(Place { role, layer }), tensor));
        }
        let mut keys = architecture(&config, format);
        keys.extend(metadata);
        // Sorted, general facts come first, as readers expect them.
        keys.sort_by(|a, b| a.0.cmp(&b.0));
        let header = header(&keys, tensors.iter().map(|(_, tensor)| tensor));
        let num_weights = tensors.iter().map(|(_, tensor)| tensor.num_weights()).sum();
        Self { config, header, tensors, rows, num_weights }
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Numbers altogether.
    #[must_use]
    pub fn num_weights(&self) -> u64 {
        self.num_weights
    }

    /// Length of the file.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        let data = self.tensors.iter().map(|(_, tensor)| tensor.padded_bytes()).sum::<u64>();
        self.header.len() as u64 + data
    }

    /// Writes the file from its beginning to its end. `progress` is told how many bytes are
    /// written, about once per MiB, and may end it.
    ///
    /// # Errors
    /// What `out` says; [`io::ErrorKind::Interrupted`] when `progress` ended it.
    pub fn write(
        mut self,
        out: &mut dyn Write,
        progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let mut sink = Sink { out, progress, buffer: std::mem::take(&mut self.header), written: 0 };
        for (place, tensor) in &self.tensors {
            match place {
                None => rows::floats(&rope_divisors(&self.config), &mut sink.buffer),
                Some(place) => {
                    for row in 0..tensor.num_rows() {
                        (self.rows)(*place, row, &mut sink.buffer);
                        sink.flush_from(CHUNK_BYTES)?;
                    }
                }
            }
            let padding = tensor.padded_bytes() - tensor.num_bytes();
            sink.buffer.extend(std::iter::repeat_n(0, padding as usize));
        }
        sink.flush_from(0)?;
        sink.out.flush()
    }
}

/// Gathers rows into chunks.
struct Sink<'a> {
    out: &'a mut dyn Write,
    progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
    buffer: Vec<u8>,
    written: u64,
}

impl Sink<'_> {
    /// Hands the gathered bytes on when there are at least `len_min`.
    fn flush_from(&mut self, len_min: usize) -> io::Result<()> {
        if self.buffer.len() < len_min {
            return Ok(());
        }
        self.out.write_all(&self.buffer)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        match (self.progress)(self.written) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(io::ErrorKind::Interrupted.into()),
        }
    }
}

/// A file of these keys and no tensors.
pub(crate) fn header_of(keys: &Metadata) -> Vec<u8> {
    header(keys, [].iter())
}

/// Divisors of the plain rotary frequencies, `[head_dim / 2]`, where the format has no keys for the
/// scaling; otherwise none.
fn rope_divisors(config: &LlamaConfig) -> Vec<f32> {
    match config.rope_scaling {
        RopeScaling::None | RopeScaling::Linear { .. } => Vec::new(),
        RopeScaling::Divisors => config.rope_freq_divisors.clone(),
        RopeScaling::Llama3 { .. } => {
            let plain = LlamaConfig { rope_scaling: RopeScaling::None, ..config.clone() };
            let pairs = inverse_frequencies(&plain).into_iter().zip(inverse_frequencies(config));
            pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect()
        }
    }
}

/// The keys of the architecture.
fn architecture(config: &LlamaConfig, format: MatrixFormat) -> Metadata {
    let text = |text: &str| MetadataValue::String(text.to_owned());
    let count = |count: usize| MetadataValue::U32(u32::try_from(count).unwrap_or(u32::MAX));
    let mut keys = vec![
        ("general.architecture", text("llama")),
        ("general.file_type", MetadataValue::U32(format.file_type())),
        ("general.quantization_version", MetadataValue::U32(2)),
        ("llama.context_length", count(config.context_len)),
        ("llama.embedding_length", count(config.hidden_len)),
        ("llama.block_count", count(config.num_layers)),
        ("llama.feed_forward_length", count(config.ffn_len)),
        ("llama.attention.head_count", count(config.num_heads)),
        ("llama.attention.head_count_kv", count(config.num_kv_heads)),
        ("llama.attention.key_length", count(config.head_dim)),
        ("llama.attention.value_length", count(config.head_dim)),
        ("llama.attention.layer_norm_rms_epsilon", MetadataValue::F32(config.norm_eps)),
        ("llama.rope.dimension_count", count(config.head_dim)),
        ("llama.rope.freq_base", MetadataValue::F32(config.rope_theta as f32)),
        ("llama.vocab_size", count(config.vocab_size)),
    ];
    if let RopeScaling::Linear { factor } = config.rope_scaling {
        keys.push(("llama.rope.scaling.type", text("linear")));
        keys.push(("llama.rope.scaling.factor", MetadataValue::F32(factor as f32)));
    }
    keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}
