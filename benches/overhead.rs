//! What a step costs outside the networks: the time of `Engine::step` less that of every forward
//! pass in it. One stream, in-process; the embedded pair unless files are named. All settings run
//! in turn within each round; medians and the span over rounds are printed.
//!
//! `cargo bench -p slipstream-benches --bench overhead -- --help`

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Context;
use clap::Parser;
use slipstream_benches::stats::Spread;
use slipstream_benches::{PROMPTS, RUST_DRAFT, RUST_VERIFIER, label};
use slipstream_draft::model_proposer::{ModelProposer, ModelProposerOptions};
use slipstream_model::batch::RaggedBatch;
use slipstream_model::clock::{Clock, MonotonicClock};
use slipstream_model::forward::{Forward, ForwardError, ForwardLimits, Logits};
use slipstream_model::ids::{BlockId, DraftEpoch, SequenceId, TokenId};
use slipstream_model::kernels::Isa;
use slipstream_model::kv_pool::KvType;
use slipstream_model::load::{LoadOptions, LoadedModel, ModelSource, load};
use slipstream_model::packed::PackedLlama;
use slipstream_model::sampling::SamplingParams;
use slipstream_model::transformer::{Transformer, TransformerOptions};
use slipstream_server::engine::request::{PrefixReuse, Priority, Request, Speculation, TenantId};
use slipstream_server::engine::{Engine, EngineConfig, EngineParts};

#[derive(Parser)]
#[command(about = "What a step costs outside the networks")]
struct Args {
    /// The verifier
    #[arg(long, default_value = RUST_VERIFIER)]
    model: PathBuf,
    /// The draft
    #[arg(long, default_value = RUST_DRAFT)]
    draft_model: PathBuf,
    /// Output tokens per completion
    #[arg(long, default_value_t = 192)]
    tokens: usize,
    /// Rounds; each runs every setting once over every prompt
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Threads of each network
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

/// A network that measures its passes.
struct Timed {
    network: Transformer,
    taken_ns: Arc<AtomicU64>,
}

impl Forward for Timed {
    fn limits(&self) -> ForwardLimits {
        self.network.limits()
    }

    fn forward(&mut self, batch: &RaggedBatch, logits: &mut Logits) -> Result<(), ForwardError> {
        let start = Instant::now();
        let result = self.network.forward(batch, logits);
        self.taken_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        result
    }

    fn copy_block(&mut self, from: BlockId, to: BlockId) {
        self.network.copy_block(from, to);
    }
}

/// Microseconds per step of one setting, one number per round.
#[derive(Default)]
struct Measured {
    step_us: Vec<f64>,
    outside_us: Vec<f64>,
    tokens_per_step: f64,
}

struct Bench {
    engine: Engine,
    clock: Arc<dyn Clock>,
    prompts: Vec<Vec<TokenId>>,
    tokens: usize,
    next_id: u64,
    forward_ns: Arc<AtomicU64>,
}

fn read(path: &std::path::Path) -> anyhow::Result<LoadedModel> {
    load(ModelSource::Path(path.to_owned()), &LoadOptions::default(), &mut |_| {})
        .with_context(|| format!("loading {}", path.display()))
}

impl Bench {
    fn new(args: &Args) -> anyhow::Result<Self> {
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
        let forward_ns = Arc::new(AtomicU64::new(0));
        let network = |model: LoadedModel| -> anyhow::Result<Box<Timed>> {
            let packed = Arc::new(PackedLlama::pack(model.config, model.weights)?);
            let options = TransformerOptions {
                num_blocks: 1024,
                threads: args.threads,
                isa: Isa::detect(),
                kv_type: KvType::F32,
            };
            let network = Transformer::new(packed, options)?;
            Ok(Box::new(Timed { network, taken_ns: Arc::clone(&forward_ns) }))
        };
        let verifier = read(&args.model)?;
        let encode = |text: &&str| verifier.tokenizer.encode(text, true).context("a prompt");
        let prompts = PROMPTS.iter().map(encode).collect::<anyhow::Result<_>>()?;
        let token_bytes = verifier.tokenizer.token_bytes();
        let options = ModelProposerOptions {
            target_vocab_size: verifier.config.vocab_size,
            ..ModelProposerOptions::default()
        };
        let draft = network(read(&args.draft_model)?)?;
        let engine = Engine::new(EngineParts {
            config: EngineConfig::default(),
            verifier: network(verifier)?,
            proposer: Some(Box::new(ModelProposer::new(draft, DraftEpoch(1), options))),
            token_bytes,
            clock: Arc::clone(&clock),
            cache_key: [7; 32],
        });
        Ok(Self { engine, clock, prompts, tokens: args.tokens, next_id: 0, forward_ns })
    }

    /// Runs all prompts under one setting.
    fn run(
        &mut self,
        params: &SamplingParams,
        speculation: Speculation,
        measured: &mut Measured,
    ) -> anyhow::Result<()> {
        let (mut step_ns, mut inside_ns, mut num_steps, mut num_tokens) = (0, 0, 0, 0);
        for prompt in &self.prompts {
            let id = SequenceId(self.next_id);
            self.next_id += 1;
            let request = Request {
                prompt: prompt.clone(),
                output_prefix: Vec::new(),
                params: params.clone(),
                stop_strings: Vec::new(),
                max_tokens: self.tokens,
                logprobs: false,
                speculation,
                arrival: self.clock.now(),
                deadline: None,
                tenant: TenantId::default(),
                priority: Priority::Normal,
                prefix_reuse: PrefixReuse::Off,
                sibling: None,
            };
            self.engine.submit(id, request)?;
            self.engine.step(); // the prompt, and a draft that has seen nothing yet
            while !self.engine.is_finished(id) {
                let before_ns = self.forward_ns.load(Ordering::Relaxed);
                let start = Instant::now();
                let report = self.engine.step();
                step_ns += start.elapsed().as_nanos();
                inside_ns += self.forward_ns.load(Ordering::Relaxed) - before_ns;
                num_steps += 1;
                num_tokens += report.num_committed;
            }
            while self.engine.take_event(id).is_some() {}
        }
        let per_step = |ns: f64| ns / 1000.0 / f64::from(num_steps);
        measured.step_us.push(per_step(step_ns as f64));
        measured.outside_us.push(per_step(step_ns as f64 - inside_ns as f64));
        measured.tokens_per_step = num_tokens as f64 / f64::from(num_steps);
        Ok(())
    }
}

/// Names, parameters and draft lengths of what is measured.
fn settings() -> Vec<(&'static str, SamplingParams, Speculation)> {
    let greedy = SamplingParams { seed: 7, ..SamplingParams::greedy() };
    let warm = SamplingParams { temperature: 0.8, ..greedy.clone() };
    let nucleus = SamplingParams { top_p: 0.95, ..warm.clone() };
    let ways = [("greedy", greedy), ("T 0.8", warm), ("T 0.8, top-p 0.95", nucleus)];
    let speculations = [Speculation::Off, Speculation::Fixed(4)];
    let all = ways.into_iter().flat_map(|(name, params)| {
        speculations.map(move |speculation| (name, params.clone(), speculation))
    });
    all.collect()
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut bench = Bench::new(&args)?;
    let mut table: Vec<_> =
        settings().into_iter().map(|setting| (setting, Measured::default())).collect();
    for round in 0..=args.rounds {
        for ((_, params, speculation), measured) in &mut table {
            if round == 0 {
                bench.run(params, *speculation, &mut Measured::default())?; // warms up
            } else {
                bench.run(params, *speculation, measured)?;
            }
        }
    }
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<20}{:<12}{:>9}{:>12} {:>15}{:>8}{:>13}",
        "choice", "setting", "step us", "outside us", "(min-max)", "share", "tokens/step"
    )?;
    for ((name, _, speculation), measured) in &table {
        let (step, outside) = (Spread::of(&measured.step_us), Spread::of(&measured.outside_us));
        writeln!(
            out,
            "{name:<20}{:<12}{:>9.1}{:>12.2} {:>15}{:>7.1}%{:>13.2}",
            label(*speculation),
            step.median,
            outside.median,
            format!("({:.2}-{:.2})", outside.min, outside.max),
            100.0 * outside.median / step.median,
            measured.tokens_per_step,
        )?;
    }
    Ok(())
}
