//! What a prompt costs whose beginning was computed before: the time to the first token of the same
//! prompt, cold and then warm, in this process and without a network. Every round takes another
//! prompt; both runs of it must give the same tokens.
//!
//! `cargo bench -p slipstream-benches --bench prefix -- --help`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};
use clap::Parser;
use rand::SeedableRng;
use rand::rngs::StdRng;
use slipstream_benches::arrivals::Corpus;
use slipstream_benches::drive::{Asked, Driver};
use slipstream_benches::stats::Spread;
use slipstream_benches::{RUST_VERIFIER, machine};
use slipstream_model::clock::{Clock, MonotonicClock};
use slipstream_model::ids::BLOCK_LEN;
use slipstream_server::config::{Config, EdgeConfig, ModelFlags, Quantize};
use slipstream_server::engine::request::Speculation;
use slipstream_server::startup::assemble;

#[derive(Parser)]
#[command(about = "TTFT of a prompt, cold and warm")]
struct Args {
    /// A verifier; may be repeated [default: the embedded pair]
    #[arg(long)]
    model: Vec<PathBuf>,
    /// Format of the verifier's weights in memory
    #[arg(long, value_enum, default_value = "none")]
    quantize: Quantize,
    /// Threads of the networks [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 1500)]
    prompt: usize,
    /// Output tokens
    #[arg(long, default_value_t = 8)]
    tokens: usize,
    /// Rounds
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Seed of the prompts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// Milliseconds to the first token, and the tokens whose KV was there; one per round.
#[derive(Default)]
struct Measured {
    ttft_ms: Vec<f64>,
    cached: Vec<f64>,
}

/// Cold, then warm.
fn measure(args: &Args, model: Option<&PathBuf>) -> anyhow::Result<[Measured; 2]> {
    let flags = ModelFlags {
        model: model.map(|path| path.display().to_string()),
        quantize: args.quantize,
        threads: args.threads,
        ..ModelFlags::default()
    };
    let corpus = Corpus::of_sources(model.map_or(RUST_VERIFIER.as_ref(), |path| path.as_path()))?;
    let config = Config::new(&flags, EdgeConfig::default())?;
    let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
    let engine = assemble(&config, Arc::clone(&clock))?.engine;
    let mut driver = Driver::new(engine, clock).with_prefix_reuse();
    let mut random = StdRng::seed_from_u64(args.seed);
    let mut measured = [Measured::default(), Measured::default()];
    for round in 0..=args.rounds {
        let asked = Asked {
            prompt: corpus.piece(args.prompt, &mut random)?,
            num_tokens: args.tokens,
            temperature: 0.0,
            speculation: Speculation::Auto,
        };
        let mut outputs = Vec::new();
        for measured in &mut measured {
            let answers = driver.run(std::slice::from_ref(&asked))?;
            let answer = answers.into_iter().next().context("it ended without an answer")?;
            let first = answer.finished.timings.first_token.context("no token came")?;
            outputs.push(answer.ids);
            if round > 0 {
                measured.ttft_ms.push(first.as_millis_f64());
                measured.cached.push(answer.finished.usage.cached_tokens as f64);
            }
        }
        ensure!(outputs[0] == outputs[1], "the prefix cache changed an output");
    }
    Ok(measured)
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{}\nprompts of {} tokens, {} rounds, medians and spans of the time to the first token",
        machine::describe(),
        args.prompt,
        args.rounds
    )?;
    // Blocks of 16 that lie before the last token, which is always computed.
    let reusable = (args.prompt - 1) / BLOCK_LEN * BLOCK_LEN;
    let rows = args.prompt - reusable;
    writeln!(
        out,
        "predicted: {reusable} tokens are there, {rows} of {} rows are left",
        args.prompt
    )?;
    writeln!(
        out,
        "{:<32}{:>10}{:>26}{:>26}{:>9}{:>10}",
        "model", "quantize", "cold ms", "warm ms", "faster", "cached"
    )?;
    let models = match args.model.is_empty() {
        true => vec![None],
        false => args.model.iter().map(Some).collect(),
    };
    for model in models {
        let [cold, warm] = measure(&args, model)?;
        let name = model.map_or("embedded pair".into(), |path| {
            path.file_name().unwrap_or_default().to_string_lossy()
        });
        let spreads = [&cold, &warm].map(|measured| Spread::of(&measured.ttft_ms));
        let [first, second] =
            spreads.map(|s| format!("{:.2} ({:.2}-{:.2})", s.median, s.min, s.max));
        writeln!(
            out,
            "{name:<32}{:>10}{first:>26}{second:>26}{:>8.1}x{:>10.0}",
            format!("{:?}", args.quantize).to_lowercase(),
            spreads[0].median / spreads[1].median,
            Spread::of(&warm.cached).median
        )?;
    }
    Ok(())
}
