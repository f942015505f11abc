//! Owns one verification of a step: builds the ragged batch, runs the target once, chooses tokens
//! row by row. Knows tokens, block tables and sampling parameters; knows no requests, no drafts and
//! no policy.

use std::ops::Range;

use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::choice::{ChoiceContext, ChoiceFault, Chooser};
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BlockId, SequenceId, TokenId};
use slipstream_model::sampling::SamplingParams;

use crate::acceptance::{FinalToken, Judgement, judge};

/// What one sequence wants computed in a step.
#[derive(Clone, Copy, Debug)]
pub struct VerifyWork<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// Among whom its KV may be shared; see `Segment::scope`.
    pub scope: u64,
    /// All its known tokens: prompt, then output.
    pub history: &'a [TokenId],
    /// Tokens of `history` that are prompt.
    pub prompt_len: usize,
    /// Positions whose KV is computed already.
    pub computed_len: usize,
    /// Known tokens to compute now, at least 1, from `computed_len` on.
    pub chunk_len: usize,
    /// Tokens proposed to follow `history`; empty unless the chunk reaches its end.
    pub proposal: &'a [TokenId],
    /// KV blocks covering all rows.
    pub block_table: &'a [BlockId],
    /// How to choose.
    pub params: &'a SamplingParams,
    /// Whether log-probabilities are wanted.
    pub logprobs: bool,
}

impl VerifyWork<'_> {
    /// Whether the chunk reaches the end of the known tokens, so that a token is chosen.
    fn reaches_end(&self) -> bool {
        self.computed_len + self.chunk_len == self.history.len()
    }
}

/// What became of one sequence's proposal. The committed tokens of the step are the accepted ones,
/// then the final one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict<'a> {
    /// Proposed tokens that the target chose too.
    pub accepted_len: usize,
    /// The target's token behind them. `None` when the last accepted token ends the completion:
    /// nothing follows an end token. A fault counts only if the accepted tokens before it did not
    /// finish the sequence.
    pub outcome: Result<Option<FinalToken>, ChoiceFault>,
    /// Log-probabilities of the committed tokens when asked for, else empty.
    pub logprobs: &'a [f64],
}

/// The verdicts of one step, one entry per item of work. Reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct Verdicts {
    entries: Vec<Option<Entry>>,
    /// Log-probabilities of all entries.
    logprobs: Vec<f64>,
}

#[derive(Clone, Debug)]
struct Entry {
    accepted_len: usize,
    outcome: Result<Option<FinalToken>, ChoiceFault>,
    /// Where its log-probabilities lie.
    logprobs: Range<usize>,
}

impl Verdicts {
    /// No verdicts.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One entry per item of work, `None` for a chunk that does not reach the end of its known
    /// tokens.
    pub fn iter(&self) -> impl Iterator<Item = Option<Verdict<'_>>> {
        self.entries.iter().map(|entry| {
            entry.as_ref().map(|entry| Verdict {
                accepted_len: entry.accepted_len,
                outcome: entry.outcome,
                logprobs: &self.logprobs[entry.logprobs.clone()],
            })
        })
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.logprobs.clear();
    }
}

/// Runs the target model and decides.
pub struct Verifier {
    forward: Box<dyn Forward>,
    batch: RaggedBatch,
    logits: Logits,
    chooser: Chooser,
    /// Scratch: the rows of one segment.
    row_tokens: Vec<TokenId>,
}

impl Verifier {
    /// A verifier on `forward`, the target.
    #[must_use]
    pub fn new(forward: Box<dyn Forward>) -> Self {
        Self {
            batch: RaggedBatch::with_block_capacity(forward.limits().num_blocks),
            forward,
            logits: Logits::new(),
            chooser: Chooser::new(),
            row_tokens: Vec::new(),
        }
    }

    /// Sizes of the target.
    #[must_use]
    pub fn limits(&self) -> ForwardLimits {
        self.forward.limits()
    }

    /// Copies a KV block; see [`Forward::copy_block`].
    pub fn copy_block(&mut self, from: BlockId, to: BlockId) {
        self.forward.copy_block(from, to);
    }

    /// Computes rows of no sequence, to find out how long that takes. What they leave in the blocks
    /// means nothing.
    ///
    /// # Errors
    /// [`ForwardError`] when the pass failed.
    pub fn rehearse(
        &mut self,
        tokens: &[TokenId],
        start: usize,
        block_table: &[BlockId],
    ) -> Result<(), ForwardError> {
        self.batch.clear();
        let logits_from = tokens.len() - 1;
        let (owner, scope) = (u64::MAX, 0);
        self.batch.push(SegmentInput { tokens, start, block_table, logits_from, owner, scope });
        self.forward.forward(&self.batch, &mut self.logits)
    }

    /// Computes all rows of `work` in one forward pass and replaces `verdicts` by one entry per
    /// item.
    ///
    /// # Errors
    /// [`ForwardError`] when the whole pass failed; there are no verdicts then.
    pub fn verify<'a>(
        &mut self,
        work: impl Iterator<Item = VerifyWork<'a>> + Clone,
        verdicts: &mut Verdicts,
    ) -> Result<(), ForwardError> {
        verdicts.clear();
        self.batch.clear();
        for item in work.clone() {
            self.push_rows(&item);
        }
        self.forward.forward(&self.batch, &mut self.logits)?;
        let mut logits_row = 0;
        for item in work {
            let mut entry = None;
            if item.reaches_end() {
                entry = Some(self.decide(&item, logits_row, &mut verdicts.logprobs));
                logits_row += item.proposal.len() + 1;
            }
            verdicts.entries.push(entry);
        }
        Ok(())
    }

    fn push_rows(&mut self, item: &VerifyWork<'_>) {
        let chunk_end = item.computed_len + item.chunk_len;
        self.row_tokens.clear();
        self.row_tokens.extend_from_slice(&item.history[item.computed_len..chunk_end]);
        self.row_tokens.extend_from_slice(item.proposal);
        let logits_from =
            if item.reaches_end() { item.chunk_len - 1 } else { self.row_tokens.len() };
        self.batch.push(SegmentInput {
            tokens: &self.row_tokens,
            start: item.computed_len,
            block_table: item.block_table,
            logits_from,
            owner: item.sequence.0,
            scope: item.scope,
        });
    }

    /// Chooses the target's token row by row until it disagrees with the proposal or an end token
    /// is reached. Rows behind that point are not looked at: plain decoding would never see them.
    fn decide(
        &mut self,
        item: &VerifyWork<'_>,
        first_row: usize,
        logprobs: &mut Vec<f64>,
    ) -> Entry {
        let start = logprobs.len();
        if item.logprobs {
            logprobs.reserve(item.proposal.len() + 1);
        }
        let mut accepted_len = 0;
        let outcome = loop {
            let row = self.logits.row(first_row + accepted_len);
            let context = ChoiceContext {
                params: item.params,
                history: item.history,
                ahead: &item.proposal[..accepted_len],
                prompt_len: item.prompt_len,
                sharpening: 1.0,
            };
            let token = match self.chooser.choose(row, &context) {
                Ok(token) => token,
                Err(fault) => break Err(fault),
            };
            if item.logprobs {
                logprobs.push(self.chooser.log_probability(row, token));
            }
            // The row behind the last proposed token always gives a final token.
            match judge(item.proposal, accepted_len, token) {
                Judgement::Final(final_token) => break Ok(Some(final_token)),
                Judgement::Accepted => accepted_len += 1,
            }
            if item.params.end_ids.contains(&token) {
                break Ok(None);
            }
        };
        Entry { accepted_len, outcome, logprobs: start..logprobs.len() }
    }
}
