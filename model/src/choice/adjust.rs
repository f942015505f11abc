//! Owns penalties, bias and masks: what they make of the few tokens that they touch. Knows neither
//! the other tokens nor what is done with the result.

use super::{Candidate, ChoiceContext};
use crate::ids::TokenId;
use crate::sampling::SamplingParams;

/// The tokens whose logits are not the model's own.
#[derive(Debug, Default)]
pub(super) struct Adjusted {
    /// Each token once, with its logit after penalties, bias and masks.
    tokens: Vec<Candidate>,
    /// How often each of `tokens` occurs in the output, as far as penalties were asked for.
    output_counts: Vec<u32>,
    /// Place in `tokens` plus one of every token, `[vocab]`, all zero between calls.
    places: Vec<u32>,
}

impl Adjusted {
    /// The tokens touched, each once.
    pub(super) fn tokens(&self) -> &[Candidate] {
        &self.tokens
    }

    /// Adjusts a row of logits, `[vocab]`.
    pub(super) fn adjust(&mut self, logits: &[f32], context: &ChoiceContext<'_>) {
        self.tokens.clear();
        let params = context.params;
        let is_masked = context.output_len() < params.min_tokens && !params.end_ids.is_empty();
        if !params.has_penalties() && params.logit_bias.is_empty() && !is_masked {
            return;
        }
        if self.places.len() < logits.len() {
            self.places.resize(logits.len(), 0);
            // Room for whatever histories touch, so that a step does not allocate.
            self.tokens.reserve(logits.len());
            self.output_counts.reserve(logits.len());
        }
        if params.has_penalties() {
            self.penalise(logits, context);
        }
        for &(token, bias) in &params.logit_bias {
            if let Some(place) = self.place(logits, token) {
                self.tokens[place].score += bias;
            }
        }
        if is_masked {
            for &token in &params.end_ids {
                if let Some(place) = self.place(logits, token) {
                    self.tokens[place].score = f64::NEG_INFINITY;
                }
            }
        }
        for adjusted in &self.tokens {
            self.places[adjusted.token.index()] = 0;
        }
    }

    /// Repetition penalty over prompt and output, then frequency and presence over the output; each
    /// once per token, however often it occurs.
    fn penalise(&mut self, logits: &[f32], context: &ChoiceContext<'_>) {
        self.output_counts.clear();
        let (prompt, output) = context.history.split_at(context.prompt_len);
        let params = context.params;
        // Without a repetition penalty nothing happens to what is only in the prompt.
        if params.repetition_penalty != 1.0 {
            for &token in prompt {
                self.count(logits, token, 0);
            }
        }
        for &token in output.iter().chain(context.ahead) {
            self.count(logits, token, 1);
        }
        for (adjusted, &count) in self.tokens.iter_mut().zip(&self.output_counts) {
            penalise(&mut adjusted.score, count, params);
        }
    }

    fn count(&mut self, logits: &[f32], token: TokenId, occurrences: u32) {
        if let Some(place) = self.place(logits, token) {
            self.output_counts.resize(self.tokens.len(), 0);
            self.output_counts[place] += occurrences;
        }
    }

    /// The place of a token in `tokens`, which it enters with its own logit. `None` for ids beyond
    /// the row: a draft's may be shorter than the verifier's vocabulary.
    fn place(&mut self, logits: &[f32], token: TokenId) -> Option<usize> {
        let logit = logits.get(token.index())?;
        let place = &mut self.places[token.index()];
        if *place == 0 {
            self.tokens.push(Candidate { token, score: f64::from(*logit) });
            *place = u32::try_from(self.tokens.len()).expect("vocabularies fit u32");
        }
        Some(*place as usize - 1)
    }
}

fn penalise(logit: &mut f64, output_count: u32, params: &SamplingParams) {
    if *logit > 0.0 {
        *logit /= params.repetition_penalty;
    } else {
        *logit *= params.repetition_penalty;
    }
    if output_count > 0 {
        *logit -= params.frequency_penalty * f64::from(output_count);
        *logit -= params.presence_penalty;
    }
}
