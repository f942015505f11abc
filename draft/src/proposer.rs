//! Owns the seam between engine and drafts. Knows sequences by id and tokens only.

use slipstream_model::clock::{Clock, Micros};
use slipstream_model::ids::{DraftEpoch, SequenceId, TokenId};
use slipstream_model::proposal::Proposals;
use slipstream_model::sampling::SamplingParams;

use crate::fault::DraftFault;

/// One sequence that wants a proposal.
#[derive(Clone, Copy, Debug)]
pub struct ProposeWork<'a> {
    /// The sequence.
    pub sequence: SequenceId,
    /// Among whom its KV may be shared; see `Segment::scope`.
    pub scope: u64,
    /// All its known tokens: prompt, then output.
    pub history: &'a [TokenId],
    /// Tokens of `history` that are prompt.
    pub prompt_len: usize,
    /// How the verifier will choose, so that the draft can choose alike.
    pub params: &'a SamplingParams,
    /// Most tokens to propose, at least 1.
    pub draft_len: usize,
}

/// How long a proposer may take. A proposer that runs out returns what it has.
#[derive(Clone, Copy)]
pub struct TimeBudget<'a> {
    /// Where to read the time.
    pub clock: &'a dyn Clock,
    /// When to stop.
    pub deadline: Micros,
}

impl TimeBudget<'_> {
    /// Whether the time is over.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.clock.now() >= self.deadline
    }
}

/// Suggests tokens. Untrusted: the engine checks everything it returns and survives its panics.
/// Nothing it does can change an output, only how fast it comes.
pub trait Proposer: Send {
    /// Epoch of the draft that proposes now.
    fn epoch(&self) -> DraftEpoch;

    /// Appends at most one proposal per sequence of `work` to `proposals`. A sequence whose draft
    /// KV has not caught up yet simply gets none.
    ///
    /// # Errors
    /// [`DraftFault`]; the step then decodes plainly.
    fn propose(
        &mut self,
        work: &[ProposeWork<'_>],
        budget: TimeBudget<'_>,
        proposals: &mut Proposals,
    ) -> Result<(), DraftFault>;

    /// The sequence has ended: its KV may go. Unknown ids are fine.
    fn release(&mut self, sequence: SequenceId);

    /// Drops all KV of all sequences, as after a fault. They catch up when next asked.
    fn reset(&mut self);

    /// KV blocks held for sequences; zero when every sequence was released, and for those that have
    /// no KV.
    fn num_held_blocks(&self) -> usize {
        0
    }
}
