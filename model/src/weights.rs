//! Owns the typed weights of a Llama network as they leave a file: matrices in file order, before
//! any repacking for kernels. Knows shapes; knows neither file formats nor kernels.

use std::collections::BTreeMap;

use half::{bf16, f16};

/// Weights that share one scale in the Q8_0 format, counted along a matrix row.
pub const Q8_0_BLOCK_LEN: usize = 32;
/// Weights that share one scale in the Q4_0 format, counted along a matrix row.
pub const Q4_0_BLOCK_LEN: usize = 32;
/// What a nibble of the Q4_0 format is above the number it stands for.
pub const Q4_0_ZERO: i8 = 8;

/// The numbers of one matrix, row-major, `[out, in]`.
#[derive(Clone, Debug, PartialEq)]
pub enum MatrixData {
    /// 32-bit floats, `[out * in]`.
    F32(Vec<f32>),
    /// IEEE half precision, `[out * in]`.
    F16(Vec<f16>),
    /// The upper halves of 32-bit floats, `[out * in]`.
    Bf16(Vec<bf16>),
    /// 8-bit integers with one half-precision scale per 32 weights of a row; weight = scale *
    /// quant.
    Q8_0 {
        /// `[out * in / 32]`.
        scales: Vec<f16>,
        /// `[out * in]`.
        quants: Vec<i8>,
    },
    /// 4-bit integers with one half-precision scale per 32 weights of a row; weight = scale *
    /// (nibble - 8). Of the 16 bytes of a block, byte `j` has weight `j` in its lower nibble and
    /// weight `j + 16` in its upper one.
    Q4_0 {
        /// `[out * in / 32]`.
        scales: Vec<f16>,
        /// `[out * in / 2]`.
        quants: Vec<u8>,
    },
}

/// A matrix that maps a row of `in_len` numbers to one of `out_len` numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows of the matrix: length of the product.
    pub out_len: usize,
    /// Columns of the matrix: length of the input.
    pub in_len: usize,
    /// The numbers. Lengths agree with `out_len` and `in_len`; the loader checked it.
    pub data: MatrixData,
}

impl MatrixData {
    /// Whether products read their input quantised.
    #[must_use]
    pub fn is_quantised(&self) -> bool {
        match self {
            Self::F32(_) | Self::F16(_) | Self::Bf16(_) => false,
            Self::Q8_0 { .. } | Self::Q4_0 { .. } => true,
        }
    }

    /// What the format is called in digests, logs and messages.
    #[must_use]
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::F16(_) => "f16",
            Self::Bf16(_) => "bf16",
            Self::Q8_0 { .. } => "q8_0",
            Self::Q4_0 { .. } => "q4_0",
        }
    }

    /// Memory of the numbers.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::F32(numbers) => size_of_val(numbers.as_slice()),
            Self::F16(numbers) => size_of_val(numbers.as_slice()),
            Self::Bf16(numbers) => size_of_val(numbers.as_slice()),
            Self::Q8_0 { scales, quants } => {
                size_of_val(scales.as_slice()) + size_of_val(quants.as_slice())
            }
            Self::Q4_0 { scales, quants } => {
                size_of_val(scales.as_slice()) + size_of_val(quants.as_slice())
            }
        }
    }
}

/// Weights of one transformer layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerWeights {
    /// RMSNorm before attention, `[hidden]`.
    pub attention_norm: Vec<f32>,
    /// Query projection, `[num_heads * head_dim, hidden]`, rows in rotate-half order
    /// (Hugging Face convention; GGUF files are put into it by the loader).
    pub query: Matrix,
    /// Key projection, `[num_kv_heads * head_dim, hidden]`, rows in rotate-half order.
    pub key: Matrix,
    /// Value projection, `[num_kv_heads * head_dim, hidden]`.
    pub value: Matrix,
    /// Attention output projection, `[hidden, num_heads * head_dim]`.
    pub attention_output: Matrix,
    /// RMSNorm before the feed-forward network, `[hidden]`.
    pub ffn_norm: Vec<f32>,
    /// SwiGLU gate projection, `[ffn, hidden]`.
    pub gate: Matrix,
    /// SwiGLU up projection, `[ffn, hidden]`.
    pub up: Matrix,
    /// SwiGLU down projection, `[hidden, ffn]`.
    pub down: Matrix,
}

/// All weights of a Llama network.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaWeights {
    /// Token embeddings, `[vocab, hidden]`.
    pub embedding: Matrix,
    /// The layers in order.
    pub layers: Vec<LayerWeights>,
    /// Final RMSNorm, `[hidden]`.
    pub output_norm: Vec<f32>,
    /// Output projection, `[vocab, hidden]`; `None` when it is tied to the embedding.
    pub output: Option<Matrix>,
}

impl LlamaWeights {
    /// All numbers; an output projection that is tied to the embedding counts once.
    #[must_use]
    pub fn num_weights(&self) -> usize {
        let of_matrices: usize = self.matrices().iter().map(|m| m.in_len * m.out_len).sum();
        of_matrices + self.norms().map(<[f32]>::len).sum::<usize>()
    }

    /// Their memory, as they leave the file.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let of_matrices: usize = self.matrices().iter().map(|m| m.data.num_bytes()).sum();
        of_matrices + self.norms().map(size_of_val).sum::<usize>()
    }

    /// Memory by format, under the names of [`MatrixData::type_name`]; norms are `f32`.
    #[must_use]
    pub fn bytes_by_type(&self) -> BTreeMap<&'static str, usize> {
        let norms = self.norms().map(|norm| ("f32", size_of_val(norm)));
        let matrices =
            self.matrices().into_iter().map(|m| (m.data.type_name(), m.data.num_bytes()));
        let mut bytes = BTreeMap::new();
        for (name, more) in norms.chain(matrices) {
            *bytes.entry(name).or_default() += more;
        }
        bytes
    }

    fn matrices(&self) -> Vec<&Matrix> {
        let mut all = vec![&self.embedding];
        for layer in &self.layers {
            all.extend([&layer.query, &layer.key, &layer.value, &layer.attention_output]);
            all.extend([&layer.gate, &layer.up, &layer.down]);
        }
        all.extend(&self.output);
        all
    }

    fn norms(&self) -> impl Iterator<Item = &[f32]> {
        let of_layers =
            self.layers.iter().flat_map(|layer| [&layer.attention_norm[..], &layer.ffn_norm[..]]);
        of_layers.chain([&self.output_norm[..]])
    }
}
