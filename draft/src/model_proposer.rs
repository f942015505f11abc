//! Owns proposing with a small model: catches its KV up with the known tokens, then runs up to
//! `draft_len` steps over all sequences at once. Chooses with the verifier's own function, noise
//! and parameters, which is what makes agreement likely. Knows nothing of acceptance: a rejected
//! token shows as a shorter common prefix when the sequence comes back.

use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::choice::{ChoiceContext, Chooser};
use slipstream_model::clock::Micros;
use slipstream_model::forward::{Forward, Logits};
use slipstream_model::ids::{DraftEpoch, SequenceId, TokenId};
use slipstream_model::proposal::Proposal;

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
    done: bool,
}

impl Run<'_> {
    /// Tokens to compute before the next one can be chosen.
    fn pending_len(&self) -> usize {
        self.tokens.len() - self.computed_len
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
            catch_up_rows: CATCH_UP_ROWS_FIRST,
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
            // What is computed was known; the verifier may have padding ids that the draft lacks.
            let is_known = |token: &TokenId| token.index() < limits.vocab_size;
            if !item.history[computed_len..].iter().all(is_known) {
                continue;
            }
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
                    done: false,
                });
            }
        }
        runs
    }

    /// Rows of one forward pass: the few tokens behind which every sequence of the last step is,
    /// and up to `rows_max` known tokens of the others in order. Returns how many of those it took.
    fn fill_batch(&mut self, runs: &mut [Run<'_>], rows_max: usize) -> usize {
        self.batch.clear();
        let mut num_caught_up = 0;
        for run in runs.iter_mut().filter(|run| !run.done) {
            let pending_len = run.pending_len();
            if pending_len <= run.work.draft_len + 1 {
                run.num_rows = pending_len;
            } else {
                run.num_rows = pending_len.min(rows_max - num_caught_up);
                num_caught_up += run.num_rows;
            }
            if run.num_rows == 0 {
                continue;
            }
            let rows = &run.tokens[run.computed_len..run.computed_len + run.num_rows];
            let reaches_end = run.num_rows == pending_len;
            self.batch.push(SegmentInput {
                tokens: rows,
                start: run.computed_len,
                block_table: self.cache.block_table(run.work.sequence),
                logits_from: if reaches_end { run.num_rows - 1 } else { run.num_rows },
                owner: run.work.sequence.0,
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
    fn extend(&mut self, runs: &mut [Run<'_>]) -> Result<(), DraftFault> {
        let mut logits_row = 0;
        for run in runs.iter_mut().filter(|run| !run.done && run.num_rows > 0) {
            let rows = &run.tokens[run.computed_len..run.computed_len + run.num_rows];
            self.cache.advance(run.work.sequence, rows);
            run.computed_len += run.num_rows;
            if run.pending_len() > 0 {
                continue; // still catching up
            }
            let context = ChoiceContext {
                params: run.work.params,
                history: &run.tokens,
                prompt_len: run.work.prompt_len,
                sharpening: self.options.sharpening,
            };
            let row = self.logits.row(logits_row);
            let row = &row[..row.len().min(self.options.target_vocab_size)];
            let token = self.chooser.choose(row, &context)?;
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
        let start = budget.clock.now();
        let mut catch_up_left = self.options.catch_up_rows_max;
        while !budget.is_spent() {
            let begin = budget.clock.now();
            let rows_max = catch_up_left.min(self.catch_up_rows);
            let num_caught_up = self.fill_batch(&mut runs, rows_max);
            catch_up_left -= num_caught_up;
            if self.batch.is_empty() {
                break; // all done, or what is left has to wait for the next step
            }
            self.forward.forward(&self.batch, &mut self.logits)?;
            if num_caught_up > 0 {
                self.adapt(budget.clock.now().since(begin), budget.deadline.since(start));
            }
            self.extend(&mut runs)?;
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
