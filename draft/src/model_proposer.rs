//! Owns proposing with a small model: catches its KV up with the known tokens, then runs up to
//! `draft_len` steps over all sequences at once. Chooses with the verifier's own function, noise
//! and parameters, which is what makes agreement likely. Knows nothing of acceptance: a rejected
//! token shows as a shorter common prefix when the sequence comes back.

use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::choice::{ChoiceContext, Chooser};
use slipstream_model::forward::{Forward, Logits};
use slipstream_model::ids::{DraftEpoch, SequenceId, TokenId};
use slipstream_model::proposal::Proposal;

use crate::fault::DraftFault;
use crate::kv_cache::KvCache;
use crate::proposer::{ProposeWork, Proposer, TimeBudget};

/// Settings of a [`ModelProposer`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelProposerOptions {
    /// Rows of known tokens that one step may catch up over all sequences. Bounds what a long
    /// prompt costs the others; a sequence that has not caught up gets no proposal.
    pub catch_up_rows_max: usize,
    /// Multiplies the draft's log-probabilities before noise is added (`beta` of the design, 0.5
    /// to 4). Cannot change any output.
    pub sharpening: f64,
}

impl Default for ModelProposerOptions {
    fn default() -> Self {
        Self { catch_up_rows_max: 512, sharpening: 1.0 }
    }
}

/// One sequence while proposals are made.
struct Run<'a> {
    work: ProposeWork<'a>,
    /// Known tokens, then proposed ones.
    tokens: Vec<TokenId>,
    /// Most tokens `tokens` may reach.
    len_max: usize,
    /// First of `tokens` whose KV is not computed.
    computed_len: usize,
    /// Rows it has in the batch being built.
    num_rows: usize,
    /// Whether the batch gives it logits.
    has_logits: bool,
    done: bool,
}

/// Proposes with a model of its own.
pub struct ModelProposer {
    forward: Box<dyn Forward>,
    epoch: DraftEpoch,
    options: ModelProposerOptions,
    cache: KvCache,
    batch: RaggedBatch,
    logits: Logits,
    chooser: Chooser,
}

impl ModelProposer {
    /// A proposer of `epoch` on the draft network `forward`, with an empty KV cache.
    #[must_use]
    pub fn new(
        forward: Box<dyn Forward>,
        epoch: DraftEpoch,
        options: ModelProposerOptions,
    ) -> Self {
        let cache = KvCache::new(forward.limits().num_blocks);
        Self {
            forward,
            epoch,
            options,
            cache,
            batch: RaggedBatch::new(),
            logits: Logits::new(),
            chooser: Chooser::new(),
        }
    }

    /// KV blocks held for sequences; zero when every sequence was released.
    #[must_use]
    pub fn num_held_blocks(&self) -> usize {
        self.cache.num_held()
    }

    /// Syncs every sequence with the cache and drops those the draft has no room for.
    fn begin<'a>(&mut self, work: &[ProposeWork<'a>]) -> Vec<Run<'a>> {
        let limits = self.forward.limits();
        self.cache.begin();
        let mut runs = Vec::with_capacity(work.len());
        for item in work {
            if item.history.is_empty() {
                continue;
            }
            let computed_len = self.cache.sync(item.sequence, item.history);
            // The last proposed token is never computed, so it needs no position.
            let len_max = (item.history.len() + item.draft_len).min(limits.context_len + 1);
            let fits = len_max > item.history.len();
            if fits && self.cache.reserve(item.sequence, len_max - 1) {
                runs.push(Run {
                    work: *item,
                    tokens: item.history.to_vec(),
                    len_max,
                    computed_len,
                    num_rows: 0,
                    has_logits: false,
                    done: false,
                });
            }
        }
        runs
    }

    /// Rows of one forward pass: whatever each sequence has not computed, within `rows_max` in all.
    fn fill_batch(&mut self, runs: &mut [Run<'_>], rows_max: usize) {
        self.batch.clear();
        let mut rows_left = rows_max;
        for run in runs.iter_mut().filter(|run| !run.done) {
            let pending = run.tokens.len() - run.computed_len;
            run.num_rows = pending.min(rows_left);
            run.has_logits = run.num_rows == pending;
            rows_left -= run.num_rows;
            if run.num_rows == 0 {
                run.has_logits = false;
                continue;
            }
            let rows = &run.tokens[run.computed_len..run.computed_len + run.num_rows];
            self.batch.push(SegmentInput {
                tokens: rows,
                start: run.computed_len,
                block_table: self.cache.block_table(run.work.sequence),
                logits_from: if run.has_logits { run.num_rows - 1 } else { run.num_rows },
                owner: run.work.sequence.0,
            });
        }
    }

    /// Records the computed rows and chooses the next token of every sequence that has logits.
    fn extend(&mut self, runs: &mut [Run<'_>]) -> Result<(), DraftFault> {
        let mut logits_row = 0;
        for run in runs.iter_mut().filter(|run| !run.done && run.num_rows > 0) {
            let rows = &run.tokens[run.computed_len..run.computed_len + run.num_rows];
            self.cache.advance(run.work.sequence, rows);
            run.computed_len += run.num_rows;
            if !run.has_logits {
                run.done = true; // still catching up; goes on in the next step
                continue;
            }
            let context = ChoiceContext {
                params: run.work.params,
                history: &run.tokens,
                prompt_len: run.work.prompt_len,
                sharpening: self.options.sharpening,
            };
            let token = self.chooser.choose(self.logits.row(logits_row), &context)?;
            logits_row += 1;
            run.tokens.push(token);
            // Nothing follows an end token.
            run.done = run.tokens.len() == run.len_max || run.work.params.end_ids.contains(&token);
        }
        Ok(())
    }
}

impl Proposer for ModelProposer {
    fn epoch(&self) -> DraftEpoch {
        self.epoch
    }

    fn propose(
        &mut self,
        work: &[ProposeWork<'_>],
        budget: TimeBudget<'_>,
        proposals: &mut Vec<Proposal>,
    ) -> Result<(), DraftFault> {
        let mut runs = self.begin(work);
        let mut rows_max = self.options.catch_up_rows_max;
        while !budget.is_spent() {
            self.fill_batch(&mut runs, rows_max);
            if self.batch.is_empty() {
                break;
            }
            self.forward.forward(&self.batch, &mut self.logits)?;
            self.extend(&mut runs)?;
            // A sequence left out for lack of rows waits for the next step.
            for run in runs.iter_mut().filter(|run| run.num_rows == 0) {
                run.done = true;
            }
            rows_max = usize::MAX; // from here on every sequence has one row
        }
        for run in runs {
            let proposed = &run.tokens[run.work.history.len()..];
            if !proposed.is_empty() {
                proposals.push(Proposal {
                    sequence: run.work.sequence,
                    epoch: self.epoch,
                    tokens: proposed.to_vec(),
                });
            }
        }
        Ok(())
    }

    fn release(&mut self, sequence: SequenceId) {
        self.cache.release(sequence);
    }

    fn reset(&mut self) {
        self.cache.clear();
    }
}
