//! Owns what a client would have received of one request, and the comparison with what the oracle
//! expects. Knows events, not engines.

use slipstream_model::ids::TokenId;
use slipstream_server::engine::event::{Event, FinishReason, Finished, OutputToken};
use slipstream_server::engine::request::Request;

use crate::reference::{Expected, Pieces, bytes_of, known_text};

/// Everything one client received.
#[derive(Clone, Debug, Default)]
pub struct Collected {
    /// Tokens, in order.
    pub tokens: Vec<OutputToken>,
    /// Text, in order.
    pub text: String,
    /// The end.
    pub finished: Option<Finished>,
}

/// Whether the engine came to this end by the rules of decoding rather than by force.
#[must_use]
pub fn is_natural(reason: FinishReason) -> bool {
    !reason.is_forced()
}

impl Collected {
    /// Takes one event.
    ///
    /// # Errors
    /// When something follows the end.
    pub fn take(&mut self, event: Event) -> Result<(), String> {
        if self.finished.is_some() {
            return Err(format!("an event after the end: {event:?}"));
        }
        match event {
            Event::Tokens(tokens) => {
                self.tokens.extend(tokens.tokens);
                self.text.push_str(&tokens.text);
            }
            Event::Finished(finished) => self.finished = Some(finished),
        }
        Ok(())
    }

    /// The ids received.
    #[must_use]
    pub fn ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// Compares what was received so far, while the request still runs: nothing may have been sent
    /// that a later stop string could take back.
    ///
    /// # Errors
    /// The first difference.
    pub fn check_running(&self, expected: &Expected) -> Result<(), String> {
        same("running tokens", expected.tokens.starts_with(&self.ids()), &self.tokens, expected)?;
        same("running text", expected.text.starts_with(&self.text), &self.text, expected)
    }

    /// Compares everything after the end. A request that was ended by force must have received
    /// nothing that going on could take back, and exactly the certain text of its tokens.
    ///
    /// # Errors
    /// The first difference, or that there is no end.
    pub fn check_finished(
        &self,
        request: &Request,
        expected: &Expected,
        pieces: &Pieces,
    ) -> Result<(), String> {
        let Some(finished) = &self.finished else { return Err("no end".to_owned()) };
        let ids = self.ids();
        let usage = finished.usage;
        same("output usage", usage.output_tokens == ids.len(), &usage, expected)?;
        same("prompt usage", usage.prompt_tokens == request.prompt.len(), &usage, expected)?;
        let prefix_len = request.output_prefix.len();
        same("prefix usage", usage.prefix_tokens == prefix_len, &usage, expected)?;
        self.check_logprobs(request, expected)?;
        self.check_accounts(finished, expected)?;
        if is_natural(finished.reason) {
            same("reason", finished.reason == expected.reason, &finished.reason, expected)?;
            same("tokens", ids == expected.tokens, &ids, expected)?;
            return same("text", self.text == expected.text, &self.text, expected);
        }
        self.check_running(expected)?;
        let prefix = bytes_of(pieces, &request.output_prefix);
        let bytes = [prefix.clone(), bytes_of(pieces, &ids)].concat();
        let text = known_text(&bytes);
        let text = text.strip_prefix(known_text(&prefix).as_str()).unwrap_or("");
        same("forced text", self.text == text, &(&self.text, text), expected)
    }

    fn check_logprobs(&self, request: &Request, expected: &Expected) -> Result<(), String> {
        for (index, token) in self.tokens.iter().enumerate() {
            let is_right = match (token.logprob, expected.logprobs.get(index)) {
                (Some(found), Some(wanted)) => found.to_bits() == wanted.to_bits(),
                (Some(_), None) => false,
                (None, _) => !request.logprobs,
            };
            same("logprob", is_right, &(index, token), expected)?;
        }
        Ok(())
    }

    /// What the end says about time and speculation must be consistent in itself.
    fn check_accounts(&self, finished: &Finished, expected: &Expected) -> Result<(), String> {
        let timings = finished.timings;
        let first_token = timings.first_token.unwrap_or(timings.total);
        let queue = timings.queue.unwrap_or(first_token);
        let in_order = queue <= first_token && first_token <= timings.total;
        same("timings", in_order, &timings, expected)?;
        let speculation = &finished.speculation;
        let proposed: usize = speculation.proposed_by_position.iter().sum();
        let at_each = speculation.proposed_by_position.iter();
        let is_monotone = at_each.zip(&speculation.accepted_by_position).all(|(p, a)| a <= p);
        let is_sound = proposed == speculation.num_proposed
            && is_monotone
            && speculation.accepted_by_position.is_sorted_by(|a, b| a >= b)
            && speculation.proposed_by_position.is_sorted_by(|a, b| a >= b);
        same("speculation", is_sound, speculation, expected)
    }
}

fn same<T: std::fmt::Debug>(
    what: &str,
    is_same: bool,
    found: &T,
    expected: &Expected,
) -> Result<(), String> {
    if is_same { Ok(()) } else { Err(format!("{what}: found {found:?}, expected {expected:?}")) }
}
