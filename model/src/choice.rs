//! Owns the one function that turns a row of logits into a token, for draft and verifier, with
//! speculation and without. Its order is part of the promise: penalties, bias, masks, temperature,
//! top-k, top-p, min-p, noise, argmax; ties go to the lowest id. Knows no batches and no requests.
//!
//! All arithmetic is `f64` in a fixed order, so equal logits give equal tokens on every machine.

use std::cmp::Ordering;

use crate::ids::TokenId;
use crate::math;
use crate::noise::NoiseRow;
use crate::sampling::SamplingParams;

/// A row of logits that no token can be chosen from. It ends the sequence it belongs to, never its
/// neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceFault {
    /// A logit is NaN or positive infinity.
    #[error("the model produced a logit that is not a number or infinite")]
    NotFinite,
    /// Masks and biases leave no token.
    #[error("no token is allowed at this position")]
    AllMasked,
}

/// What a row's choice depends on besides its logits.
#[derive(Clone, Copy, Debug)]
pub struct ChoiceContext<'a> {
    /// How to choose.
    pub params: &'a SamplingParams,
    /// All tokens before the one to be chosen: prompt, then output. Its length is the absolute
    /// position of the choice.
    pub history: &'a [TokenId],
    /// Tokens of `history` that are prompt.
    pub prompt_len: usize,
    /// Multiplies log-probabilities before noise is added. The verifier's is always 1; a draft may
    /// sharpen its own (`beta` in the design) without changing any output.
    pub sharpening: f64,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: TokenId,
    score: f64,
}

/// Chooses tokens. Holds only scratch memory: two choosers never differ in what they choose.
#[derive(Debug, Default)]
pub struct Chooser {
    /// Logits after penalties, bias and masks, `[vocab]`.
    processed: Vec<f64>,
    /// Tokens still in the running.
    candidates: Vec<Candidate>,
    /// Scratch for counting earlier tokens, `[vocab]`, all zero between calls.
    output_counts: Vec<u32>,
}

impl Chooser {
    /// A chooser with empty scratch memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The token for a row of logits, `[vocab]`.
    ///
    /// # Errors
    /// [`ChoiceFault`] when the row is not a number or nothing is allowed.
    pub fn choose(
        &mut self,
        logits: &[f32],
        context: &ChoiceContext<'_>,
    ) -> Result<TokenId, ChoiceFault> {
        self.process(logits, context)?;
        let params = context.params;
        if params.temperature == 0.0 {
            return self.greedy();
        }
        self.collect_candidates(params.temperature)?;
        self.keep_top_k(params.top_k as usize);
        self.keep_top_p(params.top_p);
        self.keep_min_p(params.min_p);
        let row = NoiseRow::new(params.seed, params.sample_index, context.history.len());
        Ok(self.noisy_argmax(row, context.sharpening))
    }

    /// Penalties, bias and masks into `self.processed`.
    fn process(&mut self, logits: &[f32], context: &ChoiceContext<'_>) -> Result<(), ChoiceFault> {
        self.processed.clear();
        self.processed.extend(logits.iter().map(|&logit| f64::from(logit)));
        if self.processed.iter().any(|logit| logit.is_nan() || *logit == f64::INFINITY) {
            return Err(ChoiceFault::NotFinite);
        }
        let params = context.params;
        if params.has_penalties() {
            self.penalise(context);
        }
        for &(token, bias) in &params.logit_bias {
            if let Some(logit) = self.processed.get_mut(token.index()) {
                *logit += bias;
            }
        }
        if context.history.len() - context.prompt_len < params.min_tokens {
            for token in &params.end_ids {
                if let Some(logit) = self.processed.get_mut(token.index()) {
                    *logit = f64::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    /// Repetition penalty over prompt and output, then frequency and presence over the output.
    fn penalise(&mut self, context: &ChoiceContext<'_>) {
        let (prompt, output) = context.history.split_at(context.prompt_len);
        let max_id = context.history.iter().map(|token| token.index()).max().unwrap_or(0);
        self.output_counts.resize(self.processed.len().max(max_id + 1), 0);
        for token in output {
            self.output_counts[token.index()] += 1;
        }
        // Each token is penalised once however often it occurs: a visited prompt token is marked by
        // a count that no output reaches, and both marks are cleared below.
        const PROMPT_ONLY: u32 = u32::MAX;
        for token in prompt {
            let count = &mut self.output_counts[token.index()];
            if *count == 0 {
                *count = PROMPT_ONLY;
            }
        }
        let params = context.params;
        for token in context.history {
            let count = std::mem::take(&mut self.output_counts[token.index()]);
            if count == 0 {
                continue; // already penalised
            }
            // A draft's row may be shorter than the verifier's vocabulary.
            let Some(logit) = self.processed.get_mut(token.index()) else { continue };
            if *logit > 0.0 {
                *logit /= params.repetition_penalty;
            } else {
                *logit *= params.repetition_penalty;
            }
            if count != PROMPT_ONLY {
                *logit -= params.frequency_penalty * f64::from(count);
                *logit -= params.presence_penalty;
            }
        }
    }

    /// The largest processed logit; the first of equals.
    fn greedy(&self) -> Result<TokenId, ChoiceFault> {
        let mut best: Option<(usize, f64)> = None;
        for (index, &logit) in self.processed.iter().enumerate() {
            if logit > best.map_or(f64::NEG_INFINITY, |(_, score)| score) {
                best = Some((index, logit));
            }
        }
        best.map(|(index, _)| token_at(index)).ok_or(ChoiceFault::AllMasked)
    }

    /// All unmasked tokens in id order, divided by the temperature.
    fn collect_candidates(&mut self, temperature: f64) -> Result<(), ChoiceFault> {
        self.candidates.clear();
        for (index, &logit) in self.processed.iter().enumerate() {
            let score = logit / temperature;
            if score.is_nan() || score == f64::INFINITY {
                return Err(ChoiceFault::NotFinite);
            }
            if score > f64::NEG_INFINITY {
                self.candidates.push(Candidate { token: token_at(index), score });
            }
        }
        if self.candidates.is_empty() { Err(ChoiceFault::AllMasked) } else { Ok(()) }
    }

    fn keep_top_k(&mut self, top_k: usize) {
        if top_k == 0 || top_k >= self.candidates.len() {
            return;
        }
        self.candidates.select_nth_unstable_by(top_k - 1, likelier_first);
        self.candidates.truncate(top_k);
        // Back to id order: sums below run in it.
        self.candidates.sort_unstable_by_key(|candidate| candidate.token);
    }

    /// Nucleus sampling (Holtzman et al., arXiv 1904.09751): the likeliest tokens are taken until
    /// their share of the total reaches `top_p`. Sorts only as much of the list as that needs.
    fn keep_top_p(&mut self, top_p: f64) {
        if top_p >= 1.0 {
            return;
        }
        let max = self.max_score();
        let total: f64 = self.candidates.iter().map(|c| math::exp(c.score - max)).sum();
        let goal = top_p * total;
        let mut sorted_len = 0;
        let mut reached = 0.0;
        while sorted_len < self.candidates.len() {
            let rest = &mut self.candidates[sorted_len..];
            let chunk_len = (sorted_len.max(32)).min(rest.len());
            if chunk_len < rest.len() {
                rest.select_nth_unstable_by(chunk_len - 1, likelier_first);
            }
            rest[..chunk_len].sort_unstable_by(likelier_first);
            for (offset, candidate) in rest[..chunk_len].iter().enumerate() {
                reached += math::exp(candidate.score - max);
                if reached >= goal {
                    self.candidates.truncate(sorted_len + offset + 1);
                    return;
                }
            }
            sorted_len += chunk_len;
        }
    }

    fn keep_min_p(&mut self, min_p: f64) {
        if min_p <= 0.0 {
            return;
        }
        let threshold = self.max_score() + math::ln(min_p);
        self.candidates.retain(|candidate| candidate.score >= threshold);
    }

    fn max_score(&self) -> f64 {
        self.candidates.iter().fold(f64::NEG_INFINITY, |max, c| max.max(c.score))
    }

    /// `argmax_v(sharpening * score_v + G_v)`; ties to the lowest id. Starts from the likeliest
    /// token, so that most others are dismissed by a bound on their noise without a logarithm.
    fn noisy_argmax(&self, row: NoiseRow, sharpening: f64) -> TokenId {
        let first = self
            .candidates
            .iter()
            .copied()
            .min_by(likelier_first)
            .expect("truncation keeps at least one candidate");
        let mut best = first.token;
        let mut best_score = sharpening * first.score + row.gumbel(first.token);
        for candidate in &self.candidates {
            let bits = row.bits(candidate.token);
            let base = sharpening * candidate.score;
            if base + bits.gumbel_bound() < best_score {
                continue;
            }
            let score = base + bits.gumbel();
            if score > best_score || (score == best_score && candidate.token < best) {
                best = candidate.token;
                best_score = score;
            }
        }
        best
    }
}

/// Natural logarithm of the probability that the raw logits (before penalties, temperature and
/// truncation) give to `token`: `l_token - ln(sum_v exp(l_v))`. `[vocab]` in.
#[must_use]
pub fn log_probability(logits: &[f32], token: TokenId) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max = f64::from(max);
    let total: f64 = logits.iter().map(|&logit| math::exp(f64::from(logit) - max)).sum();
    f64::from(logits[token.index()]) - max - math::ln(total)
}

/// Descending by score, ascending by id among equals: a total order, so that selection and sorting
/// give one result whatever algorithm does them.
fn likelier_first(a: &Candidate, b: &Candidate) -> Ordering {
    let order = b.score.partial_cmp(&a.score).expect("scores of candidates are never NaN");
    order.then(a.token.cmp(&b.token))
}

fn token_at(index: usize) -> TokenId {
    TokenId(u32::try_from(index).expect("vocabularies are validated to fit u32"))
}
