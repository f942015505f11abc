//! The cost of the wire: the same load in this process and over gRPC on the loopback interface,
//! with one connection for all streams and with one for each. Plain beside speculative, and two
//! models: the embedded pair, whose steps are so short that every microsecond of the wire shows,
//! and a larger verifier with random weights, whose steps take as long as real ones.
//!
//! `cargo bench -p slipstream-benches --bench wire -- --help`

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use slipstream_benches::random_model::RandomModel;
use slipstream_benches::stats::Spread;
use slipstream_benches::{PROMPTS, label};
use slipstream_model::clock::{Clock, MonotonicClock};
use slipstream_model::ids::TokenId;
use slipstream_model::sampling::SamplingParams;
use slipstream_proto::v1;
use slipstream_proto::v1::completions_client::CompletionsClient;
use slipstream_proto::v1::generate_event;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::speculation::Mode;
use slipstream_server::config::{Config, EdgeConfig, ModelFlags};
use slipstream_server::engine::event::Event;
use slipstream_server::engine::request::{Request, Speculation};
use slipstream_server::engine::runner::{self, EngineThread};
use slipstream_server::handle::EngineHandle;
use slipstream_server::local::{LocalServer, connect};
use slipstream_server::startup::assemble;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// How long anything may take to end.
const GRACE: Duration = Duration::from_secs(5);
/// What the table calls the model of the binary.
const MICRO: &str = "micro";

#[derive(Parser)]
#[command(about = "The same load in this process and over gRPC")]
struct Args {
    /// Streams at the same time
    #[arg(long, default_value_t = 16)]
    streams: usize,
    /// Output tokens per stream [default: 192 with the micro pair, 48 with the random verifier]
    #[arg(long)]
    tokens: Option<usize>,
    /// Rounds; each runs every setting once [default: 21 with the micro pair, 5 with the random
    /// verifier]
    #[arg(long)]
    rounds: Option<usize>,
    /// Models
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Model::Micro, Model::Random])]
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

/// How a load reaches the engine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    InProcess,
    OneConnection,
    ConnectionEach,
}

const WAYS: [Way; 3] = [Way::InProcess, Way::OneConnection, Way::ConnectionEach];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::InProcess => "in-process",
            Way::OneConnection => "gRPC, 1 conn.",
            Way::ConnectionEach => "gRPC, 1 each",
        }
    }
}

/// What one load brought.
struct Figures {
    tokens_per_s: f64,
    /// Median over the streams.
    ttft_ms: f64,
    /// Of the stream that waited longest.
    ttft_last_ms: f64,
    tokens_per_event: f64,
}

/// One setting and its figures, one per round.
struct Measured {
    way: Way,
    speculation: Speculation,
    rounds: Vec<Figures>,
}

/// What one stream saw.
struct Seen {
    ids: Vec<TokenId>,
    ttft_ms: f64,
    num_events: usize,
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
    prompts: Vec<Vec<TokenId>>,
    tokens: usize,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut out = std::io::stdout().lock();
    for &model in &args.models {
        let (tokens, rounds) = match model {
            Model::Micro => (192, 21),
            Model::Random => (48, 5),
        };
        let tokens = args.tokens.unwrap_or(tokens);
        let rounds = args.rounds.unwrap_or(rounds);
        let folder = tempfile::tempdir()?;
        let mut flags = ModelFlags { threads: args.threads, ..ModelFlags::default() };
        let mut name = MICRO.to_owned();
        if model == Model::Random {
            let shape = RandomModel { hidden_len: args.hidden, num_layers: args.layers };
            shape.write(folder.path())?;
            name = format!("random, {:.1} million weights", shape.num_weights() as f64 / 1e6);
            flags.model = folder.path().to_str().map(str::to_owned);
            flags.draft_model = Some("embedded".to_owned());
        }
        let bench = Bench::start(&flags, args.streams, tokens)?;
        let table = bench.measure(&args.speculation, rounds)?;
        bench.stop()?;
        writeln!(out, "\n{name}: {rounds} rounds x {} streams x {tokens} tokens", args.streams)?;
        write_table(&mut out, &table)?;
    }
    Ok(())
}

impl Bench {
    fn start(flags: &ModelFlags, num_streams: usize, tokens: usize) -> anyhow::Result<Self> {
        let config = Config::new(flags, EdgeConfig::with_grace(GRACE))?;
        let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
        let assembly = assemble(&config, Arc::clone(&clock))?;
        let tokenizer = assembly.tokenizer();
        let prompts = (0..num_streams)
            .map(|index| {
                let text = format!("// Part {index}.\n{}", PROMPTS[index % PROMPTS.len()]);
                tokenizer.encode(&text, true).context("tokenising a prompt")
            })
            .collect::<anyhow::Result<_>>()?;
        let (engine, thread) = runner::spawn(assembly.engine, config.requests_max())?;
        let (server_runtime, client_runtime) = (one_thread()?, one_thread()?);
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
            prompts,
            tokens,
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
        let begun = Instant::now();
        for (index, prompt) in self.prompts.iter().enumerate() {
            let prompt = prompt.clone();
            match way {
                Way::InProcess => {
                    let request = self.request(prompt, speculation);
                    let engine = self.engine.clone();
                    streams.spawn(async move { (index, in_process(engine, request).await) });
                }
                Way::OneConnection | Way::ConnectionEach => {
                    let message = self.message(&prompt, speculation);
                    let client = match way {
                        Way::ConnectionEach => self.own[index].clone(),
                        Way::InProcess | Way::OneConnection => self.shared.clone(),
                    };
                    streams.spawn(async move { (index, over_grpc(client, message).await) });
                }
            }
        }
        let mut seen: Vec<Option<Seen>> = self.prompts.iter().map(|_| None).collect();
        while let Some(ended) = streams.join_next().await {
            let (index, stream) = ended?;
            seen[index] = Some(stream?);
        }
        let elapsed_s = begun.elapsed().as_secs_f64();
        let seen: Vec<Seen> = seen.into_iter().flatten().collect();
        let num_tokens: usize = seen.iter().map(|stream| stream.ids.len()).sum();
        ensure!(num_tokens == self.prompts.len() * self.tokens, "{num_tokens} tokens came");
        let ttft_ms: Vec<f64> = seen.iter().map(|stream| stream.ttft_ms).collect();
        let num_events: usize = seen.iter().map(|stream| stream.num_events).sum();
        let figures = Figures {
            tokens_per_s: num_tokens as f64 / elapsed_s,
            ttft_ms: Spread::of(&ttft_ms).median,
            ttft_last_ms: Spread::of(&ttft_ms).max,
            tokens_per_event: num_tokens as f64 / num_events as f64,
        };
        Ok((figures, seen.into_iter().map(|stream| stream.ids).collect()))
    }

    fn request(&self, prompt: Vec<TokenId>, speculation: Speculation) -> Request {
        Request {
            prompt,
            output_prefix: Vec::new(),
            params: SamplingParams { seed: 7, ..SamplingParams::greedy() },
            stop_strings: Vec::new(),
            max_tokens: self.tokens,
            logprobs: false,
            speculation,
            arrival: self.clock.now(),
            deadline: None,
        }
    }

    fn message(&self, prompt: &[TokenId], speculation: Speculation) -> v1::GenerateRequest {
        let mode = match speculation {
            Speculation::Off => Mode::Off,
            Speculation::Auto => Mode::Auto,
            Speculation::Fixed(_) => Mode::Fixed,
        };
        let ids = prompt.iter().map(|id| id.0).collect();
        v1::GenerateRequest {
            prompt: Some(Prompt::TokenIds(v1::TokenIds { ids })),
            max_tokens: i32::try_from(self.tokens).ok(),
            temperature: Some(0.0),
            seed: Some(7),
            ignore_eos: true,
            speculation: Some(v1::Speculation { mode: mode.into(), draft_len: None }),
            ..v1::GenerateRequest::default()
        }
    }
}

/// A runtime as `slipstream serve` has it on a small machine.
fn one_thread() -> anyhow::Result<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

async fn in_process(engine: EngineHandle, request: Request) -> anyhow::Result<Seen> {
    let begun = Instant::now();
    let mut stream = engine.submit(request).await?;
    let mut seen = Seen::new();
    while let Some(event) = stream.next().await {
        match event {
            Event::Tokens(tokens) => seen.add(begun, tokens.tokens.iter().map(|token| token.id)),
            Event::Finished(_) => return Ok(seen),
        }
    }
    anyhow::bail!("the engine ended")
}

async fn over_grpc(
    mut client: CompletionsClient<Channel>,
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
            generate_event::Event::Finished(_) => {}
        }
    }
    Ok(seen)
}

impl Seen {
    fn new() -> Self {
        Self { ids: Vec::new(), ttft_ms: f64::NAN, num_events: 0 }
    }

    fn add(&mut self, begun: Instant, ids: impl Iterator<Item = TokenId>) {
        if self.num_events == 0 {
            self.ttft_ms = begun.elapsed().as_secs_f64() * 1000.0;
        }
        self.num_events += 1;
        self.ids.extend(ids);
    }
}

/// Differences to the load in this process are taken within each round; their median and span are
/// printed.
fn write_table(out: &mut impl Write, table: &[Measured]) -> anyhow::Result<()> {
    writeln!(
        out,
        "{:<7}{:<14}{:>9} {:>17}{:>9} {:>24}{:>9} {:>15}{:>24}{:>10}{:>13}",
        "setting",
        "way",
        "tokens/s",
        "(min-max)",
        "x plain",
        "difference",
        "TTFT ms",
        "(min-max)",
        "difference",
        "last ms",
        "tokens/event"
    )?;
    for measured in table {
        let find = |way: Way, speculation: Speculation| {
            table.iter().find(|other| other.way == way && other.speculation == speculation)
        };
        let inside = find(Way::InProcess, measured.speculation).context("every way is measured")?;
        let plain = find(measured.way, Speculation::Off);
        let speed = measured.spread(|figures| figures.tokens_per_s);
        let ttft = measured.spread(|figures| figures.ttft_ms);
        let gain = plain.map(|plain| speed.median / plain.spread(|f| f.tokens_per_s).median);
        writeln!(
            out,
            "{:<7}{:<14}{:>9.0} {:>17}{:>9} {:>24}{:>9.2} {:>15}{:>24}{:>10.2}{:>13.2}",
            label(measured.speculation),
            measured.way.name(),
            speed.median,
            format!("({:.0}-{:.0})", speed.min, speed.max),
            gain.map_or_else(|| "-".to_owned(), |gain| format!("{gain:.2}")),
            measured.difference(inside, |figures| figures.tokens_per_s),
            ttft.median,
            format!("({:.2}-{:.2})", ttft.min, ttft.max),
            measured.difference(inside, |figures| figures.ttft_ms),
            measured.spread(|figures| figures.ttft_last_ms).median,
            measured.spread(|figures| figures.tokens_per_event).median,
        )?;
    }
    Ok(())
}

impl Measured {
    fn spread(&self, figure: impl Fn(&Figures) -> f64) -> Spread {
        Spread::of(&self.rounds.iter().map(figure).collect::<Vec<_>>())
    }

    /// How much larger a figure is than the one of the load in this process.
    fn difference(&self, inside: &Self, figure: impl Fn(&Figures) -> f64) -> String {
        if self.way == Way::InProcess {
            return "-".to_owned();
        }
        let pairs = self.rounds.iter().zip(&inside.rounds);
        let percent = pairs.map(|(wire, inside)| 100.0 * (figure(wire) / figure(inside) - 1.0));
        let spread = Spread::of(&percent.collect::<Vec<_>>());
        format!("{:+.1} % ({:+.1} to {:+.1})", spread.median, spread.min, spread.max)
    }
}
