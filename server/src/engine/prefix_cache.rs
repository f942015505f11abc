//! Owns what the kept blocks of a pool contain, and finds the longest beginning of a sequence in
//! them. Only full blocks of committed tokens enter. Knows tokens and block ids; holds no tables
//! and sees no sequences.
//!
//! A block is found by a keyed hash of everything before and in it, and believed only when its
//! tokens, its scope and its *parent entry* are the same too. Entries leave from the leaves on, so
//! by induction the whole beginning was compared token by token: a collision of hashes can hide an
//! entry, never show a wrong one.

use std::collections::{BTreeMap, BTreeSet};

use slipstream_model::block_manager::{BlockManager, BlockTable};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};

use super::idle_list::IdleList;
use super::request::PrefixScope;

/// Keyed hash of a scope and all tokens up to the end of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BlockKey(u128);

/// What a kept block contains.
#[derive(Clone, Debug)]
struct Entry {
    key: BlockKey,
    /// Never used twice, so that an entry is not taken for one that stood in its block before.
    serial: u64,
    /// The block before it and its entry's serial; `None` for the first block of a sequence.
    parent: Option<(BlockId, u64)>,
    scope: PrefixScope,
    tokens: [TokenId; BLOCK_LEN],
}

/// The contents of kept blocks, and which of them can go.
#[derive(Debug)]
pub(super) struct PrefixCache {
    secret: [u8; 32],
    /// By block, `[num_blocks]`.
    entries: Vec<Option<Entry>>,
    by_key: BTreeMap<BlockKey, BlockId>,
    /// Kept blocks that no table holds. Tables let their blocks go from the last to the first, and
    /// hold whole beginnings: so a block is always older here than the one before it, and the
    /// oldest is a leaf.
    idle: IdleList,
    next_serial: u64,
}

impl PrefixCache {
    /// An empty cache over a pool. `secret` keys the hashes.
    pub(super) fn new(num_blocks: usize, secret: [u8; 32]) -> Self {
        Self {
            secret,
            entries: vec![None; num_blocks],
            by_key: BTreeMap::new(),
            idle: IdleList::new(num_blocks),
            next_serial: 0,
        }
    }

    /// Appends the keys of the full blocks of `tokens` that `keys` does not cover yet.
    pub(super) fn extend_keys(
        &self,
        scope: PrefixScope,
        tokens: &[TokenId],
        keys: &mut Vec<BlockKey>,
    ) {
        let known = keys.len() * BLOCK_LEN;
        for block in tokens[known.min(tokens.len())..].chunks_exact(BLOCK_LEN) {
            let mut hasher = blake3::Hasher::new_keyed(&self.secret);
            match keys.last() {
                Some(parent) => hasher.update(&parent.0.to_le_bytes()),
                None => {
                    hasher.update(&scope.tenant.0.to_le_bytes()).update(&scope.salt.to_le_bytes())
                }
            };
            for token in block {
                hasher.update(&token.0.to_le_bytes());
            }
            let hash = hasher.finalize();
            let (head, _) = hash.as_bytes().split_at(16);
            let key = u128::from_le_bytes(head.try_into().expect("16 bytes were split off"));
            keys.push(BlockKey(key));
        }
    }

    /// The kept blocks that hold the beginning of `tokens`, in order. `keys` are those of its full
    /// blocks.
    pub(super) fn matching<'a>(
        &'a self,
        scope: PrefixScope,
        tokens: &'a [TokenId],
        keys: &'a [BlockKey],
    ) -> impl Iterator<Item = BlockId> + 'a {
        let mut parent = None;
        keys.iter().zip(tokens.chunks_exact(BLOCK_LEN)).map_while(move |(key, tokens)| {
            let block = *self.by_key.get(key)?;
            let entry = self.entry(block)?;
            let is_same = entry.parent == parent && entry.scope == scope && entry.tokens == *tokens;
            parent = Some((block, entry.serial));
            is_same.then_some(block)
        })
    }

    fn entry(&self, block: BlockId) -> Option<&Entry> {
        self.entries.get(block.index())?.as_ref()
    }

    /// Keeps the full blocks of `table` from index `from` on, up to `keys`. Where another block
    /// with the same contents is kept already, the table takes that one instead of its own. Returns
    /// how many blocks from the beginning are in the cache now.
    pub(super) fn insert(
        &mut self,
        blocks: &mut BlockManager,
        table: &mut BlockTable,
        from: usize,
        contents: Contents<'_>,
    ) -> usize {
        let Contents { scope, tokens, keys } = contents;
        let mut parent = None;
        if let Some(last) = from.checked_sub(1) {
            let block = table.blocks()[last];
            let Some(entry) = self.entry(block) else { return from };
            parent = Some((block, entry.serial));
        }
        for (index, key) in keys.iter().enumerate().skip(from) {
            let own = &tokens[index * BLOCK_LEN..(index + 1) * BLOCK_LEN];
            let block = match self.by_key.get(key) {
                Some(&block) => {
                    let entry = self.entry(block).expect("keys lead to entries");
                    if entry.parent != parent || entry.scope != scope || entry.tokens != *own {
                        return index; // a collision: what follows would have no parent
                    }
                    if table.blocks()[index] != block {
                        blocks.exchange(table, index, block);
                        self.becomes_held(block);
                    }
                    block
                }
                None => {
                    let block = table.blocks()[index];
                    self.add(
                        block,
                        Entry {
                            key: *key,
                            serial: self.next_serial,
                            parent,
                            scope,
                            tokens: own.try_into().expect("a block's tokens"),
                        },
                    );
                    blocks.keep(block);
                    block
                }
            };
            parent = self.entry(block).map(|entry| (block, entry.serial));
        }
        keys.len()
    }

    fn add(&mut self, block: BlockId, entry: Entry) {
        self.next_serial += 1;
        self.by_key.insert(entry.key, block);
        self.entries[block.index()] = Some(entry);
    }

    /// The last table that held a kept block has let it go. To be told from the last block of a
    /// table to the first.
    pub(super) fn becomes_idle(&mut self, block: BlockId) {
        self.idle.push(block);
    }

    /// A table holds a kept block again.
    pub(super) fn becomes_held(&mut self, block: BlockId) {
        self.idle.remove(block);
    }

    /// Gives up the block that has been idle longest, which is free then. Returns false when there
    /// is none.
    pub(super) fn evict(&mut self, blocks: &mut BlockManager) -> bool {
        let Some(block) = self.idle.oldest() else { return false };
        self.remove(blocks, block);
        true
    }

    fn remove(&mut self, blocks: &mut BlockManager, block: BlockId) {
        let Some(entry) = self.entries[block.index()].take() else { return };
        self.by_key.remove(&entry.key);
        self.idle.remove(block);
        blocks.drop_kept(block);
    }

    /// Forgets what the blocks of `table` contain, and everything that follows them.
    pub(super) fn distrust(&mut self, blocks: &mut BlockManager, table: &BlockTable) {
        // Children are younger than their parents: going from the youngest to the oldest, nothing
        // is removed before what hangs on it.
        let mut by_age: Vec<(u64, BlockId)> = self.kept().map(|(id, at)| (at.serial, id)).collect();
        by_age.sort_unstable();
        let mut doubted = BTreeSet::new();
        for &(serial, block) in &by_age {
            let parent = self.entry(block).and_then(|entry| entry.parent);
            let hangs_on_doubted = parent.is_some_and(|(_, serial)| doubted.contains(&serial));
            if hangs_on_doubted || table.blocks().contains(&block) {
                doubted.insert(serial);
            }
        }
        for &(serial, block) in by_age.iter().rev() {
            if doubted.contains(&serial) {
                self.remove(blocks, block);
            }
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self, blocks: &mut BlockManager) {
        let kept: Vec<BlockId> = self.kept().map(|(block, _)| block).collect();
        kept.into_iter().for_each(|block| self.remove(blocks, block));
    }

    fn kept(&self) -> impl Iterator<Item = (BlockId, &Entry)> {
        let all = (0..).map(BlockId).zip(&self.entries);
        all.filter_map(|(block, entry)| Some((block, entry.as_ref()?)))
    }

    /// Every kept block with its scope and all tokens up to its end. For invariant checks.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = (BlockId, PrefixScope, Vec<TokenId>)> {
        self.kept().map(|(block, entry)| (block, entry.scope, self.tokens_up_to(entry)))
    }

    fn tokens_up_to(&self, entry: &Entry) -> Vec<TokenId> {
        let mut parts = vec![entry.tokens];
        let mut above = entry.parent;
        while let Some((block, serial)) = above {
            let parent = self.entry(block).expect("entries leave from the leaves on");
            assert_eq!(parent.serial, serial, "a parent was replaced under its child");
            parts.push(parent.tokens);
            above = parent.parent;
        }
        parts.into_iter().rev().flatten().collect()
    }
}

/// What the blocks of a table hold from the beginning.
#[derive(Clone, Copy, Debug)]
pub(super) struct Contents<'a> {
    pub(super) scope: PrefixScope,
    /// At least the tokens of all `keys`.
    pub(super) tokens: &'a [TokenId],
    /// Keys of the full blocks to keep.
    pub(super) keys: &'a [BlockKey],
}

#[cfg(test)]
impl BlockKey {
    /// One of very few keys, so that different contents often have the same.
    pub(super) fn weakened(self) -> Self {
        Self(self.0 % 3)
    }
}
