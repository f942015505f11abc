//! What a draft is worth by how often it agrees: plain decoding beside constructed drafts that are
//! never right, right as often as asked, and always right, at the cost of a real network. Random
//! weights in the shapes of published models, unless flags name files. All settings run in turn
//! within each round; medians and the span over rounds are printed. Checks on the way that every
//! setting gives the same tokens.
//!
//! `cargo bench -p slipstream-benches --bench constructed -- --help`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::ensure;
use clap::Parser;
use slipstream_benches::PROMPTS;
use slipstream_benches::checkpoint::{Format, Shape, checkpoint, write};
use slipstream_benches::constructed_draft::Script;
use slipstream_benches::drive::{Asked, Completion, Driver};
use slipstream_benches::pair::{Pair, PairOptions};
use slipstream_benches::stats::Spread;
use slipstream_model::clock::{Clock, MonotonicClock};
use slipstream_model::ids::{SequenceId, TokenId};
use slipstream_server::engine::request::Speculation;

#[derive(Parser)]
#[command(about = "Plain decoding beside drafts that agree as often as they are told to")]
struct Args {
    /// Verifier, a file or directory [default: random, in TinyLlama's shape]
    #[arg(long, value_name = "PATH")]
    verifier: Option<PathBuf>,
    /// Network of the draft, with the same vocabulary [default: random, 68 million weights]
    #[arg(long, value_name = "PATH")]
    draft: Option<PathBuf>,
    /// Format of random networks
    #[arg(long, value_enum, default_value = "q8_0")]
    format: Format,
    /// Streams at the same time; each number is measured
    #[arg(long, value_delimiter = ',', default_values_t = [1])]
    streams: Vec<usize>,
    /// Probabilities with which a proposed token agrees; 0.7 has half of three accepted
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.7, 1.0])]
    rates: Vec<f64>,
    /// Draft lengths; 1,2,3,4,5,6,7,8 sweeps
    #[arg(long, value_delimiter = ',', default_values_t = [3])]
    draft_len: Vec<usize>,
    /// Output tokens per completion
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Rounds; each runs every setting once
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Threads of the networks [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// One line of the table.
struct Line {
    /// `None` decodes plainly.
    draft: Option<(f64, usize)>,
    /// Per stream, one number per round.
    tokens_per_s: Vec<f64>,
    /// Over all streams, one number per round.
    total_per_s: Vec<f64>,
    num_proposed: usize,
    num_accepted: usize,
    num_steps: usize,
    num_tokens: usize,
}

struct Bench {
    driver: Driver,
    script: Script,
    prompts: Vec<Vec<TokenId>>,
    num_tokens: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let folder = tempfile::tempdir()?;
    let model = |given: &Option<PathBuf>, shape: Shape, name: &str| match given {
        Some(path) => anyhow::Ok(path.clone()),
        None => {
            let path = folder.path().join(name);
            write(checkpoint(shape, args.format), &path)?;
            Ok(path)
        }
    };
    let verifier = model(&args.verifier, Shape::TinyLlama, "verifier.gguf")?;
    let draft = model(&args.draft, Shape::Llama68M, "draft.gguf")?;
    let mut options = PairOptions::default();
    options.threads = args.threads.unwrap_or(options.threads);
    let pair = Pair::load(&verifier, &draft, &options)?;
    drop(folder);
    let prompts = pair.prompts(&PROMPTS)?;
    let most = args.streams.iter().max().copied().unwrap_or(1);
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    options.positions = most * (longest + args.tokens + 16);
    let mut out = std::io::stdout().lock();
    for (role, model) in ["verifier", "draft"].iter().zip(pair.describe()) {
        writeln!(out, "{role}: {model}")?;
    }
    let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
    let script = Script::default();
    let engine = pair.engine(&options, &script, Arc::clone(&clock))?;
    let driver = Driver::new(engine, clock);
    let mut bench = Bench { driver, script, prompts, num_tokens: args.tokens };
    for &streams in &args.streams {
        let lines = bench.measure(streams, &args)?;
        writeln!(out, "\n{streams} streams, {} rounds x {} tokens", args.rounds, args.tokens)?;
        write_table(&mut out, &lines)?;
    }
    Ok(())
}

impl Bench {
    /// Runs all settings in turn, after one round to warm up.
    fn measure(&mut self, streams: usize, args: &Args) -> anyhow::Result<Vec<Line>> {
        let drafts = args.rates.iter().flat_map(|rate| args.draft_len.iter().map(|k| (*rate, *k)));
        let mut lines: Vec<Line> =
            std::iter::once(None).chain(drafts.map(Some)).map(Line::new).collect();
        let mut futures = Vec::new();
        for round in 0..=args.rounds {
            for line in &mut lines {
                let completions = self.complete(streams, line.draft, &futures)?;
                let outputs: Vec<Vec<TokenId>> =
                    completions.iter().map(|completion| completion.ids.clone()).collect();
                if futures.is_empty() {
                    futures = outputs;
                } else {
                    ensure!(futures == outputs, "{:?} changed an output", line.draft);
                }
                if round > 0 {
                    line.add(&completions)?;
                }
            }
        }
        Ok(lines)
    }

    fn complete(
        &mut self,
        streams: usize,
        draft: Option<(f64, usize)>,
        futures: &[Vec<TokenId>],
    ) -> anyhow::Result<Vec<Completion>> {
        let speculation = draft.map_or(Speculation::Off, |(_, len)| Speculation::Fixed(len));
        self.script.forget();
        self.script.set_rate(draft.map_or(0.0, |(rate, _)| rate));
        let first = self.driver.next_id().0;
        let mut asked = Vec::new();
        for stream in 0..streams {
            let prompt = self.prompts[stream % self.prompts.len()].clone();
            if let Some(output) = futures.get(stream) {
                let future = [&prompt[..], output].concat();
                self.script.learn(SequenceId(first + stream as u64), future, stream as u64);
            }
            let num_tokens = self.num_tokens;
            asked.push(Asked { prompt, num_tokens, temperature: 0.0, speculation });
        }
        self.driver.run(&asked)
    }
}

impl Line {
    fn new(draft: Option<(f64, usize)>) -> Self {
        Self {
            draft,
            tokens_per_s: Vec::new(),
            total_per_s: Vec::new(),
            num_proposed: 0,
            num_accepted: 0,
            num_steps: 0,
            num_tokens: 0,
        }
    }

    fn add(&mut self, completions: &[Completion]) -> anyhow::Result<()> {
        let mut speeds = Vec::new();
        for completion in completions {
            speeds.push((completion.ids.len() - 1) as f64 / completion.decode_s()?);
            let speculation = &completion.finished.speculation;
            self.num_proposed += speculation.num_proposed;
            self.num_accepted += speculation.num_accepted();
            self.num_steps += speculation.num_steps;
            self.num_tokens += completion.finished.usage.output_tokens;
        }
        self.tokens_per_s.push(Spread::of(&speeds).median);
        self.total_per_s.push(speeds.iter().sum());
        Ok(())
    }
}

fn write_table(out: &mut impl Write, lines: &[Line]) -> anyhow::Result<()> {
    let plain = Spread::of(&lines[0].tokens_per_s).median;
    writeln!(
        out,
        "{:<26}{:>9} {:>17}{:>9}{:>9}{:>12}{:>13}",
        "draft", "tokens/s", "(min-max)", "x plain", "in all", "acceptance", "tokens/step"
    )?;
    for line in lines {
        let label = match line.draft {
            None => "plain".to_owned(),
            Some((rate, len)) => format!("draft_len {len}, agrees {rate}"),
        };
        let speed = Spread::of(&line.tokens_per_s);
        let acceptance = match line.num_proposed {
            0 => "-".to_owned(),
            proposed => format!("{:.3}", line.num_accepted as f64 / proposed as f64),
        };
        writeln!(
            out,
            "{label:<26}{:>9.1} {:>17}{:>9.2}{:>9.1}{acceptance:>12}{:>13.2}",
            speed.median,
            format!("({:.1}-{:.1})", speed.min, speed.max),
            speed.median / plain,
            Spread::of(&line.total_per_s).median,
            line.num_tokens as f64 / line.num_steps.max(1) as f64,
        )?;
    }
    Ok(())
}
