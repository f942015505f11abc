//! Owns the engine's record of one request: its tokens, how far they are computed, and its phase.
//! There is no prefill or decode phase: the computed length chases the end of the known tokens.
//! Knows blocks by table only; knows no queues and no policy.

use slipstream_model::block_manager::BlockTable;
use slipstream_model::clock::Micros;
use slipstream_model::ids::{SequenceId, TokenId};

use super::event::{FinishReason, SpeculationUsage};
use super::output::Output;
use super::prefix_cache::{BlockKey, Contents};
use super::request::Request;

/// Where a sequence stands. Changes in one function only, which knows every allowed way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Never computed yet.
    Waiting,
    /// Holds KV blocks; takes part in steps.
    Running,
    /// Its blocks were taken back; it is recomputed when there is room.
    Preempted,
    /// Over. Only its unsent output is kept.
    Finished(FinishReason),
}

/// Output tokens that a running sequence has room for at once, so that a step rarely makes its
/// lists grow. Longer ones grow by doubling.
const RESERVED_TOKENS_MAX: usize = 2048;

/// The engine's mutable record of one request.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: SequenceId,
    pub(super) request: Request,
    /// Keys of the full blocks of `tokens`, as far as they were needed.
    pub(super) block_keys: Vec<BlockKey>,
    /// Blocks of `blocks` from the beginning that the prefix cache keeps.
    pub(super) num_remembered: usize,
    /// Prompt tokens that its tenant was charged for.
    pub(super) charged_len: usize,
    /// Since when it waits, or waited before it started.
    pub(super) waiting_since: Micros,
    /// When it last had rows.
    pub(super) last_rows: Micros,
    /// Whether it holds all blocks it can ever need.
    pub(super) is_pinned: bool,
    /// Whether its reader is so far behind that it waits.
    pub(super) is_paused: bool,
    /// Prompt positions whose KV it found.
    pub(super) cached_len: usize,
    /// Times that its blocks were taken back.
    pub(super) num_preemptions: usize,
    /// Prompt, output prefix, output: all known tokens.
    pub(super) tokens: Vec<TokenId>,
    /// Positions whose verifier KV is in `blocks`.
    pub(super) computed_len: usize,
    pub(super) blocks: BlockTable,
    pub(super) phase: Phase,
    pub(super) output: Output,
    pub(super) speculation: SpeculationUsage,
    /// When its first row was planned.
    pub(super) first_planned: Option<Micros>,
    /// When its first output token was committed.
    pub(super) first_token: Option<Micros>,
}

impl Sequence {
    pub(super) fn new(id: SequenceId, request: Request, output: Output, now: Micros) -> Self {
        let mut tokens = request.prompt.clone();
        tokens.extend_from_slice(&request.output_prefix);
        Self {
            id,
            block_keys: Vec::new(),
            num_remembered: 0,
            charged_len: 0,
            waiting_since: now,
            last_rows: now,
            is_pinned: false,
            is_paused: false,
            cached_len: 0,
            num_preemptions: 0,
            tokens,
            output,
            request,
            computed_len: 0,
            blocks: BlockTable::new(),
            phase: Phase::Waiting,
            speculation: SpeculationUsage::default(),
            first_planned: None,
            first_token: None,
        }
    }

    /// Makes room for what the coming steps will add, within reason.
    pub(super) fn reserve(&mut self, draft_len_max: usize) {
        let len = self.remaining_len().min(RESERVED_TOKENS_MAX);
        self.tokens.reserve(len);
        self.blocks.reserve(self.request.max_len());
        self.output.reserve(len);
        self.speculation.proposed_by_position.reserve(draft_len_max);
        self.speculation.accepted_by_position.reserve(draft_len_max);
    }

    /// Among whom its KV may be shared, as batches carry it.
    pub(super) fn scope_tag(&self) -> u64 {
        self.request.scope().tag()
    }

    /// What its blocks hold, or will hold when they are computed.
    pub(super) fn contents(&self) -> Contents<'_> {
        Contents { scope: self.request.scope(), tokens: &self.tokens, keys: &self.block_keys }
    }

    /// Output tokens known so far, the client's prefix included.
    pub(super) fn output_len(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Output tokens it may still produce.
    pub(super) fn remaining_len(&self) -> usize {
        self.request.max_tokens - self.output_len()
    }

    pub(super) fn is_finished(&self) -> bool {
        matches!(self.phase, Phase::Finished(_))
    }

    /// The one place where a phase changes.
    ///
    /// # Panics
    /// On a transition that the life of a sequence does not have.
    pub(super) fn advance(&mut self, to: Phase) {
        let allowed = match (self.phase, to) {
            (Phase::Waiting | Phase::Preempted, Phase::Running) => true,
            (Phase::Running, Phase::Preempted) => true,
            (Phase::Waiting | Phase::Running | Phase::Preempted, Phase::Finished(_)) => true,
            (Phase::Finished(_), _)
            | (_, Phase::Waiting)
            | (Phase::Waiting | Phase::Preempted, Phase::Preempted)
            | (Phase::Running, Phase::Running) => false,
        };
        assert!(allowed, "sequence {}: no way from {:?} to {to:?}", self.id, self.phase);
        self.phase = to;
    }
}
