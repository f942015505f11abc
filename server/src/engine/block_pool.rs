//! Owns the verifier's KV blocks: tables that share them, the prefix cache that keeps them, and the
//! order in which kept ones go when room is needed. Knows tokens and ids; sees no sequences, no
//! tensors and no policy.

use slipstream_model::block_manager::{BlockManager, BlockTable, OutOfBlocks};
use slipstream_model::ids::{BlockId, TokenId};

use super::prefix_cache::{BlockKey, Contents, PrefixCache};
use super::request::PrefixScope;

/// A pool of blocks. Each is free, held by tables, or cached: held by none and kept.
#[derive(Debug)]
pub struct BlockPool {
    blocks: BlockManager,
    cache: PrefixCache,
    num_evicted: u64,
}

impl BlockPool {
    /// A pool of free blocks. `secret` keys the hashes of the prefix cache.
    pub(super) fn new(num_blocks: usize, secret: [u8; 32]) -> Self {
        Self {
            blocks: BlockManager::new(num_blocks),
            cache: PrefixCache::new(num_blocks, secret),
            num_evicted: 0,
        }
    }

    /// All blocks.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.blocks.num_blocks()
    }

    /// Blocks that hold nothing of use.
    #[must_use]
    pub fn num_free(&self) -> usize {
        self.blocks.num_free()
    }

    /// Blocks that no table holds and the prefix cache keeps.
    #[must_use]
    pub fn num_cached(&self) -> usize {
        self.blocks.num_idle()
    }

    /// Blocks that can be had: free ones and cached ones.
    #[must_use]
    pub fn num_available(&self) -> usize {
        self.num_free() + self.num_cached()
    }

    /// Tables that hold a block.
    #[must_use]
    pub fn refs(&self, block: BlockId) -> usize {
        self.blocks.num_tables(block)
    }

    /// Whether the prefix cache keeps a block, held by tables or not.
    #[must_use]
    pub fn is_kept(&self, block: BlockId) -> bool {
        self.blocks.is_kept(block)
    }

    /// Every block that the prefix cache keeps, with its scope and all tokens up to its end. For
    /// invariant checks.
    pub fn cached_prefixes(&self) -> impl Iterator<Item = (BlockId, PrefixScope, Vec<TokenId>)> {
        self.cache.prefixes()
    }

    /// Cached blocks given up so far because their room was needed.
    pub(super) fn num_evicted(&self) -> u64 {
        self.num_evicted
    }

    /// Whether a block has to be copied before it is written: others read it.
    pub(super) fn is_shared(&self, block: BlockId) -> bool {
        self.refs(block) > 1 || self.is_kept(block)
    }

    /// Grows `table` to cover `len` positions, at the cost of cached blocks.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when even those are not enough; nothing has changed then.
    pub(super) fn grow(&mut self, table: &mut BlockTable, len: usize) -> Result<(), OutOfBlocks> {
        let wanted = BlockManager::blocks_for(len).saturating_sub(table.blocks().len());
        self.make_free(wanted)?;
        self.blocks.grow(table, len)
    }

    /// Gives `table` a block of its own for `position` when it shares the one it has. Returns what
    /// is to be copied: from, to.
    ///
    /// # Errors
    /// [`OutOfBlocks`] when no block can be had; nothing has changed then.
    pub(super) fn make_writable(
        &mut self,
        table: &mut BlockTable,
        position: usize,
    ) -> Result<Option<(BlockId, BlockId)>, OutOfBlocks> {
        let index = position / slipstream_model::ids::BLOCK_LEN;
        match table.blocks().get(index) {
            Some(&block) if self.is_shared(block) => {
                self.make_free(1)?;
                let (from, to) = self.blocks.replace(table, index)?;
                self.note_idle(from);
                Ok(Some((from, to)))
            }
            Some(_) | None => Ok(None),
        }
    }

    fn make_free(&mut self, wanted: usize) -> Result<(), OutOfBlocks> {
        if wanted > self.num_available() {
            return Err(OutOfBlocks { wanted, free: self.num_available() });
        }
        while self.blocks.num_free() < wanted && self.cache.evict(&mut self.blocks) {
            self.num_evicted += 1;
        }
        Ok(())
    }

    fn note_idle(&mut self, block: BlockId) {
        if self.refs(block) == 0 && self.is_kept(block) {
            self.cache.becomes_idle(block);
        }
    }

    /// Takes back the blocks past the first `len` positions.
    pub(super) fn shrink(&mut self, table: &mut BlockTable, len: usize) {
        let wanted = BlockManager::blocks_for(len);
        while table.blocks().len() > wanted
            && let Some(&last) = table.blocks().last()
        {
            let shorter = (table.blocks().len() - 1) * slipstream_model::ids::BLOCK_LEN;
            self.blocks.shrink(table, shorter);
            self.note_idle(last);
        }
    }

    /// Takes back all blocks.
    pub(super) fn release(&mut self, table: &mut BlockTable) {
        self.shrink(table, 0);
    }

    /// Appends the keys of the full blocks of `tokens` that `keys` does not cover yet.
    pub(super) fn extend_keys(
        &self,
        scope: PrefixScope,
        tokens: &[TokenId],
        keys: &mut Vec<BlockKey>,
    ) {
        self.cache.extend_keys(scope, tokens, keys);
    }

    /// The kept blocks that hold the beginning of some contents, in order.
    pub(super) fn matching<'a>(
        &'a self,
        contents: Contents<'a>,
    ) -> impl Iterator<Item = BlockId> + 'a {
        self.cache.matching(contents.scope, contents.tokens, contents.keys)
    }

    /// Lets an empty `table` take the first `num_blocks` of the kept blocks that hold the beginning
    /// of `contents`. Returns how many it got.
    pub(super) fn adopt(
        &mut self,
        table: &mut BlockTable,
        contents: Contents<'_>,
        num_blocks: usize,
    ) -> usize {
        let Contents { scope, tokens, keys } = contents;
        for block in self.cache.matching(scope, tokens, keys).take(num_blocks) {
            self.blocks.share(table, block);
        }
        for &block in table.blocks() {
            self.cache.becomes_held(block);
        }
        table.blocks().len()
    }

    /// Lets an empty `table` hold these blocks of another table too.
    pub(super) fn share(&mut self, table: &mut BlockTable, held: &[BlockId]) {
        for &block in held {
            self.blocks.share(table, block);
        }
    }

    /// Keeps the full blocks of `table` from index `from` on for others. Returns how many from the
    /// beginning are kept now.
    pub(super) fn remember(
        &mut self,
        table: &mut BlockTable,
        from: usize,
        contents: Contents<'_>,
    ) -> usize {
        self.cache.insert(&mut self.blocks, table, from, contents)
    }

    /// Forgets what the blocks of `table` contain: nobody shall find it.
    pub(super) fn distrust(&mut self, table: &BlockTable) {
        self.cache.distrust(&mut self.blocks, table);
    }

    /// Forgets what any block contains.
    pub(super) fn distrust_all(&mut self) {
        self.cache.clear(&mut self.blocks);
    }
}
