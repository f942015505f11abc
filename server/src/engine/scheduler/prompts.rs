//! Owns the rows of sequences that still lack several known tokens, and the start of those that
//! wait: one line, in the order of class, then of what the tenant was served, then of age. The
//! first that waits and cannot start stops the line of those that wait.

use slipstream_model::block_manager::BlockManager;
use slipstream_model::clock::Micros;
use slipstream_model::ids::{BLOCK_LEN, BlockId, SequenceId};

use super::candidate::Candidate;
use super::{Admission, Planner, Start};
use crate::engine::request::PrefixReuse;
use crate::engine::sequence::{Phase, Sequence};

/// Who is next in line.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// A running sequence, by its place.
    Running(usize),
    /// A waiting one, by its place.
    Waiting(usize),
}

/// What a sequence that waits would start with.
#[derive(Clone, Copy, Debug)]
struct Beginning {
    start: Start,
    /// Positions that are computed then.
    computed_len: usize,
    /// Blocks it takes over.
    num_taken: usize,
    /// Of these, blocks that count as available until it takes them.
    num_idle: usize,
    /// Blocks to copy because others go on reading them.
    num_copies: usize,
}

impl Planner<'_> {
    /// Plans prompt rows. Returns how many rows proposals may have.
    pub(super) fn plan_prompts(&mut self) -> usize {
        let has_prompts = self.running.iter().any(|c| c.is_runnable() && !c.is_seen)
            || self.waiting.iter().any(|waiting| !waiting.is_seen);
        let (longest, num_proposed) = self.limits(has_prompts);
        if !has_prompts {
            return num_proposed;
        }
        let mut is_line_open = !self.is_somebody_short();
        while self.rows_left > num_proposed {
            match self.next(is_line_open && !self.is_tight) {
                Some(Next::Running(index)) => {
                    self.running[index].is_seen = true;
                    let len = self.chunk_len(&self.running[index], longest, num_proposed);
                    if len == 0 {
                        break; // the time is spent
                    }
                    let len = self.without_preemption(&self.running[index], len);
                    if !self.plan_rows(index, len) {
                        is_line_open = false;
                    }
                }
                Some(Next::Waiting(index)) => {
                    self.waiting[index].is_seen = true;
                    if !self.admit(index, longest, num_proposed) {
                        is_line_open = false;
                    }
                }
                None => break,
            }
        }
        num_proposed
    }

    /// Whether a running sequence did not get the blocks for its next token: nobody joins then.
    fn is_somebody_short(&self) -> bool {
        self.running.iter().any(|c| c.is_runnable() && c.is_seen && c.chunk_len == 0)
    }

    /// The first of those that were not looked at.
    fn next(&self, is_line_open: bool) -> Option<Next> {
        let running = self.running.iter().enumerate();
        let running = running.filter(|(_, c)| c.is_runnable() && !c.is_seen);
        let running = running.map(|(index, c)| ((c.class, c.service, c.id), Next::Running(index)));
        let waiting = self.waiting.iter().enumerate();
        let waiting = waiting.filter(|(_, w)| is_line_open && !w.is_seen);
        let waiting = waiting.map(|(index, w)| ((w.class, w.service, w.id), Next::Waiting(index)));
        let first =
            running.chain(waiting).min_by_key(|(key, _): &((usize, u64, SequenceId), _)| *key);
        first.map(|(_, next)| next)
    }

    /// Known tokens of a sequence that fit the time and the rows that are left. The first of a step
    /// gets one row whatever it takes.
    fn chunk_len(&self, candidate: &Candidate, longest: Micros, num_proposed: usize) -> usize {
        let len_max = candidate.pending_len().min(self.rows_left - num_proposed);
        let shape = self.with_proposals(num_proposed);
        let fitting =
            self.around.costs.rows_within(longest, shape, candidate.computed_len, len_max);
        let has_chunk = self.running.iter().any(|c| c.has_rows() && c.pending_len() > 1);
        fitting.max(usize::from(!has_chunk)).min(len_max)
    }

    /// As much of a chunk as blocks can be had for, or what the next block holds if there is none.
    fn without_preemption(&self, candidate: &Candidate, len: usize) -> usize {
        let copy = usize::from(candidate.must_copy);
        let room = candidate.num_blocks + self.room.available.saturating_sub(copy);
        let end = (room * BLOCK_LEN).max((candidate.num_blocks + 1) * BLOCK_LEN);
        len.min(end - candidate.computed_len)
    }

    /// Lets a waiting sequence start if there are rows, a seat, and blocks for all its known tokens
    /// and the next one beside what the running ones will need. Returns whether the line goes on.
    fn admit(&mut self, place: usize, longest: Micros, num_proposed: usize) -> bool {
        let waiting = self.waiting[place];
        let sequence = &self.around.sequences[&waiting.id];
        if self.waits_for_sibling(sequence) {
            return true; // its turn comes with its sibling's prompt
        }
        let is_pinned = sequence.num_preemptions >= self.around.config.preemptions_max;
        let final_len =
            if is_pinned { sequence.request.max_len() } else { sequence.tokens.len() + 1 };
        let lacks = |planner: &Self| {
            if planner.num_running() >= planner.around.config.max_running {
                return true;
            }
            let beginning = planner.beginning(sequence);
            let wanted = BlockManager::blocks_for(final_len) + beginning.num_copies;
            let needed = wanted.saturating_sub(beginning.num_taken) + beginning.num_idle;
            needed + planner.room.outstanding > planner.room.available
        };
        if lacks(self) && !self.preempt_fairly(&waiting, lacks) {
            return false;
        }
        let beginning = self.beginning(sequence);
        let mut candidate = Candidate::new(self.around, sequence);
        candidate.computed_len = beginning.computed_len;
        candidate.num_blocks = beginning.num_taken;
        candidate.is_pinned = is_pinned;
        candidate.is_new = true;
        candidate.is_seen = true;
        let len = self.chunk_len(&candidate, longest, num_proposed);
        if len == 0 {
            return false;
        }
        self.take_over(sequence, beginning);
        if is_pinned {
            candidate.new_blocks = candidate.blocks_for(final_len);
            self.room.available -= candidate.new_blocks;
        }
        self.room.outstanding += candidate.outstanding();
        self.plan.admit.push(Admission { id: waiting.id, start: beginning.start, is_pinned });
        self.running.push(candidate);
        let index = self.running.len() - 1;
        let is_planned = self.plan_rows(index, len);
        assert!(is_planned, "sequence {}: its blocks were counted", waiting.id);
        true
    }

    /// Counts the blocks that a sequence begins with. A sibling that it shares them with stays.
    fn take_over(&mut self, sequence: &Sequence, beginning: Beginning) {
        self.room.available -= beginning.num_copies;
        match beginning.start {
            Start::Cached(num_blocks) => {
                let blocks = self.around.blocks;
                for block in blocks.matching(sequence.contents()).take(num_blocks) {
                    self.room.take(block);
                }
            }
            Start::Shared { sibling, len } => {
                let table = self.around.sequences[&sibling].blocks.blocks();
                for &block in blocks_of_first(table, len) {
                    self.room.take(block);
                }
                if let Some(sibling) = self.running.iter_mut().find(|c| c.id == sibling) {
                    sibling.is_new = true;
                }
            }
        }
    }

    /// Whether the KV of its prompt is about to be computed by a sibling.
    fn waits_for_sibling(&self, sequence: &Sequence) -> bool {
        let Some(sibling) = self.sibling_of(sequence) else { return false };
        match sibling.phase {
            Phase::Waiting => true,
            Phase::Running => {
                sibling.computed_len + 1 < sibling.request.prompt.len()
                    && !self.gives_way(sibling.id)
            }
            Phase::Preempted | Phase::Finished(_) => false,
        }
    }

    /// Whether this plan preempts a running sequence, or tries to.
    fn gives_way(&self, id: SequenceId) -> bool {
        self.running.iter().any(|candidate| candidate.id == id && candidate.is_out)
    }

    /// The live sequence that has the same prompt and may share it.
    fn sibling_of(&self, sequence: &Sequence) -> Option<&Sequence> {
        let sibling = self.around.sequences.get(&sequence.request.sibling?)?;
        let is_same = sibling.id < sequence.id
            && sibling.request.scope() == sequence.request.scope()
            && sibling.request.prompt == sequence.request.prompt;
        is_same.then_some(sibling)
    }

    /// What a waiting sequence would find computed: the longer of what its sibling has and what the
    /// prefix cache keeps. The last known token is always left to compute: its row gives the
    /// logits.
    fn beginning(&self, sequence: &Sequence) -> Beginning {
        let useful = (sequence.tokens.len() - 1) / BLOCK_LEN;
        let mut num_cached = 0;
        let mut num_idle = 0;
        if self.around.config.prefix_reuse && sequence.request.prefix_reuse != PrefixReuse::Off {
            for block in self.around.blocks.matching(sequence.contents()).take(useful) {
                num_cached += 1;
                num_idle += usize::from(self.room.is_idle(block));
            }
        }
        let shared = self.sibling_of(sequence).filter(|sibling| {
            sibling.phase == Phase::Running
                && sibling.computed_len + 1 >= sibling.request.prompt.len()
                && !self.gives_way(sibling.id)
        });
        let shared_len = sequence.request.prompt.len() - 1;
        match shared {
            Some(sibling) if shared_len > num_cached * BLOCK_LEN => Beginning {
                start: Start::Shared { sibling: sibling.id, len: shared_len },
                computed_len: shared_len,
                num_taken: BlockManager::blocks_for(shared_len),
                num_idle: 0,
                // It and its sibling both go on behind the last block that they share.
                num_copies: 2 * usize::from(!shared_len.is_multiple_of(BLOCK_LEN)),
            },
            Some(_) | None => Beginning {
                start: Start::Cached(num_cached),
                computed_len: num_cached * BLOCK_LEN,
                num_taken: num_cached,
                num_idle,
                num_copies: 0,
            },
        }
    }
}

/// The blocks of the first `len` positions of a table.
pub(in crate::engine) fn blocks_of_first(blocks: &[BlockId], len: usize) -> &[BlockId] {
    &blocks[..BlockManager::blocks_for(len)]
}
