//! Owns the count of blocks and seats while a plan is made, and who gives them up. Victims are
//! tried first and taken only if they are enough: nobody is sent away in vain.

use slipstream_model::ids::{BlockId, SequenceId};

use super::candidate::{Candidate, Waiting};
use super::{Circumstances, Planner};
use crate::engine::block_pool::BlockPool;
use crate::engine::request::{Priority, TenantId};

/// By how much fewer tables hold each block when the plan is carried out so far. Scratch, kept from
/// step to step.
#[derive(Debug, Default)]
pub(super) struct Released {
    /// By block, `[num_blocks]`; negative where more tables hold it; all zero between steps.
    by_block: Vec<isize>,
    /// Blocks that were counted.
    touched: Vec<BlockId>,
    /// Sequences that are tried as victims.
    victims: Vec<usize>,
}

impl Released {
    pub(super) fn prepare(&mut self, num_blocks: usize) {
        self.by_block.resize(num_blocks, 0);
    }
}

/// Blocks while a plan is made.
pub(super) struct Room<'a> {
    blocks: &'a BlockPool,
    /// Blocks that can still be had.
    pub(super) available: usize,
    /// Blocks that the running sequences' known tokens will still need.
    pub(super) outstanding: usize,
    released: &'a mut Released,
}

impl<'a> Room<'a> {
    pub(super) fn new(
        blocks: &'a BlockPool,
        running: &[Candidate],
        released: &'a mut Released,
    ) -> Self {
        let outstanding = running.iter().map(Candidate::outstanding).sum();
        Self { blocks, available: blocks.num_available(), outstanding, released }
    }

    /// Counts what a table gives back.
    fn release(&mut self, table: &[BlockId]) {
        for &block in table {
            self.released.by_block[block.index()] += 1;
            self.released.touched.push(block);
            self.available += usize::from(self.is_idle(block));
        }
    }

    /// Counts a block that a table takes over.
    pub(super) fn take(&mut self, block: BlockId) {
        self.available -= usize::from(self.is_idle(block));
        self.released.by_block[block.index()] -= 1;
        self.released.touched.push(block);
    }

    /// Whether no table holds a block when this plan is carried out so far.
    pub(super) fn is_idle(&self, block: BlockId) -> bool {
        self.released.by_block[block.index()] == self.blocks.refs(block).cast_signed()
    }

    pub(super) fn finish(self) {
        for block in self.released.touched.drain(..) {
            self.released.by_block[block.index()] = 0;
        }
    }
}

impl Planner<'_> {
    /// Gives `needed` blocks to a running sequence, preempting others if it must: those whose
    /// readers are behind, then those of lower rank from the lowest on. Returns whether it could.
    /// The first in rank can thus always go on, unless all others are pinned and go on themselves:
    /// that is the proof of progress.
    pub(super) fn give_blocks(&mut self, index: usize, needed: usize) -> bool {
        if self.room.available < needed && !self.preempt_for(index, needed) {
            return false;
        }
        let candidate = &mut self.running[index];
        let before = candidate.outstanding();
        candidate.new_blocks += needed;
        self.room.outstanding -= before - candidate.outstanding();
        self.room.available -= needed;
        true
    }

    fn preempt_for(&mut self, index: usize, needed: usize) -> bool {
        let rank = self.running[index].rank();
        let is_victim = |candidate: &Candidate, is_paused: bool| {
            let gives_way = candidate.is_paused || candidate.rank() > rank;
            may_go(candidate) && candidate.is_paused == is_paused && gives_way
        };
        for is_paused in [true, false] {
            for other in (0..self.running.len()).rev() {
                if self.room.available >= needed {
                    break;
                }
                if other != index && is_victim(&self.running[other], is_paused) {
                    self.try_victim(other);
                }
            }
        }
        let is_enough = self.settle(self.room.available >= needed, 0);
        self.is_tight |= is_enough;
        is_enough
    }

    /// Makes room for a waiting sequence at the cost of those whose readers are behind, of lower
    /// classes, and of tenants with more than their share of the seats. `lacks` says whether
    /// something is still missing.
    pub(super) fn preempt_fairly(
        &mut self,
        waiting: &Waiting,
        lacks: impl Fn(&Self) -> bool,
    ) -> bool {
        let Circumstances { config, share, sequences, .. } = self.around;
        let priority = sequences[&waiting.id].request.priority;
        let fair_seats = (config.max_running / share.num_active().max(1)).max(1);
        while lacks(self) {
            let own_seats = self.num_seats(waiting.tenant);
            let has_a_right = own_seats < fair_seats;
            let victims = (0..self.running.len()).filter(|&index| {
                let candidate = &self.running[index];
                if !may_go(candidate) {
                    return false;
                }
                let is_lower = candidate.priority > priority;
                let is_other = candidate.priority == priority && candidate.tenant != waiting.tenant;
                candidate.is_paused
                    || is_lower
                    || (is_other && has_a_right && self.num_seats(candidate.tenant) > fair_seats)
            });
            let key = |&index: &usize| -> (bool, Priority, u64, SequenceId) {
                let candidate = &self.running[index];
                (candidate.is_paused, candidate.priority, candidate.service, candidate.id)
            };
            let Some(victim) = victims.max_by_key(key) else { break };
            self.try_victim(victim);
        }
        let is_enough = !lacks(self);
        let num_victims = self.room.released.victims.len();
        self.settle(is_enough, num_victims)
    }

    /// Sequences of a tenant that run in this step.
    fn num_seats(&self, tenant: TenantId) -> usize {
        let own = |candidate: &&Candidate| !candidate.is_out && candidate.tenant == tenant;
        self.running.iter().filter(own).count()
    }

    pub(super) fn num_running(&self) -> usize {
        self.running.iter().filter(|candidate| !candidate.is_out).count()
    }

    fn try_victim(&mut self, index: usize) {
        let table = self.around.sequences[&self.running[index].id].blocks.blocks();
        self.room.release(table);
        let victim = &mut self.running[index];
        victim.is_out = true;
        self.room.outstanding -= victim.outstanding();
        self.room.available += victim.new_blocks;
        self.rows_left += victim.chunk_len;
        self.room.released.victims.push(index);
    }

    /// Preempts the victims that were tried, or none of them.
    fn settle(&mut self, is_enough: bool, num_fair: usize) -> bool {
        let mut victims = std::mem::take(&mut self.room.released.victims);
        for index in victims.drain(..).rev() {
            let victim = &mut self.running[index];
            if is_enough {
                self.plan.preempt.push(victim.id);
                continue;
            }
            victim.is_out = false;
            self.room.outstanding += victim.outstanding();
            self.room.available -= victim.new_blocks;
            self.rows_left -= victim.chunk_len;
            let table = self.around.sequences[&victim.id].blocks.blocks();
            table.iter().for_each(|&block| self.room.take(block));
        }
        self.room.released.victims = victims;
        if is_enough {
            self.plan.num_fair += num_fair;
        }
        is_enough
    }
}

/// Whether a sequence can be preempted at all. One whose reader is behind always can: what it holds
/// is of no use to anybody.
fn may_go(candidate: &Candidate) -> bool {
    !candidate.is_out && !candidate.is_new && (!candidate.is_pinned || candidate.is_paused)
}
