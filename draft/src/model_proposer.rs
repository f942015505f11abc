//! Owns proposing with a small model: catches its KV up with the known tokens, then runs up to
//! `draft_len` steps over all sequences at once. Chooses with the verifier's own function, noise
//! and parameters, which is what makes agreement likely. Knows nothing of acceptance: a rejected
//! token shows as a shorter common prefix when the sequence comes back.

use std::ops::Range;

use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::choice::{ChoiceContext, Chooser};
use slipstream_model::clock::Micros;
use slipstream_model::forward::{Forward, Logits};
use slipstream_model::ids::{DraftEpoch, SequenceId, TokenId};
use slipstream_model::proposal::{Proposal, Proposals};

use crate::fault::DraftFault;
use crate::kv_cache::KvCache;
use crate::proposer::{ProposeWork, Proposer, TimeBudget};

/// Known tokens that one forward pass catches up at first. Between passes the time is looked at,
/// and the number follows what the last pass took.
const CATCH_UP_ROWS_FIRST: usize = 8;
/// And at most.
const CATCH_UP_ROWS_MAX: usize = 64;

/// Settings of a [`ModelProposer`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelProposerOptions {
    /// Rows of known tokens that one step may catch up over all sequences. Bounds what a long
    /// prompt costs the others; a sequence that has not caught up gets no proposal.
    pub catch_up_rows_max: usize,
    /// Multiplies the draft's log-probabilities before noise is added (`beta` of the design, 0.5
    /// to 4). Cannot change any output.
    pub sharpening: f64,
    /// Ids below this exist for the verifier. A draft whose vocabulary has more padding proposes
    /// none of it.
    pub target_vocab_size: usize,
}

impl Default for ModelProposerOptions {
    fn default() -> Self {
        Self { catch_up_rows_max: 512, sharpening: 1.0, target_vocab_size: usize::MAX }
    }
}

/// One sequence while proposals are made.
#[derive(Clone, Debug)]
struct Run {
    /// Its place in the work.
    index: usize,
    /// Where its proposed tokens lie in [`ModelProposer::proposed`].
    proposed: Range<usize>,
    /// Most tokens to propose.
    proposed_len_max: usize,
    /// First of its tokens, known ones, then proposed ones, whose KV is not computed.
    computed_len: usize,
    /// Rows it has in the batch being built.
    num_rows: usize,
    done: bool,
}

impl Run {
    /// Tokens to compute before the next one can be chosen.
    fn pending_len(&self, work: &ProposeWork<'_>) -> usize {
        work.history.len() + self.proposed.len() - self.computed_len
    }

    /// The tokens of its rows, through `scratch`.
    fn rows<'a>(
        &self,
        work: &ProposeWork<'_>,
        proposed: &[TokenId],
        scratch: &'a mut Vec<TokenId>,
    ) -> &'a [TokenId] {
        let known = work.history[self.computed_len.min(work.history.len())..].iter();
        let skipped = self.computed_len.saturating_sub(work.history.len());
        let proposed = proposed[self.proposed.clone()].iter().skip(skipped);
        scratch.clear();
        scratch.extend(known.chain(proposed).take(self.num_rows));
        scratch
    }
}

/// Proposes with a model of its own.
pub struct ModelProposer {
    forward: Box<dyn Forward>,
    epoch: DraftEpoch,
    options: ModelProposerOptions,
    cache: KvCache,
    /// Known tokens that the next forward pass may catch up.
    catch_up_rows: usize,
    batch: RaggedBatch,
    logits: Logits,
    chooser: Chooser,
    /// Scratch: the sequences of this step.
    runs: Vec<Run>,
    /// Scratch: room for the proposed tokens of all runs.
    proposed: Vec<TokenId>,
    /// Scratch: the rows of one segment.
    row_tokens: Vec<TokenId>,
}

impl ModelProposer {
    /// A proposer of `epoch` on the draft network `forward`, with an empty KV cache.
    #[must_use]
    pub fn new(
        forward: Box<dyn Forward>,
        epoch: DraftEpoch,
        options: ModelProposerOptions,
    ) -> Self {
        let limits = forward.limits();
        Self {
            forward,
            epoch,
            options,
            cache: KvCache::new(limits.num_blocks, limits.context_len),
            catch_up_rows: CATCH_UP_ROWS_FIRST,
            batch: RaggedBatch::with_block_capacity(limits.num_blocks),
            logits: Logits::new(),
            chooser: Chooser::new(),
            runs: Vec::new(),
            proposed: Vec::new(),
            row_tokens: Vec::new(),
        }
    }

    /// Syncs every sequence with the cache and drops those the draft has no room for.
    fn begin(&mut self, work: &[ProposeWork<'_>]) {
        let limits = self.forward.limits();
        self.cache.begin();
        self.runs.clear();
        self.proposed.clear();
        for (index, item) in work.iter().enumerate() {
            if item.history.is_empty() {
                continue;
            }
            let computed_len = self.cache.sync(item.sequence, item.history);
            // What is computed was known; the verifier may have padding ids that the draft lacks.
            let is_known = |token: &TokenId| token.index() < limits.vocab_size;
            if !item.history[computed_len..].iter().all(is_known) {
                continue;
            }
            // The last proposed token is never computed, so it needs no position.
            let len_max = (item.history.len() + item.draft_len).min(limits.context_len + 1);
            let fits = len_max > item.history.len();
            if fits && self.cache.reserve(item.sequence, len_max - 1) {
                let start = self.proposed.len();
                let proposed_len_max = len_max - item.history.len();
                self.proposed.resize(start + proposed_len_max, TokenId::default());
                self.runs.push(Run {
                    index,
                    proposed: start..start,
                    proposed_len_max,
                    computed_len,
                    num_rows: 0,
                    done: false,
                });
            }
        }
    }

    /// Rows of one forward pass: the few tokens behind which every sequence of the last step is,
    /// and up to `rows_max` known tokens of the others in order. Returns how many of those it took.
    fn fill_batch(&mut self, work: &[ProposeWork<'_>], rows_max: usize) -> usize {
        self.batch.clear();
        let mut num_caught_up = 0;
        for run in self.runs.iter_mut().filter(|run| !run.done) {
            let item = &work[run.index];
            let pending_len = run.pending_len(item);
            if pending_len <= item.draft_len + 1 {
                run.num_rows = pending_len;
            } else {
                run.num_rows = pending_len.min(rows_max - num_caught_up);
                num_caught_up += run.num_rows;
            }
            if run.num_rows == 0 {
                continue;
            }
            let reaches_end = run.num_rows == pending_len;
            self.batch.push(SegmentInput {
                tokens: run.rows(item, &self.proposed, &mut self.row_tokens),
                start: run.computed_len,
                block_table: self.cache.block_table(item.sequence),
                logits_from: if reaches_end { run.num_rows - 1 } else { run.num_rows },
                owner: item.sequence.0,
                scope: item.scope,
            });
        }
        num_caught_up
    }

    /// Aims catch-up passes at an eighth of the time there is: far enough from overrunning it.
    fn adapt(&mut self, taken: Micros, span: Micros) {
        if taken.0 > span.0 / 4 {
            self.catch_up_rows = (self.catch_up_rows / 2).max(1);
        } else if taken.0 < span.0 / 16 {
            self.catch_up_rows = (self.catch_up_rows * 2).min(CATCH_UP_ROWS_MAX);
        }
    }

    /// Records the computed rows and chooses the next token of every sequence that has logits.
    fn extend(&mut self, work: &[ProposeWork<'_>]) -> Result<(), DraftFault> {
        let mut logits_row = 0;
        for run in self.runs.iter_mut().filter(|run| !run.done && run.num_rows > 0) {
            let item = &work[run.index];
            let rows = run.rows(item, &self.proposed, &mut self.row_tokens);
            self.cache.advance(item.sequence, rows);
            run.computed_len += run.num_rows;
            if run.pending_len(item) > 0 {
                continue; // still catching up
            }
            let context = ChoiceContext {
                params: item.params,
                history: item.history,
                ahead: &self.proposed[run.proposed.clone()],
                prompt_len: item.prompt_len,
                sharpening: self.options.sharpening,
            };
            let row = self.logits.row(logits_row);
            let row = &row[..row.len().min(self.options.target_vocab_size)];
            let token = self.chooser.choose(row, &context)?;
            logits_row += 1;
            self.proposed[run.proposed.end] = token;
            run.proposed.end += 1;
            // Nothing follows an end token.
            let is_full = run.proposed.len() == run.proposed_len_max;
            run.done = is_full || item.params.end_ids.contains(&token);
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
        proposals: &mut Proposals,
    ) -> Result<(), DraftFault> {
        self.begin(work);
        let start = budget.clock.now();
        let mut catch_up_left = self.options.catch_up_rows_max;
        while !budget.is_spent() {
            let begin = budget.clock.now();
            let rows_max = catch_up_left.min(self.catch_up_rows);
            let num_caught_up = self.fill_batch(work, rows_max);
            catch_up_left -= num_caught_up;
            if self.batch.is_empty() {
                break; // all done, or what is left has to wait for the next step
            }
            self.forward.forward(&self.batch, &mut self.logits)?;
            if num_caught_up > 0 {
                self.adapt(budget.clock.now().since(begin), budget.deadline.since(start));
            }
            self.extend(work)?;
        }
        for run in self.runs.iter().filter(|run| !run.proposed.is_empty()) {
            proposals.push(Proposal {
                sequence: work[run.index].sequence,
                epoch: self.epoch,
                tokens: &self.proposed[run.proposed.clone()],
            });
        }
        Ok(())
    }

    fn release(&mut self, sequence: SequenceId) {
        self.cache.release(sequence);
    }

    fn reset(&mut self) {
        self.cache.clear();
    }

    fn num_held_blocks(&self) -> usize {
        self.cache.num_held()
    }
}
