//! Owns what the engine tells about a request: tokens, then exactly one end. A closed set; knows no
//! wire format.

use slipstream_model::choice::ChoiceFault;
use slipstream_model::clock::Micros;
use slipstream_model::ids::{DraftEpoch, TokenId};

/// News about one request.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Output, in order, each token exactly once.
    Tokens(TokensEvent),
    /// The end. Nothing follows it.
    Finished(Finished),
}

/// Some output tokens and the text they completed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokensEvent {
    /// Text that became certain. May lag behind the tokens: an incomplete character and a possible
    /// beginning of a stop string are held back.
    pub text: String,
    /// The tokens, in order.
    pub tokens: Vec<OutputToken>,
}

/// One token of the output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutputToken {
    /// Its id.
    pub id: TokenId,
    /// Natural logarithm of its probability under the raw logits, when asked for.
    pub logprob: Option<f64>,
    /// How it came about.
    pub provenance: Provenance,
    /// Epoch of the draft whose proposal was verified in the step that made it; `None` in a plain
    /// step.
    pub draft_epoch: Option<DraftEpoch>,
}

/// How a token came about. The token itself never depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Provenance {
    /// Proposed by the draft, and what the verifier chose.
    Accepted,
    /// The verifier's token at the first disagreement.
    Correction,
    /// The verifier's token after a fully accepted proposal.
    Bonus,
    /// The verifier's token of a step without a proposal.
    Plain,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// What it cost.
    pub usage: Usage,
    /// When things happened.
    pub timings: Timings,
    /// What speculation did for it.
    pub speculation: SpeculationUsage,
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token (EOS or a stop id) was chosen; it is not part of the output.
    EndToken(TokenId),
    /// The stop string of this index was completed; the output ends before it.
    StopString(usize),
    /// `max_tokens` or the context limit was reached.
    Length,
    /// Somebody ended it before it was done.
    Cancelled(CancelReason),
    /// The deadline passed.
    DeadlineExceeded,
    /// This sequence failed; others did not.
    Fault(SequenceFault),
    /// The server shut down before the request was done.
    ShuttingDown,
}

/// Who ended a request before it was done. The engine treats all alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelReason {
    /// The client cancelled or went away.
    ClientGone,
    /// Somebody asked for its end by its id.
    Aborted,
    /// The client took nothing for longer than the stall limit.
    Stalled,
}

impl FinishReason {
    /// Whether the request was ended from outside rather than by the rules of decoding. The client
    /// may go on elsewhere, so what was held back then stays back: it is not certain.
    #[must_use]
    pub fn is_forced(self) -> bool {
        match self {
            FinishReason::EndToken(_)
            | FinishReason::StopString(_)
            | FinishReason::Length
            | FinishReason::Fault(SequenceFault::Choice(_)) => false,
            FinishReason::Cancelled(_)
            | FinishReason::DeadlineExceeded
            | FinishReason::Fault(SequenceFault::VerifierFailed)
            | FinishReason::ShuttingDown => true,
        }
    }
}

/// What went wrong with one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SequenceFault {
    /// No token could be chosen from its logits.
    #[error(transparent)]
    Choice(#[from] ChoiceFault),
    /// The verifier failed on the batch that held it.
    #[error("the verifier failed")]
    VerifierFailed,
}

/// Token counts of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Output tokens emitted by this call; equals the tokens of all its events.
    pub output_tokens: usize,
    /// Output tokens the client brought along.
    pub prefix_tokens: usize,
    /// Prompt tokens whose KV was there already, from an earlier request or a sibling.
    pub cached_tokens: usize,
    /// Times that its KV was taken back and recomputed.
    pub preemptions: usize,
}

/// Spans of one request, from its arrival.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// Until its first row was computed; `None` when none ever was.
    pub queue: Option<Micros>,
    /// Until its first token was committed; `None` when none ever was.
    pub first_token: Option<Micros>,
    /// Until its end.
    pub total: Micros,
}

/// What speculation did for one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpeculationUsage {
    /// Steps in which the verifier chose tokens for it.
    pub num_steps: usize,
    /// Tokens proposed and verified. Those behind an end inside an accepted run do not count.
    pub num_proposed: usize,
    /// The same by position: how often a token was proposed at depth i.
    pub proposed_by_position: Vec<usize>,
    /// Proposed tokens accepted, by position. Acceptance at i means acceptance at all before it.
    pub accepted_by_position: Vec<usize>,
}

impl SpeculationUsage {
    /// Proposed tokens that were accepted.
    #[must_use]
    pub fn num_accepted(&self) -> usize {
        self.accepted_by_position.iter().sum()
    }
}
