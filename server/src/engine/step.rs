//! Owns the step: *plan what to compute; let the draft guess; let the target decide; keep what
//! agrees.* Every stage is one call; the stages live in the files named after them. A step is the
//! only thing that moves sequences forward.

use std::panic::{AssertUnwindSafe, catch_unwind};

use slipstream_draft::proposer::{ProposeWork, TimeBudget};
use slipstream_model::clock::Micros;
use slipstream_model::forward::ForwardError;
use slipstream_model::ids::BLOCK_LEN;
use slipstream_model::proposal::Proposals;
use slipstream_verifier::verifier::{Verdicts, VerifyWork};

use super::event::{FinishReason, SequenceFault};
use super::prefix_cache::Contents;
use super::proposing::ProposeTerms;
use super::scheduler::{Admission, Circumstances, Scheduler, Start, StepPlan, blocks_of_first};
use super::sequence::Phase;
use super::step_costs::StepShape;
use super::{Engine, keeping};

/// A draft has at least this long, if its budget allows: pauses of the machine are no reason to
/// stop it.
const PROPOSE_LEAST: Micros = Micros(5_000);

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
        if self.has_failed() {
            return StepReport::default();
        }
        let now = self.clock.now();
        self.expire(now);
        self.pause();
        self.plan(room, now);
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

    /// Finds out whose readers are behind, and whose are not any more.
    fn pause(&mut self) {
        for sequence in self.sequences.values_mut() {
            let is_behind = sequence.output.unread_len() >= self.config.unread_tokens_max;
            let is_paused = is_behind && !sequence.is_finished();
            self.counters.pauses += u64::from(is_paused && !sequence.is_paused);
            sequence.is_paused = is_paused;
        }
    }

    /// Chooses what to compute.
    fn plan(&mut self, room: &mut StepRoom, now: Micros) {
        self.costs.refresh();
        let circumstances = Circumstances {
            config: &self.config,
            can_propose: self.draft.is_available(),
            blocks: &self.blocks,
            share: &self.share,
            costs: &self.costs,
            sequences: &self.sequences,
            now,
            last_start: self.last_start,
        };
        room.scheduler.plan(circumstances, &mut room.plan);
    }

    /// Carries out preemptions and admissions and takes the blocks that the plan counted on.
    fn apply(&mut self, plan: &StepPlan, now: Micros) {
        for id in &plan.preempt {
            let sequence = self.sequences.get_mut(id).expect("plans name known sequences");
            sequence.advance(Phase::Preempted);
            keeping::give_back(&self.config, &mut self.blocks, sequence);
            sequence.num_preemptions += 1;
            sequence.waiting_since = now;
        }
        self.counters.preemptions += plan.preempt.len() as u64;
        self.counters.fair_preemptions += plan.num_fair as u64;
        // All starts come before any growth: growth may evict what they found.
        for admission in &plan.admit {
            self.start(admission);
            let sequence = self.sequences.get_mut(&admission.id);
            let sequence = sequence.expect("plans name known sequences");
            self.last_start[sequence.request.priority as usize] = now;
        }
        for admission in plan.admit.iter().filter(|admission| admission.is_pinned) {
            let id = admission.id;
            let sequence = self.sequences.get_mut(&id).expect("plans name known sequences");
            let grown = self.blocks.grow(&mut sequence.blocks, sequence.request.max_len());
            grown.expect("the plan counted the free blocks");
        }
        for rows in &plan.rows {
            let sequence = self.sequences.get_mut(&rows.id).expect("plans name known sequences");
            sequence.first_planned.get_or_insert(now);
            sequence.last_rows = now;
            let len = sequence.computed_len + rows.chunk_len + rows.draft_len;
            let grown = self.blocks.grow(&mut sequence.blocks, len);
            grown.expect("the plan counted the free blocks");
            let copy = self.blocks.make_writable(&mut sequence.blocks, sequence.computed_len);
            if let Some((from, to)) = copy.expect("the plan counted the free blocks") {
                self.verifier.copy_block(from, to);
                self.counters.copied_blocks += 1;
            }
        }
        self.counters.evicted_blocks = self.blocks.num_evicted();
    }

    /// Lets a sequence begin with the KV that was found for it.
    fn start(&mut self, admission: &Admission) {
        let Admission { id, start, is_pinned } = *admission;
        let shared = match start {
            Start::Cached(_) => Vec::new(),
            Start::Shared { sibling, len } => {
                blocks_of_first(self.sequences[&sibling].blocks.blocks(), len).to_vec()
            }
        };
        let sequence = self.sequences.get_mut(&id).expect("plans name known sequences");
        sequence.advance(Phase::Running);
        sequence.reserve(self.config.draft_len_max);
        sequence.is_pinned = is_pinned;
        sequence.computed_len = match start {
            Start::Cached(num_blocks) => {
                let contents = Contents {
                    scope: sequence.request.scope(),
                    tokens: &sequence.tokens,
                    keys: &sequence.block_keys,
                };
                let num_found = self.blocks.adopt(&mut sequence.blocks, contents, num_blocks);
                assert_eq!(num_found, num_blocks, "the plan found these blocks");
                sequence.num_remembered = num_blocks;
                num_blocks * BLOCK_LEN
            }
            Start::Shared { len, .. } => {
                self.blocks.share(&mut sequence.blocks, &shared);
                len
            }
        };
        let is_shared = matches!(start, Start::Shared { .. });
        if is_shared || keeping::may_share(&self.config, sequence) {
            self.counters.looked_up += sequence.tokens.len() as u64;
        }
        self.counters.cached += sequence.computed_len as u64;
        if sequence.first_planned.is_none() {
            sequence.cached_len = sequence.computed_len.min(sequence.request.prompt.len());
            sequence.charged_len = sequence.cached_len;
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
                scope: sequence.scope_tag(),
                history: &sequence.tokens,
                prompt_len: sequence.request.prompt.len(),
                params: &sequence.request.params,
                draft_len: rows.draft_len,
            }
        }));
        let clock = self.clock.as_ref();
        // A draft that has much to catch up with does so in portions: no step takes much longer
        // than it would without it.
        let verify = self.costs.predict(self.shape_of(&room.plan));
        let span = verify.max(PROPOSE_LEAST).min(self.config.propose_budget);
        let deadline = clock.now().plus(span);
        let terms = ProposeTerms {
            budget: TimeBudget { clock, deadline },
            limit: Micros(self.config.propose_budget.0.saturating_mul(2)),
            vocab_size: self.verifier.limits().vocab_size,
            quarantine_after: self.config.quarantine_after,
        };
        let outcome = self.draft.propose(&work, terms, &mut room.proposals);
        room.propose_work = reuse(work);
        self.counters.draft_faults += u64::from(outcome.is_fault);
        self.counters.dropped_proposals += outcome.num_dropped;
        self.counters.quarantines += u64::from(outcome.is_quarantined_now);
    }

    /// The rows of a plan as their cost sees them.
    fn shape_of(&self, plan: &StepPlan) -> StepShape {
        plan.rows.iter().fold(StepShape::default(), |shape, rows| {
            let start = self.sequences[&rows.id].computed_len;
            shape.with(start, rows.chunk_len + rows.draft_len)
        })
    }

    /// Lets the target decide.
    fn verify(&mut self, room: &mut StepRoom) -> Result<(), ForwardError> {
        let (sequences, proposals) = (&self.sequences, &room.proposals);
        let work = room.plan.rows.iter().map(|rows| {
            let sequence = &sequences[&rows.id];
            VerifyWork {
                sequence: rows.id,
                scope: sequence.scope_tag(),
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
        let shape = work.clone().fold(StepShape::default(), |shape, item| {
            shape.with(item.computed_len, item.chunk_len + item.proposal.len())
        });
        let begin = self.clock.now();
        let verifier = &mut self.verifier;
        // Unwind safety: after a panic no verdict is read, no KV is believed, and the engine ends.
        let verified = catch_unwind(AssertUnwindSafe(|| verifier.verify(work, &mut room.verdicts)));
        let result = verified.unwrap_or_else(|_| {
            self.health.has_panicked = true;
            Err(ForwardError::Failed("the verifier panicked".to_owned()))
        });
        match &result {
            Ok(()) => {
                self.health.num_failures = 0;
                self.costs.observe(shape, self.clock.now().since(begin));
            }
            Err(_) => self.health.num_failures += 1,
        }
        result
    }

    /// A failure of the verifier ends every sequence of the batch, and only those. After a panic
    /// nothing in the pool is believed any more.
    fn fail(&mut self, plan: &StepPlan, error: &ForwardError) -> StepReport {
        tracing::error!(%error, sequences = plan.rows.len(), "the verifier failed");
        self.counters.verifier_failures += 1;
        for rows in &plan.rows {
            self.finish(rows.id, FinishReason::Fault(SequenceFault::VerifierFailed));
        }
        if self.health.has_panicked {
            self.blocks.distrust_all();
        }
        StepReport::default()
    }
}

/// How the verifier has fared lately.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct VerifierHealth {
    /// Failures since the last success.
    num_failures: usize,
    has_panicked: bool,
}

impl VerifierHealth {
    /// Whether the engine ends: after one panic, because nobody knows what it left behind, or after
    /// this many failures in a row.
    pub(super) fn has_failed(self, failures_max: usize) -> bool {
        self.has_panicked || self.num_failures >= failures_max
    }
}

/// Empties a list and gives its memory to items that may borrow from elsewhere. Collecting from a
/// vector in place keeps its memory; `tests/allocations.rs` would see it if it did not.
fn reuse<'a>(mut work: Vec<ProposeWork<'_>>) -> Vec<ProposeWork<'a>> {
    work.clear();
    work.into_iter().map(|_| unreachable!("the list was emptied")).collect()
}
