//! The cost of the wire: the same load in this process and over gRPC on the loopback interface,
//! with one connection for all streams and with one for each. Every stream asks for one completion
//! after another, of lengths of its own, so that requests arrive while others run. Plain beside
//! speculative, and two models: the micro pair, whose steps are so short that every microsecond of
//! the wire shows, and a larger verifier with random weights, whose steps take as long as real
//! ones.
//!
//! `cargo bench -p slipstream-benches --bench wire -- --help`

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use slipstream_benches::random_model::RandomModel;
use slipstream_benches::stats::Spread;
use slipstream_benches::wire_table::{Figures, Measured, WAYS, Way, write_table};
use slipstream_benches::{MICRO_DRAFT, MICRO_VERIFIER, PROMPTS};
use slipstream_model::clock::{Clock, Micros, MonotonicClock};
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;
use slipstream_proto::v1;
use slipstream_proto::v1::completions_client::CompletionsClient;
use slipstream_proto::v1::generate_event;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::speculation::Mode;
use slipstream_server::config::{Config, EdgeConfig, ModelFlags};
use slipstream_server::engine::event::Event;
use slipstream_server::engine::request::{PrefixReuse, Priority, Request, Speculation, TenantId};
use slipstream_server::engine::runner::EngineThread;
use slipstream_server::handle::{Canceller, EngineHandle};
use slipstream_server::local::{LocalServer, connect};
use slipstream_server::startup::assemble;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// How long anything may take to end.
const GRACE: Duration = Duration::from_secs(5);
/// What the table calls the micro pair.
const MICRO: &str = "micro";

#[derive(Parser)]
#[command(about = "The same load in this process and over gRPC")]
struct Args {
    /// Streams at the same time
    #[arg(long, default_value_t = 16)]
    streams: usize,
    /// Mean output tokens of a completion [default: 128 with the micro pair, 24 with the random
    /// verifier]
    #[arg(long)]
    tokens: Option<usize>,
    /// Completions that every stream asks for, one after another
    #[arg(long, default_value_t = 4)]
    completions: usize,
    /// Rounds; each runs every setting once [default: 21 with the micro pair, 5 with the random
    /// verifier]
    #[arg(long)]
    rounds: Option<usize>,
    /// Models
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_values_t = [Model::Micro, Model::Random]
    )]
    models: Vec<Model>,
    /// Ways to speculate
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Mood::Off, Mood::Auto])]
    speculation: Vec<Mood>,
    /// Width of the random verifier
    #[arg(long, default_value_t = 768)]
    hidden: usize,
    /// Layers of the random verifier
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// Threads of the networks [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Passed by cargo; ignored
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Model {
    Micro,
    Random,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mood {
    Off,
    Auto,
}

/// What the client saw of one completion.
struct Seen {
    ids: Vec<TokenId>,
    ttft_ms: f64,
    /// Time to first token as the engine reports it.
    engine_ttft_ms: f64,
    num_events: usize,
}

/// One completion to ask for.
#[derive(Clone)]
struct Asked {
    prompt: Vec<TokenId>,
    num_tokens: usize,
}

/// An engine in this process and a server with another, of the same settings.
struct Bench {
    /// The server's async threads, and those of the clients: in life they are two processes.
    server_runtime: Runtime,
    client_runtime: Runtime,
    engine: EngineHandle,
    thread: EngineThread,
    clock: Arc<dyn Clock>,
    server: LocalServer,
    shared: CompletionsClient<Channel>,
    own: Vec<CompletionsClient<Channel>>,
    /// What each stream asks for, one after another.
    asked: Vec<Vec<Asked>>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut out = std::io::stdout().lock();
    for &model in &args.models {
        let (tokens, rounds) = match model {
            Model::Micro => (128, 21),
            Model::Random => (24, 5),
        };
        let tokens = args.tokens.unwrap_or(tokens);
        let rounds = args.rounds.unwrap_or(rounds);
        let folder = tempfile::tempdir()?;
        let mut flags = ModelFlags {
            model: Some(MICRO_VERIFIER.to_owned()),
            draft_model: Some(MICRO_DRAFT.to_owned()),
            threads: args.threads,
            ..ModelFlags::default()
        };
        let mut name = MICRO.to_owned();
        if model == Model::Random {
            let shape = RandomModel { hidden_len: args.hidden, num_layers: args.layers };
            shape.write(folder.path())?;
            name = format!("random, {:.1} million weights", shape.num_weights() as f64 / 1e6);
            flags.model = folder.path().to_str().map(str::to_owned);
        }
        let bench = Bench::start(&flags, [args.streams, args.completions, tokens])?;
        let table = bench.measure(&args.speculation, rounds)?;
        bench.stop()?;
        let (streams, completions) = (args.streams, args.completions);
        writeln!(
            out,
            "\n{name}: {rounds} rounds x {streams} streams x {completions} completions of about \
             {tokens} tokens"
        )?;
        write_table(&mut out, &table)?;
    }
    Ok(())
}

impl Bench {
    /// `sizes`: streams, completions of each, mean tokens of a completion.
    fn start(flags: &ModelFlags, sizes: [usize; 3]) -> anyhow::Result<Self> {
        let [num_streams, num_completions, tokens] = sizes;
        let config = Config::new(flags, EdgeConfig::with_grace(GRACE))?;
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
        let assembly = assemble(&config, Arc::clone(&clock))?;
        let mut asked = vec![Vec::new(); num_streams];
        for (stream, asked) in asked.iter_mut().enumerate() {
            for index in 0..num_completions {
                let text = format!("// Part {stream}.{index}\n{}", PROMPTS[stream % PROMPTS.len()]);
                let prompt = assembly.tokenizer().encode(&text, true).context("tokenising")?;
                // Half to one and a half times the mean, in an order without pattern.
                let sixteenths = 8 + (7 * stream + 5 * index) % 17;
                asked.push(Asked { prompt, num_tokens: (tokens * sixteenths / 16).max(2) });
            }
        }
        let (engine, thread) = assembly.spawn(&clock, config.requests_max())?;
        let (server_runtime, client_runtime) = (one_thread("server")?, one_thread("client")?);
        let server = server_runtime.block_on(LocalServer::start(config))?;
        let address = format!("http://{}", server.address());
        let mut clients = client_runtime.block_on(async {
            let mut clients = Vec::new();
            for _ in 0..=num_streams {
                clients.push(CompletionsClient::new(connect(&address).await?));
            }
            anyhow::Ok(clients)
        })?;
        let shared = clients.pop().context("there is one connection more than streams")?;
        let own = clients;
        Ok(Self {
            server_runtime,
            client_runtime,
            engine,
            thread,
            clock,
            server,
            shared,
            own,
            asked,
        })
    }

    fn stop(self) -> anyhow::Result<()> {
        self.engine.stop();
        drop((self.shared, self.own));
        self.server_runtime.block_on(self.server.stop())?;
        ensure!(self.thread.join().is_ok(), "the engine panicked");
        Ok(())
    }

    /// Runs all settings in turn, `rounds` times, after one round to warm up. Every round begins
    /// with another setting, so that none always has the same neighbour.
    fn measure(&self, moods: &[Mood], rounds: usize) -> anyhow::Result<Vec<Measured>> {
        let mut table = Vec::new();
        for mood in moods {
            let speculation = match mood {
                Mood::Off => Speculation::Off,
                Mood::Auto => Speculation::Auto,
            };
            table.extend(WAYS.map(|way| Measured { way, speculation, rounds: Vec::new() }));
        }
        let mut expected: Option<Vec<Vec<TokenId>>> = None;
        for round in 0..=rounds {
            for turn in 0..table.len() {
                let index = (turn + round) % table.len();
                let measured = &mut table[index];
                let (way, speculation) = (measured.way, measured.speculation);
                let (figures, ids) = self.client_runtime.block_on(self.load(way, speculation))?;
                let expected = expected.get_or_insert_with(|| ids.clone());
                ensure!(*expected == ids, "{} {speculation:?} changed an output", way.name());
                if round > 0 {
                    measured.rounds.push(figures);
                }
            }
        }
        Ok(table)
    }

    /// All streams at once, to their ends.
    async fn load(
        &self,
        way: Way,
        speculation: Speculation,
    ) -> anyhow::Result<(Figures, Vec<Vec<TokenId>>)> {
        let mut streams = JoinSet::new();
        let cpu = cpu_us();
        let begun = Instant::now();
        for (index, asked) in self.asked.iter().enumerate() {
            let source = match way {
                Way::InProcess => Source::InProcess(self.engine.clone(), Arc::clone(&self.clock)),
                Way::OneConnection => Source::Grpc(self.shared.clone()),
                Way::ConnectionEach => Source::Grpc(self.own[index].clone()),
            };
            let asked = asked.clone();
            streams.spawn(async move { (index, source.complete_all(asked, speculation).await) });
        }
        let mut seen: Vec<Vec<Seen>> = self.asked.iter().map(|_| Vec::new()).collect();
        while let Some(ended) = streams.join_next().await {
            let (index, stream) = ended?;
            seen[index] = stream?;
        }
        let elapsed_s = begun.elapsed().as_secs_f64();
        let cpu_us = cpu_us() - cpu;
        let seen: Vec<Seen> = seen.into_iter().flatten().collect();
        let num_tokens: usize = seen.iter().map(|each| each.ids.len()).sum();
        let wanted: usize = self.asked.iter().flatten().map(|asked| asked.num_tokens).sum();
        ensure!(num_tokens == wanted, "{num_tokens} tokens came instead of {wanted}");
        let ttft_ms: f64 = seen.iter().map(|each| each.ttft_ms).sum();
        let outside_ms = seen.iter().map(|each| each.ttft_ms - each.engine_ttft_ms);
        let num_events: usize = seen.iter().map(|each| each.num_events).sum();
        let figures = Figures {
            tokens_per_s: num_tokens as f64 / elapsed_s,
            ttft_ms: ttft_ms / seen.len() as f64,
            outside_ms: Spread::of(&outside_ms.collect::<Vec<_>>()).median,
            tokens_per_event: num_tokens as f64 / num_events as f64,
            cpu_us_per_token: cpu_us / num_tokens as f64,
        };
        Ok((figures, seen.into_iter().map(|each| each.ids).collect()))
    }
}

/// Processor time that the threads of this process have taken; NaN where the kernel does not say.
fn cpu_us() -> f64 {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return f64::NAN };
    let of_task = |path: std::path::PathBuf| -> Option<f64> {
        let text = std::fs::read_to_string(path.join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    };
    let nanoseconds: Vec<f64> = tasks.flatten().filter_map(|task| of_task(task.path())).collect();
    if nanoseconds.is_empty() { f64::NAN } else { nanoseconds.iter().sum::<f64>() / 1000.0 }
}

fn request(asked: Asked, speculation: Speculation, arrival: Micros) -> Request {
    Request {
        prompt: asked.prompt,
        output_prefix: Vec::new(),
        params: SamplingParams { seed: 7, ..SamplingParams::greedy() },
        stop_strings: Vec::new(),
        max_tokens: asked.num_tokens,
        logprobs: false,
        speculation,
        arrival,
        deadline: None,
        tenant: TenantId::default(),
        priority: Priority::Normal,
        prefix_reuse: PrefixReuse::Off,
        sibling: None,
    }
}

fn message(asked: &Asked, speculation: Speculation) -> v1::GenerateRequest {
    let mode = match speculation {
        Speculation::Off => Mode::Off,
        Speculation::Auto => Mode::Auto,
        Speculation::Fixed(_) => Mode::Fixed,
    };
    let ids = asked.prompt.iter().map(|id| id.0).collect();
    v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids })),
        max_tokens: i32::try_from(asked.num_tokens).ok(),
        temperature: Some(0.0),
        seed: Some(7),
        ignore_eos: true,
        // Rounds repeat their prompts, and each shall cost what the first one costs.
        no_prefix_reuse: true,
        speculation: Some(v1::Speculation { mode: mode.into(), draft_len: None }),
        ..v1::GenerateRequest::default()
    }
}

/// A runtime as `slipstream serve` has it on a small machine.
fn one_thread(name: &str) -> anyhow::Result<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(name)
        .enable_all()
        .build()?)
}

/// Where one stream's completions come from.
enum Source {
    InProcess(EngineHandle, Arc<dyn Clock>),
    Grpc(CompletionsClient<Channel>),
}

impl Source {
    async fn complete_all(
        mut self,
        asked: Vec<Asked>,
        speculation: Speculation,
    ) -> anyhow::Result<Vec<Seen>> {
        let mut all = Vec::new();
        for asked in asked {
            all.push(match &mut self {
                Source::InProcess(engine, clock) => {
                    in_process(engine, request(asked, speculation, clock.now())).await?
                }
                Source::Grpc(client) => over_grpc(client, message(&asked, speculation)).await?,
            });
        }
        Ok(all)
    }
}

async fn in_process(engine: &EngineHandle, request: Request) -> anyhow::Result<Seen> {
    let begun = Instant::now();
    let mut stream = engine.submit(request, &Canceller::default()).await?;
    let mut seen = Seen::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::Tokens(tokens) => seen.add(begun, tokens.tokens.iter().map(|token| token.id)),
            Event::Finished(finished) => {
                let first = finished.timings.first_token;
                seen.engine_ttft_ms = first.context("no token came")?.as_millis_f64();
                return Ok(seen);
            }
        }
    }
    anyhow::bail!("the engine ended")
}

async fn over_grpc(
    client: &mut CompletionsClient<Channel>,
    message: v1::GenerateRequest,
) -> anyhow::Result<Seen> {
    let begun = Instant::now();
    let mut stream = client.generate(message).await?.into_inner();
    let mut seen = Seen::new();
    while let Some(event) = stream.message().await? {
        match event.event.context("an event says what happened")? {
            generate_event::Event::Started(_) => {}
            generate_event::Event::Tokens(tokens) => {
                seen.add(begun, tokens.tokens.iter().map(|token| TokenId(token.id)));
            }
            generate_event::Event::Finished(finished) => {
                let timings = finished.timings.context("every end has its times")?;
                seen.engine_ttft_ms = timings.first_token_ms.context("no token came")?;
            }
        }
    }
    Ok(seen)
}

impl Seen {
    fn new() -> Self {
        Self { ids: Vec::new(), ttft_ms: f64::NAN, engine_ttft_ms: f64::NAN, num_events: 0 }
    }

    fn add(&mut self, begun: Instant, ids: impl Iterator<Item = TokenId>) {
        if self.num_events == 0 {
            self.ttft_ms = begun.elapsed().as_secs_f64() * 1000.0;
        }
        self.num_events += 1;
        self.ids.extend(ids);
    }
}
