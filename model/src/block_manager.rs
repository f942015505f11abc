//! Owns which KV blocks are free, how many tables hold each of the others, and which are kept
//! although no table holds them. Deals in ids only: it never sees a tensor, a token or a request.
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

/// Hands out the blocks of one KV pool. A block is *free*, *held* by one or more tables, or *idle*:
/// kept for later by somebody who knows what it contains, and held by no table.
#[derive(Debug)]
pub struct BlockManager {
    /// Free ids; the last one is handed out next.
    free: Vec<BlockId>,
    /// Tables that hold each block, `[num_blocks]`.
    num_tables: Vec<u32>,
    /// Whether each block is kept beyond its tables, `[num_blocks]`.
    is_kept: Vec<bool>,
    num_idle: usize,
}

impl BlockManager {
    /// A manager of `num_blocks` free blocks.
    ///
    /// # Panics
    /// When `num_blocks` does not fit block ids; pool sizes are validated with the configuration.
    #[must_use]
    pub fn new(num_blocks: usize) -> Self {
        let last = u32::try_from(num_blocks).expect("pool sizes are validated to fit u32");
        Self {
            free: (0..last).rev().map(BlockId).collect(),
            num_tables: vec![0; num_blocks],
            is_kept: vec![false; num_blocks],
            num_idle: 0,
        }
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

    /// Kept blocks that no table holds.
    #[must_use]
    pub fn num_idle(&self) -> usize {
        self.num_idle
    }

    /// All blocks of the pool.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_tables.len()
    }

    /// Tables that hold a block.
    #[must_use]
    pub fn num_tables(&self, block: BlockId) -> usize {
        self.num_tables[block.index()] as usize
    }

    /// Whether a block is kept beyond its tables.
    #[must_use]
    pub fn is_kept(&self, block: BlockId) -> bool {
        self.is_kept[block.index()]
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
            let block = self.take_free().expect("the free count was checked above");
            table.blocks.push(block);
        }
        Ok(())
    }

    fn take_free(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.num_tables[block.index()] = 1;
        Some(block)
    }

    /// Appends a block that other tables hold or that is kept.
    ///
    /// # Panics
    /// When the block is free.
    pub fn share(&mut self, table: &mut BlockTable, block: BlockId) {
        self.hold(block);
        table.blocks.push(block);
    }

    fn hold(&mut self, block: BlockId) {
        let num_tables = &mut self.num_tables[block.index()];
        if *num_tables == 0 {
            assert!(self.is_kept[block.index()], "block {} is free", block.0);
            self.num_idle -= 1;
        }
        *num_tables += 1;
    }

    /// Puts a block with the same contents, which is held or kept, in the place of the table's own.
    ///
    /// # Panics
    /// When the block is free, or the table has no block there.
    pub fn exchange(&mut self, table: &mut BlockTable, index: usize, block: BlockId) {
        self.hold(block);
        let own = std::mem::replace(&mut table.blocks[index], block);
        self.let_go(own);
    }

    /// Puts a free block in the place of one that the table shares, so that it can be written.
    /// Returns the shared one and the new one, whose contents are to be copied.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when no block is free.
    pub fn replace(
        &mut self,
        table: &mut BlockTable,
        index: usize,
    ) -> Result<(BlockId, BlockId), OutOfBlocks> {
        let Some(own) = self.take_free() else {
            return Err(OutOfBlocks { wanted: 1, free: 0 });
        };
        let shared = std::mem::replace(&mut table.blocks[index], own);
        self.let_go(shared);
        Ok((shared, own))
    }

    /// Takes back the blocks past the first `len` positions, the last one first.
    ///
    /// # Panics
    /// When a block is not held: it was released twice.
    pub fn shrink(&mut self, table: &mut BlockTable, len: usize) {
        while table.blocks.len() > Self::blocks_for(len) {
            let block = table.blocks.pop().expect("the length was checked by the loop");
            self.let_go(block);
        }
    }

    fn let_go(&mut self, block: BlockId) {
        let num_tables = &mut self.num_tables[block.index()];
        assert!(*num_tables > 0, "block {} released twice", block.0);
        *num_tables -= 1;
        if *num_tables > 0 {
            return;
        }
        if self.is_kept[block.index()] {
            self.num_idle += 1;
        } else {
            self.free.push(block);
        }
    }

    /// Takes back all blocks of `table`.
    pub fn release(&mut self, table: &mut BlockTable) {
        self.shrink(table, 0);
    }

    /// Keeps a block beyond the tables that hold it.
    ///
    /// # Panics
    /// When no table holds it.
    pub fn keep(&mut self, block: BlockId) {
        assert!(self.num_tables[block.index()] > 0, "block {} is not held", block.0);
        self.is_kept[block.index()] = true;
    }

    /// Keeps a block no longer. It is free when no table holds it.
    pub fn drop_kept(&mut self, block: BlockId) {
        if !std::mem::replace(&mut self.is_kept[block.index()], false) {
            return;
        }
        if self.num_tables[block.index()] == 0 {
            self.num_idle -= 1;
            self.free.push(block);
        }
    }
}
