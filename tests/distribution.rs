//! Proves the law: sampled output with speculation follows the verifier's distribution exactly.
//! All sequences over a tiny vocabulary are enumerated with their probabilities and compared with
//! what the engine really produces, at a false-alarm rate of one in a million and with the power to
//! see a bias of one point computed. The same test must fail for the classic mistake, acceptance by
//! the p/q ratio on shared noise: a test of the test.

use std::sync::Arc;

use slipstream_draft::model_proposer::{ModelProposer, ModelProposerOptions};
use slipstream_draft::proposer::Proposer;
use slipstream_model::choice::{ChoiceContext, Chooser};
use slipstream_model::forward::ForwardLimits;
use slipstream_model::ids::{DraftEpoch, TokenId};
use slipstream_model::noise::{NoiseBits, NoiseRow};
use slipstream_model::sampling::SamplingParams;
use slipstream_model::token_bytes::TokenBytes;
use slipstream_server::engine::request::Speculation;
use slipstream_server::engine::{Engine, EngineConfig, EngineParts};
use slipstream_tests::drive::{Outcome, drive};
use slipstream_tests::naive_choice::{self, NaiveRow};
use slipstream_tests::proposers::VirtualClock;
use slipstream_tests::random::mix;
use slipstream_tests::requests::plain_request;
use slipstream_tests::stats::{
    chi_square_limit, chi_square_power, non_centrality, pearson, poisson_at_most,
};
use slipstream_tests::table_lm::{Law, TableLm, logits_of, probabilities_of};
use slipstream_tests::timing::{report, timed};

/// How often a sound implementation may fail one of these tests.
const FALSE_ALARM: f64 = 1e-6;
/// Tokens of the tiny vocabulary.
const VOCAB_SIZE: usize = 3;
/// Tokens of every enumerated sequence.
const LEN: usize = 4;
/// Sequences sampled per test of the full law.
const NUM_SAMPLES: u64 = 320_000;

/// The target: it depends on the last two tokens, so that a misplaced history shows.
fn target(history: &[TokenId]) -> Vec<f64> {
    let rows = [[0.10, 0.60, 0.30], [0.45, 0.05, 0.50], [0.25, 0.35, 0.40]];
    let last = history.last().map_or(0, |token| token.index());
    let before = history.len().checked_sub(2).map_or(0, |index| history[index].index());
    let mut row = rows[last];
    row.rotate_left(before);
    row.to_vec()
}

/// Drafts from near to far: a blurred target, a flat one, one that hardly knows but one token.
fn drafts() -> Vec<(&'static str, Law)> {
    let blurred = |history: &[TokenId]| target(history).iter().map(|p| 0.7 * p + 0.1).collect();
    let flat = |_: &[TokenId]| vec![1.0 / 3.0; 3];
    let stubborn = |_: &[TokenId]| vec![0.8, 0.1, 0.1];
    vec![("blurred", Arc::new(blurred)), ("flat", Arc::new(flat)), ("stubborn", Arc::new(stubborn))]
}

/// What is sampled.
#[derive(Clone)]
struct Experiment {
    vocab_size: usize,
    law: Law,
    draft: Option<Law>,
    params: SamplingParams,
    draft_len: usize,
    max_tokens: usize,
    sharpening: f64,
}

impl Experiment {
    fn limits(&self) -> ForwardLimits {
        ForwardLimits { vocab_size: self.vocab_size, context_len: 16, num_blocks: 64 }
    }

    fn engine(&self) -> Engine {
        let options =
            ModelProposerOptions { sharpening: self.sharpening, ..ModelProposerOptions::default() };
        let proposer = self.draft.as_ref().map(|law| {
            let forward = Box::new(TableLm::new(self.limits(), Arc::clone(law)));
            Box::new(ModelProposer::new(forward, DraftEpoch(1), options)) as Box<dyn Proposer>
        });
        Engine::new(EngineParts {
            config: EngineConfig::default(),
            verifier: Box::new(TableLm::new(self.limits(), Arc::clone(&self.law))),
            proposer,
            token_bytes: Arc::new(TokenBytes::new(vec!["a"; self.vocab_size])),
            clock: Arc::new(VirtualClock::default()),
            cache_key: [7; 32],
        })
    }

    /// Runs 64 seeds through one engine, from `first` on.
    fn run(&self, first: u64) -> Outcome {
        let mut requests = Vec::new();
        for seed in first..first + 64 {
            let mut request = plain_request(vec![TokenId(0)], self.max_tokens);
            request.params = SamplingParams { seed, ..self.params.clone() };
            request.speculation = Speculation::Fixed(self.draft_len);
            requests.push(request);
        }
        drive(&mut self.engine(), &requests, 0)
    }

    /// Counts of all outputs over `num_samples` seeds from `first_seed` on, on two threads. A
    /// cell's number is the output read as digits.
    fn count(&self, first_seed: u64, num_samples: u64) -> Vec<u64> {
        let num_cells = self.vocab_size.pow(u32::try_from(self.max_tokens).unwrap());
        let count_half = |half: u64| {
            let mut counts = vec![0; num_cells];
            for batch in (half..num_samples.div_ceil(64)).step_by(2) {
                for collected in self.run(first_seed + batch * 64).collected {
                    counts[self.cell(&collected.ids())] += 1;
                }
            }
            counts
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| count_half(1));
            let mut counts: Vec<u64> = count_half(0);
            let other = other.join().expect("the other half failed");
            counts.iter_mut().zip(other).for_each(|(count, more)| *count += more);
            counts
        })
    }

    fn cell(&self, tokens: &[TokenId]) -> usize {
        assert_eq!(tokens.len(), self.max_tokens, "nothing ends these outputs early");
        tokens.iter().fold(0, |cell, token| cell * self.vocab_size + token.index())
    }

    /// The exact probability of every output: a product of conditional laws, each from the logits
    /// as they really are after rounding.
    fn probabilities(&self) -> Vec<f64> {
        let num_cells = self.vocab_size.pow(u32::try_from(self.max_tokens).unwrap());
        let mut all = Vec::with_capacity(num_cells);
        for cell in 0..num_cells {
            let mut history = vec![TokenId(0)];
            let mut probability = 1.0;
            for place in (0..self.max_tokens).rev() {
                let digit = cell / self.vocab_size.pow(place as u32) % self.vocab_size;
                let logits = logits_of(&(self.law)(&history));
                let params = &self.params;
                let row = NaiveRow { logits: &logits, params, history: &history, prompt_len: 1 };
                probability *= naive_choice::law(&row).unwrap()[digit];
                history.push(TokenId(digit as u32));
            }
            all.push(probability);
        }
        all
    }
}

fn warm() -> SamplingParams {
    SamplingParams { temperature: 1.0, ..SamplingParams::greedy() }
}

/// The full law over sequences of four tokens.
fn full_law(draft: Option<Law>) -> Experiment {
    Experiment {
        vocab_size: VOCAB_SIZE,
        law: Arc::new(target),
        draft,
        params: warm(),
        draft_len: 3,
        max_tokens: LEN,
        sharpening: 1.0,
    }
}

/// Fails unless `counts` follow `probabilities`.
fn assert_follows(what: &str, counts: &[u64], probabilities: &[f64]) {
    let (statistic, degrees) = pearson(counts, probabilities);
    let limit = chi_square_limit(degrees, FALSE_ALARM);
    report(&format!("  law: {what}: chi-square {statistic:.1}, limit {limit:.1}"));
    assert!(statistic < limit, "{what}: chi-square {statistic}, limit {limit}");
}

/// The probabilities of all sequences when the first token is biased: one point of it taken from
/// `from` and given to `to`, everything after it as it should be.
fn biased(probabilities: &[f64], from: usize, to: usize) -> Vec<f64> {
    let per_token = probabilities.len() / VOCAB_SIZE;
    let first = |token: usize| -> f64 {
        probabilities[token * per_token..(token + 1) * per_token].iter().sum()
    };
    let scale = |cell: usize| match cell / per_token {
        token if token == from => 1.0 - 0.01 / first(from),
        token if token == to => 1.0 + 0.01 / first(to),
        _ => 1.0,
    };
    probabilities.iter().enumerate().map(|(cell, p)| p * scale(cell)).collect()
}

#[test]
fn the_test_has_the_power_to_see_one_point() {
    let experiment = full_law(None);
    let probabilities = experiment.probabilities();
    assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    let degrees = (probabilities.len() - 1) as f64;
    let limit = chi_square_limit(degrees, FALSE_ALARM);
    // The weakest of all possible one-point biases of the first token decides.
    let mut weakest: f64 = 1.0;
    for from in 0..VOCAB_SIZE {
        for to in (0..VOCAB_SIZE).filter(|to| *to != from) {
            let lambda = NUM_SAMPLES as f64
                * non_centrality(&probabilities, &biased(&probabilities, from, to));
            weakest = weakest.min(chi_square_power(degrees, lambda, limit));
        }
    }
    report(&format!(
        "  law: {NUM_SAMPLES} samples, {degrees} degrees: power at a one-point bias {weakest:.5}"
    ));
    assert!(weakest > 0.99, "power {weakest}");
}

#[test]
fn speculative_output_follows_the_law() {
    timed("law, full enumeration", 20.0, || {
        let probabilities = full_law(None).probabilities();
        let drafts = drafts();
        for ((name, draft), first_seed) in drafts[1..].iter().zip([0, NUM_SAMPLES]) {
            let counts = full_law(Some(Arc::clone(draft))).count(first_seed, NUM_SAMPLES);
            assert_follows(name, &counts, &probabilities);
        }
        // Equal seeds give equal output, so other drafts could only repeat these verdicts.
        let plain = full_law(None).count(0, 20_000);
        for (name, draft) in drafts {
            assert_eq!(full_law(Some(draft)).count(0, 20_000), plain, "{name} draft");
        }
    });
}

/// One token by Gumbel-max from weights that need not sum to 1.
fn gumbel_max(weights: &[f64], row: NoiseRow) -> usize {
    let score = |token: usize| weights[token].ln() + row.gumbel(TokenId(token as u32));
    (0..weights.len()).max_by(|a, b| score(*a).total_cmp(&score(*b))).unwrap()
}

/// The classic mistake: the draft proposes with the shared noise, the verifier accepts by the p/q
/// ratio with a coin of its own and resamples from the residual, again with the shared noise.
fn ratio_on_shared_noise(seed: u64, draft: &Law) -> usize {
    let mut history = vec![TokenId(0)];
    let mut cell = 0;
    for position in 1..=LEN {
        let row = NoiseRow::new(seed, 0, position);
        let (p, q) = (target(&history), draft(&history));
        let proposed = gumbel_max(&q, row);
        let coin = (mix(seed ^ mix(position as u64)) >> 11) as f64 / (1u64 << 53) as f64;
        let token = if coin < p[proposed] / q[proposed] {
            proposed
        } else {
            let residual: Vec<f64> = p.iter().zip(&q).map(|(p, q)| (p - q).max(0.0)).collect();
            gumbel_max(&residual, row)
        };
        cell = cell * VOCAB_SIZE + token;
        history.push(TokenId(token as u32));
    }
    cell
}

#[test]
fn the_ratio_rule_on_shared_noise_fails_the_same_test() {
    timed("law, test of the test", 10.0, || {
        let probabilities = full_law(None).probabilities();
        // The blurred draft is so near that the mistake moves only a tenth of a point with it.
        for (name, draft) in drafts().split_off(1) {
            let mut counts = vec![0; probabilities.len()];
            for seed in 0..NUM_SAMPLES {
                counts[ratio_on_shared_noise(seed, &draft)] += 1;
            }
            let (statistic, degrees) = pearson(&counts, &probabilities);
            let limit = chi_square_limit(degrees, FALSE_ALARM);
            let first: Vec<f64> = counts
                .chunks(counts.len() / VOCAB_SIZE)
                .map(|cells| cells.iter().sum::<u64>() as f64 / NUM_SAMPLES as f64)
                .collect();
            report(&format!(
                "  law: ratio rule, {name} draft: first token {first:.3?} instead of \
                 [0.100, 0.600, 0.300], chi-square {statistic:.0}, limit {limit:.1}"
            ));
            assert!(statistic > limit, "the test is blind to the ratio rule with a {name} draft");
        }
    });
}

#[test]
fn truncated_laws_are_followed() {
    let wide: Law = Arc::new(|history: &[TokenId]| {
        let mut row = vec![0.30, 0.02, 0.25, 0.05, 0.20, 0.18];
        row.rotate_left(history.last().map_or(0, |token| token.index()));
        row
    });
    let draft: Law = Arc::new(|history: &[TokenId]| {
        let mut row = vec![0.25, 0.10, 0.20, 0.10, 0.20, 0.15];
        row.rotate_left(history.last().map_or(0, |token| token.index()));
        row
    });
    timed("law, truncated", 10.0, || {
        for (name, params) in [
            ("temperature 0.7", SamplingParams { temperature: 0.7, ..warm() }),
            ("top-k", SamplingParams { top_k: 4, ..warm() }),
            ("top-p", SamplingParams { top_p: 0.5, ..warm() }),
            ("min-p", SamplingParams { min_p: 0.61, ..warm() }),
            (
                "all at once",
                SamplingParams { temperature: 1.3, top_k: 5, top_p: 0.9, min_p: 0.3, ..warm() },
            ),
            ("presence penalty", SamplingParams { presence_penalty: 0.8, ..warm() }),
        ] {
            let experiment = Experiment {
                vocab_size: 6,
                law: Arc::clone(&wide),
                draft: Some(Arc::clone(&draft)),
                params,
                draft_len: 2,
                max_tokens: 3,
                sharpening: 1.0,
            };
            let counts = experiment.count(0, 100_000);
            assert_follows(name, &counts, &experiment.probabilities());
        }
    });
}

/// `alpha_G = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)`: how often two distributions choose the
/// same token under shared noise (Daliri, Musco, Suresh, arXiv 2408.07978).
fn coupled_acceptance(p: &[f64], q: &[f64]) -> f64 {
    let share = |i: usize| {
        let ratios = p.iter().zip(q).map(|(pj, qj)| (pj / p[i]).max(qj / q[i]));
        1.0 / ratios.sum::<f64>()
    };
    (0..p.len()).map(share).sum()
}

#[test]
fn measured_acceptance_is_the_closed_form() {
    let p = [0.35, 0.05, 0.20, 0.10, 0.30];
    let near = [0.30, 0.10, 0.22, 0.08, 0.30];
    let far = [0.05, 0.40, 0.10, 0.25, 0.20];
    timed("law, acceptance", 10.0, || {
        for (q, sharpening) in [(near, 1.0), (far, 1.0), (near, 2.0), (far, 0.5)] {
            let experiment = Experiment {
                vocab_size: 5,
                law: Arc::new(move |_: &[TokenId]| p.to_vec()),
                draft: Some(Arc::new(move |_: &[TokenId]| q.to_vec())),
                params: warm(),
                draft_len: 3,
                max_tokens: 9,
                sharpening,
            };
            // A sharpened draft is a draft whose logarithms are multiplied.
            let sharp: Vec<f64> =
                logits_of(&q).iter().map(|l| f64::from(*l) * sharpening).collect();
            let sharp: Vec<f32> = sharp.iter().map(|&logit| logit as f32).collect();
            let alpha = coupled_acceptance(
                &probabilities_of(&logits_of(&p), 1.0),
                &probabilities_of(&sharp, 1.0),
            );
            let (mut proposed, mut accepted) = (0, 0);
            for batch in 0..400 {
                for collected in experiment.run(batch * 64).collected {
                    let usage = collected.finished.unwrap().speculation;
                    // Only the first position: the others are judged after acceptance only.
                    proposed += usage.proposed_by_position[0];
                    accepted += usage.accepted_by_position[0];
                }
            }
            assert_close("acceptance", alpha, accepted, proposed);
            report(&format!(
                "  law: acceptance {:.4}, closed form {alpha:.4}",
                accepted as f64 / proposed as f64
            ));
        }
    });
}

/// Fails when a frequency is more than five standard errors from its probability.
fn assert_close(what: &str, probability: f64, hits: usize, trials: usize) {
    let frequency = hits as f64 / trials as f64;
    let error = (probability * (1.0 - probability) / trials as f64).sqrt();
    assert!(
        (frequency - probability).abs() < 5.0 * error,
        "{what}: {hits} of {trials} is {frequency}, expected {probability} +- {error}"
    );
}

#[test]
fn the_far_tail_is_hit_as_often_as_it_should() {
    // 2^18 equal tokens share 0.75 % of the mass: each is so rare that noise of 24 bits could
    // hardly ever lift it above the one likely token.
    const NUM_LOW: usize = 1 << 18;
    const TAIL: f64 = 0.0075;
    const NUM_ROWS: u64 = 2_000;
    timed("law, tail", 12.0, || {
        let mut logits = vec![(TAIL / NUM_LOW as f64).ln() as f32; NUM_LOW];
        logits.push((1.0 - TAIL).ln() as f32);
        let low: f64 = f64::from(logits[0]).exp() * NUM_LOW as f64;
        let mean = NUM_ROWS as f64 * low / (low + f64::from(logits[NUM_LOW]).exp());
        let hits_of = |half: u64| {
            let mut chooser = Chooser::new();
            let mut hits = 0;
            for seed in (half..NUM_ROWS).step_by(2) {
                let params = SamplingParams { seed, ..warm() };
                let history = [TokenId(0)];
                let context = ChoiceContext {
                    params: &params,
                    history: &history,
                    ahead: &[],
                    prompt_len: 1,
                    sharpening: 1.0,
                };
                hits += u64::from(chooser.choose(&logits, &context).unwrap().index() < NUM_LOW);
            }
            hits
        };
        let hits = std::thread::scope(|scope| {
            let other = scope.spawn(|| hits_of(1));
            hits_of(0) + other.join().expect("the other half failed")
        });
        report(&format!("  law: {hits} tail hits, {mean:.1} expected"));
        assert!(poisson_at_most(mean, hits) > FALSE_ALARM, "{hits} hits are too few for {mean}");
        let at_least = 1.0 - poisson_at_most(mean, hits - 1);
        assert!(at_least > FALSE_ALARM, "{hits} hits are too many for {mean}");
    });
    // The mistake this guards against: the largest number that 24 bits can give is below what the
    // tail needs to win even on a middling day of its rival.
    let coarse_max = NoiseBits::from_raw(((1 << 24) - 1) << 29 | 1 << 28).gumbel();
    let needed = ((1.0 - TAIL) * NUM_LOW as f64 / TAIL).ln();
    assert!(coarse_max < needed, "24 bits reach {coarse_max}, the tail needs {needed}");
}
