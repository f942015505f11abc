//! Owns what planning must know about a sequence, and what it has decided for it so far.

use slipstream_model::block_manager::BlockManager;
use slipstream_model::clock::Micros;
use slipstream_model::ids::{BLOCK_LEN, SequenceId};

use super::Circumstances;
use crate::engine::EngineConfig;
use crate::engine::request::{Priority, Speculation, TenantId};
use crate::engine::sequence::Sequence;

/// A running sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) id: SequenceId,
    pub(super) priority: Priority,
    pub(super) tenant: TenantId,
    /// What its tenant was served so far.
    pub(super) service: u64,
    /// Its class, the more urgent the longer ago it came.
    pub(super) class: usize,
    pub(super) tokens_len: usize,
    pub(super) computed_len: usize,
    /// Proposed tokens it would take.
    pub(super) draft_len_wanted: usize,
    /// Whether a token of it was committed already.
    pub(super) has_output: bool,
    /// Whether the block that its next row is written to has to be copied first.
    pub(super) must_copy: bool,
    /// Blocks it holds when the step begins.
    pub(super) num_blocks: usize,
    /// Blocks that this plan gives to it.
    pub(super) new_blocks: usize,
    pub(super) is_pinned: bool,
    pub(super) is_paused: bool,
    /// Whether this plan lets it start.
    pub(super) is_new: bool,
    /// Whether this plan preempts it.
    pub(super) is_out: bool,
    /// Whether its prompt rows were looked at already.
    pub(super) is_seen: bool,
    pub(super) chunk_len: usize,
    pub(super) draft_len: usize,
}

impl Candidate {
    pub(super) fn new(around: Circumstances<'_>, sequence: &Sequence) -> Self {
        let next = sequence.blocks.blocks().get(sequence.computed_len / BLOCK_LEN);
        Self {
            id: sequence.id,
            priority: sequence.request.priority,
            tenant: sequence.request.tenant,
            service: around.share.service(sequence.request.tenant),
            class: class(around, sequence, sequence.last_rows),
            tokens_len: sequence.tokens.len(),
            computed_len: sequence.computed_len,
            draft_len_wanted: if around.can_propose {
                draft_len_wanted(around.config, sequence)
            } else {
                0
            },
            has_output: sequence.first_token.is_some(),
            must_copy: next.is_some_and(|&block| around.blocks.is_shared(block)),
            num_blocks: sequence.blocks.blocks().len(),
            new_blocks: 0,
            is_pinned: sequence.is_pinned,
            is_paused: sequence.is_paused,
            is_new: false,
            is_out: false,
            is_seen: false,
            chunk_len: 0,
            draft_len: 0,
        }
    }

    /// Who gives way to whom: lower classes to higher ones, then the younger to the older.
    pub(super) fn rank(&self) -> (Priority, SequenceId) {
        (self.priority, self.id)
    }

    pub(super) fn pending_len(&self) -> usize {
        self.tokens_len - self.computed_len
    }

    /// Whether it may have rows at all.
    pub(super) fn is_runnable(&self) -> bool {
        !self.is_out && !self.is_paused
    }

    pub(super) fn has_rows(&self) -> bool {
        !self.is_out && self.chunk_len > 0
    }

    /// Whether its planned rows reach the end of its known tokens, so that proposals may follow.
    pub(super) fn reaches_end(&self) -> bool {
        self.has_rows() && self.chunk_len == self.pending_len()
    }

    /// Blocks it lacks for `len` positions.
    pub(super) fn blocks_for(&self, len: usize) -> usize {
        let copy = usize::from(self.must_copy);
        let wanted = BlockManager::blocks_for(len) + copy;
        wanted.saturating_sub(self.num_blocks + self.new_blocks)
    }

    /// Blocks that its known tokens and the next one still need behind what it has.
    pub(super) fn outstanding(&self) -> usize {
        self.blocks_for(self.tokens_len + 1)
    }
}

/// A sequence that waits for its start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) id: SequenceId,
    pub(super) tenant: TenantId,
    /// What its tenant was served so far.
    pub(super) service: u64,
    /// Its class, the more urgent the longer it has waited.
    pub(super) class: usize,
    /// Whether this plan is done with it.
    pub(super) is_seen: bool,
}

impl Waiting {
    pub(super) fn new(around: Circumstances<'_>, sequence: &Sequence) -> Self {
        // A class that is served does not age, however long its line: otherwise a flood would
        // overtake everybody by its age.
        let served = around.last_start[sequence.request.priority as usize];
        Self {
            id: sequence.id,
            tenant: sequence.request.tenant,
            service: around.share.service(sequence.request.tenant),
            class: class(around, sequence, sequence.waiting_since.max(served)),
            // Nobody makes room for a reader that is behind.
            is_seen: sequence.is_paused,
        }
    }
}

/// The class in which a sequence stands in line: one more urgent after each time of aging in which
/// nothing was done for it, so that no class waits for ever.
fn class(around: Circumstances<'_>, sequence: &Sequence, since: Micros) -> usize {
    let waited = around.now.since(since).0;
    let steps_up = waited / around.config.priority_aging.0.max(1);
    let class = sequence.request.priority as usize;
    class.saturating_sub(usize::try_from(steps_up).unwrap_or(usize::MAX))
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
