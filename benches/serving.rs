//! Owns a server in this process for benches that speak gRPC to it: its start, its clients, one
//! streamed completion with its times, and what the server counts. Knows no loads and no tables.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use slipstream_model::ids::TokenId;
use slipstream_proto::v1;
use slipstream_proto::v1::completions_client::CompletionsClient;
use slipstream_proto::v1::generate_event;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::speculation::Mode;
use slipstream_server::config::{Config, EdgeConfig, ModelFlags};
use slipstream_server::engine::request::Speculation;
use slipstream_server::local::{LocalServer, connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tonic::Code;
use tonic::transport::Channel;

use crate::arrivals::Wanted;

/// How long anything may take to end.
const GRACE: Duration = Duration::from_secs(30);
/// Streams of one connection: more than any bench opens.
const STREAMS_MAX: u32 = 1 << 16;

/// A client of the server.
pub type Client = CompletionsClient<Channel>;

/// A server, and some connections to it. Both have async threads of their own: in life they are
/// two processes.
pub struct Serving {
    server_runtime: Runtime,
    /// For whoever drives the clients.
    pub client_runtime: Runtime,
    server: LocalServer,
    /// One per connection.
    pub clients: Vec<Client>,
}

impl Serving {
    /// Starts a server with these settings and opens connections.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(flags: &ModelFlags, num_connections: usize) -> anyhow::Result<Self> {
        let mut config = Config::new(flags, EdgeConfig::with_grace(GRACE))?;
        config.edge.net.streams_max = STREAMS_MAX;
        let (server_runtime, client_runtime) = (one_thread("server")?, one_thread("client")?);
        let server = server_runtime.block_on(LocalServer::start(config))?;
        let address = format!("http://{}", server.address());
        let clients = client_runtime.block_on(async {
            let mut clients = Vec::new();
            for _ in 0..num_connections {
                clients.push(CompletionsClient::new(connect(&address).await?));
            }
            anyhow::Ok(clients)
        })?;
        Ok(Self { server_runtime, client_runtime, server, clients })
    }

    /// Everything without labels that the server counts, by name.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn counted(&self) -> anyhow::Result<BTreeMap<String, f64>> {
        let page = self.client_runtime.block_on(async {
            let address = self.server.address();
            let mut stream = TcpStream::connect(address).await?;
            let head = "GET /metrics HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";
            stream.write_all(head.as_bytes()).await?;
            let mut page = String::new();
            stream.read_to_string(&mut page).await?;
            anyhow::Ok(page)
        })?;
        let samples = page.lines().filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            let name = name.strip_prefix("slipstream_")?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Ok(samples.collect())
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn stop(self) -> anyhow::Result<()> {
        drop(self.clients);
        Ok(self.server_runtime.block_on(self.server.stop())?)
    }
}

/// A runtime as `slipstream serve` has it on a small machine.
fn one_thread(name: &str) -> anyhow::Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    Ok(builder.worker_threads(1).thread_name(name).enable_all().build()?)
}

/// What a client saw of one completion.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// When each event with tokens came, and with how many.
    pub events: Vec<(Instant, usize)>,
}

/// How one call ended.
#[derive(Clone, Debug)]
pub enum Ended {
    /// With everything that was asked for.
    Finished,
    /// The server was full and refused it.
    Shed,
    /// In any other way.
    Failed(String),
}

impl Seen {
    /// When the first token came.
    #[must_use]
    pub fn first(&self) -> Option<Instant> {
        self.events.first().map(|(at, _)| *at)
    }

    /// When the last token came.
    #[must_use]
    pub fn last(&self) -> Option<Instant> {
        self.events.last().map(|(at, _)| *at)
    }

    /// Tokens that came until then.
    #[must_use]
    pub fn tokens_until(&self, then: Instant) -> usize {
        let early = self.events.iter().filter(|(at, _)| *at <= then);
        early.map(|(_, num)| num).sum()
    }
}

/// The request for what is wanted: greedy, and no end token ends it.
#[must_use]
pub fn message(wanted: &Wanted, speculation: Speculation) -> v1::GenerateRequest {
    let (mode, draft_len) = match speculation {
        Speculation::Off => (Mode::Off, None),
        Speculation::Auto => (Mode::Auto, None),
        Speculation::Fixed(len) => (Mode::Fixed, i32::try_from(len).ok()),
    };
    let ids = wanted.prompt.iter().map(|TokenId(id)| *id).collect();
    v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids })),
        max_tokens: i32::try_from(wanted.num_tokens).ok(),
        temperature: Some(0.0),
        seed: Some(7),
        ignore_eos: true,
        speculation: Some(v1::Speculation { mode: mode.into(), draft_len }),
        ..v1::GenerateRequest::default()
    }
}

/// Streams one completion to its end; `on_event` hears of every event with tokens as it comes.
pub async fn complete(
    client: &mut Client,
    message: v1::GenerateRequest,
    mut on_event: impl FnMut(&Seen),
) -> (Seen, Ended) {
    let mut seen = Seen::default();
    let ended = follow(client, message, &mut seen, &mut on_event).await;
    let ended = match ended {
        Ok(()) => Ended::Finished,
        Err(error) => match error.downcast_ref::<tonic::Status>().map(tonic::Status::code) {
            Some(Code::ResourceExhausted) if seen.events.is_empty() => Ended::Shed,
            Some(_) | None => Ended::Failed(error.to_string()),
        },
    };
    (seen, ended)
}

async fn follow(
    client: &mut Client,
    message: v1::GenerateRequest,
    seen: &mut Seen,
    on_event: &mut impl FnMut(&Seen),
) -> anyhow::Result<()> {
    let mut stream = client.generate(message).await?.into_inner();
    while let Some(event) = stream.message().await? {
        match event.event.context("an event says what happened")? {
            generate_event::Event::Started(_) => {}
            generate_event::Event::Tokens(tokens) if tokens.tokens.is_empty() => {}
            generate_event::Event::Tokens(tokens) => {
                seen.events.push((Instant::now(), tokens.tokens.len()));
                on_event(seen);
            }
            generate_event::Event::Finished(_) => return Ok(()),
        }
    }
    anyhow::bail!("the stream ended without its end")
}
