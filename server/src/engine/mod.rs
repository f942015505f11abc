//! The engine: a synchronous struct that moves every sequence's computed length towards the end of
//! its known tokens. It imports no tokio, no tonic, no channels and reads time only through
//! [`Clock`]; `runner.rs` is the one place that connects it to threads and queues. Read `step.rs`
//! first.

mod block_pool;
mod commit;
mod counters;
pub mod event;
mod fair_share;
mod idle_list;
mod keeping;
mod lifecycle;
mod output;
mod prefix_cache;
mod proposing;
mod rehearsal;
pub mod request;
pub mod runner;
mod scheduler;
mod sequence;
mod step;
mod step_costs;
mod stop;

use std::collections::BTreeMap;
use std::sync::Arc;

use slipstream_draft::proposer::Proposer;
use slipstream_model::clock::{Clock, Micros};
use slipstream_model::forward::Forward;
use slipstream_model::ids::{BlockId, SequenceId, TokenId};
use slipstream_model::token_bytes::TokenBytes;
use slipstream_verifier::verifier::Verifier;

use event::Event;
use fair_share::FairShare;
use lifecycle::Ends;
use proposing::Draft;
use request::{PrefixScope, Priority, TenantId};
use sequence::Sequence;
use step_costs::StepCosts;

pub use block_pool::BlockPool;
pub use counters::{Counters, EngineSnapshot, FinishedBy, POSITIONS_MAX};
pub use sequence::Phase;
pub use step::StepReport;
use step::{StepRoom, VerifierHealth};

/// Bounds and policy of an engine. None of them can change an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Rows of one step at most, over all sequences; at least 1.
    pub step_tokens_max: usize,
    /// Sequences that hold KV blocks at the same time at most; at least 1.
    pub max_running: usize,
    /// Sequences that wait at most, beyond the running ones.
    pub max_waiting: usize,
    /// Draft length of requests that leave it to the engine.
    pub draft_len_auto: usize,
    /// Draft length that no request exceeds.
    pub draft_len_max: usize,
    /// Time the proposer may take in one step.
    pub propose_budget: Micros,
    /// Consecutive faulty steps after which a draft is not asked any more.
    pub quarantine_after: usize,
    /// How long a step may take while somebody's output is running: chunks of prompts are cut to
    /// that. Steps may always take one and a half times what the decode rows alone take.
    pub step_target: Micros,
    /// Released tokens that may wait for a reader before its sequence pauses; at least 1.
    pub unread_tokens_max: usize,
    /// Times that a sequence can be preempted. When it starts again after the last, it holds all
    /// the blocks it can ever need.
    pub preemptions_max: usize,
    /// A request counts as one class more urgent after each such time in which neither it nor,
    /// while it waits, anybody of its class was started.
    pub priority_aging: Micros,
    /// Whether KV of earlier requests is kept for later ones.
    pub prefix_reuse: bool,
    /// Consecutive failures of the verifier after which the engine ends.
    pub verifier_failures_max: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            step_tokens_max: 256,
            max_running: 64,
            max_waiting: 256,
            draft_len_auto: 4,
            draft_len_max: 8,
            propose_budget: Micros(50_000),
            quarantine_after: 3,
            step_target: Micros(50_000),
            unread_tokens_max: 512,
            preemptions_max: 3,
            priority_aging: Micros(10_000_000),
            prefix_reuse: true,
            verifier_failures_max: 3,
        }
    }
}

/// What an engine is made of.
pub struct EngineParts {
    /// Bounds and policy.
    pub config: EngineConfig,
    /// The target.
    pub verifier: Box<dyn Forward>,
    /// The draft, if any.
    pub proposer: Option<Box<dyn Proposer>>,
    /// Bytes of every token of the target's vocabulary.
    pub token_bytes: Arc<TokenBytes>,
    /// Where to read the time.
    pub clock: Arc<dyn Clock>,
    /// Secret of the prefix cache's hashes, so that nobody can make two prefixes look alike.
    pub cache_key: [u8; 32],
}

/// One sequence as invariant checks see it.
#[derive(Clone, Copy, Debug)]
pub struct SequenceView<'a> {
    /// Its id.
    pub id: SequenceId,
    /// Where it stands.
    pub phase: Phase,
    /// Prompt, output prefix and output.
    pub tokens: &'a [TokenId],
    /// Tokens that are prompt.
    pub prompt_len: usize,
    /// Positions whose KV is computed.
    pub computed_len: usize,
    /// KV blocks held, in position order.
    pub blocks: &'a [BlockId],
    /// Whose request it is.
    pub tenant: TenantId,
    /// How urgent it is.
    pub priority: Priority,
    /// Among whom its KV may be shared.
    pub scope: PrefixScope,
    /// Prompt positions whose KV it found.
    pub cached_len: usize,
    /// Times that its blocks were taken back.
    pub num_preemptions: usize,
    /// Whether it holds all blocks it can ever need and is preempted only while its reader is
    /// behind.
    pub is_pinned: bool,
    /// Whether it waits for its reader.
    pub is_paused: bool,
}

/// The engine. See the module's documentation.
pub struct Engine {
    config: EngineConfig,
    verifier: Verifier,
    draft: Draft,
    token_bytes: Arc<TokenBytes>,
    clock: Arc<dyn Clock>,
    blocks: BlockPool,
    /// All sequences by id, which is the order of arrival. Finished ones stay until their last
    /// event is taken.
    sequences: BTreeMap<SequenceId, Sequence>,
    share: FairShare,
    /// When a request of each class last started, in the order of [`Priority::ALL`].
    last_start: [Micros; 3],
    costs: StepCosts,
    counters: Counters,
    /// Steps without a failure of the verifier since the last one with.
    health: VerifierHealth,
    /// When requests ended lately.
    ends: Ends,
    room: StepRoom,
}

impl Engine {
    /// An idle engine.
    #[must_use]
    pub fn new(parts: EngineParts) -> Self {
        let verifier = Verifier::new(parts.verifier);
        let blocks = BlockPool::new(verifier.limits().num_blocks, parts.cache_key);
        Self {
            config: parts.config,
            verifier,
            draft: Draft::new(parts.proposer),
            token_bytes: parts.token_bytes,
            clock: parts.clock,
            blocks,
            sequences: BTreeMap::new(),
            share: FairShare::default(),
            last_start: [Micros(0); 3],
            costs: StepCosts::default(),
            counters: Counters::default(),
            health: VerifierHealth::default(),
            ends: Ends::default(),
            room: StepRoom::default(),
        }
    }

    /// Whether a request has ended and only waits for its events to be taken.
    #[must_use]
    pub fn is_finished(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(Sequence::is_finished)
    }

    /// Whether any sequence needs steps now. One whose reader is behind needs none until it has
    /// read.
    #[must_use]
    pub fn has_work(&self) -> bool {
        let unread_max = self.config.unread_tokens_max;
        self.sequences
            .values()
            .any(|sequence| !sequence.is_finished() && sequence.output.unread_len() < unread_max)
    }

    /// The ids whose [`take_event`](Self::take_event) would return something, appended to `ids`.
    pub fn ids_with_news(&self, ids: &mut Vec<SequenceId>) {
        let with_news = self.sequences.values().filter(|sequence| sequence.output.has_news());
        ids.extend(with_news.map(|sequence| sequence.id));
    }

    /// Everything unsent of one request in one event, then its end, once. With the end taken,
    /// nothing of the request is left in the engine.
    pub fn take_event(&mut self, id: SequenceId) -> Option<Event> {
        let event = self.sequences.get_mut(&id)?.output.take_event();
        match &event {
            Some(Event::Tokens(tokens)) => self.counters.taken += tokens.tokens.len() as u64,
            Some(Event::Finished(_)) => {
                self.sequences.remove(&id);
                self.counters.released += 1;
            }
            None => {}
        }
        event
    }

    /// Installs another draft, or none, between two steps. Running sequences go on unchanged.
    pub fn set_proposer(&mut self, proposer: Option<Box<dyn Proposer>>) {
        self.draft = Draft::new(proposer);
    }

    /// All sequences the engine holds, finished ones with unsent output included, in id order.
    pub fn sequences(&self) -> impl Iterator<Item = SequenceView<'_>> {
        self.sequences.values().map(|sequence| SequenceView {
            id: sequence.id,
            phase: sequence.phase,
            tokens: &sequence.tokens,
            prompt_len: sequence.request.prompt.len(),
            computed_len: sequence.computed_len,
            blocks: sequence.blocks.blocks(),
            tenant: sequence.request.tenant,
            priority: sequence.request.priority,
            scope: sequence.request.scope(),
            cached_len: sequence.cached_len,
            num_preemptions: sequence.num_preemptions,
            is_pinned: sequence.is_pinned,
            is_paused: sequence.is_paused,
        })
    }

    /// The verifier's KV blocks.
    #[must_use]
    pub fn blocks(&self) -> &BlockPool {
        &self.blocks
    }

    /// What a tenant was served so far, in virtual tokens. For invariant checks.
    #[must_use]
    pub fn service(&self, tenant: TenantId) -> u64 {
        self.share.service(tenant)
    }

    /// What has happened so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Whether the verifier failed too often: nothing can be computed any more, and the engine is
    /// to be shut down.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.health.has_failed(self.config.verifier_failures_max)
    }

    /// When a request of each class last started, in the order of [`Priority::ALL`].
    #[must_use]
    pub fn last_starts(&self) -> [Micros; 3] {
        self.last_start
    }

    /// Whether the installed draft is in quarantine.
    #[must_use]
    pub fn is_draft_quarantined(&self) -> bool {
        self.draft.is_quarantined()
    }
}
