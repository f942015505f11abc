//! Owns the types that tensors have in files and the ones that they are held in: their blocks,
//! their names, and which becomes which. Knows where a tensor lies; reads nothing.

use candle_core::quantized::GgmlDType;

use super::WeightFormat;

/// A type of numbers in a file that can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoredType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// A format in memory: the variants of [`MatrixData`](crate::weights::MatrixData).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeldType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
}

/// Where the numbers of a tensor lie. Whoever made it has compared it with the file's length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoredTensor {
    pub(super) stored_type: StoredType,
    /// Outermost dimension first: `[out, in]`.
    pub(super) shape: Vec<usize>,
    /// First byte, counted from the beginning of the file.
    pub(super) start: u64,
}

impl StoredTensor {
    pub(super) fn num_weights(&self) -> usize {
        self.shape.iter().product()
    }

    pub(super) fn num_bytes(&self) -> u64 {
        (self.num_weights() / self.stored_type.block_len() * self.stored_type.block_bytes()) as u64
    }
}

impl StoredType {
    /// All of them, as messages list them.
    pub(super) const GGUF_NAMES: &str =
        "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K";

    /// By its number in GGUF files.
    pub(super) fn from_gguf(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Bf16,
            _ => return None,
        })
    }

    /// By its name in safetensors files.
    pub(super) fn from_safetensors(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(Self::F32),
            "F16" => Some(Self::F16),
            "BF16" => Some(Self::Bf16),
            _ => None,
        }
    }

    /// What candle calls it.
    pub(super) fn in_candle(self) -> GgmlDType {
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::Bf16 => GgmlDType::BF16,
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// Numbers of a row that are stored together.
    pub(super) fn block_len(self) -> usize {
        self.in_candle().block_size()
    }

    /// Bytes of a block.
    pub(super) fn block_bytes(self) -> usize {
        self.in_candle().type_size()
    }

    /// As logs and reports call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    /// The format of a matrix in memory: what the operator wants, or else the file's own. Types
    /// that are not computed with become the smallest one that loses little of them.
    pub(super) fn held(self, wanted: Option<WeightFormat>) -> HeldType {
        match (wanted, self) {
            (Some(WeightFormat::F32), _) | (None, Self::F32) => HeldType::F32,
            (None, Self::F16) => HeldType::F16,
            (None, Self::Bf16) => HeldType::Bf16,
            (Some(WeightFormat::Q4_0), _) | (None, Self::Q4_0 | Self::Q4K) => HeldType::Q4_0,
            (Some(WeightFormat::Q8_0), _)
            | (None, Self::Q8_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q5K | Self::Q6K) => {
                HeldType::Q8_0
            }
        }
    }
}

impl HeldType {
    /// As logs and reports call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// Rows of a matrix are multiples of this.
    pub(super) fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 => crate::weights::Q8_0_BLOCK_LEN,
            Self::Q4_0 => crate::weights::Q4_0_BLOCK_LEN,
        }
    }

    /// Memory of so many weights in whole blocks.
    pub(super) fn num_bytes(self, num_weights: u64) -> u64 {
        match self {
            Self::F32 => num_weights.saturating_mul(4),
            Self::F16 | Self::Bf16 => num_weights.saturating_mul(2),
            Self::Q8_0 => num_weights + num_weights / 16,
            Self::Q4_0 => num_weights / 2 + num_weights / 16,
        }
    }
}
