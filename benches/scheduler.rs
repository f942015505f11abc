//! What a step costs outside the networks by how many requests there are: running ones, all of
//! which take part, and waiting ones, which only stand in line. The network here costs nothing: it
//! writes the same logits for every row. What it takes to write them is measured and left out.
//!
//! `cargo bench -p slipstream-benches --bench scheduler -- --help`

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Parser;
use slipstream_benches::machine;
use slipstream_benches::stats::Spread;
use slipstream_model::batch::RaggedBatch;
use slipstream_model::clock::{Clock, Micros, MonotonicClock};
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BlockId, SequenceId, TokenId};
use slipstream_model::sampling::SamplingParams;
use slipstream_model::token_bytes::TokenBytes;
use slipstream_server::engine::request::{PrefixReuse, Priority, Request, Speculation, TenantId};
use slipstream_server::engine::{Engine, EngineConfig, EngineParts};

/// Entries of the vocabulary: few, so that choosing among them costs little.
const VOCAB_SIZE: usize = 64;
/// Positions of the context.
const CONTEXT_LEN: usize = 1 << 15;
/// Tokens of every prompt.
const PROMPT_LEN: usize = 32;
/// Steps before measuring in which everybody takes part.
const WARM_UP: usize = 64;
/// Running requests beside whom others wait.
const RUNNING_BESIDE: usize = 8;

#[derive(Parser)]
#[command(about = "What a step costs outside the networks, by the number of requests")]
struct Args {
    /// How many requests
    #[arg(
        long,
        value_delimiter = ',',
        default_values_t = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    )]
    sequences: Vec<usize>,
    /// Tenants that they belong to, in turn
    #[arg(long, default_value_t = 8)]
    tenants: u128,
    /// Steps of one measurement
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Rounds
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// A network that always says the same, and measures what that takes.
struct Constant {
    num_blocks: usize,
    taken_ns: Arc<AtomicU64>,
}

impl Forward for Constant {
    fn limits(&self) -> ForwardLimits {
        let num_blocks = self.num_blocks;
        ForwardLimits { vocab_size: VOCAB_SIZE, context_len: CONTEXT_LEN, num_blocks }
    }

    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError> {
        let begun = Instant::now();
        for row in logits.reset(batch.num_logit_rows(), VOCAB_SIZE).chunks_exact_mut(VOCAB_SIZE) {
            for (index, logit) in row.iter_mut().enumerate() {
                *logit = index as f32 * -0.125;
            }
        }
        self.taken_ns.fetch_add(begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn copy_block(&mut self, _: BlockId, _: BlockId) {}
}

/// How many requests run, and how many wait beside them.
#[derive(Clone, Copy)]
struct Load {
    running: usize,
    waiting: usize,
}

/// Microseconds of one measurement.
#[derive(Clone, Copy)]
struct Cost {
    /// A step, without the network.
    step: f64,
    /// Taking its events, as the thread around the engine does.
    events: f64,
    /// The picture for the metrics.
    snapshot: f64,
}

/// An engine under a load.
struct Bench {
    engine: Engine,
    load: Load,
    taken_ns: Arc<AtomicU64>,
    costs: Vec<Cost>,
    news: Vec<SequenceId>,
}

impl Bench {
    fn new(args: &Args, load: Load) -> anyhow::Result<Self> {
        let Load { running, waiting } = load;
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
        let taken_ns = Arc::new(AtomicU64::new(0));
        let num_steps = 2 * WARM_UP + running + (args.rounds + 1) * args.steps;
        let max_tokens = num_steps + PROMPT_LEN;
        ensure!(PROMPT_LEN + max_tokens <= CONTEXT_LEN, "fewer steps, or fewer rounds");
        let num_blocks = (running + 1) * (PROMPT_LEN + max_tokens).div_ceil(16);
        let mut engine = Engine::new(EngineParts {
            config: EngineConfig {
                step_tokens_max: running + 256,
                max_running: running,
                max_waiting: waiting,
                // Everybody stays in the class it came with.
                priority_aging: Micros(3_600_000_000),
                ..EngineConfig::default()
            },
            verifier: Box::new(Constant { num_blocks, taken_ns: Arc::clone(&taken_ns) }),
            proposer: None,
            token_bytes: Arc::new(TokenBytes::new(vec![b"x".to_vec(); VOCAB_SIZE])),
            clock: Arc::clone(&clock),
            cache_key: [7; 32],
        });
        for id in 0..running + waiting {
            let tenant = TenantId(id as u128 % args.tenants);
            let request = request(id, max_tokens, tenant, clock.now());
            engine.submit(SequenceId(id as u64), request)?;
        }
        let mut bench = Self { engine, load, taken_ns, costs: Vec::new(), news: Vec::new() };
        // Prompts first, and then everybody as it goes on.
        let mut num_settled = 0;
        for _ in 0..2 * WARM_UP + running {
            let report = bench.engine.step();
            bench.take_events()?;
            let snapshot = bench.engine.snapshot();
            let found = (snapshot.num_running, snapshot.num_waiting, report.num_rows);
            num_settled += usize::from(found == (running, waiting, running));
        }
        ensure!(num_settled >= WARM_UP, "{num_settled} steps in which {running} run");
        Ok(bench)
    }

    fn take_events(&mut self) -> anyhow::Result<()> {
        self.news.clear();
        self.engine.ids_with_news(&mut self.news);
        for id in &self.news {
            self.engine.take_event(*id).context("it has news")?;
        }
        Ok(())
    }

    fn measure(&mut self, num_steps: usize) -> anyhow::Result<Cost> {
        let (mut step_ns, mut events_ns, mut snapshot_ns) = (0, 0, 0);
        let network_ns = self.taken_ns.load(Ordering::Relaxed);
        for _ in 0..num_steps {
            let begun = Instant::now();
            let report = self.engine.step();
            let stepped = Instant::now();
            self.take_events()?;
            let taken = Instant::now();
            std::hint::black_box(self.engine.snapshot());
            snapshot_ns += taken.elapsed().as_nanos();
            events_ns += (taken - stepped).as_nanos();
            step_ns += (stepped - begun).as_nanos();
            let running = self.load.running;
            ensure!(report.num_rows == running, "{} rows of {running}", report.num_rows);
        }
        let network_ns = u128::from(self.taken_ns.load(Ordering::Relaxed) - network_ns);
        let per_step = |ns: u128| ns as f64 / 1000.0 / num_steps as f64;
        Ok(Cost {
            step: per_step(step_ns - network_ns),
            events: per_step(events_ns),
            snapshot: per_step(snapshot_ns),
        })
    }

    fn write(&self, out: &mut impl Write) -> anyhow::Result<()> {
        let Load { running, waiting } = self.load;
        let spread =
            |cost: fn(&Cost) -> f64| Spread::of(&self.costs.iter().map(cost).collect::<Vec<_>>());
        let step = spread(|cost| cost.step);
        writeln!(
            out,
            "{running:>8}{waiting:>8}{:>12.2}{:>20}{:>14.3}{:>12.2}{:>14.2}",
            step.median,
            format!("({:.2}-{:.2})", step.min, step.max),
            step.median / running as f64,
            spread(|cost| cost.events).median,
            spread(|cost| cost.snapshot).median,
        )?;
        Ok(())
    }
}

/// A request that runs as long as the bench does. Prompts differ, so that none is found again.
fn request(id: usize, max_tokens: usize, tenant: TenantId, arrival: Micros) -> Request {
    let token = |index: usize| TokenId(((id >> (6 * (index % 2))) % VOCAB_SIZE) as u32);
    Request {
        prompt: (0..PROMPT_LEN).map(token).collect(),
        output_prefix: Vec::new(),
        params: SamplingParams { seed: 7, ..SamplingParams::greedy() },
        stop_strings: Vec::new(),
        max_tokens,
        logprobs: false,
        speculation: Speculation::Off,
        arrival,
        deadline: None,
        tenant,
        priority: Priority::Normal,
        prefix_reuse: PrefixReuse::salted(""),
        sibling: None,
    }
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{}\n{} rounds of {} steps, {} tenants; medians and spans, in microseconds of a step \
         without the network\n\
         predicted: the step grows with those who run, the same for each of them, and hardly with \
         those who wait",
        machine::describe(),
        args.rounds,
        args.steps,
        args.tenants
    )?;
    let running = args.sequences.iter().map(|&running| Load { running, waiting: 0 });
    let beside = std::iter::once(&0).chain(&args.sequences);
    let waiting = beside.map(|&waiting| Load { running: RUNNING_BESIDE, waiting });
    for loads in [running.collect::<Vec<_>>(), waiting.collect()] {
        writeln!(
            out,
            "\n{:>8}{:>8}{:>12}{:>20}{:>14}{:>12}{:>14}",
            "running", "waiting", "step us", "(min-max)", "per running", "events us", "snapshot us"
        )?;
        let benches = loads.into_iter().map(|load| Bench::new(&args, load));
        let mut benches = benches.collect::<anyhow::Result<Vec<_>>>()?;
        for round in 0..=args.rounds {
            for bench in &mut benches {
                let cost = bench.measure(args.steps)?;
                if round > 0 {
                    bench.costs.push(cost); // the first one warms up
                }
            }
        }
        for bench in &benches {
            bench.write(&mut out)?;
        }
    }
    Ok(())
}
