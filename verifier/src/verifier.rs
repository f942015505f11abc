//! Owns one verification of a step: builds the ragged batch, runs the target once, chooses tokens
//! row by row. Knows tokens, block tables and sampling parameters; knows no requests, no drafts and
//! no policy.

use slipstream_model::batch::{RaggedBatch, SegmentInput};
use slipstream_model::choice::{ChoiceContext, ChoiceFault, Chooser, log_probability};
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BlockId, SequenceId, TokenId};
use slipstream_model::sampling::SamplingParams;

use crate::acceptance::{FinalToken, Judgement, judge};

/// What one sequence wants computed in a step.
#[derive(Clone, Copy, Debug)]
pub struct VerifyWork<'a> {
    /// The sequence.
    pub sequence: SequenceId,
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
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Proposed tokens that the target chose too.
    pub accepted_len: usize,
    /// The target's token behind them. `None` when the last accepted token ends the completion:
    /// nothing follows an end token. A fault counts only if the accepted tokens before it did not
    /// finish the sequence.
    pub outcome: Result<Option<FinalToken>, ChoiceFault>,
    /// Log-probabilities of the committed tokens when asked for, else empty.
    pub logprobs: Vec<f64>,
}

/// Runs the target model and decides.
pub struct Verifier {
    forward: Box<dyn Forward>,
    batch: RaggedBatch,
    logits: Logits,
    chooser: Chooser,
    /// Scratch: the rows of one segment.
    row_tokens: Vec<TokenId>,
    /// Scratch: history of the row in hand.
    history: Vec<TokenId>,
}

impl Verifier {
    /// A verifier on `forward`, the target.
    #[must_use]
    pub fn new(forward: Box<dyn Forward>) -> Self {
        Self {
            forward,
            batch: RaggedBatch::new(),
            logits: Logits::new(),
            chooser: Chooser::new(),
            row_tokens: Vec::new(),
            history: Vec::new(),
        }
    }

    /// Sizes of the target.
    #[must_use]
    pub fn limits(&self) -> ForwardLimits {
        self.forward.limits()
    }

    /// Computes all rows of `work` in one forward pass and appends one entry per item to
    /// `verdicts`, `None` for a chunk that does not reach the end of its known tokens.
    ///
    /// # Errors
    /// [`ForwardError`] when the whole pass failed; nothing was appended.
    pub fn verify(
        &mut self,
        work: &[VerifyWork<'_>],
        verdicts: &mut Vec<Option<Verdict>>,
    ) -> Result<(), ForwardError> {
        self.batch.clear();
        for item in work {
            self.push_rows(item);
        }
        self.forward.forward(&self.batch, &mut self.logits)?;
        let mut logits_row = 0;
        for item in work {
            if item.reaches_end() {
                verdicts.push(Some(self.decide(item, logits_row)));
                logits_row += item.proposal.len() + 1;
            } else {
                verdicts.push(None);
            }
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
        });
    }

    /// Chooses the target's token row by row until it disagrees with the proposal or an end token
    /// is reached. Rows behind that point are not looked at: plain decoding would never see them.
    fn decide(&mut self, item: &VerifyWork<'_>, first_row: usize) -> Verdict {
        self.history.clear();
        self.history.extend_from_slice(item.history);
        let mut verdict = Verdict { accepted_len: 0, outcome: Ok(None), logprobs: Vec::new() };
        for depth in 0..=item.proposal.len() {
            let row = self.logits.row(first_row + depth);
            let context = ChoiceContext {
                params: item.params,
                history: &self.history,
                prompt_len: item.prompt_len,
                sharpening: 1.0,
            };
            let token = match self.chooser.choose(row, &context) {
                Ok(token) => token,
                Err(fault) => {
                    verdict.outcome = Err(fault);
                    return verdict;
                }
            };
            if item.logprobs {
                verdict.logprobs.push(log_probability(row, token));
            }
            match judge(item.proposal, depth, token) {
                Judgement::Final(final_token) => {
                    verdict.outcome = Ok(Some(final_token));
                    return verdict;
                }
                Judgement::Accepted => verdict.accepted_len += 1,
            }
            if item.params.end_ids.contains(&token) {
                return verdict;
            }
            self.history.push(token);
        }
        unreachable!("the row behind the last proposed token always gives a final token")
    }
}
