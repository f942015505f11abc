//! Owns the choice of what a step computes: which sequences join, which give their blocks back, how
//! many known tokens and how many proposed tokens each may run. Reads counts, writes a
//! [`StepPlan`], changes nothing else. First come, first served, in the order of sequence ids.

use slipstream_model::block_manager::BlockManager;
use slipstream_model::ids::SequenceId;

use super::EngineConfig;
use super::request::Speculation;
use super::sequence::{Phase, Sequence};

/// Rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlannedRows {
    pub(super) id: SequenceId,
    /// Known tokens to compute, at least 1.
    pub(super) chunk_len: usize,
    /// Most tokens the draft may propose behind them.
    pub(super) draft_len: usize,
}

/// What a step does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct StepPlan {
    /// Running sequences that give their blocks back, before anything else happens.
    pub(super) preempt: Vec<SequenceId>,
    /// Waiting or preempted sequences that start to run.
    pub(super) admit: Vec<SequenceId>,
    /// Rows, at most one entry per sequence.
    pub(super) rows: Vec<PlannedRows>,
}

impl StepPlan {
    fn clear(&mut self) {
        self.preempt.clear();
        self.admit.clear();
        self.rows.clear();
    }
}

/// What planning must know about a sequence, and what it has decided for it so far.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    id: SequenceId,
    tokens_len: usize,
    computed_len: usize,
    /// Proposed tokens it would take.
    draft_len_wanted: usize,
    /// Whether a token of it was committed already.
    has_output: bool,
    /// Blocks it holds, those of this plan included.
    num_blocks: usize,
    chunk_len: usize,
    draft_len: usize,
}

impl Candidate {
    fn new(config: &EngineConfig, sequence: &Sequence) -> Self {
        Self {
            id: sequence.id,
            tokens_len: sequence.tokens.len(),
            computed_len: sequence.computed_len,
            draft_len_wanted: draft_len_wanted(config, sequence),
            has_output: sequence.first_token.is_some(),
            num_blocks: sequence.blocks.blocks().len(),
            chunk_len: 0,
            draft_len: 0,
        }
    }

    fn pending_len(&self) -> usize {
        self.tokens_len - self.computed_len
    }

    /// Whether its planned rows reach the end of its known tokens, so that proposals may follow.
    fn reaches_end(&self) -> bool {
        self.chunk_len == self.pending_len()
    }

    /// Blocks it lacks for `len` positions.
    fn blocks_for(&self, len: usize) -> usize {
        BlockManager::blocks_for(len).saturating_sub(self.num_blocks)
    }
}

/// Proposed tokens that `sequence` would take in a step that reaches its end. None before its first
/// token: that one comes from the verifier and never waits for a draft.
fn draft_len_wanted(config: &EngineConfig, sequence: &Sequence) -> usize {
    let wanted = match sequence.request.speculation {
        Speculation::Off => 0,
        Speculation::Auto => config.draft_len_auto,
        Speculation::Fixed(draft_len) => draft_len,
    };
    if sequence.first_token.is_none() {
        return 0;
    }
    // The step adds one token of the verifier's own, so proposals end one before the limit.
    wanted.min(config.draft_len_max).min(sequence.remaining_len().saturating_sub(1))
}

/// What a plan depends on besides the sequences.
#[derive(Clone, Copy, Debug)]
pub(super) struct Circumstances<'a> {
    pub(super) config: &'a EngineConfig,
    /// Without a draft that can propose, nothing is set aside for proposals.
    pub(super) can_propose: bool,
    pub(super) blocks: &'a BlockManager,
}

/// Plans steps. Holds only scratch memory, reused from step to step.
#[derive(Debug, Default)]
pub(super) struct Scheduler {
    running: Vec<Candidate>,
    waiting: Vec<Candidate>,
}

/// The plan in the making.
struct Planner<'a> {
    config: &'a EngineConfig,
    rows_left: usize,
    free_blocks: usize,
    /// Sequences that run in this step, oldest first. Preempted ones leave it at the end.
    running: &'a mut Vec<Candidate>,
    plan: &'a mut StepPlan,
}

impl Scheduler {
    /// Plans one step over `sequences`, given in id order, into `plan`. Nothing is set aside for
    /// proposals in a step that brings somebody's first token, which would have to wait for the
    /// others' draft.
    pub(super) fn plan<'a>(
        &mut self,
        circumstances: Circumstances<'_>,
        sequences: impl Iterator<Item = &'a Sequence>,
        plan: &mut StepPlan,
    ) {
        let Circumstances { config, can_propose, blocks } = circumstances;
        plan.clear();
        self.running.clear();
        self.waiting.clear();
        for sequence in sequences {
            let list = match sequence.phase {
                Phase::Running => &mut self.running,
                Phase::Waiting | Phase::Preempted => &mut self.waiting,
                Phase::Finished(_) => continue,
            };
            list.push(Candidate::new(config, sequence));
        }
        let mut planner = Planner {
            config,
            rows_left: config.step_tokens_max,
            free_blocks: blocks.num_free(),
            running: &mut self.running,
            plan,
        };
        planner.plan_decode_rows();
        planner.plan_chunks();
        planner.admit(&self.waiting);
        if can_propose && !planner.brings_a_first_token() {
            planner.plan_proposals();
        }
        planner.finish();
    }
}

impl Planner<'_> {
    /// One row for every running sequence that only lacks its last token, oldest first.
    fn plan_decode_rows(&mut self) {
        let mut index = 0;
        while index < self.running.len() && self.rows_left > 0 {
            if self.running[index].pending_len() == 1 {
                self.plan_rows(index, 1);
            }
            index += 1;
        }
    }

    /// Chunks of known tokens for the others, oldest first, within the rows that are left.
    fn plan_chunks(&mut self) {
        let mut index = 0;
        while index < self.running.len() && self.rows_left > 0 {
            let pending_len = self.running[index].pending_len();
            if pending_len > 1 {
                self.plan_rows(index, pending_len.min(self.rows_left));
            }
            index += 1;
        }
    }

    /// Plans `chunk_len` rows of a running sequence if blocks can be had, preempting only younger
    /// ones. The oldest sequence can thus always go on: that is the proof of progress.
    fn plan_rows(&mut self, index: usize, chunk_len: usize) {
        let candidate = self.running[index];
        let needed = candidate.blocks_for(candidate.computed_len + chunk_len);
        let younger = self.running[index + 1..].iter();
        let reachable = self.free_blocks + younger.map(|other| other.num_blocks).sum::<usize>();
        if reachable < needed {
            return; // sending the younger ones away would not help
        }
        while self.free_blocks < needed {
            self.preempt_youngest();
        }
        self.free_blocks -= needed;
        self.rows_left -= chunk_len;
        self.running[index].num_blocks += needed;
        self.running[index].chunk_len = chunk_len;
    }

    fn preempt_youngest(&mut self) {
        let victim = self.running.pop().expect("the caller saw a younger sequence");
        // What this very plan gave to it comes back too.
        self.free_blocks += victim.num_blocks;
        self.rows_left += victim.chunk_len;
        self.plan.preempt.push(victim.id);
    }

    /// Lets waiting sequences in, oldest first, while rows, seats and blocks for all their known
    /// tokens and the next one are free. The first that does not fit stops the line.
    fn admit(&mut self, waiting: &[Candidate]) {
        if !self.plan.preempt.is_empty()
            || self.running.iter().any(|running| running.chunk_len == 0)
        {
            return; // blocks are short: nobody joins while somebody older has to wait for them
        }
        for &candidate in waiting {
            let has_seat = self.running.len() < self.config.max_running;
            let has_blocks = candidate.blocks_for(candidate.tokens_len + 1) <= self.free_blocks;
            if !has_seat || !has_blocks || self.rows_left == 0 {
                return;
            }
            self.plan.admit.push(candidate.id);
            self.running.push(candidate);
            let chunk_len = candidate.pending_len().min(self.rows_left);
            self.plan_rows(self.running.len() - 1, chunk_len);
        }
    }

    /// Whether this step ends with the first token of some sequence.
    fn brings_a_first_token(&self) -> bool {
        self.running.iter().any(|candidate| candidate.reaches_end() && !candidate.has_output)
    }

    /// Gives the rows and blocks that nobody needs to proposals, one more token for each sequence
    /// in turn. Proposals never preempt, and never take rows from known tokens.
    fn plan_proposals(&mut self) {
        for depth in 0..self.config.draft_len_max {
            for candidate in self.running.iter_mut() {
                let wants = depth < candidate.draft_len_wanted && candidate.draft_len == depth;
                if !wants || !candidate.reaches_end() || self.rows_left == 0 {
                    continue;
                }
                let needed = candidate.blocks_for(candidate.tokens_len + depth + 1);
                if needed <= self.free_blocks {
                    self.free_blocks -= needed;
                    self.rows_left -= 1;
                    candidate.num_blocks += needed;
                    candidate.draft_len = depth + 1;
                }
            }
        }
    }

    fn finish(self) {
        let planned = self.running.iter().filter(|candidate| candidate.chunk_len > 0);
        self.plan.rows.extend(planned.map(|candidate| PlannedRows {
            id: candidate.id,
            chunk_len: candidate.chunk_len,
            draft_len: candidate.draft_len,
        }));
    }
}
