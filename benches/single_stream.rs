//! One stream, in-process, no network: plain decoding beside draft lengths 1 to 8. All settings run
//! in turn within each round, so that drift of the machine hits them alike; medians and the span
//! over rounds are printed, and how large the models are. Checks on the way that every setting
//! gives the same tokens. The embedded pair, unless flags name another.
//!
//! `cargo bench -p slipstream-benches --bench single_stream -- --help`

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Parser;
use slipstream_benches::drive::{Asked, Completion, Driver};
use slipstream_benches::stats::Spread;
use slipstream_benches::{PROMPTS, label};
use slipstream_model::clock::{Clock, MonotonicClock};
use slipstream_model::ids::TokenId;
use slipstream_server::config::{Config, EdgeConfig, ModelFlags};
use slipstream_server::engine::event::Finished;
use slipstream_server::engine::request::Speculation;
use slipstream_server::startup::assemble;

/// Bytes of a MiB.
const MIB: f64 = (1 << 20) as f64;

#[derive(Parser)]
#[command(about = "One stream: plain decoding beside draft lengths 1 to 8")]
struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// Output tokens per completion
    #[arg(long, default_value_t = 192)]
    tokens: usize,
    /// Rounds; each runs every setting once over every prompt
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Temperatures
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.8])]
    temperatures: Vec<f64>,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// Figures of one setting, one number per round.
#[derive(Default)]
struct Measured {
    tokens_per_s: Vec<f64>,
    ttft_ms: Vec<f64>,
    num_proposed: usize,
    num_accepted: usize,
    num_steps: usize,
    num_tokens: usize,
}

/// An engine and what is needed to feed it.
struct Bench {
    driver: Driver,
    prompts: Vec<Vec<TokenId>>,
    tokens: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
    let config = Config::new(&args.model, EdgeConfig::with_grace(Duration::ZERO))?;
    let assembly = assemble(&config, Arc::clone(&clock))?;
    let tokenizer = assembly.tokenizer();
    let encode = |text: &&str| tokenizer.encode(text, true).context("tokenising a prompt");
    let prompts = PROMPTS.iter().map(encode).collect::<anyhow::Result<_>>()?;
    let sizes = assembly.sizes().to_vec();
    let driver = Driver::new(assembly.engine, clock);
    let mut bench = Bench { driver, prompts, tokens: args.tokens };
    let mut out = std::io::stdout().lock();
    for (role, size) in ["verifier", "draft"].into_iter().zip(&sizes) {
        let (millions, mib) = (size.num_weights as f64 / 1e6, size.weight_bytes as f64 / MIB);
        writeln!(out, "{role}: {}, {millions:.2} million weights, {mib:.2} MiB", size.name)?;
    }
    writeln!(out, "{} rounds x {} prompts x {} tokens", args.rounds, PROMPTS.len(), args.tokens)?;
    for &temperature in &args.temperatures {
        let table = bench.measure(temperature, args.rounds)?;
        write_table(&mut out, temperature, &table)?;
    }
    Ok(())
}

/// `Off`, then every draft length.
fn settings() -> Vec<Speculation> {
    let fixed = (1..=8).map(Speculation::Fixed);
    std::iter::once(Speculation::Off).chain(fixed).collect()
}

impl Bench {
    /// Runs all settings in turn, `rounds` times, after one round to warm up.
    fn measure(
        &mut self,
        temperature: f64,
        rounds: usize,
    ) -> anyhow::Result<Vec<(Speculation, Measured)>> {
        let mut table: Vec<_> =
            settings().into_iter().map(|setting| (setting, Measured::default())).collect();
        let mut expected: Vec<Option<Vec<TokenId>>> = vec![None; self.prompts.len()];
        for round in 0..=rounds {
            for (setting, measured) in &mut table {
                let mut decode_s = 0.0;
                let mut decoded = 0;
                for (index, expected) in expected.iter_mut().enumerate() {
                    let completion = self.complete(index, temperature, *setting)?;
                    decode_s += completion.decode_s()?;
                    let Completion { ids, finished } = completion;
                    let expected = expected.get_or_insert_with(|| ids.clone());
                    ensure!(*expected == ids, "{setting:?} changed the output of prompt {index}");
                    let first = finished.timings.first_token.context("no token came")?;
                    decoded += ids.len() - 1;
                    if round > 0 {
                        measured.add(&finished, first.as_millis_f64());
                    }
                }
                if round > 0 {
                    measured.tokens_per_s.push(decoded as f64 / decode_s);
                }
            }
        }
        Ok(table)
    }

    /// One completion, stepped to its end.
    fn complete(
        &mut self,
        prompt: usize,
        temperature: f64,
        speculation: Speculation,
    ) -> anyhow::Result<Completion> {
        let (prompt, num_tokens) = (self.prompts[prompt].clone(), self.tokens);
        let asked = Asked { prompt, num_tokens, temperature, speculation };
        self.driver.run(&[asked])?.pop().context("it ended without an answer")
    }
}

impl Measured {
    fn add(&mut self, finished: &Finished, ttft_ms: f64) {
        self.ttft_ms.push(ttft_ms);
        self.num_proposed += finished.speculation.num_proposed;
        self.num_accepted += finished.speculation.num_accepted();
        self.num_steps += finished.speculation.num_steps;
        self.num_tokens += finished.usage.output_tokens;
    }
}

fn write_table(
    out: &mut impl Write,
    temperature: f64,
    table: &[(Speculation, Measured)],
) -> anyhow::Result<()> {
    let plain = Spread::of(&table[0].1.tokens_per_s);
    writeln!(out, "\ntemperature {temperature}")?;
    writeln!(
        out,
        "{:<14}{:>9} {:>19}{:>9}{:>10}{:>12}{:>13}",
        "setting", "tokens/s", "(min-max)", "x plain", "TTFT ms", "acceptance", "tokens/step"
    )?;
    for (setting, measured) in table {
        let proposes = measured.num_proposed > 0;
        ensure!(proposes == (*setting != Speculation::Off), "{setting:?}: the draft fell silent");
        let label = label(*setting);
        let speed = Spread::of(&measured.tokens_per_s);
        let acceptance = match measured.num_proposed {
            0 => "-".to_owned(),
            proposed => format!("{:.3}", measured.num_accepted as f64 / proposed as f64),
        };
        writeln!(
            out,
            "{label:<14}{:>9.0} {:>19}{:>9.2}{:>10.3}{acceptance:>12}{:>13.2}",
            speed.median,
            format!("({:.0}-{:.0})", speed.min, speed.max),
            speed.median / plain.median,
            Spread::of(&measured.ttft_ms).median,
            measured.num_tokens as f64 / measured.num_steps.max(1) as f64,
        )?;
    }
    Ok(())
}
