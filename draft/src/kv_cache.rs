//! Owns the draft's record of what it has computed for which sequence. All of it is a cache: any
//! entry may be dropped at any time and is caught up when next needed. Knows tokens and block ids;
//! knows no network.
//!
//! The record holds the *tokens* whose KV is in the pool, so rejection, preemption, a resumed
//! request or a swapped draft need no notification: the common prefix with the sequence's tokens is
//! what is still good.

use std::collections::BTreeMap;

use slipstream_model::block_manager::{BlockManager, BlockTable};
use slipstream_model::ids::{BlockId, SequenceId, TokenId};

/// Positions that a new record has room for at once, so that it rarely grows in the middle of a
/// step.
const RESERVED_LEN_MAX: usize = 2048;

/// Tokens that are compared at a time: side by side, without a branch for each.
const COMPARED_LEN: usize = 64;

/// What is computed for one sequence.
#[derive(Debug, Default)]
struct Entry {
    /// Tokens whose KV lies in `blocks`, from position 0.
    computed: Vec<TokenId>,
    blocks: BlockTable,
    /// Value of [`KvCache::now`] when last used.
    last_used: u64,
}

impl Entry {
    fn with_room(len: usize) -> Self {
        let mut entry = Self::default();
        entry.computed.reserve(len);
        entry.blocks.reserve(len);
        entry
    }
}

/// The draft's KV records over one block pool.
#[derive(Debug)]
pub(crate) struct KvCache {
    blocks: BlockManager,
    /// Positions that new records have room for.
    reserved_len: usize,
    entries: BTreeMap<SequenceId, Entry>,
    /// Counts calls of [`begin`](Self::begin); orders entries by recency.
    now: u64,
}

impl KvCache {
    /// Records over `num_blocks` blocks, none longer than `context_len`.
    pub(crate) fn new(num_blocks: usize, context_len: usize) -> Self {
        Self {
            blocks: BlockManager::new(num_blocks),
            reserved_len: context_len.min(RESERVED_LEN_MAX),
            entries: BTreeMap::new(),
            now: 0,
        }
    }

    /// Starts a step: entries touched from now on are not evicted in it.
    pub(crate) fn begin(&mut self) {
        self.now += 1;
    }

    /// Lowers what is recorded for `sequence` to its common prefix with `history`, but so that at
    /// least the last token is left to compute: its row gives the logits. Returns the length.
    pub(crate) fn sync(&mut self, sequence: SequenceId, history: &[TokenId]) -> usize {
        let entry = self.entries.entry(sequence);
        let entry = entry.or_insert_with(|| Entry::with_room(self.reserved_len));
        entry.last_used = self.now;
        let common = common_len(&entry.computed, history);
        entry.computed.truncate(common.min(history.len() - 1));
        entry.computed.len()
    }

    /// Makes room for `len` positions, at the cost of entries not used in this step, the least
    /// recently used first. Returns false when even that is not enough.
    pub(crate) fn reserve(&mut self, sequence: SequenceId, len: usize) -> bool {
        loop {
            let entry = self.entries.entry(sequence).or_default();
            if self.blocks.grow(&mut entry.blocks, len).is_ok() {
                return true;
            }
            let now = self.now;
            let stale = self.entries.iter().filter(|(_, entry)| entry.last_used < now);
            let Some(victim) = stale.min_by_key(|(_, entry)| entry.last_used).map(|(id, _)| *id)
            else {
                return false;
            };
            self.release(victim);
        }
    }

    /// Records that KV of `tokens`, which follow what is recorded, has been computed.
    pub(crate) fn advance(&mut self, sequence: SequenceId, tokens: &[TokenId]) {
        let entry = self.entries.get_mut(&sequence).expect("only synced sequences advance");
        entry.computed.extend_from_slice(tokens);
    }

    pub(crate) fn block_table(&self, sequence: SequenceId) -> &[BlockId] {
        self.entries.get(&sequence).map_or(&[], |entry| entry.blocks.blocks())
    }

    pub(crate) fn release(&mut self, sequence: SequenceId) {
        if let Some(mut entry) = self.entries.remove(&sequence) {
            self.blocks.release(&mut entry.blocks);
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::new(self.blocks.num_blocks(), self.reserved_len);
    }

    /// Blocks held by entries; for tests of leaks.
    pub(crate) fn num_held(&self) -> usize {
        self.blocks.num_blocks() - self.blocks.num_free()
    }
}

/// Length of the common prefix.
fn common_len(a: &[TokenId], b: &[TokenId]) -> usize {
    let len = a.len().min(b.len());
    let parts = a[..len].chunks_exact(COMPARED_LEN).zip(b.chunks_exact(COMPARED_LEN));
    let is_same = |(a, b): &(&[TokenId], &[TokenId])| {
        a.iter().zip(*b).fold(0, |difference, (a, b)| difference | (a.0 ^ b.0)) == 0
    };
    let start = parts.take_while(is_same).count() * COMPARED_LEN;
    start + a[start..].iter().zip(&b[start..]).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::{KvCache, common_len};
    use slipstream_model::ids::{SequenceId, TokenId};

    fn tokens(ids: &[u32]) -> Vec<TokenId> {
        ids.iter().copied().map(TokenId).collect()
    }

    #[test]
    fn rejection_lowers_the_record_to_the_common_prefix() {
        let mut cache = KvCache::new(4, 64);
        let id = SequenceId(1);
        cache.begin();
        assert_eq!(cache.sync(id, &tokens(&[1, 2, 3])), 0);
        assert!(cache.reserve(id, 5));
        cache.advance(id, &tokens(&[1, 2, 3, 7, 8]));
        assert_eq!(cache.sync(id, &tokens(&[1, 2, 3, 7, 9, 4])), 4);
        // Everything known is computed: one token is kept back to give logits.
        assert_eq!(cache.sync(id, &tokens(&[1, 2, 3, 7])), 3);
    }

    #[test]
    fn common_prefixes_end_where_they_should() {
        for len in [0, 1, 63, 64, 65, 200] {
            let whole: Vec<u32> = (0..len).collect();
            for cut in 0..len as usize {
                let mut other = whole.clone();
                other[cut] += 1;
                assert_eq!(common_len(&tokens(&whole), &tokens(&other)), cut);
                assert_eq!(common_len(&tokens(&whole[..cut]), &tokens(&whole)), cut);
            }
            assert_eq!(common_len(&tokens(&whole), &tokens(&whole)), len as usize);
        }
    }

    #[test]
    fn only_entries_unused_in_this_step_are_evicted() {
        let mut cache = KvCache::new(2, 32);
        cache.begin();
        cache.sync(SequenceId(1), &tokens(&[1]));
        assert!(cache.reserve(SequenceId(1), 17));
        cache.begin();
        cache.sync(SequenceId(2), &tokens(&[1]));
        assert!(cache.reserve(SequenceId(2), 17));
        assert!(cache.block_table(SequenceId(1)).is_empty());
        cache.sync(SequenceId(3), &tokens(&[1]));
        assert!(!cache.reserve(SequenceId(3), 1));
        cache.release(SequenceId(2));
        cache.release(SequenceId(3));
        assert_eq!(cache.num_held(), 0);
    }
}
