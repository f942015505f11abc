//! Proves the one function that chooses tokens: its order of operations by a table of small rows
//! whose answer is plain to see, and all of it against the naive twin on random rows.

use slipstream_model::choice::{ChoiceContext, ChoiceFault, Chooser, log_probability};
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;
use slipstream_tests::naive_choice::{self, NaiveRow};
use slipstream_tests::random::Rng;
use slipstream_tests::requests::{random_params, random_tokens};
use slipstream_tests::timing::timed;

const INF: f32 = f32::INFINITY;

fn ids(list: &[u32]) -> Vec<TokenId> {
    list.iter().copied().map(TokenId).collect()
}

/// The one place that touches the API.
fn choose(
    logits: &[f32],
    params: &SamplingParams,
    history: &[u32],
    prompt_len: usize,
) -> Result<u32, ChoiceFault> {
    let history = ids(history);
    let context = ChoiceContext { params, history: &history, prompt_len, sharpening: 1.0 };
    Chooser::new().choose(logits, &context).map(|token| token.0)
}

/// Which tokens a sampled choice can come out as: tries many seeds.
fn reachable(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut hit = vec![false; logits.len()];
    for seed in 0..4_000 {
        let params = SamplingParams { seed, ..params.clone() };
        hit[choose(logits, &params, &[0], 1).unwrap() as usize] = true;
    }
    (0..logits.len()).filter(|&token| hit[token]).map(|token| token as u32).collect()
}

fn greedy() -> SamplingParams {
    SamplingParams::greedy()
}

fn warm() -> SamplingParams {
    SamplingParams { temperature: 1.0, ..greedy() }
}

#[test]
fn greedy_takes_the_largest_and_ties_go_to_the_lowest_id() {
    for (logits, wanted) in [
        (&[1.0, 3.0, 2.0][..], Ok(1)),
        (&[2.0, 5.0, 5.0, 5.0], Ok(1)),
        (&[0.0, -0.0], Ok(0)),
        (&[-0.0, 0.0], Ok(0)),
        (&[-INF, -7.0, -INF], Ok(1)),
        (&[f32::MIN, f32::MIN], Ok(0)),
        (&[f32::MAX, 0.0], Ok(0)),
        (&[-INF, -INF], Err(ChoiceFault::AllMasked)),
        (&[0.0, f32::NAN], Err(ChoiceFault::NotFinite)),
        (&[-INF, f32::NAN], Err(ChoiceFault::NotFinite)),
        (&[0.0, INF], Err(ChoiceFault::NotFinite)),
    ] {
        assert_eq!(choose(logits, &greedy(), &[0], 1), wanted, "greedy over {logits:?}");
        if wanted.is_err() {
            assert_eq!(choose(logits, &warm(), &[0], 1), wanted, "sampled from {logits:?}");
        }
    }
    // Penalties see the tie before the rule does.
    let params = SamplingParams { presence_penalty: 0.5, ..greedy() };
    assert_eq!(choose(&[5.0, 5.0], &params, &[1, 0], 1), Ok(1));
}

#[test]
fn penalties_touch_what_they_should() {
    let repetition = SamplingParams { repetition_penalty: 2.0, ..greedy() };
    let presence = SamplingParams { presence_penalty: 1.0, ..greedy() };
    let frequency = SamplingParams { frequency_penalty: 1.0, ..greedy() };
    let reward = SamplingParams { repetition_penalty: 0.5, ..greedy() };
    // Prompt length 2: tokens 0 and 1 are prompt; the rest is output.
    for (what, params, logits, history, wanted) in [
        ("repetition sees the prompt", &repetition, &[4.0, 1.0, 3.0][..], &[0, 1][..], 2),
        ("repetition sees the output", &repetition, &[4.0, 1.0, 3.0], &[1, 1, 0], 2),
        ("once, however often", &repetition, &[4.0, 1.0, 1.9], &[0, 0, 0, 0, 0], 0),
        ("negative logits are multiplied", &repetition, &[-1.0, -3.0, -1.5], &[0, 1], 2),
        ("zero stays zero", &repetition, &[0.0, -9.0, -0.5], &[0, 0], 0),
        ("below 1 rewards", &reward, &[2.0, -9.0, 3.0], &[0, 1], 0),
        ("presence does not see the prompt", &presence, &[4.0, 0.0, 3.5], &[0, 1], 0),
        ("presence sees the output", &presence, &[4.0, 0.0, 3.5], &[1, 1, 0], 2),
        ("presence counts once", &presence, &[4.0, 0.0, 2.5], &[1, 1, 0, 0, 0], 0),
        ("frequency does not see the prompt", &frequency, &[4.0, 0.0, 3.5], &[0, 0], 0),
        ("frequency counts each", &frequency, &[4.0, 0.0, 2.5], &[1, 1, 0, 0], 2),
        ("frequency of two", &frequency, &[4.0, 0.0, 1.5], &[1, 1, 0, 0], 0),
        ("in the prompt and the output", &frequency, &[4.0, 0.0, 2.5], &[0, 1, 0], 0),
    ] {
        assert_eq!(choose(logits, params, history, 2), Ok(wanted), "{what}");
    }
    // Repetition first, then the subtractions: 4 / 2 - 1.5 = 0.5, not (4 - 1.5) / 2 = 1.25; and
    // -1 * 2 - 1.5 = -3.5, not (-1 - 1.5) * 2 = -5.
    let both = SamplingParams { presence_penalty: 1.5, ..repetition };
    assert_eq!(choose(&[4.0, -9.0, 1.0], &both, &[1, 0], 1), Ok(2));
    assert_eq!(choose(&[-1.0, -9.0, -4.0], &both, &[1, 0], 1), Ok(0));
}

#[test]
fn bias_comes_after_penalties_and_masks_after_bias() {
    let bias = vec![(TokenId(0), 2.0), (TokenId(7), 100.0)];
    let params = SamplingParams { logit_bias: bias, repetition_penalty: 2.0, ..greedy() };
    // 1 / 2 + 2 = 2.5, not (1 + 2) / 2 = 1.5; an id beyond the vocabulary is nobody's bias.
    assert_eq!(choose(&[1.0, 2.0], &params, &[0], 1), Ok(0));
    let mut masked = SamplingParams {
        logit_bias: vec![(TokenId(0), 1e9)],
        min_tokens: 2,
        end_ids: ids(&[0, 9]),
        ..greedy()
    };
    for (history, wanted) in [(&[1][..], 1), (&[1, 1], 1), (&[1, 1, 1], 0)] {
        assert_eq!(choose(&[1.0, 2.0], &masked, history, 1), Ok(wanted), "{history:?}");
    }
    // Without end ids (`ignore_eos`) nothing is masked.
    masked.end_ids.clear();
    assert_eq!(choose(&[1.0, 2.0], &masked, &[1], 1), Ok(0));
    // Everything masked is a fault, greedy or sampled.
    masked.end_ids = ids(&[0, 1]);
    assert_eq!(choose(&[1.0, 2.0], &masked, &[1], 1), Err(ChoiceFault::AllMasked));
    masked.temperature = 1.0;
    assert_eq!(choose(&[1.0, 2.0], &masked, &[1], 1), Err(ChoiceFault::AllMasked));
    let sunk = SamplingParams { logit_bias: vec![(TokenId(0), f64::NEG_INFINITY)], ..warm() };
    assert_eq!(choose(&[5.0, -50.0], &sunk, &[1], 1), Ok(1));
}

#[test]
fn truncations_keep_what_they_should_in_their_order() {
    let rows = |weights: &[f64]| -> Vec<f32> { weights.iter().map(|w| w.ln() as f32).collect() };
    let logits = rows(&[0.1, 0.4, 0.2, 0.3]);
    let even = rows(&[0.25, 0.25, 0.25, 0.25]);
    for (what, params, logits, wanted) in [
        ("everything", warm(), &logits, &[0, 1, 2, 3][..]),
        ("top-k", SamplingParams { top_k: 2, ..warm() }, &logits, &[1, 3]),
        ("top-k of one is greedy", SamplingParams { top_k: 1, ..warm() }, &logits, &[1]),
        ("top-k above all", SamplingParams { top_k: 9, ..warm() }, &logits, &[0, 1, 2, 3]),
        ("top-k ties keep low ids", SamplingParams { top_k: 3, ..warm() }, &even, &[0, 1, 2]),
        ("top-p", SamplingParams { top_p: 0.65, ..warm() }, &logits, &[1, 3]),
        (
            "top-p takes the one that reaches",
            SamplingParams { top_p: 0.75, ..warm() },
            &logits,
            &[1, 2, 3],
        ),
        ("top-p keeps one at least", SamplingParams { top_p: 1e-9, ..warm() }, &logits, &[1]),
        ("top-p ties keep low ids", SamplingParams { top_p: 0.4, ..warm() }, &even, &[0, 1]),
        ("min-p", SamplingParams { min_p: 0.6, ..warm() }, &logits, &[1, 3]),
        ("min-p of one keeps the mode", SamplingParams { min_p: 1.0, ..warm() }, &logits, &[1]),
        (
            "min-p of one keeps all modes",
            SamplingParams { min_p: 1.0, ..warm() },
            &even,
            &[0, 1, 2, 3],
        ),
        // Within the top two, 0.4 is 57 % of the mass: top-p 0.55 is content with it. Over all four
        // it is 40 %, and a second one would be kept.
        ("top-k before top-p", SamplingParams { top_k: 2, top_p: 0.55, ..warm() }, &logits, &[1]),
        // Halving the temperature squares the weights: 16, 9, 4, 1 of 30; half is reached by one.
        (
            "temperature before top-p",
            SamplingParams { temperature: 0.5, top_p: 0.5, ..warm() },
            &logits,
            &[1],
        ),
        // Squared, 0.3 against 0.4 is 0.5625 of the mode: below 0.6 now.
        (
            "temperature before min-p",
            SamplingParams { temperature: 0.5, min_p: 0.6, ..warm() },
            &logits,
            &[1],
        ),
    ] {
        assert_eq!(reachable(logits, &params), wanted, "{what}");
    }
}

#[test]
fn extreme_temperatures_are_defined() {
    let logits = [1.0, 3.0, 2.0];
    let cold = SamplingParams { temperature: 1e-6, ..greedy() };
    assert_eq!(reachable(&logits, &cold), [1]);
    // A temperature so small that scores overflow is a fault of the sequence, not a panic.
    let frozen = SamplingParams { temperature: 1e-320, ..greedy() };
    assert_eq!(choose(&logits, &frozen, &[0], 1), Err(ChoiceFault::NotFinite));
    let hot = SamplingParams { temperature: 1e300, ..greedy() };
    assert_eq!(reachable(&logits, &hot), [0, 1, 2]);
}

/// One random row: flat, peaked, full of ties or with masked tokens.
fn random_row(rng: &mut Rng, vocab_size: usize) -> Vec<f32> {
    let spread = *rng.pick(&[0.01, 1.0, 5.0, 40.0]);
    let step = *rng.pick(&[0.0, 0.5]);
    let holes = *rng.pick(&[0, 0, 3]);
    let mut row = Vec::new();
    for _ in 0..vocab_size {
        let mut logit = (rng.unit() + rng.unit() - 1.0) * spread;
        if step > 0.0 {
            logit = (logit / step).round() * step;
        }
        row.push(if rng.one_in(holes) { -INF } else { logit as f32 });
    }
    if rng.one_in(200) {
        let at = rng.below(vocab_size);
        row[at] = *rng.pick(&[f32::NAN, INF]);
    }
    row
}

/// Compares the product, with one chooser for all rows, with the naive twin.
fn compare(num_rows: usize, vocab_size_max: usize) {
    let mut chooser = Chooser::new();
    for seed in 0..num_rows as u64 {
        let mut rng = Rng::new(seed);
        let vocab_size = rng.between(1, vocab_size_max);
        let logits = random_row(&mut rng, vocab_size);
        let history_len = rng.between(1, 20);
        let history = random_tokens(&mut rng, vocab_size, history_len);
        let prompt_len = rng.between(1, history.len());
        let mut params = random_params(&mut rng, vocab_size);
        params.top_k = *rng.pick(&[params.top_k, 40, 1_000]);
        params.top_p = *rng.pick(&[params.top_p, 0.99]);
        let row = NaiveRow { logits: &logits, params: &params, history: &history, prompt_len };
        let context =
            ChoiceContext { params: &params, history: &history, prompt_len, sharpening: 1.0 };
        let found = chooser.choose(&logits, &context);
        assert_eq!(found, naive_choice::choose(&row), "row of seed {seed}: {params:?}");
    }
}

#[test]
fn random_rows_agree_with_the_naive_twin() {
    timed("choice, small rows", 5.0, || compare(60_000, 60));
    timed("choice, large rows", 5.0, || compare(600, 6_000));
}

#[test]
fn log_probabilities_are_of_the_raw_row() {
    let logits = [0.5, -1.0, 3.25, -INF, 2.0];
    let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    for (index, &logit) in logits.iter().enumerate() {
        let found = log_probability(&logits, TokenId(index as u32));
        let wanted = f64::from(logit) - total.ln();
        assert!(found == wanted || (found - wanted).abs() < 1e-14, "{found} is not {wanted}");
    }
    // Large logits do not overflow.
    assert!((log_probability(&[1e30, 1e30], TokenId(1)) + 2.0_f64.ln()).abs() < 1e-12);
}
