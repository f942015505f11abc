//! What a long prompt does to those who are being served: while streams run, it arrives, and the
//! largest gap between two tokens of the others is measured; with prompts computed in pieces, as
//! the step target cuts them, and in one go. Over gRPC, both servers in turn within each round.
//!
//! `cargo bench -p slipstream-benches --bench stall -- --help`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use rand::SeedableRng;
use rand::rngs::StdRng;
use slipstream_benches::arrivals::{Corpus, Wanted};
use slipstream_benches::serving::{Client, Ended, Seen, Serving, complete, message};
use slipstream_benches::stats::Spread;
use slipstream_benches::{RUST_VERIFIER, label, machine};
use slipstream_server::config::{ModelFlags, Quantize, TimeSpan};
use slipstream_server::engine::request::Speculation;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// As good as no target for the time of a step.
const NO_TARGET: TimeSpan = TimeSpan(Duration::from_secs(3600));
/// Events that every stream has received before the prompt arrives.
const EVENTS_BEFORE: usize = 24;
/// Tokens of the prompts of those who are being served.
const SHORT: usize = 32;
/// Output tokens of the long prompt.
const LONG_OUTPUT: usize = 4;

#[derive(Parser)]
#[command(about = "What a long prompt does to running streams")]
struct Args {
    /// The verifier [default: the embedded one]
    #[arg(long)]
    model: Option<PathBuf>,
    /// The draft
    #[arg(long)]
    draft_model: Option<PathBuf>,
    /// Format of the verifier's weights in memory
    #[arg(long, value_enum, default_value = "none")]
    quantize: Quantize,
    /// Threads of the networks [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Streams that run
    #[arg(long, default_value_t = 8)]
    streams: usize,
    /// Tokens of the long prompt
    #[arg(long, default_value_t = 2000)]
    prompt: usize,
    /// Milliseconds that a step shall take at most
    #[arg(long, default_value_t = 50)]
    step_target_ms: u64,
    /// Output tokens of every stream: enough to outlast the long prompt
    #[arg(long, default_value_t = 1500)]
    tokens: usize,
    /// Whether the streams speculate
    #[arg(long)]
    speculate: bool,
    /// Rounds; each measures both servers once
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seed of the prompts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one round brought, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Round {
    /// Median gap of the streams before the prompt came.
    usual: f64,
    /// Their largest gap then, over a time of the same number of gaps per stream.
    quiet: f64,
    /// Their largest gap while the prompt was computed.
    largest: f64,
    /// From sending the long prompt to its first token.
    ttft: f64,
}

/// A server with its name.
struct Setting {
    name: &'static str,
    predicted: &'static str,
    serving: Serving,
    rounds: Vec<Round>,
}

/// The times of one stream's events.
type Times = Vec<Instant>;

/// Runs one stream, and says when it has received enough to begin. Dropping `stop` ends it.
async fn follow(
    mut client: Client,
    wanted: Wanted,
    speculation: Speculation,
    (ready, stop): (mpsc::Sender<()>, Arc<tokio::sync::Notify>),
) -> anyhow::Result<Times> {
    let mut times = Times::new();
    let on_event = |seen: &Seen| {
        times.extend(seen.last());
        if times.len() == EVENTS_BEFORE {
            let _ = ready.try_send(()); // there is room for everybody
        }
    };
    let request = message(&wanted, speculation);
    tokio::select! {
        (_, ended) = complete(&mut client, request, on_event) => {
            anyhow::bail!("a stream ended before the prompt was computed: {ended:?}")
        }
        () = stop.notified() => Ok(times),
    }
}

/// Gaps between events that end within a span of time, in milliseconds.
fn gaps(times: &Times, [from, to]: [Instant; 2]) -> impl Iterator<Item = f64> {
    let pairs = times.iter().zip(times.iter().skip(1));
    let within = pairs.filter(move |(begin, end)| **end > from && **begin < to);
    within.map(|(begin, end)| (*end - *begin).as_secs_f64() * 1000.0)
}

impl Setting {
    fn start(args: &Args, name: &'static str, is_cut: bool) -> anyhow::Result<Self> {
        let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let defaults = ModelFlags::default();
        let flags = ModelFlags {
            model: text(&args.model),
            draft_model: text(&args.draft_model),
            quantize: args.quantize,
            threads: args.threads,
            // Every round computes its prompt anew.
            prefix_reuse: false,
            step_target: match is_cut {
                true => TimeSpan(Duration::from_millis(args.step_target_ms)),
                false => NO_TARGET,
            },
            step_tokens: if is_cut { defaults.step_tokens } else { args.prompt + args.streams },
            kv_blocks: Some((args.streams + 1) * 160),
            ..defaults
        };
        let predicted = match is_cut {
            true => "the larger of the target and 1.5 usual gaps",
            false => "its TTFT",
        };
        let serving = Serving::start(&flags, args.streams + 1)?;
        Ok(Self { name, predicted, serving, rounds: Vec::new() })
    }

    async fn round(
        &self,
        args: &Args,
        corpus: &Corpus,
        random: &mut StdRng,
    ) -> anyhow::Result<Round> {
        let speculation = if args.speculate { Speculation::Auto } else { Speculation::Off };
        let (ready, mut all_ready) = mpsc::channel(args.streams);
        let stop = Arc::new(tokio::sync::Notify::new());
        let mut streams = JoinSet::new();
        for client in &self.serving.clients[1..] {
            let wanted = Wanted { prompt: corpus.piece(SHORT, random)?, num_tokens: args.tokens };
            let signals = (ready.clone(), Arc::clone(&stop));
            streams.spawn(follow(client.clone(), wanted, speculation, signals));
        }
        drop(ready);
        for _ in 0..args.streams {
            all_ready.recv().await.context("a stream ended early")?;
        }
        let long = Wanted { prompt: corpus.piece(args.prompt, random)?, num_tokens: LONG_OUTPUT };
        let request = message(&long, Speculation::Off);
        let sent = Instant::now();
        let (seen, ended) = complete(&mut self.serving.clients[0].clone(), request, |_| {}).await;
        ensure!(matches!(ended, Ended::Finished), "the long prompt: {ended:?}");
        let first = seen.first().context("no token came")?;
        stop.notify_waiters();
        let mut all = Vec::new();
        while let Some(times) = streams.join_next().await {
            all.push(times??);
        }
        let over = |span: [Instant; 2]| all.iter().flat_map(move |times| gaps(times, span));
        // Before: behind everybody's own prompts.
        let settled = all.iter().filter_map(|times| times.get(EVENTS_BEFORE / 2)).max();
        let before = [*settled.context("there are streams")?, sent];
        let usual: Vec<f64> = over(before).collect();
        Ok(Round {
            usual: Spread::of(&usual).median,
            quiet: Spread::of(&usual).max,
            largest: over([sent, first]).fold(0.0, f64::max),
            ttft: (first - sent).as_secs_f64() * 1000.0,
        })
    }

    fn write(&self, out: &mut impl Write) -> anyhow::Result<()> {
        let of = |figure: fn(&Round) -> f64| {
            let spread = Spread::of(&self.rounds.iter().map(figure).collect::<Vec<_>>());
            format!("{:.1} ({:.1}-{:.1})", spread.median, spread.min, spread.max)
        };
        writeln!(
            out,
            "{:<12}{:>22}{:>22}{:>26}{:>26}   {}",
            self.name,
            of(|round| round.usual),
            of(|round| round.quiet),
            of(|round| round.largest),
            of(|round| round.ttft),
            self.predicted
        )?;
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let corpus = Corpus::of_sources(args.model.as_deref().unwrap_or(RUST_VERIFIER.as_ref()))?;
    let mut settings =
        [Setting::start(&args, "in pieces", true)?, Setting::start(&args, "in one go", false)?];
    let mut random = StdRng::seed_from_u64(args.seed);
    for round in 0..=args.rounds {
        for setting in &mut settings {
            let runtime = &setting.serving.client_runtime;
            let measured = runtime.block_on(setting.round(&args, &corpus, &mut random))?;
            if round > 0 {
                setting.rounds.push(measured); // the first one warms up
            }
        }
    }
    let mut out = std::io::stdout().lock();
    let speculation = if args.speculate { Speculation::Auto } else { Speculation::Off };
    writeln!(
        out,
        "{}\n{}, {} streams ({}), a prompt of {} tokens, step target {} ms; {} rounds, medians and \
         spans, in milliseconds",
        machine::describe(),
        args.model.as_ref().map_or("embedded pair".to_owned(), |path| path.display().to_string()),
        args.streams,
        label(speculation),
        args.prompt,
        args.step_target_ms,
        args.rounds
    )?;
    writeln!(
        out,
        "{:<12}{:>22}{:>22}{:>26}{:>26}   predicted for the largest gap",
        "the prompt", "usual gap", "largest before", "largest during it", "TTFT of the prompt"
    )?;
    for setting in &settings {
        setting.write(&mut out)?;
    }
    for setting in settings {
        setting.serving.stop()?;
    }
    Ok(())
}
