//! Owns asking the draft and trusting nothing of what comes back: panics are caught, nonsense is
//! dropped and counted, a draft that keeps failing is quarantined. The engine sees only proposals
//! that are safe to verify.

use std::panic::{AssertUnwindSafe, catch_unwind};

use slipstream_draft::fault::DraftFault;
use slipstream_draft::proposer::{ProposeWork, Proposer, TimeBudget};
use slipstream_model::clock::Micros;
use slipstream_model::ids::{DraftEpoch, SequenceId};
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

    /// Whether there is a draft that may be asked.
    pub(super) fn is_available(&self) -> bool {
        self.proposer.is_some() && !self.is_quarantined
    }

    pub(super) fn is_installed(&self) -> bool {
        self.proposer.is_some()
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
        if work.is_empty() || !self.is_available() {
            return outcome;
        }
        let Some(proposer) = self.proposer.as_mut() else { return outcome };
        let begin = budget.clock.now();
        let mut epoch = DraftEpoch::default();
        let mut raw = Vec::with_capacity(work.len());
        let asked = guard(|| {
            epoch = proposer.epoch();
            proposer.propose(work, budget, &mut raw)
        });
        match asked.and_then(|()| check_time(begin, budget)) {
            Ok(()) => {
                raw.retain(|proposal| !proposal.tokens.is_empty()); // nothing to say is no offence
                let num_raw = raw.len();
                outcome.proposals = keep_sane(raw, work, epoch, vocab_size);
                outcome.num_dropped = (num_raw - outcome.proposals.len()) as u64;
            }
            Err(fault) => {
                tracing::warn!(%fault, %epoch, "the draft failed; this step decodes plainly");
                outcome.is_fault = true;
                if !matches!(fault, DraftFault::OverBudget { .. }) {
                    // Its KV may be half written: let it start afresh.
                    let reset = guard(|| {
                        proposer.reset();
                        Ok(())
                    });
                    if reset.is_err() {
                        self.consecutive_faults = quarantine_after;
                    }
                }
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

/// A proposer that took more than twice its time is at fault: the tokens of every stream waited.
fn check_time(begin: Micros, budget: TimeBudget<'_>) -> Result<(), DraftFault> {
    let budget_us = budget.deadline.since(begin).0;
    let taken_us = budget.clock.now().since(begin).0;
    if taken_us > budget_us.saturating_mul(2) {
        return Err(DraftFault::OverBudget { taken_us, budget_us });
    }
    Ok(())
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

/// The proposals that are of this epoch, for a sequence that was asked for and only once, no longer
/// than asked for, and made of vocabulary ids.
fn keep_sane(
    raw: Vec<Proposal>,
    work: &[ProposeWork<'_>],
    epoch: DraftEpoch,
    vocab_size: usize,
) -> Vec<Proposal> {
    let mut kept: Vec<Proposal> = Vec::with_capacity(raw.len());
    for proposal in raw {
        let asked = work.iter().find(|item| item.sequence == proposal.sequence);
        let fits = asked.is_some_and(|item| proposal.tokens.len() <= item.draft_len);
        let is_first = kept.iter().all(|other| other.sequence != proposal.sequence);
        let is_known = proposal.tokens.iter().all(|token| token.index() < vocab_size);
        if fits && is_first && is_known && proposal.epoch == epoch {
            kept.push(proposal);
        }
    }
    kept
}
