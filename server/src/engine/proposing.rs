//! Owns asking the draft and trusting nothing of what comes back: panics are caught, nonsense is
//! dropped and counted, a draft that keeps failing is quarantined. The engine sees only proposals
//! that are safe to verify.

use std::panic::{AssertUnwindSafe, catch_unwind};

use slipstream_draft::fault::DraftFault;
use slipstream_draft::proposer::{ProposeWork, Proposer, TimeBudget};
use slipstream_model::clock::Micros;
use slipstream_model::ids::{DraftEpoch, SequenceId};
use slipstream_model::proposal::Proposals;

/// What came of asking the draft in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ProposeOutcome {
    /// Proposals dropped as nonsense.
    pub(super) num_dropped: u64,
    /// Whether the draft failed as a whole.
    pub(super) is_fault: bool,
    /// Whether this step put the draft into quarantine.
    pub(super) is_quarantined_now: bool,
}

/// What the draft is asked under.
#[derive(Clone, Copy)]
pub(super) struct ProposeTerms<'a> {
    /// How long it may take.
    pub(super) budget: TimeBudget<'a>,
    /// How long it may take without being at fault.
    pub(super) limit: Micros,
    /// Ids that the verifier knows.
    pub(super) vocab_size: usize,
    /// Consecutive faulty steps after which it is not asked any more.
    pub(super) quarantine_after: usize,
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

    /// Asks for proposals. Whatever the draft does, the caller gets something safe: `proposals` are
    /// then those that passed every check, at most one per sequence.
    pub(super) fn propose(
        &mut self,
        work: &[ProposeWork<'_>],
        terms: ProposeTerms<'_>,
        proposals: &mut Proposals,
    ) -> ProposeOutcome {
        let ProposeTerms { budget, limit, vocab_size, quarantine_after } = terms;
        let mut outcome = ProposeOutcome::default();
        proposals.clear();
        if work.is_empty() || !self.is_available() {
            return outcome;
        }
        let Some(proposer) = self.proposer.as_mut() else { return outcome };
        let begin = budget.clock.now();
        let mut epoch = DraftEpoch::default();
        let asked = guard(|| {
            epoch = proposer.epoch();
            proposer.propose(work, budget, proposals)
        });
        match asked.and_then(|()| check_time(begin, budget, limit)) {
            Ok(()) => {
                proposals.drop_empty(); // nothing to say is no offence
                let num_raw = proposals.len();
                keep_sane(proposals, work, epoch, vocab_size);
                outcome.num_dropped = (num_raw - proposals.len()) as u64;
            }
            Err(fault) => {
                tracing::warn!(%fault, %epoch, "the draft failed; this step decodes plainly");
                outcome.is_fault = true;
                proposals.clear();
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

    /// KV blocks that the draft holds, as it says.
    pub(super) fn num_held_blocks(&self) -> usize {
        let Some(proposer) = self.proposer.as_ref() else { return 0 };
        let mut num_held = 0;
        let asked = guard(|| {
            num_held = proposer.num_held_blocks();
            Ok(())
        });
        asked.map_or(0, |()| num_held)
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

/// A proposer that took more than its limit is at fault: the tokens of every stream waited.
fn check_time(begin: Micros, budget: TimeBudget<'_>, limit: Micros) -> Result<(), DraftFault> {
    let taken_us = budget.clock.now().since(begin).0;
    if taken_us > limit.0 {
        return Err(DraftFault::OverBudget { taken_us, budget_us: limit.0 });
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

/// Keeps the proposals that are of this epoch, for a sequence that was asked for and only once, no
/// longer than asked for, and made of vocabulary ids.
fn keep_sane(
    proposals: &mut Proposals,
    work: &[ProposeWork<'_>],
    epoch: DraftEpoch,
    vocab_size: usize,
) {
    proposals.keep_first(|proposal| {
        let asked = work.iter().find(|item| item.sequence == proposal.sequence);
        let fits = asked.is_some_and(|item| proposal.tokens.len() <= item.draft_len);
        let is_known = proposal.tokens.iter().all(|token| token.index() < vocab_size);
        fits && is_known && proposal.epoch == epoch
    });
}
