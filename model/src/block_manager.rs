//! Owns which KV blocks are free. Deals in ids only: it never sees a tensor, a token or a request.
//! Draft and verifier each have a manager of their own.

use crate::ids::{BLOCK_LEN, BlockId};

/// Not enough free blocks for the positions asked for. Nothing was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} more KV blocks wanted, {free} free")]
pub struct OutOfBlocks {
    /// Blocks the caller would have needed.
    pub wanted: usize,
    /// Blocks that were free.
    pub free: usize,
}

/// The block ids of one sequence in position order. Returned to its manager by
/// [`BlockManager::release`]; dropping a table that still holds blocks is a leak that the
/// invariant checks find.
#[derive(Debug, Default)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for the blocks of `len` positions, so that the table does not have to grow when
    /// it takes them.
    pub fn reserve(&mut self, len: usize) {
        let wanted = BlockManager::blocks_for(len);
        self.blocks.reserve(wanted.saturating_sub(self.blocks.len()));
    }

    /// The blocks in position order.
    #[must_use]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Positions that the table has room for.
    #[must_use]
    pub fn capacity_len(&self) -> usize {
        self.blocks.len() * BLOCK_LEN
    }
}

/// Hands out the blocks of one KV pool.
#[derive(Debug)]
pub struct BlockManager {
    /// Free ids; the last one is handed out next.
    free: Vec<BlockId>,
    /// Whether each block is held by a table, `[num_blocks]`. Guards against double release.
    held: Vec<bool>,
}

impl BlockManager {
    /// A manager of `num_blocks` free blocks.
    ///
    /// # Panics
    /// When `num_blocks` does not fit block ids; pool sizes are validated with the configuration.
    #[must_use]
    pub fn new(num_blocks: usize) -> Self {
        let last = u32::try_from(num_blocks).expect("pool sizes are validated to fit u32");
        Self { free: (0..last).rev().map(BlockId).collect(), held: vec![false; num_blocks] }
    }

    /// Blocks needed for `len` positions.
    #[must_use]
    pub fn blocks_for(len: usize) -> usize {
        len.div_ceil(BLOCK_LEN)
    }

    /// Free blocks.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// All blocks of the pool.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.held.len()
    }

    /// Whether a block is held by some table. For invariant checks.
    #[must_use]
    pub fn is_held(&self, block: BlockId) -> bool {
        self.held[block.index()]
    }

    /// Grows `table` so that it covers `len` positions.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when the pool cannot supply them all; the table is then unchanged.
    pub fn grow(&mut self, table: &mut BlockTable, len: usize) -> Result<(), OutOfBlocks> {
        let wanted = Self::blocks_for(len).saturating_sub(table.blocks.len());
        if wanted > self.free.len() {
            return Err(OutOfBlocks { wanted, free: self.free.len() });
        }
        for _ in 0..wanted {
            let block = self.free.pop().expect("the free count was checked above");
            self.held[block.index()] = true;
            table.blocks.push(block);
        }
        Ok(())
    }

    /// Takes back the blocks past the first `len` positions.
    ///
    /// # Panics
    /// When a block is not held: two tables would have shared it.
    pub fn shrink(&mut self, table: &mut BlockTable, len: usize) {
        while table.blocks.len() > Self::blocks_for(len) {
            let block = table.blocks.pop().expect("the length was checked by the loop");
            assert!(self.held[block.index()], "block {} released twice", block.0);
            self.held[block.index()] = false;
            self.free.push(block);
        }
    }

    /// Takes back all blocks of `table`.
    pub fn release(&mut self, table: &mut BlockTable) {
        self.shrink(table, 0);
    }
}
