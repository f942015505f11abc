//! Owns the hash LM: a [`Forward`] whose logits are a hash of what is really read back from its KV
//! store, so that a stale, leaked or misplaced entry changes the output at once, while real token
//! choice, real acceptance and real scheduling run on top of it. Knows nothing of the engine.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use slipstream_model::batch::{RaggedBatch, Segment};
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BLOCK_LEN, BlockId, TokenId};

use crate::random::mix;

/// What one slot of the store holds: not only the token, but everything that must be true of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredSlot {
    /// Token that was computed here.
    pub token: TokenId,
    /// Absolute position it was computed for.
    pub position: usize,
    /// Block it was written through.
    pub block: BlockId,
    /// Owner tag of the segment that wrote it.
    pub owner: u64,
}

/// Nobody's slot: what a fresh or scrambled slot holds.
const UNWRITTEN: StoredSlot = StoredSlot {
    token: TokenId(u32::MAX),
    position: usize::MAX,
    block: BlockId(u32::MAX),
    owner: u64::MAX,
};

/// Which hash LM to build.
#[derive(Clone, Copy, Debug)]
pub struct HashLmConfig {
    /// Vocabulary, context and pool sizes.
    pub limits: ForwardLimits,
    /// The function from history to logits. A draft and a verifier of one language agree.
    pub language: u64,
    /// Standard deviation of the noise added to every logit; 0 for the verifier. A draft of the
    /// same language with a little noise agrees often, with much noise hardly ever.
    pub perturbation: f32,
    /// One in this many histories has a row of NaN after it; 0 for none. A pure function of the
    /// history, so that the oracle meets the same rows.
    pub nan_one_in: u64,
}

impl HashLmConfig {
    /// A verifier without faults.
    #[must_use]
    pub fn verifier(language: u64, limits: ForwardLimits) -> Self {
        Self { limits, language, perturbation: 0.0, nan_one_in: 0 }
    }

    /// A draft of the same language, with the given noise on its logits.
    #[must_use]
    pub fn draft(self, perturbation: f32) -> Self {
        Self { perturbation, nan_one_in: 0, ..self }
    }
}

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
    /// Slots read whose position, block or owner was not the reader's. Must stay 0.
    pub poisoned_reads: u64,
    /// Calls refused because of an id, position or block out of range. Must stay 0.
    pub refused_calls: u64,
    /// Calls failed on purpose.
    pub failed_calls: u64,
    /// Rows of NaN given out on purpose.
    pub nan_rows: u64,
}

#[derive(Debug)]
struct Store {
    slots: Vec<StoredSlot>,
    counts: HashLmCounts,
    nan_rows: BTreeSet<(u64, usize)>,
    fail_calls: u32,
}

/// Looks into a hash LM that the engine owns, and makes it fail.
#[derive(Clone, Debug)]
pub struct HashLmProbe {
    store: Arc<Mutex<Store>>,
}

impl HashLmProbe {
    /// What has happened so far.
    #[must_use]
    pub fn counts(&self) -> HashLmCounts {
        self.lock().counts
    }

    /// Fails the next `num_calls` forward passes, leaving nonsense in the slots of their rows.
    pub fn fail_next(&self, num_calls: u32) {
        self.lock().fail_calls = num_calls;
    }

    /// Makes the row at `position` of `owner` a row of NaN.
    pub fn poison_row(&self, owner: u64, position: usize) {
        self.lock().nan_rows.insert((owner, position));
    }

    /// The first of `tokens` whose slot, read through `blocks`, does not hold what it must:
    /// `None` when all of them are really computed.
    #[must_use]
    pub fn first_wrong_slot(
        &self,
        owner: u64,
        blocks: &[BlockId],
        tokens: &[TokenId],
    ) -> Option<(usize, Option<StoredSlot>)> {
        let store = self.lock();
        tokens.iter().enumerate().find_map(|(position, &token)| {
            let Some(&block) = blocks.get(position / BLOCK_LEN) else {
                return Some((position, None));
            };
            let found = store.slots[slot_index(block, position)];
            let wanted = StoredSlot { token, position, block, owner };
            (found != wanted).then_some((position, Some(found)))
        })
    }

    fn lock(&self) -> MutexGuard<'_, Store> {
        // A panicking proposer may have poisoned the lock; the store is plain data and stays valid.
        self.store.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A language model made of hashes. See the module's description.
#[derive(Debug)]
pub struct HashLm {
    config: HashLmConfig,
    probe: HashLmProbe,
}

impl HashLm {
    /// A hash LM with an empty store, and a probe to look into it.
    #[must_use]
    pub fn new(config: HashLmConfig) -> (Self, HashLmProbe) {
        let store = Store {
            slots: vec![UNWRITTEN; config.limits.num_blocks * BLOCK_LEN],
            counts: HashLmCounts::default(),
            nan_rows: BTreeSet::new(),
            fail_calls: 0,
        };
        let probe = HashLmProbe { store: Arc::new(Mutex::new(store)) };
        (Self { config, probe: probe.clone() }, probe)
    }

    fn first_state(&self) -> u64 {
        mix(self.config.language)
    }

    /// Logits of the row whose history folds to `state`, `[vocab]`.
    fn fill_row(&self, state: u64, row: &mut [f32]) {
        // Peaked and flat rows alternate: spreads of 1, 2, 4 and 8 standard deviations.
        let spread = (1u32 << (mix(state ^ 0x5052_4541) >> 62)) as f32;
        for (token, logit) in row.iter_mut().enumerate() {
            let key = mix(state.wrapping_add((token as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
            // Steps of 1/8 make ties common, so that the tie rule is exercised as well.
            *logit = (bell(key) * spread * 8.0).round() / 8.0;
            if self.config.perturbation != 0.0 {
                *logit += self.config.perturbation * bell(mix(key ^ 0x4452_4146));
            }
        }
    }

    fn is_nan_row(&self, state: u64) -> bool {
        self.config.nan_one_in != 0
            && mix(state ^ 0x004E_414E).is_multiple_of(self.config.nan_one_in)
    }

    fn check(&self, batch: &RaggedBatch) -> Result<(), ForwardError> {
        let ForwardLimits { vocab_size, context_len, num_blocks } = self.config.limits;
        for (row, token) in batch.tokens().iter().enumerate() {
            if token.index() >= vocab_size {
                return Err(ForwardError::TokenOutOfRange { token: token.0, row, vocab_size });
            }
        }
        for segment in batch.segments() {
            let position = segment.start + segment.rows.len() - 1;
            if position >= context_len {
                return Err(ForwardError::PositionOutOfRange { position, context_len });
            }
            let mut table = batch.block_table(segment).iter();
            if let Some(&block) = table.find(|block| block.index() >= num_blocks) {
                return Err(ForwardError::BlockOutOfRange { block, num_blocks });
            }
        }
        Ok(())
    }

    /// Reads the segment's whole history back and fills its logits rows from `next_row` on.
    fn read_segment(
        &self,
        store: &mut Store,
        batch: &RaggedBatch,
        segment: &Segment,
        out: &mut RowWriter<'_>,
    ) {
        let table = batch.block_table(segment);
        let mut state = self.first_state();
        for position in 0..segment.start + segment.rows.len() {
            let block = table[position / BLOCK_LEN];
            let slot = store.slots[slot_index(block, position)];
            state = fold(state, slot.token, slot.position);
            if slot.position != position || slot.block != block || slot.owner != segment.owner {
                store.counts.poisoned_reads += 1;
                state = mix(state ^ slot.owner ^ 0x504F_4953_4F4E);
            }
            let wants_logits = position >= segment.start + segment.logits_from;
            if wants_logits {
                let row = out.logits.row_mut(out.next_row);
                out.next_row += 1;
                self.fill_row(state, row);
                if self.is_nan_row(state) || store.nan_rows.contains(&(segment.owner, position)) {
                    row.fill(f32::NAN);
                    store.counts.nan_rows += 1;
                }
            }
        }
        store.counts.slots_read += (segment.start + segment.rows.len()) as u64;
    }
}

struct RowWriter<'a> {
    logits: &'a mut Logits,
    next_row: usize,
}

impl Forward for HashLm {
    fn limits(&self) -> ForwardLimits {
        self.config.limits
    }

    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError> {
        let probe = self.probe.clone();
        let mut store = probe.lock();
        store.counts.calls += 1;
        if let Err(error) = self.check(batch) {
            store.counts.refused_calls += 1;
            return Err(error);
        }
        if store.fail_calls > 0 {
            store.fail_calls -= 1;
            store.counts.failed_calls += 1;
            write_rows(&mut store, batch, |_| UNWRITTEN);
            return Err(ForwardError::Failed("on purpose".to_owned()));
        }
        store.counts.rows += batch.num_rows() as u64;
        write_rows(&mut store, batch, |slot| slot);
        logits.reset(batch.num_logit_rows(), self.config.limits.vocab_size);
        let mut out = RowWriter { logits, next_row: 0 };
        for segment in batch.segments() {
            self.read_segment(&mut store, batch, segment, &mut out);
        }
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        let probe = self.probe.clone();
        let mut store = probe.lock();
        for offset in 0..BLOCK_LEN {
            let slot = store.slots[from.index() * BLOCK_LEN + offset];
            let copied = StoredSlot { block: to, ..slot };
            store.slots[to.index() * BLOCK_LEN + offset] =
                if slot == UNWRITTEN { slot } else { copied };
        }
    }
}

/// Writes the slots of all rows before any is read, as a transformer's layer does.
fn write_rows(store: &mut Store, batch: &RaggedBatch, change: impl Fn(StoredSlot) -> StoredSlot) {
    for segment in batch.segments() {
        let table = batch.block_table(segment);
        for (offset, &token) in batch.tokens()[segment.rows.clone()].iter().enumerate() {
            let position = segment.start + offset;
            let block = table[position / BLOCK_LEN];
            let slot = StoredSlot { token, position, block, owner: segment.owner };
            store.slots[slot_index(block, position)] = change(slot);
            store.counts.slots_written += 1;
        }
    }
}

fn slot_index(block: BlockId, position: usize) -> usize {
    block.index() * BLOCK_LEN + position % BLOCK_LEN
}

fn fold(state: u64, token: TokenId, position: usize) -> u64 {
    mix(state ^ (u64::from(token.0) << 32) ^ position as u64)
}

/// Roughly standard normal: the centred sum of four 16-bit uniforms.
fn bell(key: u64) -> f32 {
    let sum: u64 = (0..4).map(|part| (key >> (16 * part)) & 0xFFFF).sum();
    (sum as f32 - 131_070.0) / 37_837.0
}

#[cfg(test)]
mod tests {
    use slipstream_model::batch::{RaggedBatch, SegmentInput};
    use slipstream_model::forward::{Forward, ForwardLimits, Logits};
    use slipstream_model::ids::{BlockId, TokenId};

    use super::{HashLm, HashLmConfig};
    use crate::random::Rng;
    use crate::requests::random_tokens;

    fn config() -> HashLmConfig {
        let limits = ForwardLimits { vocab_size: 24, context_len: 96, num_blocks: 12 };
        HashLmConfig::verifier(3, limits)
    }

    /// Logits of the rows `start ..` of `tokens`, read and written through `blocks` by `owner`.
    fn rows(
        lm: &mut HashLm,
        tokens: &[TokenId],
        start: usize,
        blocks: [u32; 6],
        owner: u64,
    ) -> Vec<Vec<f32>> {
        let mut batch = RaggedBatch::new();
        batch.push(SegmentInput {
            tokens: &tokens[start..],
            start,
            block_table: &blocks.map(BlockId),
            logits_from: 0,
            owner,
            scope: 0,
        });
        let mut logits = Logits::new();
        lm.forward(&batch, &mut logits).expect("the batch is in range");
        (0..logits.num_rows()).map(|row| logits.row(row).to_vec()).collect()
    }

    #[test]
    fn rows_depend_on_what_is_read_and_on_nothing_else() {
        let tokens = random_tokens(&mut Rng::new(1), 24, 90);
        let (near, far) = ([0, 1, 2, 3, 4, 5], [11, 3, 9, 1, 7, 5]);
        let (mut lm, probe) = HashLm::new(config());
        let whole = rows(&mut lm, &tokens, 0, near, 1);
        for chunk in [1, 7, 16, 33] {
            let (mut lm, probe) = HashLm::new(config());
            let mut pieces = Vec::new();
            for start in (0..90).step_by(chunk) {
                let end = (start + chunk).min(90);
                pieces.extend(rows(&mut lm, &tokens[..end], start, far, 77));
            }
            assert_eq!(pieces, whole, "chunks of {chunk}, other blocks, another owner");
            assert_eq!(probe.counts().slots_written, 90);
            assert_eq!(probe.counts().poisoned_reads, 0);
        }
        assert_eq!(probe.first_wrong_slot(1, &near.map(BlockId), &tokens), None);
        // One foreign block, one stale token, one misplaced block: each changes the row.
        let last = &whole[89..];
        assert_ne!(rows(&mut lm, &tokens, 89, near, 2), last, "another owner's KV");
        assert_eq!(probe.counts().poisoned_reads, 89);
        assert_ne!(rows(&mut lm, &tokens, 89, [0, 2, 1, 3, 4, 5], 1), last, "blocks out of order");
        let mut other = tokens.clone();
        other[40].0 ^= 1;
        rows(&mut lm, &other[..41], 40, near, 1);
        assert_ne!(rows(&mut lm, &tokens, 89, near, 1), last, "a stale token");
        assert_eq!(probe.first_wrong_slot(1, &near.map(BlockId), &tokens).unwrap().0, 40);
        rows(&mut lm, &tokens[..41], 40, near, 1);
        assert_eq!(rows(&mut lm, &tokens, 89, near, 1), last, "all put right again");
    }

    #[test]
    fn noise_lowers_agreement_and_failures_leave_nonsense() {
        let tokens = random_tokens(&mut Rng::new(2), 24, 90);
        let blocks = [0, 1, 2, 3, 4, 5];
        let best = |row: &Vec<f32>| {
            (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("rows are not empty")
        };
        let wanted = rows(&mut HashLm::new(config()).0, &tokens, 0, blocks, 1);
        let mut agreements = Vec::new();
        for perturbation in [0.0, 0.5, 4.0, 100.0] {
            let (mut draft, _) = HashLm::new(config().draft(perturbation));
            let found = rows(&mut draft, &tokens, 0, blocks, 1);
            let pairs = found.iter().zip(&wanted);
            agreements.push(pairs.filter(|(a, b)| best(a) == best(b)).count());
        }
        assert_eq!(agreements[0], 90);
        assert!(agreements.is_sorted_by(|a, b| a > b) && agreements[3] < 20, "{agreements:?}");
        let (mut lm, probe) = HashLm::new(config());
        probe.fail_next(1);
        let mut batch = RaggedBatch::new();
        let block_table = &blocks.map(BlockId);
        let (start, logits_from, owner) = (0, 90, 1);
        batch.push(SegmentInput {
            tokens: &tokens,
            start,
            block_table,
            logits_from,
            owner,
            scope: 0,
        });
        assert!(lm.forward(&batch, &mut Logits::new()).is_err());
        assert_ne!(rows(&mut lm, &tokens, 89, blocks, 1), wanted[89..], "the slots are nonsense");
    }
}
