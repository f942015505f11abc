//! What a server does under load: requests arrive as they do in life, at moments of their own,
//! whether or not those before them have been answered (an open loop), at shares of the rate that
//! the server can finish. Over gRPC, with real text and varying lengths. Latencies count from the
//! moment at which a request was meant to be sent, so that a client that falls behind hides
//! nothing.
//!
//! `cargo bench -p slipstream-benches --bench load -- --help`

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use slipstream_benches::arrivals::{Arrivals, Corpus, Lengths, Wanted};
use slipstream_benches::serving::{Client, Ended, Serving, complete, message};
use slipstream_benches::stats::percentile;
use slipstream_benches::{RUST_VERIFIER, label, machine};
use slipstream_server::config::{ModelFlags, Quantize};
use slipstream_server::engine::request::Speculation;
use tokio::task::JoinSet;

/// Connections that take turns.
const CONNECTIONS: usize = 8;
/// Part of the measurement of the capacity that warms up.
const WARM_UP: f64 = 0.25;

#[derive(Parser)]
#[command(about = "Open-loop load at shares of the capacity")]
struct Args {
    /// The verifier [default: the embedded pair]
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
    /// Seconds of every phase
    #[arg(long, default_value_t = 30.0)]
    seconds: f64,
    /// Seconds that measure the capacity
    #[arg(long, default_value_t = 20.0)]
    capacity_seconds: f64,
    /// Shares of the capacity, in percent
    #[arg(long, value_delimiter = ',', default_values_t = [50.0, 80.0, 100.0, 150.0])]
    percent: Vec<f64>,
    /// Ways to speculate, one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Mood::Off, Mood::Auto])]
    speculation: Vec<Mood>,
    /// Requests per second that count as the capacity, instead of measuring it
    #[arg(long)]
    capacity: Option<f64>,
    /// Median tokens of a prompt
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    /// Median tokens of an output
    #[arg(long, default_value_t = 64)]
    output: usize,
    /// Most tokens of either
    #[arg(long, default_value_t = 768)]
    most: usize,
    /// Requests computed at the same time
    #[arg(long, default_value_t = ModelFlags::default().max_running)]
    max_running: usize,
    /// Requests that may wait
    #[arg(long, default_value_t = ModelFlags::default().max_waiting)]
    max_waiting: usize,
    /// Seed of prompts, lengths and arrivals
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mood {
    Off,
    Auto,
}

impl Mood {
    fn speculation(self) -> Speculation {
        match self {
            Self::Off => Speculation::Off,
            Self::Auto => Speculation::Auto,
        }
    }
}

/// What became of one request.
struct Outcome {
    ended: Ended,
    /// From the moment at which it was meant to be sent.
    ttft_ms: Option<f64>,
    /// Mean per token behind the first.
    tpot_ms: Option<f64>,
    finished_at: Instant,
    tokens_in_time: usize,
}

/// What became of the requests of one phase.
struct Phase {
    percent: f64,
    offered_per_s: f64,
    seconds: f64,
    until: Instant,
    /// How late the client sent, at worst.
    lag_ms: f64,
    outcomes: Vec<Outcome>,
    resident_mib: [f64; 2],
}

/// Sends requests of one way to speculate.
struct Sender<'a> {
    clients: &'a [Client],
    arrivals: Arrivals<'a>,
    speculation: Speculation,
    num_sent: usize,
    calls: JoinSet<Outcome>,
}

impl<'a> Sender<'a> {
    fn new(clients: &'a [Client], arrivals: Arrivals<'a>, speculation: Speculation) -> Self {
        Self { clients, arrivals, speculation, num_sent: 0, calls: JoinSet::new() }
    }

    /// Sends the next request, which was meant to go out at `intended`. Tokens count `until` then.
    fn send(&mut self, intended: Instant, until: Instant) -> anyhow::Result<()> {
        let wanted = self.arrivals.next_wanted()?;
        let client = self.clients[self.num_sent % self.clients.len()].clone();
        let speculation = self.speculation;
        self.num_sent += 1;
        self.calls.spawn(ask(client, wanted, speculation, [intended, until]));
        Ok(())
    }

    /// Keeps `num` requests under way for `seconds`. Returns how many per second ended behind the
    /// part that warms up.
    async fn capacity(&mut self, num: usize, seconds: f64) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let [warm, until] =
            [WARM_UP * seconds, seconds].map(|after| begun + Duration::from_secs_f64(after));
        for _ in 0..num {
            self.send(Instant::now(), until)?;
        }
        let mut num_finished = 0;
        while let Some(outcome) = self.calls.join_next().await {
            let outcome = outcome?;
            ensure!(matches!(outcome.ended, Ended::Finished), "{:?}", outcome.ended);
            num_finished += usize::from((warm..until).contains(&outcome.finished_at));
            if Instant::now() < until {
                self.send(Instant::now(), until)?;
            }
        }
        Ok(num_finished as f64 / (until - warm).as_secs_f64())
    }

    /// Sends requests at `per_second` for `seconds`, and waits for all of them.
    async fn phase(&mut self, per_second: f64, seconds: f64) -> anyhow::Result<Phase> {
        let before = machine::resident_mib();
        let mut intended = Instant::now();
        let until = intended + Duration::from_secs_f64(seconds);
        let mut outcomes = Vec::new();
        let mut lag_ms: f64 = 0.0;
        loop {
            intended += self.arrivals.next_gap(per_second)?;
            if intended >= until {
                break;
            }
            tokio::time::sleep_until(intended.into()).await;
            lag_ms = lag_ms.max(intended.elapsed().as_secs_f64() * 1000.0);
            self.send(intended, until)?;
            while let Some(outcome) = self.calls.try_join_next() {
                outcomes.push(outcome?);
            }
        }
        tokio::time::sleep_until(until.into()).await;
        let after = machine::resident_mib();
        while let Some(outcome) = self.calls.join_next().await {
            outcomes.push(outcome?);
        }
        let resident_mib = [before, after];
        let (percent, offered_per_s) = (f64::NAN, per_second);
        Ok(Phase { percent, offered_per_s, seconds, until, lag_ms, outcomes, resident_mib })
    }
}

/// Sends one request and waits for its end.
async fn ask(
    mut client: Client,
    wanted: Wanted,
    speculation: Speculation,
    [intended, until]: [Instant; 2],
) -> Outcome {
    let (seen, ended) = complete(&mut client, message(&wanted, speculation), |_| {}).await;
    let finished_at = Instant::now();
    let ms = |span: Duration| span.as_secs_f64() * 1000.0;
    let num_tokens = seen.tokens_until(finished_at);
    let decode = seen.first().zip(seen.last()).map(|(first, last)| ms(last - first));
    Outcome {
        ended,
        ttft_ms: seen.first().map(|first| ms(first - intended)),
        tpot_ms: decode.filter(|_| num_tokens > 1).map(|ms| ms / (num_tokens - 1) as f64),
        finished_at,
        tokens_in_time: seen.tokens_until(until),
    }
}

impl Phase {
    fn finished(&self) -> impl Iterator<Item = &Outcome> {
        self.outcomes.iter().filter(|outcome| matches!(outcome.ended, Ended::Finished))
    }

    /// Requests that ended well within the phase, per second.
    fn finished_per_s(&self) -> f64 {
        let in_time = self.finished().filter(|outcome| outcome.finished_at <= self.until);
        in_time.count() as f64 / self.seconds
    }

    /// Tokens per second that came within the phase, of requests that ended well.
    fn goodput(&self) -> f64 {
        let tokens: usize = self.finished().map(|outcome| outcome.tokens_in_time).sum();
        tokens as f64 / self.seconds
    }

    fn num_shed(&self) -> usize {
        self.outcomes.iter().filter(|outcome| matches!(outcome.ended, Ended::Shed)).count()
    }

    fn errors(&self) -> Vec<&str> {
        let errors = self.outcomes.iter().filter_map(|outcome| match &outcome.ended {
            Ended::Failed(error) => Some(error.as_str()),
            Ended::Finished | Ended::Shed => None,
        });
        errors.collect()
    }

    fn write(&self, out: &mut impl Write, capacity: f64) -> anyhow::Result<()> {
        let of = |value: fn(&Outcome) -> Option<f64>| {
            let values: Vec<f64> = self.finished().filter_map(value).collect();
            [50.0, 99.0].map(|percent| percentile(&values, percent))
        };
        let [ttft50, ttft99] = of(|outcome| outcome.ttft_ms);
        let [tpot50, tpot99] = of(|outcome| outcome.tpot_ms);
        let num_sent = self.outcomes.len().max(1) as f64;
        let predicted = self.offered_per_s.min(capacity);
        let predicted_shed = 100.0 * (1.0 - predicted / self.offered_per_s);
        writeln!(
            out,
            "{:>5.0}%{:>9.2}{:>10.2}{:>8.2}{:>10.0}{:>10.1}{:>10.1}{:>9.2}{:>9.2}{:>8.1}{:>7.1}\
             {:>7}{:>9.0}{:>7.0}{:>8.1}",
            self.percent,
            self.offered_per_s,
            self.finished_per_s(),
            predicted,
            self.goodput(),
            ttft50,
            ttft99,
            tpot50,
            tpot99,
            100.0 * self.num_shed() as f64 / num_sent,
            predicted_shed,
            self.errors().len(),
            self.resident_mib[0],
            self.resident_mib[1],
            self.lag_ms,
        )?;
        Ok(())
    }
}

fn write_head(out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(
        out,
        "{:>6}{:>9}{:>10}{:>8}{:>10}{:>20}{:>18}{:>15}{:>7}{:>16}{:>8}",
        "load",
        "offered",
        "finished",
        "(pred.)",
        "goodput",
        "TTFT ms p50, p99",
        "TPOT ms p50, p99",
        "shed % (pred.)",
        "errors",
        "RSS MiB, to",
        "lag ms"
    )?;
    Ok(())
}

/// Everything about one way to speculate, on a server of its own.
fn measure(args: &Args, corpus: &Corpus, mood: Mood, out: &mut impl Write) -> anyhow::Result<()> {
    let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let flags = ModelFlags {
        model: text(&args.model),
        draft_model: text(&args.draft_model),
        quantize: args.quantize,
        threads: args.threads,
        max_running: args.max_running,
        max_waiting: args.max_waiting,
        ..ModelFlags::default()
    };
    let serving = Serving::start(&flags, CONNECTIONS)?;
    let lengths = Lengths { prompt: args.prompt, output: args.output, most: args.most };
    let arrivals = Arrivals::new(corpus, lengths, args.seed);
    let mut sender = Sender::new(&serving.clients, arrivals, mood.speculation());
    let runtime = &serving.client_runtime;
    let measured = sender.capacity(args.max_running, args.capacity_seconds);
    let measured = runtime.block_on(measured)?;
    let capacity = args.capacity.unwrap_or(measured);
    writeln!(
        out,
        "\n{}: capacity {measured:.2} requests/s with {} under way (closed loop, {} s)",
        label(mood.speculation()),
        args.max_running,
        args.capacity_seconds
    )?;
    write_head(out)?;
    let mut phases = Vec::new();
    for &percent in &args.percent {
        let phase = runtime.block_on(sender.phase(capacity * percent / 100.0, args.seconds))?;
        let phase = Phase { percent, ..phase };
        phase.write(out, capacity)?;
        out.flush()?;
        for error in phase.errors().iter().take(3) {
            writeln!(out, "       error: {error}")?;
        }
        phases.push(phase);
    }
    conclude(&phases, &serving, out)?;
    drop(sender);
    serving.stop()
}

/// What the phases say together, and whether everything was given back.
fn conclude(phases: &[Phase], serving: &Serving, out: &mut impl Write) -> anyhow::Result<()> {
    let peak = phases.iter().map(Phase::goodput).fold(0.0, f64::max);
    let last = phases.last().context("there is a phase")?;
    writeln!(
        out,
        "goodput at {:.0} %: {:.1} % of its peak",
        last.percent,
        100.0 * last.goodput() / peak
    )?;
    let counted = serving.counted()?;
    let number = |name: &str| counted.get(name).copied().unwrap_or(f64::NAN);
    let left = number("requests_submitted_total") - number("requests_released_total");
    writeln!(
        out,
        "left behind: {left} requests, {} blocks; preemptions {}, shed by the engine {}, pauses \
         {}; prefix cache {} of {} tokens, {} blocks evicted",
        number("kv_blocks_used"),
        number("num_preemptions_total"),
        number("requests_shed_total"),
        number("request_pauses_total"),
        number("prefix_cache_hits_total"),
        number("prefix_cache_queries_total"),
        number("kv_blocks_evicted_total"),
    )?;
    ensure!(phases.iter().all(|phase| phase.errors().is_empty()), "requests failed");
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut out = std::io::stdout().lock();
    let corpus = Corpus::of_sources(args.model.as_deref().unwrap_or(RUST_VERIFIER.as_ref()))?;
    let model = args.model.as_ref().map_or("embedded pair".to_owned(), |path| {
        path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    });
    writeln!(
        out,
        "{}\n{model}, server and clients in one process; Poisson arrivals, {} s per phase, seed \
         {}; prompts and outputs log-normal with medians {} and {}, at most {} tokens\n\
         TTFT and TPOT over requests that ended well, from the intended arrival; goodput in \
         tokens/s",
        machine::describe(),
        args.seconds,
        args.seed,
        args.prompt,
        args.output,
        args.most
    )?;
    for &mood in &args.speculation {
        measure(&args, &corpus, mood, &mut out)?;
    }
    Ok(())
}
