//! Owns top-k, top-p and min-p: the tokens that are left of a row. Touches the likeliest only, as
//! many as it takes; what is kept is what looking at all of them would keep.

use super::row::Row;
use super::{Candidate, likelier_first};
use crate::kernels::scan;
use crate::math;
use crate::sampling::SamplingParams;

/// How many of the likeliest tokens are looked at first when it is not known how many it takes,
/// and how many times as many then.
const FIRST_LEN: usize = 32;
const GROWTH: usize = 4;

/// Relative error of an estimated total that top-p puts up with before it computes the total
/// itself. See [`scan::estimate_exp_sum`].
const ESTIMATE_ERROR: f64 = 1e-9;
/// The estimate is used for scores and temperatures up to these.
const ESTIMATE_SCORE_MAX: f64 = 1e5;
const ESTIMATE_TEMPERATURES: std::ops::Range<f64> = 1e-6..1e6;

/// Finds what is left of rows. Holds only scratch memory.
#[derive(Debug, Default)]
pub(super) struct Truncation {
    /// Tokens still in the running.
    kept: Vec<Candidate>,
    /// Scratch for selecting block maxima.
    maxima: Vec<f32>,
}

impl Truncation {
    /// The tokens that truncation keeps, in no particular order; `None` when the parameters
    /// truncate nothing. `max` is the row's largest score.
    pub(super) fn survivors(
        &mut self,
        row: &Row<'_>,
        params: &SamplingParams,
        max: f64,
    ) -> Option<&[Candidate]> {
        let top_k = params.top_k as usize;
        let temperature = params.temperature;
        self.kept.clear();
        // Room for whatever the rows to come keep, so that a step does not allocate.
        self.kept.reserve(row.logits.len());
        if top_k > 0 && top_k < row.logits.len() {
            self.collect_top_k(row, top_k, temperature);
            if params.top_p < 1.0 {
                self.keep_top_p(params.top_p, max);
            }
        } else if params.top_p < 1.0 {
            self.collect_top_p(row, params, max);
        } else if params.min_p > 0.0 {
            self.collect_min_p(row, params, max);
        } else {
            return None;
        }
        if params.min_p > 0.0 {
            let threshold = min_p_threshold(params.min_p, max);
            self.kept.retain(|candidate| candidate.score >= threshold);
        }
        Some(&self.kept)
    }

    /// The `top_k` likeliest.
    fn collect_top_k(&mut self, row: &Row<'_>, top_k: usize, temperature: f64) {
        let floor = row.floor_below(top_k, temperature, &mut self.maxima);
        self.kept.extend(row.scores_between(temperature, floor, f32::INFINITY));
        self.kept.extend(row.adjusted_scores(temperature));
        if top_k < self.kept.len() {
            self.kept.select_nth_unstable_by(top_k - 1, likelier_first);
            self.kept.truncate(top_k);
        }
    }

    /// Nucleus sampling (Holtzman et al., arXiv 1904.09751) within what is kept: the likeliest
    /// tokens are taken until their share of the total reaches `top_p`.
    fn keep_top_p(&mut self, top_p: f64, max: f64) {
        let goal = top_p * total(&mut self.kept, max);
        let mut walk = Walk { len: 0, reached: 0.0, max };
        if walk.reaches(goal, &mut self.kept) {
            self.kept.truncate(walk.len);
        }
    }

    /// Top-p over a whole row. An estimate of the total nearly always decides what the total
    /// itself would decide; else that is computed.
    fn collect_top_p(&mut self, row: &Row<'_>, params: &SamplingParams, max: f64) {
        let estimate = estimated_total(row, params.temperature, max);
        let is_decided = estimate.is_some_and(|total| {
            let (low, high) = (total * (1.0 - ESTIMATE_ERROR), total * (1.0 + ESTIMATE_ERROR));
            let goal = Goal { low: params.top_p * low, high: params.top_p * high, max };
            self.collect_to(row, params.temperature, goal)
        });
        if !is_decided {
            self.kept.clear();
            self.kept.extend(row.scores_between(params.temperature, f32::NEG_INFINITY, f32::MAX));
            self.kept.extend(row.adjusted_scores(params.temperature));
            self.keep_top_p(params.top_p, max);
        }
    }

    /// Collects the likeliest tokens until their sum reaches a goal that lies between `low` and
    /// `high`. Returns false when it would take the goal itself to know where that is.
    fn collect_to(&mut self, row: &Row<'_>, temperature: f64, goal: Goal) -> bool {
        let mut walk = Walk { len: 0, reached: 0.0, max: goal.max };
        let (mut top, mut top_score) = (f32::INFINITY, f64::INFINITY);
        let mut wanted = FIRST_LEN;
        loop {
            // What is collected now has larger scores than the floor and all that is left; what
            // was collected before has larger ones than the top.
            let floor = row.floor_below(wanted, temperature, &mut self.maxima);
            let floor_score = f64::from(floor) / temperature;
            self.kept.extend(row.scores_between(temperature, floor, top));
            let is_here = |score: f64| score > floor_score && score <= top_score;
            let adjusted = row.adjusted_scores(temperature);
            self.kept.extend(adjusted.filter(|candidate| is_here(candidate.score)));
            if walk.reaches(goal.low, &mut self.kept) {
                self.kept.truncate(walk.len);
                return walk.reached >= goal.high;
            }
            if floor == f32::NEG_INFINITY {
                return false; // by rounding, all together do not reach it
            }
            (top, top_score) = (floor, floor_score);
            wanted *= GROWTH;
        }
    }

    /// The tokens at least `min_p` as likely as the likeliest, and perhaps a few more.
    fn collect_min_p(&mut self, row: &Row<'_>, params: &SamplingParams, max: f64) {
        let temperature = params.temperature;
        let threshold = min_p_threshold(params.min_p, max);
        let near = (threshold * temperature) as f32;
        let floor = row.floor_under(threshold, near, temperature);
        self.kept.extend(row.scores_between(temperature, floor, f32::MAX));
        self.kept.extend(row.adjusted_scores(temperature));
    }
}

/// Where a sum of `exp(score - max)` has to get.
struct Goal {
    low: f64,
    high: f64,
    max: f64,
}

/// A walk over tokens from the likeliest down.
struct Walk {
    /// Tokens passed: they stand in order.
    len: usize,
    /// Their sum of `exp(score - max)`, in this order.
    reached: f64,
    max: f64,
}

impl Walk {
    /// Goes on over `tokens` until the sum reaches `goal`, and returns whether it does. Sorts only
    /// as many as that takes.
    fn reaches(&mut self, goal: f64, tokens: &mut [Candidate]) -> bool {
        while self.len < tokens.len() {
            let rest = &mut tokens[self.len..];
            let chunk_len = self.len.max(FIRST_LEN).min(rest.len());
            if chunk_len < rest.len() {
                rest.select_nth_unstable_by(chunk_len - 1, likelier_first);
            }
            rest[..chunk_len].sort_unstable_by(likelier_first);
            for candidate in &rest[..chunk_len] {
                self.reached += math::exp(candidate.score - self.max);
                self.len += 1;
                if self.reached >= goal {
                    return true;
                }
            }
        }
        false
    }
}

fn min_p_threshold(min_p: f64, max: f64) -> f64 {
    max + math::ln(min_p)
}

/// The sum of `exp(score - max)`. Its order, by id, is part of the definition.
fn total(tokens: &mut [Candidate], max: f64) -> f64 {
    tokens.sort_unstable_by_key(|candidate| candidate.token);
    tokens.iter().map(|candidate| math::exp(candidate.score - max)).sum()
}

/// [`total`] of a whole row, within [`ESTIMATE_ERROR`]; `None` where that is not certain.
fn estimated_total(row: &Row<'_>, temperature: f64, max: f64) -> Option<f64> {
    if max.abs() > ESTIMATE_SCORE_MAX || !ESTIMATE_TEMPERATURES.contains(&temperature) {
        return None;
    }
    let adjusted = row.adjusted_scores(temperature).map(|other| math::exp(other.score - max));
    let rest = scan::estimate_exp_sum(row.isa, row.logits, 1.0 / temperature, max);
    Some(rest + adjusted.sum::<f64>())
}
