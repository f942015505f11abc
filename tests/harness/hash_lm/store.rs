//! Owns the slots of a hash LM's KV pool, who wrote what in which pass, and the window through
//! which tests look at them and cause faults. Knows no hashes: states are numbers here.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slipstream_model::batch::{RaggedBatch, Segment};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};

/// What one slot of the store holds: its state and everything that must be true of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredSlot {
    /// Hash of everything read before it and of what stands here.
    pub state: u64,
    /// Token that was computed here.
    pub token: TokenId,
    /// Absolute position it was computed for.
    pub position: usize,
    /// Among whom it may be shared.
    pub scope: u64,
    /// Owner tag of the segment that wrote it. Others of the scope may read it.
    pub owner: u64,
}

impl StoredSlot {
    pub(super) fn new(state: u64, token: TokenId, position: usize, segment: &Segment) -> Self {
        Self { state, token, position, scope: segment.scope, owner: segment.owner }
    }
}

/// Nobody's slot: what a fresh or scrambled slot holds.
const UNWRITTEN: StoredSlot = StoredSlot {
    state: 0x504F_4953_4F4E,
    token: TokenId(u32::MAX),
    position: usize::MAX,
    scope: u64::MAX,
    owner: u64::MAX,
};

/// What a hash LM has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HashLmCounts {
    /// Forward passes asked for.
    pub calls: u64,
    /// Rows computed.
    pub rows: u64,
    /// Slots written.
    pub slots_written: u64,
    /// Slots read back.
    pub slots_read: u64,
    /// Slots read whose position or scope was not the reader's, or that the same pass wrote for
    /// somebody else. Must stay 0.
    pub poisoned_reads: u64,
    /// Blocks written that another segment of the same pass has in its table. Must stay 0.
    pub shared_writes: u64,
    /// Calls refused because of an id, position or block out of range. Must stay 0.
    pub refused_calls: u64,
    /// Calls failed on purpose.
    pub failed_calls: u64,
    /// Calls that panicked on purpose.
    pub panicked_calls: u64,
    /// Rows of NaN given out on purpose.
    pub nan_rows: u64,
    /// Blocks copied.
    pub copied_blocks: u64,
}

/// The last write to a block.
#[derive(Clone, Copy, Debug)]
struct LastWrite {
    /// Number of the pass, from 1; 0 for never.
    pass: u64,
    owner: u64,
}

#[derive(Debug)]
pub(super) struct Store {
    slots: Vec<StoredSlot>,
    /// The last write to each block, `[num_blocks]`.
    last_writes: Vec<LastWrite>,
    /// How often each block has changed, copies included, `[num_blocks]`.
    versions: Vec<u64>,
    pass: u64,
    pub(super) counts: HashLmCounts,
    nan_rows: BTreeSet<(u64, usize)>,
    pub(super) fail_calls: u32,
    pub(super) panic_calls: u32,
}

impl Store {
    fn new(num_blocks: usize) -> Self {
        Self {
            slots: vec![UNWRITTEN; num_blocks * BLOCK_LEN],
            last_writes: vec![LastWrite { pass: 0, owner: u64::MAX }; num_blocks],
            versions: vec![0; num_blocks],
            pass: 0,
            counts: HashLmCounts::default(),
            nan_rows: BTreeSet::new(),
            fail_calls: 0,
            panic_calls: 0,
        }
    }

    /// Scrambles the slots of all rows and notes who writes where.
    pub(super) fn begin_pass(&mut self, batch: &RaggedBatch) {
        self.pass += 1;
        for segment in batch.segments() {
            let table = batch.block_table(segment);
            for position in segment.start..segment.start + segment.rows.len() {
                let block = table[position / BLOCK_LEN];
                self.slots[slot_index(block, position)] = UNWRITTEN;
                let write = LastWrite { pass: self.pass, owner: segment.owner };
                let old = std::mem::replace(&mut self.last_writes[block.index()], write);
                let is_shared = old.pass == self.pass && old.owner != segment.owner;
                self.counts.shared_writes += u64::from(is_shared);
                self.versions[block.index()] += 1;
            }
        }
        for segment in batch.segments() {
            for &block in batch.block_table(segment) {
                let write = self.last_writes[block.index()];
                let is_shared = write.pass == self.pass && write.owner != segment.owner;
                self.counts.shared_writes += u64::from(is_shared);
            }
        }
    }

    /// The state of the slot of `position`, for a reader of `segment`.
    pub(super) fn read(&mut self, table: &[BlockId], position: usize, segment: &Segment) -> u64 {
        let slot = self.slots[slot_index(table[position / BLOCK_LEN], position)];
        if slot.position != position || slot.scope != segment.scope {
            self.counts.poisoned_reads += 1;
        }
        slot.state
    }

    pub(super) fn write(&mut self, table: &[BlockId], segment: &Segment, slot: StoredSlot) {
        debug_assert_eq!(slot.owner, segment.owner);
        self.slots[slot_index(table[slot.position / BLOCK_LEN], slot.position)] = slot;
        self.counts.slots_written += 1;
    }

    pub(super) fn is_poisoned(&self, owner: u64, position: usize) -> bool {
        !self.nan_rows.is_empty() && self.nan_rows.contains(&(owner, position))
    }

    pub(super) fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let start = from.index() * BLOCK_LEN;
        self.slots.copy_within(start..start + BLOCK_LEN, to.index() * BLOCK_LEN);
        self.versions[to.index()] += 1;
        self.counts.copied_blocks += 1;
    }
}

/// Looks into a hash LM that the engine owns, and makes it fail.
#[derive(Clone, Debug)]
pub struct HashLmProbe {
    store: Arc<Mutex<Store>>,
}

impl HashLmProbe {
    pub(super) fn new(num_blocks: usize) -> Self {
        Self { store: Arc::new(Mutex::new(Store::new(num_blocks))) }
    }

    /// What has happened so far.
    #[must_use]
    pub fn counts(&self) -> HashLmCounts {
        self.lock().counts
    }

    /// Fails the next `num_calls` forward passes, leaving nonsense in the slots of their rows.
    pub fn fail_next(&self, num_calls: u32) {
        self.lock().fail_calls = num_calls;
    }

    /// Makes the next `num_calls` forward passes panic, leaving nonsense in the slots of their
    /// rows.
    pub fn panic_next(&self, num_calls: u32) {
        self.lock().panic_calls = num_calls;
    }

    /// Makes the row at `position` of `owner` a row of NaN.
    pub fn poison_row(&self, owner: u64, position: usize) {
        self.lock().nan_rows.insert((owner, position));
    }

    /// The first position whose slot, read through `blocks`, does not hold its state: `None` when
    /// all of `states` are really computed. `states` are those of `HashLmConfig::states`.
    #[must_use]
    pub fn first_wrong_slot(
        &self,
        blocks: &[BlockId],
        states: &[u64],
    ) -> Option<(usize, Option<StoredSlot>)> {
        let store = self.lock();
        for (index, states) in states.chunks(BLOCK_LEN).enumerate() {
            let Some(&block) = blocks.get(index) else { return Some((index * BLOCK_LEN, None)) };
            let slots = &store.slots[block.index() * BLOCK_LEN..][..states.len()];
            let is_wrong = |(slot, state): (&StoredSlot, &u64)| slot.state != *state;
            if let Some(offset) = slots.iter().zip(states).position(is_wrong) {
                return Some((index * BLOCK_LEN + offset, Some(slots[offset])));
            }
        }
        None
    }

    /// The blocks of `blocks` that the last pass wrote, each with its writer.
    pub fn last_writers(
        &self,
        blocks: impl Iterator<Item = BlockId>,
        mut visit: impl FnMut(BlockId, u64),
    ) {
        let store = self.lock();
        for block in blocks {
            let write = store.last_writes[block.index()];
            if write.pass == store.pass && store.pass > 0 {
                visit(block, write.owner);
            }
        }
    }

    /// How often `block` has changed so far.
    #[must_use]
    pub fn version(&self, block: BlockId) -> u64 {
        self.lock().versions[block.index()]
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Store> {
        // A panicking forward may have poisoned the lock; the store is plain data and stays valid.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn slot_index(block: BlockId, position: usize) -> usize {
    block.index() * BLOCK_LEN + position % BLOCK_LEN
}
