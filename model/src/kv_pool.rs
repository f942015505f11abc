//! Owns the keys and values of one network: slots in blocks, nothing else. Knows no sequences and
//! no policy; `block_manager.rs` decides who may use which block. Blocks are never cleared: a row
//! reads only positions that its own sequence wrote.

use std::ops::Range;

use crate::config::LlamaConfig;
use crate::ids::{BLOCK_LEN, BlockId};

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

/// Keys and values, each `[layer, block, kv_head, BLOCK_LEN, head_dim]`. The memory goes back when
/// the pool is dropped.
#[derive(Debug)]
pub struct KvPool {
    num_blocks: usize,
    num_kv_heads: usize,
    head_dim: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvPool {
    /// A pool of `num_blocks` blocks for this network.
    ///
    /// # Errors
    /// When the memory is not there; holds the bytes needed.
    pub fn new(config: &LlamaConfig, num_blocks: usize) -> Result<Self, usize> {
        let num_bytes = Self::num_bytes_for(config, num_blocks).ok_or(usize::MAX)?;
        let len = num_bytes / (2 * size_of::<f32>());
        Ok(Self {
            num_blocks,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            keys: zeros(len).ok_or(num_bytes)?,
            values: zeros(len).ok_or(num_bytes)?,
        })
    }

    /// Memory that a pool takes, in bytes; `None` when the number does not exist.
    #[must_use]
    pub fn num_bytes_for(config: &LlamaConfig, num_blocks: usize) -> Option<usize> {
        let floats_per_block = config.num_kv_heads.checked_mul(BLOCK_LEN * config.head_dim)?;
        let floats = config.num_layers.checked_mul(num_blocks)?.checked_mul(floats_per_block)?;
        floats.checked_mul(2 * size_of::<f32>())
    }

    /// Blocks of the pool.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Stores one position of one layer. `keys` and `values` are `[num_kv_heads, head_dim]`.
    ///
    /// # Panics
    /// When the slot is not in the pool or a length disagrees.
    pub fn write(&mut self, layer: usize, slot: Slot, keys: &[f32], values: &[f32]) {
        assert!(slot.block.index() < self.num_blocks && slot.offset < BLOCK_LEN, "slot in pool");
        assert_eq!(keys.len(), self.num_kv_heads * self.head_dim, "keys are one row");
        assert_eq!(values.len(), keys.len(), "values are one row");
        for kv_head in 0..self.num_kv_heads {
            let start = self.block_range(layer, slot.block, kv_head).start;
            let start = start + slot.offset * self.head_dim;
            let to = start..start + self.head_dim;
            let from = kv_head * self.head_dim..(kv_head + 1) * self.head_dim;
            self.keys[to.clone()].copy_from_slice(&keys[from.clone()]);
            self.values[to].copy_from_slice(&values[from]);
        }
    }

    /// Keys of one block and head, `[BLOCK_LEN, head_dim]`.
    #[must_use]
    pub fn keys(&self, layer: usize, block: BlockId, kv_head: usize) -> &[f32] {
        &self.keys[self.block_range(layer, block, kv_head)]
    }

    /// Values of one block and head, `[BLOCK_LEN, head_dim]`.
    #[must_use]
    pub fn values(&self, layer: usize, block: BlockId, kv_head: usize) -> &[f32] {
        &self.values[self.block_range(layer, block, kv_head)]
    }

    fn block_range(&self, layer: usize, block: BlockId, kv_head: usize) -> Range<usize> {
        let len = BLOCK_LEN * self.head_dim;
        let index = (layer * self.num_blocks + block.index()) * self.num_kv_heads + kv_head;
        index * len..(index + 1) * len
    }
}

fn zeros(len: usize) -> Option<Vec<f32>> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).ok()?;
    vec.resize(len, 0.0);
    Some(vec)
}
