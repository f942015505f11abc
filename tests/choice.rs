//! Proves the one function that chooses tokens: its order of operations by a table of small rows
//! whose answer is plain to see, and all of it against the naive twin on random rows.

use slipstream_model::choice::{ChoiceContext, ChoiceFault, Chooser, log_probability};
use slipstream_model::ids::TokenId;
use slipstream_model::kernels::Isa;
use slipstream_model::kernels::scan::SCAN_LEN;
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
    let context =
        ChoiceContext { params, history: &history, ahead: &[], prompt_len, sharpening: 1.0 };
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

/// One random row: flat, peaked, sorted, full of ties, of tokens that nothing is left of or of
/// numbers at the ends of their range; now and then with one that is none.
fn random_row(rng: &mut Rng, vocab_size: usize) -> Vec<f32> {
    let spread = *rng.pick(&[0.0, 0.01, 1.0, 5.0, 5.0, 40.0, 1e4, 1e30, 1e-38, 1e-42]);
    let step = *rng.pick(&[0.0, 0.0, 0.5]);
    let holes = *rng.pick(&[0, 0, 0, 3, 1]);
    let odd = *rng.pick(&[0, 0, 0, 0, 40]);
    let mut row = Vec::new();
    for _ in 0..vocab_size {
        let mut logit = (rng.unit() + rng.unit() - 1.0) * spread;
        if step > 0.0 {
            logit = (logit / step).round() * step;
        }
        row.push(match () {
            () if rng.one_in(holes) => -INF,
            () if rng.one_in(odd) => *rng.pick(&[0.0, -0.0, f32::MAX, f32::MIN, 1e-45, -1e-40]),
            () => logit as f32,
        });
    }
    match rng.below(8) {
        0 => row.sort_by(f32::total_cmp),
        1 => row.sort_by(|a, b| b.total_cmp(a)),
        _ => {}
    }
    if holes == 1 {
        // Few tokens in a desert.
        for _ in 0..rng.below(4) {
            let at = rng.below(vocab_size);
            row[at] = spread as f32;
        }
    }
    if rng.one_in(50) {
        let at = *rng.pick(&[0, vocab_size - 1, rng.clone().below(vocab_size)]);
        row[at] = *rng.pick(&[f32::NAN, -f32::NAN, INF]);
    }
    row
}

/// Parameters at and around everything that is special.
fn random_knobs(rng: &mut Rng, vocab_size: usize) -> SamplingParams {
    let mut params = random_params(rng, vocab_size);
    let usual = params.temperature;
    params.temperature =
        *rng.pick(&[usual, usual, usual, 1.0, 0.01, 1e-6, 1e-7, 1e-300, 1e-320, 30.0, 1e6, 1e300]);
    let around = vocab_size as u32;
    params.top_k = *rng.pick(&[params.top_k, 0, 40, 1_000, around - 1, around, around + 1]);
    params.top_p = *rng.pick(&[params.top_p, 0.99, 0.25, 1.0 - 1e-16, 1e-9, 1e-300]);
    params.min_p = *rng.pick(&[params.min_p, 0.0, 0.0, 1.0, 0.5, 1e-5, 1e-30, 1e-300, 1e-310]);
    if rng.one_in(3) {
        for _ in 0..rng.below(40) {
            let token = TokenId(rng.below(vocab_size + 2) as u32);
            let bias =
                *rng.pick(&[0.0, 0.5, -3.0, 7.0, 100.0, -1e9, 1e9, f64::NEG_INFINITY, 1e308]);
            if params.logit_bias.iter().all(|(other, _)| *other != token) {
                params.logit_bias.push((token, bias));
            }
        }
    }
    if rng.one_in(4) {
        let num_ends = rng.below(vocab_size.min(50)) + 1;
        params.end_ids = random_tokens(rng, vocab_size, num_ends);
    }
    params
}

/// Compares the product, with one chooser for all rows, with the naive twin.
fn compare(seeds: std::ops::Range<u64>, vocab_size_max: usize) {
    let mut choosers: Vec<(Isa, Chooser)> =
        Isa::available().into_iter().map(|isa| (isa, Chooser::with_isa(isa))).collect();
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let mut vocab_size = rng.between(1, vocab_size_max);
        if rng.one_in(3) {
            // Around the edges of a block.
            let edge = vocab_size.next_multiple_of(SCAN_LEN);
            vocab_size = rng.between(edge - 1, edge + 1);
        }
        let logits = random_row(&mut rng, vocab_size);
        let history_len = *rng.pick(&[1, 5, 20, 20, 300]);
        let history_len = rng.between(1, history_len);
        // A draft's row may be shorter than the verifier's vocabulary.
        let history = random_tokens(&mut rng, vocab_size + 1, history_len);
        let prompt_len = rng.between(1, history.len());
        let params = random_knobs(&mut rng, vocab_size);
        let sharpening = *rng.pick(&[1.0, 1.0, 0.5, 1.7, 4.0]);
        let row = NaiveRow { logits: &logits, params: &params, history: &history, prompt_len };
        let wanted = naive_choice::choose_sharpened(&row, sharpening);
        let (history, ahead) = history.split_at(rng.between(prompt_len, history.len()));
        let context = ChoiceContext { params: &params, history, ahead, prompt_len, sharpening };
        for (isa, chooser) in &mut choosers {
            let found = chooser.choose(&logits, &context);
            let name = isa.name();
            assert_eq!(found, wanted, "{name}, seed {seed}, {vocab_size} tokens: {context:?}");
            let token = wanted.unwrap_or(TokenId(0));
            let found = chooser.log_probability(&logits, token);
            let wanted = log_probability(&logits, token);
            let same = found.to_bits() == wanted.to_bits() || (found.is_nan() && wanted.is_nan());
            assert!(same, "{name}, seed {seed}: log-probability {found:e}, not {wanted:e}");
        }
    }
}

#[test]
fn random_rows_agree_with_the_naive_twin() {
    timed("choice, small rows", 5.0, || compare(0..60_000, 60));
    timed("choice, rows of some blocks", 5.0, || compare(100_000..110_000, 700));
    timed("choice, large rows", 10.0, || compare(200_000..200_300, 33_000));
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
