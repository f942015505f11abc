//! Owns the verifier's KV blocks: tables that share them, the prefix cache that keeps them, and the
//! order in which kept ones go when room is needed. Knows tokens and ids; sees no sequences, no
//! tensors and no policy.

use slipstream_model::block_manager::{BlockManager, BlockTable, OutOfBlocks};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};

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
        let index = position / BLOCK_LEN;
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
            let shorter = (table.blocks().len() - 1) * BLOCK_LEN;
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use slipstream_model::block_manager::BlockTable;
    use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};

    use super::{BlockPool, Contents};
    use crate::engine::prefix_cache::BlockKey;
    use crate::engine::request::{PrefixScope, TenantId};

    /// Draws numbers below a bound.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, bound: usize) -> usize {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
            (self.0 >> 33) as usize % bound
        }
    }

    /// What somebody computes.
    #[derive(Default)]
    struct Run {
        scope: PrefixScope,
        tokens: Vec<TokenId>,
        keys: Vec<BlockKey>,
        table: BlockTable,
        computed_len: usize,
        num_remembered: usize,
    }

    impl Run {
        fn contents(&self, num_blocks: usize) -> Contents<'_> {
            Contents { scope: self.scope, tokens: &self.tokens, keys: &self.keys[..num_blocks] }
        }
    }

    struct World {
        dice: Dice,
        pool: BlockPool,
        /// Whose tokens were written into each block, all up to its last written position.
        store: Vec<(PrefixScope, Vec<TokenId>)>,
        runs: Vec<Run>,
        is_weak: bool,
        num_hits: usize,
        num_copies: usize,
    }

    impl World {
        fn new(seed: u64, is_weak: bool) -> Self {
            let mut dice = Dice(seed);
            let num_blocks = 4 + dice.below(12);
            Self {
                pool: BlockPool::new(num_blocks, [3; 32]),
                store: vec![Default::default(); num_blocks],
                runs: (0..4).map(|_| Run::default()).collect(),
                dice,
                is_weak,
                num_hits: 0,
                num_copies: 0,
            }
        }

        /// Two patterns of blocks only, so that beginnings are often the same.
        fn start(&mut self, index: usize) {
            let scope = PrefixScope { tenant: TenantId(self.dice.below(2) as u128), salt: 0 };
            let mut tokens = Vec::new();
            for _ in 0..self.dice.below(5) {
                let pattern = self.dice.below(2) as u32;
                tokens.extend((0..BLOCK_LEN as u32).map(|place| TokenId(10 * place + pattern)));
            }
            tokens.extend((0..=self.dice.below(BLOCK_LEN)).map(|_| TokenId(7)));
            let mut keys = Vec::new();
            self.pool.extend_keys(scope, &tokens, &mut keys);
            if self.is_weak {
                keys.iter_mut().for_each(|key| *key = key.weakened());
            }
            let useful = (tokens.len() - 1) / BLOCK_LEN;
            let contents = Contents { scope, tokens: &tokens, keys: &keys };
            let mut table = BlockTable::new();
            let num_found = self.pool.adopt(&mut table, contents, useful);
            for (number, block) in table.blocks().iter().enumerate() {
                let wanted = &tokens[..(number + 1) * BLOCK_LEN];
                let (held_by, held) = &self.store[block.index()];
                assert_eq!((*held_by, &held[..]), (scope, wanted), "found what is not there");
            }
            self.num_hits += num_found;
            let (computed_len, num_remembered) = (num_found * BLOCK_LEN, num_found);
            self.runs[index] = Run { scope, tokens, keys, table, computed_len, num_remembered };
        }

        /// Takes over everything that another run has, as a sibling does.
        fn follow(&mut self, index: usize, other: usize) {
            let Run { scope, ref tokens, ref keys, ref table, computed_len, .. } = self.runs[other];
            let (tokens, keys, held) = (tokens.clone(), keys.clone(), table.blocks().to_vec());
            let run = &mut self.runs[index];
            self.pool.share(&mut run.table, &held[..computed_len.div_ceil(BLOCK_LEN)]);
            run.num_remembered = 0;
            (run.scope, run.tokens, run.keys, run.computed_len) =
                (scope, tokens, keys, computed_len);
        }

        fn compute(&mut self, index: usize) {
            let run = &mut self.runs[index];
            let left = run.tokens.len() - run.computed_len;
            let len = run.computed_len + self.dice.below(left + 1);
            if len == run.computed_len || self.pool.grow(&mut run.table, len).is_err() {
                return;
            }
            let Ok(copy) = self.pool.make_writable(&mut run.table, run.computed_len) else {
                return;
            };
            if let Some((from, to)) = copy {
                self.store[to.index()] = self.store[from.index()].clone();
                self.num_copies += 1;
            }
            for (number, block) in run.table.blocks().iter().enumerate() {
                let end = ((number + 1) * BLOCK_LEN).min(len);
                if end > run.computed_len {
                    assert!(self.pool.refs(*block) == 1, "a shared block is written");
                    self.store[block.index()] = (run.scope, run.tokens[..end].to_vec());
                }
            }
            run.computed_len = len;
        }

        fn remember(&mut self, index: usize) {
            let run = &mut self.runs[index];
            let num_blocks = run.computed_len / BLOCK_LEN;
            let mut table = std::mem::take(&mut run.table);
            let contents = run.contents(num_blocks);
            let kept = self.pool.remember(&mut table, run.num_remembered.min(num_blocks), contents);
            (run.table, run.num_remembered) = (table, kept);
        }

        fn check(&self) {
            let held: BTreeSet<BlockId> =
                self.runs.iter().flat_map(|run| run.table.blocks().iter().copied()).collect();
            let pool = &self.pool;
            assert_eq!(pool.num_available() + held.len(), pool.num_blocks(), "blocks are lost");
            for block in (0..pool.num_blocks() as u32).map(BlockId) {
                let tables = self.runs.iter().map(|run| run.table.blocks());
                let count = tables.flatten().filter(|&&other| other == block).count();
                assert_eq!(pool.refs(block), count, "{block:?}");
            }
            for (block, scope, tokens) in pool.cached_prefixes() {
                assert_eq!(self.store[block.index()], (scope, tokens), "{block:?} holds else");
            }
        }
    }

    fn live(seed: u64, is_weak: bool) -> (usize, usize, u64) {
        let mut world = World::new(seed, is_weak);
        for _ in 0..400 {
            let index = world.dice.below(world.runs.len());
            let other = world.dice.below(world.runs.len());
            let is_idle = world.runs[index].tokens.is_empty();
            match world.dice.below(12) {
                0 if !is_idle => {
                    let run = &mut world.runs[index];
                    world.pool.release(&mut run.table);
                    *run = Run::default();
                }
                1 if is_idle && other != index => world.follow(index, other),
                2 if world.dice.below(8) == 0 => world.pool.distrust(&world.runs[index].table),
                3 if world.dice.below(40) == 0 => world.pool.distrust_all(),
                4 | 5 if !is_idle => world.remember(index),
                _ if is_idle => world.start(index),
                _ => world.compute(index),
            }
            world.check();
        }
        (world.num_hits, world.num_copies, world.pool.num_evicted())
    }

    #[test]
    fn random_sharing_never_shows_what_is_not_there() {
        for is_weak in [false, true] {
            let mut total = (0, 0, 0);
            for seed in 0..300 {
                let (num_hits, num_copies, num_evicted) = live(seed, is_weak);
                total = (total.0 + num_hits, total.1 + num_copies, total.2 + num_evicted);
            }
            let is_met = total.0 > 1_000 && total.1 > 100 && total.2 > 1_000;
            assert!(is_met, "hits, copies, evictions: {total:?}, weak keys: {is_weak}");
        }
    }
}
