//! Owns the hash LM: a [`Forward`] whose logits are a hash of what is really read back from its KV
//! store, so that a stale, leaked or misplaced entry changes the output at once, while real token
//! choice, real acceptance and real scheduling run on top of it. Like the KV of a network, what a
//! slot holds depends on everything before it: a block read behind another beginning, or across
//! tenants, is wrong even where its tokens are right. Knows nothing of the engine.

mod store;

use std::sync::Arc;

use slipstream_model::batch::{RaggedBatch, Segment};
use slipstream_model::clock::Micros;
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BlockId, TokenId};

use crate::proposers::VirtualClock;
use crate::random::mix;
use store::Store;

pub use store::{HashLmCounts, HashLmProbe, StoredSlot};

/// What a forward pass costs in virtual time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardCost {
    /// Every pass.
    pub base_ns: u64,
    /// Every row.
    pub row_ns: u64,
    /// Every position that a row attends to, itself included.
    pub pair_ns: u64,
}

impl ForwardCost {
    /// What `rows` rows in segments cost that attend to `pairs` positions in all.
    #[must_use]
    pub fn of(self, rows: u64, pairs: u64) -> Micros {
        Micros((self.base_ns + rows * self.row_ns + pairs * self.pair_ns) / 1_000)
    }

    fn of_batch(self, batch: &RaggedBatch) -> Micros {
        let attended = |segment: &Segment| {
            let rows = segment.rows.len() as u64;
            rows * segment.start as u64 + rows * (rows + 1) / 2
        };
        self.of(batch.num_rows() as u64, batch.segments().iter().map(attended).sum())
    }
}

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
    /// What a pass costs on the clock of [`HashLm::timed`].
    pub cost: ForwardCost,
}

impl HashLmConfig {
    /// A verifier without faults, which costs nothing.
    #[must_use]
    pub fn verifier(language: u64, limits: ForwardLimits) -> Self {
        let cost = ForwardCost::default();
        Self { limits, language, perturbation: 0.0, nan_one_in: 0, cost }
    }

    /// A draft of the same language, with the given noise on its logits.
    #[must_use]
    pub fn draft(self, perturbation: f32) -> Self {
        Self { perturbation, nan_one_in: 0, ..self }
    }

    /// The states that the slots of `tokens` must hold, from position 0, among readers of `scope`.
    #[must_use]
    pub fn states(&self, scope: u64, tokens: &[TokenId]) -> Vec<u64> {
        let mut read = first_read(self.language);
        let state = |(position, &token): (usize, &TokenId)| {
            let state = state_of(read, Place { token, position, scope });
            read = read_back(read, state);
            state
        };
        tokens.iter().enumerate().map(state).collect()
    }
}

/// A token at its place.
#[derive(Clone, Copy)]
struct Place {
    token: TokenId,
    position: usize,
    scope: u64,
}

/// What has been read before anything was read.
fn first_read(language: u64) -> u64 {
    mix(language)
}

/// What the slot of a token holds when `read` is what was read back before it.
fn state_of(read: u64, place: Place) -> u64 {
    let Place { token, position, scope } = place;
    mix(read ^ mix(scope ^ position as u64) ^ (u64::from(token.0) << 32))
}

/// Folds a slot's state into what was read before it. One-to-one in both arguments.
fn read_back(read: u64, state: u64) -> u64 {
    (read ^ state).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)
}

/// A language model made of hashes. See the module's description.
#[derive(Debug)]
pub struct HashLm {
    config: HashLmConfig,
    probe: HashLmProbe,
    clock: Option<Arc<VirtualClock>>,
}

impl HashLm {
    /// A hash LM with an empty store, and a probe to look into it. Takes no time.
    #[must_use]
    pub fn new(config: HashLmConfig) -> (Self, HashLmProbe) {
        let probe = HashLmProbe::new(config.limits.num_blocks);
        (Self { config, probe: probe.clone(), clock: None }, probe)
    }

    /// As [`new`](Self::new); every pass moves `clock` by what it costs.
    #[must_use]
    pub fn timed(config: HashLmConfig, clock: &Arc<VirtualClock>) -> (Self, HashLmProbe) {
        let (untimed, probe) = Self::new(config);
        (Self { clock: Some(Arc::clone(clock)), ..untimed }, probe)
    }

    /// Logits of the row whose history folds to `read`, `[vocab]`.
    fn fill_row(&self, read: u64, row: &mut [f32]) {
        let state = mix(read);
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

    fn is_nan_row(&self, read: u64) -> bool {
        self.config.nan_one_in != 0
            && mix(read ^ 0x004E_414E).is_multiple_of(self.config.nan_one_in)
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

    /// Reads the segment's whole history back, writes its rows and fills its logits rows.
    fn compute_segment(
        &self,
        store: &mut Store,
        batch: &RaggedBatch,
        segment: &Segment,
        out: &mut RowWriter<'_>,
    ) {
        let table = batch.block_table(segment);
        let mut read = first_read(self.config.language);
        for position in 0..segment.start {
            read = read_back(read, store.read(table, position, segment));
        }
        for (row, &token) in batch.tokens()[segment.rows.clone()].iter().enumerate() {
            let position = segment.start + row;
            let state = state_of(read, Place { token, position, scope: segment.scope });
            store.write(table, segment, StoredSlot::new(state, token, position, segment));
            read = read_back(read, state);
            if row < segment.logits_from {
                continue;
            }
            let logits = out.logits.row_mut(out.next_row);
            out.next_row += 1;
            if self.is_nan_row(read) || store.is_poisoned(segment.owner, position) {
                logits.fill(f32::NAN);
                store.counts.nan_rows += 1;
            } else {
                self.fill_row(read, logits);
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
        if let Some(clock) = &self.clock {
            clock.advance(self.config.cost.of_batch(batch));
        }
        // Nonsense first, in all rows: whoever reads another's row of the same pass sees it.
        store.begin_pass(batch);
        if store.panic_calls > 0 {
            store.panic_calls -= 1;
            store.counts.panicked_calls += 1;
            drop(store);
            // Unwinds like a panic, without the message that the panic hook would print.
            std::panic::resume_unwind(Box::new("on purpose"));
        }
        if store.fail_calls > 0 {
            store.fail_calls -= 1;
            store.counts.failed_calls += 1;
            return Err(ForwardError::Failed("on purpose".to_owned()));
        }
        store.counts.rows += batch.num_rows() as u64;
        logits.reset(batch.num_logit_rows(), self.config.limits.vocab_size);
        let mut out = RowWriter { logits, next_row: 0 };
        for segment in batch.segments() {
            self.compute_segment(&mut store, batch, segment, &mut out);
        }
        Ok(())
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        self.probe.lock().copy_block(from, to);
    }
}

/// Roughly standard normal: the centred sum of four 16-bit uniforms.
fn bell(key: u64) -> f32 {
    let sum: u64 = (0..4).map(|part| (key >> (16 * part)) & 0xFFFF).sum();
    (sum as f32 - 131_070.0) / 37_837.0
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use slipstream_model::batch::{RaggedBatch, SegmentInput};
    use slipstream_model::clock::{Clock, Micros};
    use slipstream_model::forward::{Forward, ForwardLimits, Logits};
    use slipstream_model::ids::{BlockId, TokenId};

    use super::{ForwardCost, HashLm, HashLmConfig};
    use crate::proposers::VirtualClock;
    use crate::random::Rng;
    use crate::requests::random_tokens;

    fn config() -> HashLmConfig {
        let limits = ForwardLimits { vocab_size: 24, context_len: 96, num_blocks: 12 };
        HashLmConfig::verifier(3, limits)
    }

    /// Logits of the rows `start ..` of `tokens`, read and written through `blocks` in `scope`.
    fn rows(
        lm: &mut HashLm,
        tokens: &[TokenId],
        start: usize,
        blocks: [u32; 6],
        scope: u64,
    ) -> Vec<Vec<f32>> {
        let mut batch = RaggedBatch::new();
        batch.push(SegmentInput {
            tokens: &tokens[start..],
            start,
            block_table: &blocks.map(BlockId),
            logits_from: 0,
            owner: 5,
            scope,
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
                pieces.extend(rows(&mut lm, &tokens[..end], start, far, 1));
            }
            assert_eq!(pieces, whole, "chunks of {chunk}, other blocks");
            assert_eq!(probe.counts().slots_written, 90);
            assert_eq!(probe.counts().poisoned_reads, 0);
        }
        let states = config().states(1, &tokens);
        assert_eq!(probe.first_wrong_slot(&near.map(BlockId), &states), None);
        assert_ne!(rows(&mut HashLm::new(config()).0, &tokens, 0, near, 2), whole, "other scope");
        // One foreign block, one stale token, one misplaced block: each changes the row.
        let last = &whole[89..];
        assert_ne!(rows(&mut lm, &tokens, 89, near, 2), last, "another tenant's KV");
        assert_eq!(probe.counts().poisoned_reads, 89);
        assert_ne!(rows(&mut lm, &tokens, 89, [0, 2, 1, 3, 4, 5], 1), last, "blocks out of order");
        let mut other = tokens.clone();
        other[40].0 ^= 1;
        rows(&mut lm, &other[..41], 40, near, 1);
        assert_ne!(rows(&mut lm, &tokens, 89, near, 1), last, "a stale token");
        assert_eq!(probe.first_wrong_slot(&near.map(BlockId), &states).unwrap().0, 40);
        rows(&mut lm, &tokens[..41], 40, near, 1);
        assert_eq!(rows(&mut lm, &tokens, 89, near, 1), last, "all put right again");
        // The right tokens at the right positions of the right scope, behind another beginning.
        let mut other = tokens.clone();
        other[3].0 ^= 1;
        rows(&mut lm, &other[..64], 0, [6, 7, 8, 9, 4, 5], 1);
        assert_ne!(rows(&mut lm, &tokens, 89, [0, 1, 8, 3, 4, 5], 1), last, "another prefix");
        // And a copy is as good as what it was copied from.
        lm.copy_block(BlockId(2), BlockId(10));
        rows(&mut lm, &tokens, 89, near, 1);
        assert_eq!(rows(&mut lm, &tokens, 89, [0, 1, 10, 3, 4, 5], 1), last, "a copied block");
    }

    #[test]
    fn a_block_that_another_segment_reads_is_not_to_be_written() {
        let tokens = random_tokens(&mut Rng::new(3), 24, 40);
        let (mut lm, probe) = HashLm::new(config());
        for (shared, wanted) in [([0, 1, 2, 3, 4, 5], 0), ([0, 1, 6, 7, 8, 9], 0)] {
            rows(&mut lm, &tokens, 0, shared, 0);
            assert_eq!(probe.counts().shared_writes, wanted);
        }
        let mut batch = RaggedBatch::new();
        for (owner, table, start) in [(1, [0, 1, 2], 36), (2, [0, 1, 6], 20)] {
            batch.push(SegmentInput {
                tokens: &tokens[start..],
                start,
                block_table: &table.map(BlockId),
                logits_from: 0,
                owner,
                scope: 0,
            });
        }
        lm.forward(&batch, &mut Logits::new()).expect("the batch is in range");
        // The second writes block 1, which the first has in its table, and had been scrambled.
        assert_eq!(probe.counts().shared_writes, 1);
        assert!(probe.counts().poisoned_reads > 0);
        let mut writers = Vec::new();
        let blocks = [0, 1, 2, 6].map(BlockId);
        probe.last_writers(blocks.into_iter(), |block, owner| writers.push((block.0, owner)));
        assert_eq!(writers, [(1, 2), (2, 1), (6, 2)]);
    }

    #[test]
    fn a_pass_costs_what_it_attends_to() {
        let clock = Arc::new(VirtualClock::default());
        let cost = ForwardCost { base_ns: 7_000, row_ns: 100_000, pair_ns: 10_000 };
        let (mut lm, _) = HashLm::timed(HashLmConfig { cost, ..config() }, &clock);
        let tokens = random_tokens(&mut Rng::new(4), 24, 12);
        rows(&mut lm, &tokens[..10], 0, [0, 1, 2, 3, 4, 5], 0);
        assert_eq!(clock.now(), Micros(7 + 10 * 100 + 55 * 10));
        rows(&mut lm, &tokens, 10, [0, 1, 2, 3, 4, 5], 0);
        assert_eq!(clock.now(), Micros(2 * 7 + 12 * 100 + 78 * 10));
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
            scope: 1,
        });
        assert!(lm.forward(&batch, &mut Logits::new()).is_err());
        assert_ne!(rows(&mut lm, &tokens, 89, blocks, 1), wanted[89..], "the slots are nonsense");
    }
}
