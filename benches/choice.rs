//! Choosing a token from a row of logits: nanoseconds by vocabulary and parameters, and the
//! log-probability of the token. All settings run in turn within each round; medians and the span
//! over rounds are printed. Rows are bell-shaped like those of trained models, a few tokens ahead.
//!
//! `cargo bench -p slipstream-benches --bench choice -- --help`

use std::hint::black_box;
use std::io::Write;
use std::time::Instant;

use clap::Parser;
use slipstream_benches::stats::Spread;
use slipstream_model::choice::{ChoiceContext, Chooser};
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;

#[derive(Parser)]
#[command(about = "Choosing a token from a row of logits")]
struct Args {
    /// Vocabulary sizes
    #[arg(long, value_delimiter = ',', default_values_t = [4096, 32_000])]
    vocab: Vec<usize>,
    /// Rounds; each runs every setting once over every row
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Rows
    #[arg(long, default_value_t = 64)]
    rows: usize,
    /// Tokens before the one to be chosen
    #[arg(long, default_value_t = 1024)]
    history: usize,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// Names and parameters of what is measured.
fn settings() -> Vec<(&'static str, SamplingParams)> {
    let greedy = SamplingParams { seed: 7, ..SamplingParams::greedy() };
    let warm = SamplingParams { temperature: 0.8, ..greedy.clone() };
    let bias = (0..16).map(|id| (TokenId(id * 100), -1.5)).collect();
    vec![
        ("greedy", greedy.clone()),
        ("greedy, penalties", SamplingParams { repetition_penalty: 1.1, ..greedy.clone() }),
        ("greedy, 16 biases", SamplingParams { logit_bias: bias, ..greedy }),
        ("T 0.8", warm.clone()),
        ("T 0.8, top-k 50", SamplingParams { top_k: 50, ..warm.clone() }),
        ("T 0.8, top-p 0.95", SamplingParams { top_p: 0.95, ..warm.clone() }),
        ("T 0.8, min-p 0.05", SamplingParams { min_p: 0.05, ..warm.clone() }),
        ("T 0.8, penalties", SamplingParams { presence_penalty: 0.5, ..warm }),
    ]
}

/// SplitMix64, so that every run sees the same rows.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Rows of bell-shaped logits with a deviation of 2.5, ten tokens of each as far as 22 above it.
fn random_rows(num_rows: usize, vocab_size: usize) -> Vec<Vec<f32>> {
    let mut state = vocab_size as u64;
    let mut unit = || (next(&mut state) >> 40) as f32 / (1u64 << 24) as f32;
    let mut row = || {
        let mut bell = || (0..12).map(|_| unit()).sum::<f32>() - 6.0;
        let mut row: Vec<f32> = (0..vocab_size).map(|_| bell() * 2.5).collect();
        for _ in 0..10 {
            let at = (unit() * vocab_size as f32) as usize % vocab_size;
            row[at] = 22.0 * unit();
        }
        row
    };
    (0..num_rows).map(|_| row()).collect()
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut out = std::io::stdout().lock();
    for &vocab_size in &args.vocab {
        writeln!(out, "\n{vocab_size} tokens, history of {}", args.history)?;
        writeln!(out, "{:<20}{:>12} {:>19}", "setting", "ns", "(min-max)")?;
        for (name, times) in measure(&args, vocab_size)? {
            let spread = Spread::of(&times);
            let span = format!("({:.0}-{:.0})", spread.min, spread.max);
            writeln!(out, "{name:<20}{:>12.0} {span:>19}", spread.median)?;
        }
    }
    Ok(())
}

/// Nanoseconds of every setting, one number per round.
fn measure(args: &Args, vocab_size: usize) -> anyhow::Result<Vec<(&'static str, Vec<f64>)>> {
    let mut chooser = Chooser::new();
    let rows = random_rows(args.rows, vocab_size);
    let ids = (0..args.history as u32).map(|id| id.wrapping_mul(2_654_435_761));
    let history: Vec<TokenId> = ids.map(|id| TokenId(id % vocab_size as u32)).collect();
    let mut table: Vec<_> = settings().into_iter().map(|setting| (setting, Vec::new())).collect();
    let mut logprob_times = Vec::new();
    for _ in 0..args.rounds {
        let per_row = |start: Instant| start.elapsed().as_nanos() as f64 / rows.len() as f64;
        for ((_, params), times) in &mut table {
            let context = ChoiceContext {
                params,
                history: &history,
                ahead: &[],
                prompt_len: args.history / 2,
                sharpening: 1.0,
            };
            let start = Instant::now();
            for row in &rows {
                black_box(chooser.choose(black_box(row), &context)?);
            }
            times.push(per_row(start));
        }
        let start = Instant::now();
        for row in &rows {
            black_box(chooser.log_probability(black_box(row), TokenId(3)));
        }
        logprob_times.push(per_row(start));
    }
    let mut named: Vec<_> = table.into_iter().map(|((name, _), times)| (name, times)).collect();
    named.push(("log-probability", logprob_times));
    Ok(named)
}
