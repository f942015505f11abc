//! Owns the step: *plan what to compute; let the draft guess; let the target decide; keep what
//! agrees.* Every stage is one call; the stages live in the files named after them. A step is the
//! only thing that moves sequences forward.

use slipstream_draft::proposer::{ProposeWork, TimeBudget};
use slipstream_model::clock::Micros;
use slipstream_model::proposal::Proposal;
use slipstream_verifier::verifier::{Verdict, VerifyWork};

use super::Engine;
use super::event::{FinishReason, SequenceFault};
use super::scheduler::{self, StepPlan};
use super::sequence::Phase;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Rows that the verifier computed, proposals included.
    pub num_rows: usize,
    /// Tokens committed over all sequences.
    pub num_committed: usize,
}

impl Engine {
    /// Runs one step. Does nothing when no sequence needs one.
    pub fn step(&mut self) -> StepReport {
        let now = self.clock.now();
        self.expire(now);
        let can_propose = self.draft.is_available();
        let sequences = self.sequences.values();
        let plan = scheduler::plan(&self.config, can_propose, sequences, &self.blocks);
        self.apply(&plan, now);
        if plan.rows.is_empty() {
            return StepReport::default();
        }
        let proposals = self.propose(&plan);
        let Some(verdicts) = self.verify(&plan, &proposals) else {
            return StepReport::default();
        };
        self.commit(&plan, &proposals, verdicts)
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
            self.counters.preemptions += 1;
        }
        for id in &plan.admit {
            let sequence = self.sequences.get_mut(id).expect("plans name known sequences");
            sequence.advance(Phase::Running);
        }
        for rows in &plan.rows {
            let sequence = self.sequences.get_mut(&rows.id).expect("plans name known sequences");
            sequence.first_planned.get_or_insert(now);
            let len = sequence.computed_len + rows.chunk_len + rows.draft_len;
            let grown = self.blocks.grow(&mut sequence.blocks, len);
            grown.expect("the plan counted the free blocks");
        }
    }

    /// Lets the draft guess. The answer has one entry per planned sequence, in order.
    fn propose(&mut self, plan: &StepPlan) -> Vec<Option<Proposal>> {
        let wanting = plan.rows.iter().filter(|rows| rows.draft_len > 0);
        let work: Vec<ProposeWork<'_>> = wanting
            .map(|rows| {
                let sequence = &self.sequences[&rows.id];
                ProposeWork {
                    sequence: rows.id,
                    history: &sequence.tokens,
                    prompt_len: sequence.request.prompt.len(),
                    params: &sequence.request.params,
                    draft_len: rows.draft_len,
                }
            })
            .collect();
        let clock = self.clock.as_ref();
        let deadline = clock.now().plus(self.config.propose_budget);
        let budget = TimeBudget { clock, deadline };
        let vocab_size = self.verifier.limits().vocab_size;
        let quarantine_after = self.config.quarantine_after;
        let mut outcome = self.draft.propose(&work, budget, vocab_size, quarantine_after);
        self.counters.draft_faults += u64::from(outcome.is_fault);
        self.counters.dropped_proposals += outcome.num_dropped;
        self.counters.quarantines += u64::from(outcome.is_quarantined_now);
        let mut take = |id| {
            let found = outcome.proposals.iter().position(|proposal| proposal.sequence == id);
            found.map(|index| outcome.proposals.swap_remove(index))
        };
        plan.rows.iter().map(|rows| take(rows.id)).collect()
    }

    /// Lets the target decide. A failure ends every sequence of the batch, and only those.
    fn verify(
        &mut self,
        plan: &StepPlan,
        proposals: &[Option<Proposal>],
    ) -> Option<Vec<Option<Verdict>>> {
        let planned = plan.rows.iter().zip(proposals);
        let work: Vec<VerifyWork<'_>> = planned
            .map(|(rows, proposal)| {
                let sequence = &self.sequences[&rows.id];
                VerifyWork {
                    sequence: rows.id,
                    history: &sequence.tokens,
                    prompt_len: sequence.request.prompt.len(),
                    computed_len: sequence.computed_len,
                    chunk_len: rows.chunk_len,
                    proposal: proposal.as_ref().map_or(&[], |proposal| &proposal.tokens),
                    block_table: sequence.blocks.blocks(),
                    params: &sequence.request.params,
                    logprobs: sequence.request.logprobs,
                }
            })
            .collect();
        let mut verdicts = Vec::with_capacity(work.len());
        self.counters.steps += 1;
        self.counters.rows +=
            work.iter().map(|item| (item.chunk_len + item.proposal.len()) as u64).sum::<u64>();
        match self.verifier.verify(&work, &mut verdicts) {
            Ok(()) => Some(verdicts),
            Err(error) => {
                tracing::error!(%error, sequences = plan.rows.len(), "the verifier failed");
                self.counters.verifier_failures += 1;
                for rows in &plan.rows {
                    self.finish(rows.id, FinishReason::Fault(SequenceFault::VerifierFailed));
                }
                None
            }
        }
    }
}
