//! Owns the beginning and the end of sequences: whether a request is taken, what ends it from
//! outside, and what its end gives back. Knows no steps.

use slipstream_model::clock::Micros;
use slipstream_model::ids::{BLOCK_LEN, SequenceId};

use super::event::{CancelReason, FinishReason, Finished, SequenceFault, Timings, Usage};
use super::output::{Output, StopRules};
use super::prefix_cache::Contents;
use super::request::{PrefixReuse, Request, SubmitError};
use super::sequence::{Phase, Sequence};
use super::step_costs::StepShape;
use super::{Engine, keeping};

/// The pace at which requests have ended lately.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ends {
    last: Option<Micros>,
    /// Mean time between two ends, in microseconds; follows the last ones.
    interval_us: f64,
}

/// Weight of the newest interval between two ends.
const ENDS_WEIGHT: f64 = 0.1;
/// Bounds of the time after which a client that was sent away may come back.
const RETRY_LEAST: Micros = Micros(200_000);
const RETRY_MOST: Micros = Micros(30_000_000);
/// Of this many places one is for requests of other tenants than the one with the most, if there
/// are enough to give some away.
const OTHERS_PART: usize = 16;
const PLACES_ENOUGH: usize = 64;
/// What is certain of a predicted time: a request is refused as too late only if even this part of
/// the prediction is more than it has.
const CERTAIN_PART: u64 = 2;

impl Ends {
    fn note(&mut self, now: Micros) {
        let Some(last) = self.last.replace(now) else { return };
        let interval_us = now.since(last).0 as f64;
        self.interval_us += ENDS_WEIGHT * (interval_us - self.interval_us);
    }

    /// When `num_requests` more will likely have ended.
    fn time_for(self, num_requests: usize) -> Micros {
        let us = self.interval_us * num_requests as f64;
        Micros(us as u64).clamp(RETRY_LEAST, RETRY_MOST)
    }
}

impl Engine {
    /// Takes a request. Ids are served in ascending order and never used twice.
    ///
    /// # Errors
    /// [`SubmitError`]; the engine is then unchanged.
    pub fn submit(&mut self, id: SequenceId, request: Request) -> Result<(), SubmitError> {
        let now = self.clock.now();
        if let Err(refusal) = self.check(id, &request, now) {
            match refusal {
                SubmitError::QueueFull { .. } => self.counters.shed += 1,
                SubmitError::TooLate { .. } => self.counters.refused_late += 1,
                SubmitError::TooManyRequests { .. }
                | SubmitError::NeverFits { .. }
                | SubmitError::OverContext { .. }
                | SubmitError::Invalid(_)
                | SubmitError::ShuttingDown => {}
            }
            return Err(refusal);
        }
        let mut output = Output::default();
        let end = self.feed_prefix(&request, &mut output);
        self.counters.submitted += 1;
        self.counters.prompt_tokens += request.prompt.len() as u64;
        self.share.arrives(request.tenant);
        let mut sequence = Sequence::new(id, request, output, now);
        if keeping::may_share(&self.config, &sequence) {
            keeping::learn_keys(&self.blocks, &mut sequence);
        }
        self.sequences.insert(id, sequence);
        if let Some(reason) = end {
            self.finish(id, reason);
        }
        Ok(())
    }

    /// Whether a request can be taken and will certainly fit.
    fn check(&self, id: SequenceId, request: &Request, now: Micros) -> Result<(), SubmitError> {
        self.check_contents(id, request)?;
        self.check_size(request)?;
        let live = self.sequences.values().filter(|sequence| !sequence.is_finished());
        let limit = self.config.max_running + self.config.max_waiting;
        // Some places are for the others: whoever fills the queue does not shut them out.
        let num_kept = if limit < PLACES_ENOUGH { 0 } else { limit / OTHERS_PART };
        let own_limit = limit - num_kept;
        if live.count() >= limit || self.share.num_live(request.tenant) >= own_limit {
            let retry_after = self.ends.time_for(1 + self.config.max_waiting / 4);
            return Err(SubmitError::QueueFull { limit, retry_after });
        }
        let Some(deadline) = request.deadline else { return Ok(()) };
        let (left, needed) = (deadline.since(now), self.least_time(request));
        if left == Micros(0) || left < needed {
            return Err(SubmitError::TooLate { left, needed });
        }
        Ok(())
    }

    /// The time that the prompt of a request takes at least, going by what steps took so far: all
    /// of it but what is cached in one step, as if the machine were idle, and of what that is
    /// expected to take the part that is certain.
    fn least_time(&self, request: &Request) -> Micros {
        if !self.costs.knows_chunks() || request.sibling.is_some() {
            return Micros(0);
        }
        let (scope, tokens) = (request.scope(), request.prompt.as_slice());
        let mut keys = Vec::new();
        if self.config.prefix_reuse && request.prefix_reuse != PrefixReuse::Off {
            self.blocks.extend_keys(scope, tokens, &mut keys);
        }
        let contents = Contents { scope, tokens, keys: &keys };
        let cached_len = self.blocks.matching(contents).count() * BLOCK_LEN;
        let rest = StepShape::default().with(cached_len, tokens.len() - cached_len);
        Micros(self.costs.predict(rest).0 / CERTAIN_PART)
    }

    /// Whether a sequence that does not run cannot have its first token in time any more.
    fn is_hopeless(&self, sequence: &Sequence, now: Micros) -> bool {
        let Some(deadline) = sequence.request.deadline else { return false };
        if sequence.phase == Phase::Running || sequence.first_token.is_some() {
            return false;
        }
        // Looking into the cache takes longer than this, and is rarely needed.
        let left = deadline.since(now);
        let whole = StepShape::default().with(0, sequence.request.prompt.len());
        left < self.costs.predict(whole) && left < self.least_time(&sequence.request)
    }

    /// Ends the sequences whose deadline has passed, or will have before they can begin to answer.
    pub(super) fn expire(&mut self, now: Micros) {
        let live = self.sequences.values().filter(|sequence| !sequence.is_finished());
        let late = live.filter(|sequence| {
            let is_over = sequence.request.deadline.is_some_and(|deadline| deadline <= now);
            is_over || self.is_hopeless(sequence, now)
        });
        let ids: Vec<_> = late.map(|sequence| sequence.id).collect();
        for id in ids {
            self.finish(id, FinishReason::DeadlineExceeded);
        }
    }

    fn check_contents(&self, id: SequenceId, request: &Request) -> Result<(), SubmitError> {
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
        Ok(())
    }

    fn check_size(&self, request: &Request) -> Result<(), SubmitError> {
        let limits = self.verifier.limits();
        let wanted = request.max_len();
        if wanted > limits.context_len {
            return Err(SubmitError::OverContext { wanted, context_len: limits.context_len });
        }
        let capacity = limits.num_blocks * BLOCK_LEN;
        if wanted > capacity {
            return Err(SubmitError::NeverFits { wanted, capacity });
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
    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let now = self.clock.now();
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.is_finished() {
            return;
        }
        sequence.advance(Phase::Finished(reason));
        if reason.is_forced() {
            sequence.output.withhold();
        }
        if matches!(reason, FinishReason::Fault(SequenceFault::Choice(_))) {
            // Its KV may be what is wrong: nobody shall build on it.
            self.blocks.distrust(&sequence.blocks);
            sequence.computed_len = 0;
        }
        keeping::give_back(&self.config, &mut self.blocks, sequence);
        self.draft.release(id);
        self.ends.note(now);
        self.share.leaves(sequence.request.tenant);
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
}

/// When the stop strings of `request` count.
pub(super) fn stop_rules(request: &Request) -> StopRules<'_> {
    StopRules { strings: &request.stop_strings, min_tokens: request.params.min_tokens }
}
