//! The engine: a synchronous struct that moves every sequence's computed length towards the end of
//! its known tokens. It imports no tokio, no tonic, no channels and reads time only through
//! [`Clock`]; `runner.rs` is the one place that connects it to threads and queues. Read `step.rs`
//! first.

mod commit;
mod counters;
pub mod event;
mod output;
mod proposing;
pub mod request;
pub mod runner;
mod scheduler;
mod sequence;
mod step;
mod stop;

use std::collections::BTreeMap;
use std::sync::Arc;

use slipstream_draft::proposer::Proposer;
use slipstream_model::block_manager::BlockManager;
use slipstream_model::clock::{Clock, Micros};
use slipstream_model::forward::Forward;
use slipstream_model::ids::{BLOCK_LEN, BlockId, SequenceId, TokenId};
use slipstream_model::token_bytes::TokenBytes;
use slipstream_verifier::verifier::Verifier;

use event::{CancelReason, Event, FinishReason, Finished, Timings, Usage};
use output::{Output, StopRules};
use proposing::Draft;
use request::{PrefixScope, Priority, Request, SubmitError, TenantId};
use sequence::Sequence;

pub use counters::{Counters, EngineSnapshot, FinishedBy, POSITIONS_MAX};
pub use sequence::Phase;
pub use step::StepReport;
use step::StepRoom;

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
    /// A waiting request counts as one class more urgent after each such time.
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
    /// Whether it holds all blocks it can ever need and is never preempted again.
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
    blocks: BlockManager,
    /// All sequences by id, which is the order of service. Finished ones stay until their last
    /// event is taken.
    sequences: BTreeMap<SequenceId, Sequence>,
    counters: Counters,
    room: StepRoom,
}

impl Engine {
    /// An idle engine.
    #[must_use]
    pub fn new(parts: EngineParts) -> Self {
        let verifier = Verifier::new(parts.verifier);
        let blocks = BlockManager::new(verifier.limits().num_blocks);
        Self {
            config: parts.config,
            verifier,
            draft: Draft::new(parts.proposer),
            token_bytes: parts.token_bytes,
            clock: parts.clock,
            blocks,
            sequences: BTreeMap::new(),
            counters: Counters::default(),
            room: StepRoom::default(),
        }
    }

    /// Takes a request. Ids are served in ascending order and never used twice.
    ///
    /// # Errors
    /// [`SubmitError`]; the engine is then unchanged.
    pub fn submit(&mut self, id: SequenceId, request: Request) -> Result<(), SubmitError> {
        self.check(id, &request)?;
        let mut output = Output::default();
        let end = self.feed_prefix(&request, &mut output);
        self.counters.submitted += 1;
        self.counters.prompt_tokens += request.prompt.len() as u64;
        let sequence = Sequence::new(id, request, output);
        self.sequences.insert(id, sequence);
        if let Some(reason) = end {
            self.finish(id, reason);
        }
        Ok(())
    }

    /// Whether a request can be taken and will certainly fit.
    fn check(&self, id: SequenceId, request: &Request) -> Result<(), SubmitError> {
        let limits = self.verifier.limits();
        if self.sequences.contains_key(&id) {
            return Err(SubmitError::Invalid("sequence id is in use"));
        }
        if request.prompt.is_empty() {
            return Err(SubmitError::Invalid("prompt is empty"));
        }
        if request.max_tokens == 0 || request.output_prefix.len() > request.max_tokens {
            return Err(SubmitError::Invalid("max_tokens is zero or less than output_prefix"));
        }
        if request.stop_strings.iter().any(Vec::is_empty) {
            return Err(SubmitError::Invalid("a stop string is empty"));
        }
        let mut ids = request.prompt.iter().chain(&request.output_prefix);
        if ids.any(|token| token.index() >= limits.vocab_size) {
            return Err(SubmitError::Invalid("a token id lies outside the vocabulary"));
        }
        let wanted = request.max_len();
        if wanted > limits.context_len {
            return Err(SubmitError::OverContext { wanted, context_len: limits.context_len });
        }
        let capacity = limits.num_blocks * BLOCK_LEN;
        if wanted > capacity {
            return Err(SubmitError::NeverFits { wanted, capacity });
        }
        let live = self.sequences.values().filter(|sequence| !sequence.is_finished());
        let limit = self.config.max_running + self.config.max_waiting;
        if live.count() >= limit {
            return Err(SubmitError::QueueFull { limit, retry_after: Micros(1_000_000) });
        }
        Ok(())
    }

    /// Runs the client's output prefix through the same rules as new output. It may already be
    /// complete.
    fn feed_prefix(&self, request: &Request, output: &mut Output) -> Option<FinishReason> {
        let rules = stop_rules(request);
        for (index, &token) in request.output_prefix.iter().enumerate() {
            if index >= request.params.min_tokens && request.params.end_ids.contains(&token) {
                return Some(FinishReason::EndToken(token));
            }
            if let Some(found) = output.push_prefix(self.token_bytes.get(token), rules) {
                return Some(FinishReason::StopString(found.index));
            }
        }
        (request.output_prefix.len() == request.max_tokens).then_some(FinishReason::Length)
    }

    /// Ends a request in whatever state it is. Its end can then be taken as an event. Unknown and
    /// finished ids are fine.
    pub fn cancel(&mut self, id: SequenceId, reason: CancelReason) {
        self.finish(id, FinishReason::Cancelled(reason));
    }

    /// Ends a request whose events nobody shall have any more, and drops them.
    pub fn forget(&mut self, id: SequenceId, reason: CancelReason) {
        self.finish(id, FinishReason::Cancelled(reason));
        if self.sequences.remove(&id).is_some() {
            self.counters.released += 1;
        }
    }

    /// Ends every request because the server stops.
    pub fn shut_down(&mut self) {
        let ids: Vec<SequenceId> = self.sequences.keys().copied().collect();
        for id in ids {
            self.finish(id, FinishReason::ShuttingDown);
        }
    }

    /// Ends a sequence: takes its blocks back in both pools and closes its output. Does nothing
    /// when it has ended before.
    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let now = self.clock.now();
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.is_finished() {
            return;
        }
        sequence.advance(Phase::Finished(reason));
        if reason.is_forced() {
            sequence.output.withhold();
        }
        self.blocks.release(&mut sequence.blocks);
        sequence.computed_len = 0;
        self.draft.release(id);
        self.counters.add_end(reason);
        let arrival = sequence.request.arrival;
        let finished = Finished {
            reason,
            usage: Usage {
                prompt_tokens: sequence.request.prompt.len(),
                output_tokens: sequence.output.num_tokens(),
                prefix_tokens: sequence.request.output_prefix.len(),
                cached_tokens: sequence.cached_len,
                preemptions: sequence.num_preemptions,
            },
            timings: Timings {
                queue: sequence.first_planned.map(|at| at.since(arrival)),
                first_token: sequence.first_token.map(|at| at.since(arrival)),
                total: now.since(arrival),
            },
            speculation: std::mem::take(&mut sequence.speculation),
        };
        sequence.output.finish(finished);
    }

    /// Whether a request has ended and only waits for its events to be taken.
    #[must_use]
    pub fn is_finished(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(Sequence::is_finished)
    }

    /// Whether any sequence still needs steps.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.sequences.values().any(|sequence| !sequence.is_finished())
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
            is_pinned: false,
            is_paused: false,
        })
    }

    /// The verifier's KV blocks.
    #[must_use]
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
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
        false
    }

    /// Whether the installed draft is in quarantine.
    #[must_use]
    pub fn is_draft_quarantined(&self) -> bool {
        self.draft.is_quarantined()
    }
}

/// When the stop strings of `request` count.
fn stop_rules(request: &Request) -> StopRules<'_> {
    StopRules { strings: &request.stop_strings, min_tokens: request.params.min_tokens }
}
