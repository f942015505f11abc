//! Owns a row of logits as choosing sees it: the tokens that penalties, bias and masks left alone
//! with the maxima of their blocks, and the few others. Finds what can win without looking at what
//! cannot; knows no truncation.
//!
//! Scores are `f64::from(logit) / temperature`. Division by a positive number keeps the order of
//! its inputs, also when rounded, so a bound on a block's largest logit is one on all its scores.

use super::{Candidate, ChoiceFault, token_at};
use crate::ids::TokenId;
use crate::kernels::Isa;
use crate::kernels::scan::{self, SCAN_LEN};
use crate::noise::{NoiseRow, hash_to_reach};

/// A row without NaN and positive infinity.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    pub(super) isa: Isa,
    /// Logits, `[vocab]`; negative infinity for the adjusted ones.
    pub(super) logits: &'a [f32],
    /// Largest of every [`SCAN_LEN`] of them.
    pub(super) maxima: &'a [f32],
    /// Tokens whose logits are not the model's own, as logits.
    pub(super) adjusted: &'a [Candidate],
}

/// The winner so far: the largest score; the lowest id among equals.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Best {
    found: Option<Candidate>,
}

impl Best {
    pub(super) fn token(self) -> Option<TokenId> {
        self.found.map(|found| found.token)
    }

    pub(super) fn consider(&mut self, candidate: Candidate) {
        let Candidate { token, score } = candidate;
        let is_better = self.found.is_none_or(|found| {
            score > found.score || (score == found.score && token < found.token)
        });
        if is_better {
            self.found = Some(candidate);
        }
    }

    /// Considers a token with its noise, unless a bound on that shows that it loses.
    pub(super) fn consider_noisy(
        &mut self,
        candidate: Candidate,
        noise: &NoiseRow,
        sharpening: f64,
    ) {
        let Candidate { token, score } = candidate;
        let bits = noise.bits(token);
        let base = sharpening * score;
        if self.found.is_some_and(|found| base + bits.gumbel_bound() < found.score) {
            return;
        }
        self.consider(Candidate { token, score: base + bits.gumbel() });
    }
}

impl<'a> Row<'a> {
    /// Largest logit that was not adjusted; negative infinity without one.
    fn largest(&self) -> f32 {
        self.maxima.iter().fold(f32::NEG_INFINITY, |a, &b| if a > b { a } else { b })
    }

    /// The largest logit; the first of equals.
    pub(super) fn greedy(&self) -> Result<TokenId, ChoiceFault> {
        let mut best = Best::default();
        for &adjusted in self.adjusted {
            if adjusted.score > f64::NEG_INFINITY {
                best.consider(adjusted);
            }
        }
        let largest = self.largest();
        if largest > f32::NEG_INFINITY {
            let block = self.maxima.iter().position(|&maximum| maximum == largest);
            let start = block.expect("the largest is one of them") * SCAN_LEN;
            let offset = self.logits[start..].iter().position(|&logit| logit == largest);
            let token = token_at(start + offset.expect("a block holds its maximum"));
            best.consider(Candidate { token, score: f64::from(largest) });
        }
        best.token().ok_or(ChoiceFault::AllMasked)
    }

    /// The largest score at a temperature.
    ///
    /// # Errors
    /// When no token has a score, or one that is NaN or infinite.
    pub(super) fn max_score(&self, temperature: f64) -> Result<f64, ChoiceFault> {
        let mut max = f64::from(self.largest()) / temperature;
        for adjusted in self.adjusted {
            let score = adjusted.score / temperature;
            if score.is_nan() {
                return Err(ChoiceFault::NotFinite);
            }
            max = max.max(score);
        }
        if max == f64::INFINITY {
            return Err(ChoiceFault::NotFinite);
        }
        if max == f64::NEG_INFINITY { Err(ChoiceFault::AllMasked) } else { Ok(max) }
    }

    /// The adjusted tokens that have a score.
    pub(super) fn adjusted_scores(
        &self,
        temperature: f64,
    ) -> impl Iterator<Item = Candidate> + use<'a> {
        let scores = self.adjusted.iter().map(move |adjusted| Candidate {
            token: adjusted.token,
            score: adjusted.score / temperature,
        });
        scores.filter(|candidate| candidate.score > f64::NEG_INFINITY)
    }

    /// The scores of the tokens that were not adjusted, with logits above `floor` and up to `top`.
    pub(super) fn scores_between(
        &self,
        temperature: f64,
        floor: f32,
        top: f32,
    ) -> impl Iterator<Item = Candidate> + use<'a> {
        let blocks = self.maxima.iter().zip(self.logits.chunks(SCAN_LEN)).enumerate();
        let reaching = blocks.filter(move |(_, (maximum, _))| **maximum > floor);
        let inside = reaching.flat_map(move |(block, (_, logits))| {
            let numbered = (block * SCAN_LEN..).zip(logits);
            numbered.filter(move |(_, logit)| **logit > floor && **logit <= top)
        });
        let scores = inside.map(move |(index, &logit)| Candidate {
            token: token_at(index),
            score: f64::from(logit) / temperature,
        });
        scores.filter(|candidate| candidate.score > f64::NEG_INFINITY)
    }

    /// A logit such that at least `wanted` tokens have strictly larger scores than it and all
    /// below it; negative infinity when that is not quickly found. `scratch` is overwritten.
    pub(super) fn floor_below(
        &self,
        wanted: usize,
        temperature: f64,
        scratch: &mut Vec<f32>,
    ) -> f32 {
        if wanted == 0 || wanted > self.maxima.len() {
            return f32::NEG_INFINITY;
        }
        scratch.clear();
        scratch.extend_from_slice(self.maxima);
        let descending = |a: &f32, b: &f32| b.total_cmp(a);
        let (_, &mut reached, _) = scratch.select_nth_unstable_by(wanted - 1, descending);
        self.floor_under(f64::from(reached) / temperature, reached, temperature)
    }

    /// The largest logit found below `near` whose score is below `score`; negative infinity if
    /// none was found.
    pub(super) fn floor_under(&self, score: f64, near: f32, temperature: f64) -> f32 {
        let floors = [near.next_down(), near.next_down().next_down()];
        let is_under = |floor: &f32| f64::from(*floor) / temperature < score;
        floors.into_iter().find(is_under).unwrap_or(f32::NEG_INFINITY)
    }

    /// `argmax_v(sharpening * score_v + G_v)` over all tokens; ties to the lowest id. The block of
    /// the largest logit comes first, so that a comparison of hashes dismisses nearly all others.
    pub(super) fn noisy_argmax(
        &self,
        temperature: f64,
        noise: &NoiseRow,
        sharpening: f64,
    ) -> Option<TokenId> {
        let mut best = Best::default();
        let largest = self.largest();
        let first = self.maxima.iter().position(|&maximum| maximum == largest).unwrap_or(0);
        let contest = Contest { row: self, temperature, noise, sharpening };
        contest.run(first, &mut best);
        for candidate in self.adjusted_scores(temperature) {
            best.consider_noisy(candidate, noise, sharpening);
        }
        for block in (0..self.maxima.len()).filter(|&block| block != first) {
            contest.run(block, &mut best);
        }
        best.token()
    }
}

/// What blocks are looked at with.
struct Contest<'a> {
    row: &'a Row<'a>,
    temperature: f64,
    noise: &'a NoiseRow,
    sharpening: f64,
}

impl Contest<'_> {
    /// Considers the tokens of one block whose noise is large enough.
    fn run(&self, block: usize, best: &mut Best) {
        let Row { isa, logits, maxima, .. } = *self.row;
        let Some(&maximum) = maxima.get(block) else { return };
        if maximum == f32::NEG_INFINITY {
            return;
        }
        let base = self.sharpening * (f64::from(maximum) / self.temperature);
        let limit = best.found.map_or(Some(0), |best| hash_to_reach(best.score, base));
        let Some(limit) = limit else { return };
        let start = block * SCAN_LEN;
        let mut hits = scan::noise_hits(isa, self.noise, token_at(start), limit);
        while hits != 0 {
            let index = start + hits.trailing_zeros() as usize;
            hits &= hits - 1;
            let Some(&logit) = logits.get(index) else { return };
            let score = f64::from(logit) / self.temperature;
            if score > f64::NEG_INFINITY {
                let candidate = Candidate { token: token_at(index), score };
                best.consider_noisy(candidate, self.noise, self.sharpening);
            }
        }
    }
}
