//! Owns the choice of what a step computes: which sequences join, which give their blocks back, how
//! many known tokens and how many proposed tokens each may run. Reads the engine, writes a
//! [`StepPlan`], changes nothing else.
//!
//! The order of claims: one row for everybody whose output runs (`rows.rs`); prompts in fair order,
//! running and waiting ones alike, within the time that a step may take (`prompts.rs`); proposals
//! in what was set aside for them. Who gives way when blocks or seats run out is in `room.rs`.

mod candidate;
mod prompts;
mod room;
mod rows;

use std::collections::BTreeMap;

use slipstream_model::clock::Micros;
use slipstream_model::ids::SequenceId;

use super::EngineConfig;
use super::block_pool::BlockPool;
use super::fair_share::FairShare;
use super::sequence::{Phase, Sequence};
use super::step_costs::{StepCosts, StepShape};
use candidate::{Candidate, Waiting};
pub(super) use prompts::blocks_of_first;
use room::Room;

/// Rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlannedRows {
    pub(super) id: SequenceId,
    /// Known tokens to compute, at least 1.
    pub(super) chunk_len: usize,
    /// Most tokens the draft may propose behind them.
    pub(super) draft_len: usize,
}

/// Where a sequence that starts finds KV of its known tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// In this many blocks of the prefix cache; 0 for nowhere.
    Cached(usize),
    /// In the first `len` positions of a running sequence with the same prompt.
    Shared { sibling: SequenceId, len: usize },
}

/// A sequence that starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Admission {
    pub(super) id: SequenceId,
    pub(super) start: Start,
    /// Whether it takes all blocks it can ever need.
    pub(super) is_pinned: bool,
}

/// What a step does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct StepPlan {
    /// Running sequences that give their blocks back, before anything else happens.
    pub(super) preempt: Vec<SequenceId>,
    /// How many of those make room for a tenant or class that has a right to it.
    pub(super) num_fair: usize,
    /// Waiting or preempted sequences that start to run.
    pub(super) admit: Vec<Admission>,
    /// Rows, at most one entry per sequence.
    pub(super) rows: Vec<PlannedRows>,
}

impl StepPlan {
    fn clear(&mut self) {
        self.preempt.clear();
        self.num_fair = 0;
        self.admit.clear();
        self.rows.clear();
    }
}

/// What a plan depends on.
#[derive(Clone, Copy)]
pub(super) struct Circumstances<'a> {
    pub(super) config: &'a EngineConfig,
    /// Without a draft that can propose, nothing is set aside for proposals.
    pub(super) can_propose: bool,
    pub(super) blocks: &'a BlockPool,
    pub(super) share: &'a FairShare,
    pub(super) costs: &'a StepCosts,
    pub(super) sequences: &'a BTreeMap<SequenceId, Sequence>,
    pub(super) now: Micros,
    /// When a request of each class last started, in the order of `Priority::ALL`.
    pub(super) last_start: [Micros; 3],
}

/// Plans steps. Holds only scratch memory, reused from step to step.
#[derive(Debug, Default)]
pub(super) struct Scheduler {
    running: Vec<Candidate>,
    waiting: Vec<Waiting>,
    released: room::Released,
}

/// The plan in the making.
struct Planner<'a> {
    around: Circumstances<'a>,
    room: Room<'a>,
    rows_left: usize,
    /// The rows planned so far.
    shape: StepShape,
    /// Whether somebody had to give way for blocks of a running sequence: nobody joins then.
    is_tight: bool,
    /// Sequences that run in this step, the last to give way first. Preempted ones stay, marked.
    running: &'a mut Vec<Candidate>,
    waiting: &'a mut Vec<Waiting>,
    plan: &'a mut StepPlan,
}

impl Scheduler {
    /// Plans one step into `plan`. Nothing is proposed in a step that brings somebody's first
    /// token, which would have to wait for the others' draft.
    pub(super) fn plan(&mut self, around: Circumstances<'_>, plan: &mut StepPlan) {
        plan.clear();
        self.collect(around);
        let Self { running, waiting, released } = self;
        released.prepare(around.blocks.num_blocks());
        let mut planner = Planner {
            room: Room::new(around.blocks, running, released),
            rows_left: around.config.step_tokens_max,
            shape: StepShape::default(),
            is_tight: false,
            around,
            running,
            waiting,
            plan,
        };
        planner.plan_decode_rows();
        let wanted_len = planner.plan_prompts();
        if wanted_len > 0 && !planner.brings_a_first_token() {
            planner.plan_proposals(wanted_len);
        }
        planner.finish();
    }

    fn collect(&mut self, around: Circumstances<'_>) {
        self.running.clear();
        self.waiting.clear();
        for sequence in around.sequences.values() {
            match sequence.phase {
                Phase::Running => self.running.push(Candidate::new(around, sequence)),
                Phase::Waiting | Phase::Preempted => {
                    self.waiting.push(Waiting::new(around, sequence));
                }
                Phase::Finished(_) => {}
            }
        }
        self.running.sort_unstable_by_key(Candidate::rank);
    }
}

impl Planner<'_> {
    fn finish(self) {
        self.room.finish();
        let planned = self.running.iter().filter(|candidate| candidate.has_rows());
        self.plan.rows.extend(planned.map(|candidate| PlannedRows {
            id: candidate.id,
            chunk_len: candidate.chunk_len,
            draft_len: candidate.draft_len,
        }));
    }
}
