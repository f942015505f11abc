//! Owns the keys and values of one network: slots in blocks, nothing else. Knows no sequences and
//! no policy; `block_manager.rs` decides who may use which block. Blocks are never cleared: a row
//! reads only positions that its own sequence wrote.

use std::ops::Range;

use half::f16;

use crate::aligned::Aligned;
use crate::config::LlamaConfig;
use crate::ids::{BLOCK_LEN, BlockId};
use crate::kernels::Isa;
use crate::kernels::attention::{self, KvNumbers};

/// One position's place in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The block.
    pub block: BlockId,
    /// The position within the block, below [`BLOCK_LEN`].
    pub offset: usize,
}

impl Slot {
    /// Where a block table puts a position.
    ///
    /// # Panics
    /// When the table does not reach the position.
    #[must_use]
    pub fn of(position: usize, block_table: &[BlockId]) -> Self {
        Self { block: block_table[position / BLOCK_LEN], offset: position % BLOCK_LEN }
    }
}

/// Type of keys and values in a pool. Part of the digest of a verifier: it changes output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvType {
    /// Single precision: as computed.
    #[default]
    F32,
    /// Half precision, rounded to the nearest when written, ties to even. What is too large for it
    /// becomes NaN: a fault of its sequence.
    F16,
}

impl KvType {
    /// Name in settings, reports and digests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }

    /// Memory of one number.
    #[must_use]
    pub fn num_bytes(self) -> usize {
        match self {
            Self::F32 => size_of::<f32>(),
            Self::F16 => size_of::<f16>(),
        }
    }
}

/// How a pool is made.
#[derive(Clone, Copy, Debug)]
pub struct KvPoolOptions {
    /// Blocks.
    pub num_blocks: usize,
    /// Type of keys and values.
    pub kv_type: KvType,
    /// Implementation of the rounding.
    pub isa: Isa,
}

/// Keys and values, each `[layer, block, kv_head, BLOCK_LEN, head_dim]`. The memory goes back when
/// the pool is dropped.
#[derive(Debug)]
pub struct KvPool {
    isa: Isa,
    num_blocks: usize,
    num_kv_heads: usize,
    head_dim: usize,
    numbers: Numbers,
}

#[derive(Debug)]
enum Numbers {
    F32 { keys: Aligned<f32>, values: Aligned<f32> },
    F16 { keys: Aligned<f16>, values: Aligned<f16> },
}

impl KvPool {
    /// A pool of `num_blocks` blocks for this network.
    ///
    /// # Errors
    /// When the memory is not there; holds the bytes needed.
    pub fn new(config: &LlamaConfig, options: KvPoolOptions) -> Result<Self, usize> {
        let KvPoolOptions { num_blocks, kv_type, isa } = options;
        let num_bytes = Self::num_bytes_for(config, kv_type, num_blocks).ok_or(usize::MAX)?;
        let len = num_bytes / (2 * kv_type.num_bytes());
        let numbers = match kv_type {
            KvType::F32 => Numbers::F32 {
                keys: Aligned::zeros(len).map_err(|_| num_bytes)?,
                values: Aligned::zeros(len).map_err(|_| num_bytes)?,
            },
            KvType::F16 => Numbers::F16 {
                keys: Aligned::zeros(len).map_err(|_| num_bytes)?,
                values: Aligned::zeros(len).map_err(|_| num_bytes)?,
            },
        };
        let LlamaConfig { num_kv_heads, head_dim, .. } = *config;
        Ok(Self { isa, num_blocks, num_kv_heads, head_dim, numbers })
    }

    /// Memory that a pool takes, in bytes; `None` when the number does not exist.
    #[must_use]
    pub fn num_bytes_for(
        config: &LlamaConfig,
        kv_type: KvType,
        num_blocks: usize,
    ) -> Option<usize> {
        let per_block = config.num_kv_heads.checked_mul(BLOCK_LEN.checked_mul(config.head_dim)?)?;
        let numbers = config.num_layers.checked_mul(num_blocks)?.checked_mul(per_block)?;
        numbers.checked_mul(2 * kv_type.num_bytes())
    }

    /// Blocks of the pool.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Type of keys and values.
    #[must_use]
    pub fn kv_type(&self) -> KvType {
        match self.numbers {
            Numbers::F32 { .. } => KvType::F32,
            Numbers::F16 { .. } => KvType::F16,
        }
    }

    /// Stores one position of one layer. `keys` and `values` are `[num_kv_heads, head_dim]`.
    ///
    /// # Panics
    /// When the slot is not in the pool or a length disagrees.
    pub fn write(&mut self, layer: usize, slot: Slot, keys: &[f32], values: &[f32]) {
        assert!(slot.block.index() < self.num_blocks && slot.offset < BLOCK_LEN, "slot in pool");
        assert_eq!(keys.len(), self.num_kv_heads * self.head_dim, "keys are one row");
        assert_eq!(values.len(), keys.len(), "values are one row");
        let head_dim = self.head_dim;
        for kv_head in 0..self.num_kv_heads {
            let start = self.block_range(layer, slot.block, kv_head).start;
            let start = start + slot.offset * head_dim;
            let to = start..start + head_dim;
            let from = kv_head * head_dim..(kv_head + 1) * head_dim;
            let (from_keys, from_values) = (&keys[from.clone()], &values[from]);
            match &mut self.numbers {
                Numbers::F32 { keys, values } => {
                    keys.as_mut_slice()[to.clone()].copy_from_slice(from_keys);
                    values.as_mut_slice()[to].copy_from_slice(from_values);
                }
                Numbers::F16 { keys, values } => {
                    let to_keys = &mut keys.as_mut_slice()[to.clone()];
                    attention::narrow(self.isa, from_keys, to_keys);
                    attention::narrow(self.isa, from_values, &mut values.as_mut_slice()[to]);
                }
            }
        }
    }

    /// Copies the keys and values of all layers and heads of one block to another.
    ///
    /// # Panics
    /// When a block is not in the pool.
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        assert!(from.index() < self.num_blocks && to.index() < self.num_blocks, "blocks in pool");
        let len = self.num_kv_heads * BLOCK_LEN * self.head_dim;
        let layer_len = self.num_blocks * len;
        match &mut self.numbers {
            Numbers::F32 { keys, values } => {
                copy_in_layers(keys.as_mut_slice(), layer_len, len, (from, to));
                copy_in_layers(values.as_mut_slice(), layer_len, len, (from, to));
            }
            Numbers::F16 { keys, values } => {
                copy_in_layers(keys.as_mut_slice(), layer_len, len, (from, to));
                copy_in_layers(values.as_mut_slice(), layer_len, len, (from, to));
            }
        }
    }

    /// Keys of one block and head, `[BLOCK_LEN, head_dim]`.
    #[must_use]
    pub fn keys(&self, layer: usize, block: BlockId, kv_head: usize) -> KvNumbers<'_> {
        let range = self.block_range(layer, block, kv_head);
        match &self.numbers {
            Numbers::F32 { keys, .. } => KvNumbers::F32(&keys.as_slice()[range]),
            Numbers::F16 { keys, .. } => KvNumbers::F16(&keys.as_slice()[range]),
        }
    }

    /// Values of one block and head, `[BLOCK_LEN, head_dim]`.
    #[must_use]
    pub fn values(&self, layer: usize, block: BlockId, kv_head: usize) -> KvNumbers<'_> {
        let range = self.block_range(layer, block, kv_head);
        match &self.numbers {
            Numbers::F32 { values, .. } => KvNumbers::F32(&values.as_slice()[range]),
            Numbers::F16 { values, .. } => KvNumbers::F16(&values.as_slice()[range]),
        }
    }

    fn block_range(&self, layer: usize, block: BlockId, kv_head: usize) -> Range<usize> {
        let len = BLOCK_LEN * self.head_dim;
        let index = (layer * self.num_blocks + block.index()) * self.num_kv_heads + kv_head;
        index * len..(index + 1) * len
    }
}

/// Copies one block to another in every layer. `numbers` is `[layers, layer_len]`, a block is `len`
/// numbers.
fn copy_in_layers<T: Copy>(
    numbers: &mut [T],
    layer_len: usize,
    len: usize,
    (from, to): (BlockId, BlockId),
) {
    for layer in numbers.chunks_exact_mut(layer_len) {
        let start = from.index() * len;
        layer.copy_within(start..start + len, to.index() * len);
    }
}
