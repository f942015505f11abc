//! Owns the step: *plan what to compute; let the draft guess; let the target decide; keep what
//! agrees.* Every stage is one call; the stages live in the files named after them. A step is the
//! only thing that moves sequences forward.

use slipstream_draft::proposer::{ProposeWork, TimeBudget};
use slipstream_model::clock::Micros;
use slipstream_model::forward::ForwardError;
use slipstream_model::proposal::Proposals;
use slipstream_verifier::verifier::{Verdicts, VerifyWork};

use super::Engine;
use super::event::{FinishReason, SequenceFault};
use super::proposing::ProposeTerms;
use super::scheduler::{Circumstances, Scheduler, StepPlan};
use super::sequence::Phase;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Rows that the verifier computed, proposals included.
    pub num_rows: usize,
    /// Tokens committed over all sequences.
    pub num_committed: usize,
}

/// What the stages of a step hand on to each other. Kept from step to step, so that a step of the
/// same sequences allocates nothing.
#[derive(Default)]
pub(super) struct StepRoom {
    scheduler: Scheduler,
    pub(super) plan: StepPlan,
    /// Empty between steps: the items borrow from the sequences.
    propose_work: Vec<ProposeWork<'static>>,
    pub(super) proposals: Proposals,
    pub(super) verdicts: Verdicts,
}

impl Engine {
    /// Runs one step. Does nothing when no sequence needs one.
    pub fn step(&mut self) -> StepReport {
        let mut room = std::mem::take(&mut self.room);
        let report = self.step_in(&mut room);
        self.room = room;
        report
    }

    fn step_in(&mut self, room: &mut StepRoom) -> StepReport {
        let now = self.clock.now();
        self.expire(now);
        self.plan(room);
        self.apply(&room.plan, now);
        if room.plan.rows.is_empty() {
            return StepReport::default();
        }
        self.propose(room);
        match self.verify(room) {
            Ok(()) => self.commit(room),
            Err(error) => self.fail(&room.plan, &error),
        }
    }

    /// Chooses what to compute.
    fn plan(&self, room: &mut StepRoom) {
        let circumstances = Circumstances {
            config: &self.config,
            can_propose: self.draft.is_available(),
            blocks: &self.blocks,
        };
        room.scheduler.plan(circumstances, self.sequences.values(), &mut room.plan);
    }

    /// Ends the sequences whose deadline has passed.
    fn expire(&mut self, now: Micros) {
        let is_late = |deadline: Option<Micros>| deadline.is_some_and(|deadline| deadline <= now);
        let live = self.sequences.values().filter(|sequence| !sequence.is_finished());
        let late = live.filter(|sequence| is_late(sequence.request.deadline));
        let ids: Vec<_> = late.map(|sequence| sequence.id).collect();
        for id in ids {
            self.finish(id, FinishReason::DeadlineExceeded);
        }
    }

    /// Carries out preemptions and admissions and takes the blocks that the plan counted on.
    fn apply(&mut self, plan: &StepPlan, now: Micros) {
        for id in &plan.preempt {
            let sequence = self.sequences.get_mut(id).expect("plans name known sequences");
            sequence.advance(Phase::Preempted);
            sequence.computed_len = 0;
            self.blocks.release(&mut sequence.blocks);
            sequence.num_preemptions += 1;
            self.counters.preemptions += 1;
        }
        for id in &plan.admit {
            let sequence = self.sequences.get_mut(id).expect("plans name known sequences");
            sequence.advance(Phase::Running);
            sequence.reserve(self.config.draft_len_max);
        }
        for rows in &plan.rows {
            let sequence = self.sequences.get_mut(&rows.id).expect("plans name known sequences");
            sequence.first_planned.get_or_insert(now);
            let len = sequence.computed_len + rows.chunk_len + rows.draft_len;
            let grown = self.blocks.grow(&mut sequence.blocks, len);
            grown.expect("the plan counted the free blocks");
        }
    }

    /// Lets the draft guess.
    fn propose(&mut self, room: &mut StepRoom) {
        let mut work = reuse(std::mem::take(&mut room.propose_work));
        let wanting = room.plan.rows.iter().filter(|rows| rows.draft_len > 0);
        work.extend(wanting.map(|rows| {
            let sequence = &self.sequences[&rows.id];
            ProposeWork {
                sequence: rows.id,
                scope: sequence.scope,
                history: &sequence.tokens,
                prompt_len: sequence.request.prompt.len(),
                params: &sequence.request.params,
                draft_len: rows.draft_len,
            }
        }));
        let clock = self.clock.as_ref();
        let deadline = clock.now().plus(self.config.propose_budget);
        let terms = ProposeTerms {
            budget: TimeBudget { clock, deadline },
            vocab_size: self.verifier.limits().vocab_size,
            quarantine_after: self.config.quarantine_after,
        };
        let outcome = self.draft.propose(&work, terms, &mut room.proposals);
        room.propose_work = reuse(work);
        self.counters.draft_faults += u64::from(outcome.is_fault);
        self.counters.dropped_proposals += outcome.num_dropped;
        self.counters.quarantines += u64::from(outcome.is_quarantined_now);
    }

    /// Lets the target decide.
    fn verify(&mut self, room: &mut StepRoom) -> Result<(), ForwardError> {
        let (sequences, proposals) = (&self.sequences, &room.proposals);
        let work = room.plan.rows.iter().map(|rows| {
            let sequence = &sequences[&rows.id];
            VerifyWork {
                sequence: rows.id,
                scope: sequence.scope,
                history: &sequence.tokens,
                prompt_len: sequence.request.prompt.len(),
                computed_len: sequence.computed_len,
                chunk_len: rows.chunk_len,
                proposal: proposals.of(rows.id).map_or(&[], |proposal| proposal.tokens),
                block_table: sequence.blocks.blocks(),
                params: &sequence.request.params,
                logprobs: sequence.request.logprobs,
            }
        });
        self.counters.steps += 1;
        let num_rows = work.clone().map(|item| item.chunk_len + item.proposal.len());
        self.counters.rows += num_rows.sum::<usize>() as u64;
        self.verifier.verify(work, &mut room.verdicts)
    }

    /// A failure of the verifier ends every sequence of the batch, and only those.
    fn fail(&mut self, plan: &StepPlan, error: &ForwardError) -> StepReport {
        tracing::error!(%error, sequences = plan.rows.len(), "the verifier failed");
        self.counters.verifier_failures += 1;
        for rows in &plan.rows {
            self.finish(rows.id, FinishReason::Fault(SequenceFault::VerifierFailed));
        }
        StepReport::default()
    }
}

/// Empties a list and gives its memory to items that may borrow from elsewhere. Collecting from a
/// vector in place keeps its memory; `tests/allocations.rs` would see it if it did not.
fn reuse<'a>(mut work: Vec<ProposeWork<'_>>) -> Vec<ProposeWork<'a>> {
    work.clear();
    work.into_iter().map(|_| unreachable!("the list was emptied")).collect()
}
