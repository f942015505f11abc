//! Owns the one function that turns a row of logits into a token, for draft and verifier, with
//! speculation and without. Its order is part of the promise: penalties, bias, masks, temperature,
//! top-k, top-p, min-p, noise, argmax; ties go to the lowest id. Knows no batches and no requests.
//!
//! All arithmetic is `f64` in a fixed order, so equal logits give equal tokens on every machine.
//! That defines the token; what can be shown not to win is not looked at.

mod adjust;
mod row;
mod truncate;

use std::cmp::Ordering;

use crate::ids::TokenId;
use crate::kernels::Isa;
use crate::kernels::scan;
use crate::math;
use crate::noise::NoiseRow;
use crate::sampling::SamplingParams;
use adjust::Adjusted;
use row::{Best, Row};
use truncate::Truncation;

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
    /// Tokens before the one to be chosen: prompt, then output.
    pub history: &'a [TokenId],
    /// Tokens behind `history` that count as output too: those of a proposal, accepted so far. The
    /// length of both is the absolute position of the choice.
    pub ahead: &'a [TokenId],
    /// Tokens of `history` that are prompt.
    pub prompt_len: usize,
    /// Multiplies log-probabilities before noise is added. The verifier's is always 1; a draft may
    /// sharpen its own (`beta` in the design) without changing any output. Above 0, finite.
    pub sharpening: f64,
}

impl ChoiceContext<'_> {
    /// Absolute position of the token to be chosen.
    fn position(&self) -> usize {
        self.history.len() + self.ahead.len()
    }

    /// Output tokens before it.
    fn output_len(&self) -> usize {
        self.position() - self.prompt_len
    }
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: TokenId,
    score: f64,
}

/// Chooses tokens. Holds only scratch memory: two choosers never differ in what they choose.
#[derive(Debug)]
pub struct Chooser {
    isa: Isa,
    /// The tokens that penalties, bias and masks touch.
    adjusted: Adjusted,
    /// The row without them, when there are any, `[vocab]`.
    others: Vec<f32>,
    /// Largest logits of its blocks, `[vocab / SCAN_LEN]`.
    maxima: Vec<f32>,
    truncation: Truncation,
}

impl Default for Chooser {
    fn default() -> Self {
        Self::new()
    }
}

impl Chooser {
    /// A chooser with empty scratch memory.
    #[must_use]
    pub fn new() -> Self {
        Self::with_isa(Isa::detect())
    }

    /// A chooser that scans rows with the given implementation. They all choose alike.
    #[must_use]
    pub fn with_isa(isa: Isa) -> Self {
        Self {
            isa,
            adjusted: Adjusted::default(),
            others: Vec::new(),
            maxima: Vec::new(),
            truncation: Truncation::default(),
        }
    }

    /// The token for a row of logits, `[vocab]`.
    ///
    /// # Errors
    /// [`ChoiceFault`] when the row is not a number or nothing is allowed.
    ///
    /// # Panics
    /// When the sharpening is not above 0 and finite.
    pub fn choose(
        &mut self,
        logits: &[f32],
        context: &ChoiceContext<'_>,
    ) -> Result<TokenId, ChoiceFault> {
        let ChoiceContext { params, sharpening, .. } = *context;
        assert!(sharpening > 0.0 && sharpening.is_finite(), "sharpening keeps the order of scores");
        self.adjusted.adjust(logits, context);
        let row = scanned(self.isa, logits, &self.adjusted, &mut self.others, &mut self.maxima)?;
        if params.temperature == 0.0 {
            return row.greedy();
        }
        let max = row.max_score(params.temperature)?;
        let noise = NoiseRow::new(params.seed, params.sample_index, context.position());
        let token = match self.truncation.survivors(&row, params, max) {
            Some(survivors) => noisy_argmax(survivors, &noise, sharpening),
            None => row.noisy_argmax(params.temperature, &noise, sharpening),
        };
        Ok(token.expect("a row with a largest score keeps at least one token"))
    }

    /// As [`log_probability`], the same bits, faster.
    #[must_use]
    pub fn log_probability(&mut self, logits: &[f32], token: TokenId) -> f64 {
        self.maxima.resize(scan::num_blocks(logits.len()), 0.0);
        if !scan::block_maxima(self.isa, logits, &mut self.maxima) {
            return log_probability(logits, token);
        }
        let max = f64::from(self.maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let total = scan::exp_sum(self.isa, logits, max);
        // Zeros of the maxima have lost their sign; adding 0 takes it from the difference too.
        (f64::from(logits[token.index()]) - max + 0.0) - math::ln(total)
    }
}

/// Splits a row into the tokens that were adjusted and the others, and scans those.
fn scanned<'a>(
    isa: Isa,
    logits: &'a [f32],
    adjusted: &'a Adjusted,
    others: &'a mut Vec<f32>,
    maxima: &'a mut Vec<f32>,
) -> Result<Row<'a>, ChoiceFault> {
    let adjusted = adjusted.tokens();
    let own = |candidate: &Candidate| logits[candidate.token.index()];
    let mut is_sound = adjusted.iter().all(|candidate| own(candidate) < f32::INFINITY);
    let logits = if adjusted.is_empty() {
        logits
    } else {
        others.clear();
        others.extend_from_slice(logits);
        for candidate in adjusted {
            others[candidate.token.index()] = f32::NEG_INFINITY;
        }
        others
    };
    maxima.resize(scan::num_blocks(logits.len()), 0.0);
    is_sound &= scan::block_maxima(isa, logits, maxima);
    if !is_sound {
        return Err(ChoiceFault::NotFinite);
    }
    Ok(Row { isa, logits, maxima, adjusted })
}

/// `argmax_v(sharpening * score_v + G_v)`; ties to the lowest id. Starts from the likeliest token,
/// so that most others are dismissed by a bound on their noise without a logarithm.
fn noisy_argmax(tokens: &[Candidate], noise: &NoiseRow, sharpening: f64) -> Option<TokenId> {
    let mut best = Best::default();
    let first = tokens.iter().copied().min_by(likelier_first);
    for candidate in first.into_iter().chain(tokens.iter().copied()) {
        best.consider_noisy(candidate, noise, sharpening);
    }
    best.token()
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
