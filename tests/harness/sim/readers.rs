//! Owns the clients of a world: how often they take their events, what they have received, and the
//! comparison of it with the oracle while they read and at their end.

use slipstream_model::ids::SequenceId;
use slipstream_server::engine::event::{Event, FinishReason, Provenance};
use slipstream_server::engine::request::{PrefixReuse, Request};

use super::{World, is_live, require};
use crate::collected::{Collected, is_natural};
use crate::reference::Expected;

/// One client.
#[derive(Debug)]
pub(super) struct Client {
    request: Request,
    expected: Expected,
    collected: Collected,
    /// Takes its events once in this many steps; 0 for not before the calm.
    reads_one_in: usize,
}

impl Client {
    pub(super) fn new(request: Request, expected: Expected, reads_one_in: usize) -> Self {
        Self { request, expected, collected: Collected::default(), reads_one_in }
    }
}

impl World {
    /// Clients take their events; in calm weather all do, all the time.
    pub(super) fn read(&mut self, is_calm: bool) -> Result<(), String> {
        let ids: Vec<SequenceId> = self.clients.keys().copied().collect();
        for id in ids {
            let reads_one_in = self.clients[&id].reads_one_in;
            if is_calm || self.rng.one_in(reads_one_in) {
                self.read_one(id)?;
            }
        }
        self.checker.between_steps(&self.engine)
    }

    fn read_one(&mut self, id: SequenceId) -> Result<(), String> {
        let config = self.climate.config;
        let client = self.clients.get_mut(&id).expect("the caller listed it");
        let is_running = self.engine.sequences().any(|view| view.id == id && is_live(view.phase));
        while let Some(event) = self.engine.take_event(id) {
            let is_end = matches!(event, Event::Finished(_));
            if let Event::Tokens(tokens) = &event {
                // A step may overshoot by what it brings; a stop string holds more back than that.
                let bound = config.unread_tokens_max + config.draft_len_max;
                let is_bounded = tokens.tokens.len() <= bound;
                require(is_bounded || !client.request.stop_strings.is_empty(), || {
                    format!("I12: {id} had {} tokens unread", tokens.tokens.len())
                })?;
            }
            client.collected.take(event).map_err(|error| format!("I7: {id}: {error}"))?;
            if is_end {
                break;
            }
        }
        if is_running {
            let check = client.collected.check_running(&client.expected);
            check.map_err(|error| format!("I5, I11: {id}: {error}"))?;
        }
        if client.collected.finished.is_some() {
            let client = self.clients.remove(&id).expect("it was just used");
            self.close(id, &client)?;
        }
        Ok(())
    }

    /// A client has its end: everything it received is compared with the oracle.
    fn close(&mut self, id: SequenceId, client: &Client) -> Result<(), String> {
        let Client { request, expected, collected, .. } = client;
        let check = collected.check_finished(request, expected, &self.pieces);
        check.map_err(|error| format!("I5, I6, I11: {id} {request:?}: {error}"))?;
        let finished = collected.finished.as_ref().expect("only ended clients close");
        let reason = finished.reason;
        self.coverage.note(if is_natural(reason) { "natural ends" } else { "forced ends" }, 1);
        self.coverage.note(
            match reason {
                FinishReason::EndToken(_) => "ended by token",
                FinishReason::StopString(_) => "ended by stop string",
                FinishReason::Length => "ended by length",
                FinishReason::Cancelled(_) => "ended by cancel",
                FinishReason::DeadlineExceeded => "ended by deadline",
                FinishReason::Fault(_) if is_natural(reason) => "ended by bad logits",
                FinishReason::Fault(_) => "ended by verifier failure",
                FinishReason::ShuttingDown => "ended by shutdown",
            },
            1,
        );
        let end = request.arrival.plus(finished.timings.total);
        let is_late = reason == FinishReason::DeadlineExceeded;
        let is_due = request.deadline.is_some_and(|at| at <= end);
        // What has not begun to answer may end as soon as it cannot any more.
        let is_hopeless = request.deadline.is_some() && collected.tokens.is_empty();
        require(!is_late || is_due || is_hopeless, || format!("{id} ended before its deadline"))?;
        self.coverage.note("ended as hopeless", u64::from(is_late && !is_due));
        self.check_usage(id, client)?;
        self.check_provenance(id, collected)
    }

    /// What its end says about shared KV and preemptions must be possible.
    fn check_usage(&mut self, id: SequenceId, client: &Client) -> Result<(), String> {
        let Client { request, collected, .. } = client;
        let usage = collected.finished.as_ref().expect("only ended clients close").usage;
        let is_cached = usage.cached_tokens > 0;
        let may_be_cached = request.prefix_reuse != PrefixReuse::Off || request.sibling.is_some();
        // The last known token is always computed: its row gives the logits.
        let known_len = request.prompt.len() + request.output_prefix.len();
        let is_possible = usage.cached_tokens <= request.prompt.len().min(known_len - 1)
            && (may_be_cached || !is_cached);
        require(is_possible, || format!("I6: {id}: {usage:?} of {request:?}"))?;
        let is_partial = !usage.cached_tokens.is_multiple_of(slipstream_model::ids::BLOCK_LEN);
        self.coverage.note("prefix hits", u64::from(is_cached));
        self.coverage.note("siblings shared", u64::from(is_partial && request.sibling.is_some()));
        self.coverage.note("preempted and finished", u64::from(usage.preemptions > 0));
        Ok(())
    }

    fn check_provenance(&mut self, id: SequenceId, collected: &Collected) -> Result<(), String> {
        let first = collected.tokens.first().map(|token| token.provenance);
        require(first.is_none_or(|provenance| provenance == Provenance::Plain), || {
            format!("{id} waited for a draft before its first token: {first:?}")
        })?;
        for token in &collected.tokens {
            let is_known_epoch = token.draft_epoch.is_none_or(|epoch| epoch.0 <= self.epoch);
            let is_even = token.draft_epoch.is_none_or(|epoch| epoch.0.is_multiple_of(2));
            require(is_known_epoch && is_even, || {
                format!("I8: {id} has a token of another epoch: {token:?}")
            })?;
            self.coverage.note(
                match token.provenance {
                    Provenance::Accepted => "accepted tokens",
                    Provenance::Correction => "correction tokens",
                    Provenance::Bonus => "bonus tokens",
                    Provenance::Plain => "plain tokens",
                },
                1,
            );
        }
        Ok(())
    }
}
