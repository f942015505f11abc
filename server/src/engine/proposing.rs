//! Owns asking the draft and trusting nothing of what comes back: panics are caught, nonsense is
//! dropped and counted, a draft that keeps failing is quarantined. The engine sees only proposals
//! that are safe to verify.

use std::panic::{AssertUnwindSafe, catch_unwind};

use slipstream_draft::fault::DraftFault;
use slipstream_draft::proposer::{ProposeWork, Proposer, TimeBudget};
use slipstream_model::ids::SequenceId;
use slipstream_model::proposal::Proposal;

/// What came of asking the draft in one step.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ProposeOutcome {
    /// Proposals that passed every check, at most one per sequence.
    pub(super) proposals: Vec<Proposal>,
    /// Proposals dropped as nonsense.
    pub(super) num_dropped: u64,
    /// Whether the draft failed as a whole.
    pub(super) is_fault: bool,
    /// Whether this step put the draft into quarantine.
    pub(super) is_quarantined_now: bool,
}

/// The installed draft and its record of failures.
pub(super) struct Draft {
    proposer: Option<Box<dyn Proposer>>,
    /// Faulty steps since the last good one.
    consecutive_faults: usize,
    is_quarantined: bool,
}

impl Draft {
    pub(super) fn new(proposer: Option<Box<dyn Proposer>>) -> Self {
        Self { proposer, consecutive_faults: 0, is_quarantined: false }
    }

    pub(super) fn is_quarantined(&self) -> bool {
        self.is_quarantined
    }

    /// Asks for proposals. Whatever the draft does, the caller gets something safe.
    pub(super) fn propose(
        &mut self,
        work: &[ProposeWork<'_>],
        budget: TimeBudget<'_>,
        vocab_size: usize,
        quarantine_after: usize,
    ) -> ProposeOutcome {
        let mut outcome = ProposeOutcome::default();
        if work.is_empty() || self.is_quarantined {
            return outcome;
        }
        let Some(proposer) = self.proposer.as_mut() else { return outcome };
        let epoch = proposer.epoch();
        let mut raw = Vec::with_capacity(work.len());
        match guard(|| proposer.propose(work, budget, &mut raw)) {
            Ok(()) => {
                for proposal in raw {
                    let is_new =
                        outcome.proposals.iter().all(|kept| kept.sequence != proposal.sequence);
                    if is_new && proposal.epoch == epoch && is_sane(&proposal, work, vocab_size) {
                        outcome.proposals.push(proposal);
                    } else {
                        outcome.num_dropped += 1;
                    }
                }
            }
            Err(fault) => {
                tracing::warn!(%fault, %epoch, "the draft failed; this step decodes plainly");
                outcome.is_fault = true;
                // Its KV may be half written: let it start afresh.
                let _ = guard(|| {
                    proposer.reset();
                    Ok(())
                });
            }
        }
        if outcome.is_fault || outcome.num_dropped > 0 {
            self.consecutive_faults += 1;
        } else {
            self.consecutive_faults = 0;
        }
        if self.consecutive_faults >= quarantine_after {
            tracing::error!(%epoch, faults = self.consecutive_faults, "the draft is quarantined");
            self.is_quarantined = true;
            outcome.is_quarantined_now = true;
        }
        outcome
    }

    /// Tells the draft that a sequence has ended.
    pub(super) fn release(&mut self, sequence: SequenceId) {
        let Some(proposer) = self.proposer.as_mut() else { return };
        let released = guard(|| {
            proposer.release(sequence);
            Ok(())
        });
        if released.is_err() {
            self.is_quarantined = true;
        }
    }
}

/// Runs a call into the draft and turns a panic into a fault.
fn guard(call: impl FnOnce() -> Result<(), DraftFault>) -> Result<(), DraftFault> {
    // Unwind safety: after a panic the proposer is reset before it is asked again, and nothing it
    // had written is read.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            Err(DraftFault::Panicked(text.unwrap_or_else(|| "no message".to_owned())))
        }
    }
}

/// Whether a proposal is for a sequence that was asked for, no longer than asked for, and made of
/// vocabulary ids.
fn is_sane(proposal: &Proposal, work: &[ProposeWork<'_>], vocab_size: usize) -> bool {
    let asked = work.iter().find(|item| item.sequence == proposal.sequence);
    asked.is_some_and(|item| proposal.tokens.len() <= item.draft_len)
        && proposal.tokens.iter().all(|token| token.index() < vocab_size)
}
