//! Owns a server on a free loopback port and a gRPC client for it, as the wire tests use them.
//! Knows the protocol; knows nothing of the engine behind it.

use std::time::{Duration, Instant};

use slipstream_proto::v1;
use slipstream_proto::v1::completions_client::CompletionsClient;
use slipstream_proto::v1::generate_event::Event;
use slipstream_proto::v1::generate_request::Prompt;
use slipstream_proto::v1::speculation::Mode;
use slipstream_server::config::{Config, EdgeConfig, ModelFlags};
use slipstream_server::local::LocalServer;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::micro_pair;

/// Far longer than anything here takes: only a server that hangs reaches it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A client of the service under test.
pub type Client = CompletionsClient<Channel>;

/// Settings of a server with the micro pair; `change` makes them the test's own.
///
/// # Panics
/// When the settings are refused.
pub fn config(change: impl FnOnce(&mut ModelFlags)) -> Config {
    let mut flags = micro_pair::flags();
    change(&mut flags);
    checked(&flags)
}

/// Settings of a server that was told nothing about models: it has the embedded pair.
///
/// # Panics
/// When the settings are refused.
#[must_use]
pub fn embedded_config() -> Config {
    checked(&ModelFlags::default())
}

fn checked(flags: &ModelFlags) -> Config {
    Config::new(flags, EdgeConfig::with_grace(Duration::from_secs(20)))
        .expect("the test's settings are valid")
}

/// A ready server with the micro pair.
///
/// # Panics
/// When it does not start.
pub async fn start(change: impl FnOnce(&mut ModelFlags)) -> LocalServer {
    LocalServer::start(config(change)).await.expect("the micro pair starts")
}

/// A client on the server's own connection.
#[must_use]
pub fn client(server: &LocalServer) -> Client {
    CompletionsClient::new(server.channel())
}

/// Where the server listens.
#[must_use]
pub fn url(server: &LocalServer) -> String {
    format!("http://{}", server.address())
}

/// Asks until there is room, and says how long that took: an ended request's place is free once the
/// engine has seen it go.
///
/// # Panics
/// When no room comes, or another error.
pub async fn until_taken(client: &Client, request: &v1::GenerateRequest) -> Duration {
    let begun = Instant::now();
    loop {
        match stream(client, request.clone()).await {
            Ok(_) => return begun.elapsed(),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                assert!(begun.elapsed() < PATIENCE, "the place of an ended request never came");
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Reads a stream to its end: the ids received, and the status unless it came to a good end.
pub async fn read_on(
    events: &mut Streaming<v1::GenerateEvent>,
    mut received: Vec<u32>,
) -> (Vec<u32>, Option<Status>) {
    loop {
        match events.message().await {
            Ok(Some(event)) => {
                if let Some(Event::Tokens(tokens)) = event.event {
                    received.extend(tokens.tokens.iter().map(|token| token.id));
                }
            }
            Ok(None) => return (received, None),
            Err(status) => return (received, Some(status)),
        }
    }
}

/// Runs an asynchronous test body on a runtime of its own.
///
/// # Panics
/// When the body does, or there is no runtime.
pub fn block_on<T>(body: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(1).enable_all().build().expect("a runtime can be had");
    let result = runtime.block_on(body);
    runtime.shutdown_background();
    result
}

/// A greedy request for a text prompt that always runs to `max_tokens`.
#[must_use]
pub fn greedy(prompt: &str, max_tokens: i32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(Prompt::Text(prompt.to_owned())),
        max_tokens: Some(max_tokens),
        temperature: Some(0.0),
        ignore_eos: true,
        seed: Some(1),
        ..v1::GenerateRequest::default()
    }
}

/// The same at a temperature and with a seed.
#[must_use]
pub fn sampled(prompt: &str, max_tokens: i32, seed: u64) -> v1::GenerateRequest {
    v1::GenerateRequest { temperature: Some(0.8), seed: Some(seed), ..greedy(prompt, max_tokens) }
}

/// A speculation mode; `draft_len` only for `Fixed`.
#[must_use]
pub fn speculation(mode: Mode, draft_len: Option<i32>) -> Option<v1::Speculation> {
    Some(v1::Speculation { mode: mode.into(), draft_len })
}

/// Everything a client received of one completion.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// The first event.
    pub started: v1::Started,
    /// All text.
    pub text: String,
    /// All tokens.
    pub tokens: Vec<v1::Token>,
    /// The last event.
    pub finished: v1::Finished,
}

impl Answer {
    /// Ids of all tokens.
    #[must_use]
    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id).collect()
    }

    /// What the promise is about: ids, text and end.
    #[must_use]
    pub fn bytes(&self) -> (Vec<u32>, &str, i32, Option<&v1::finished::Cause>) {
        (self.ids(), &self.text, self.finished.reason, self.finished.cause.as_ref())
    }

    /// Speculation counts.
    #[must_use]
    pub fn speculation(&self) -> v1::SpeculationStats {
        self.finished.speculation.clone().unwrap_or_default()
    }
}

impl From<v1::CompleteResponse> for Answer {
    fn from(response: v1::CompleteResponse) -> Self {
        Self {
            started: response.started.unwrap_or_default(),
            text: response.text,
            tokens: response.tokens,
            finished: response.finished.unwrap_or_default(),
        }
    }
}

/// Streams a completion to its end and checks the order of its events.
///
/// # Errors
/// The call's status.
///
/// # Panics
/// When events come in an order that the protocol does not have.
pub async fn stream(client: &Client, request: v1::GenerateRequest) -> Result<Answer, Status> {
    let mut events = client.clone().generate(request).await?.into_inner();
    let mut answer = Answer::default();
    let mut num_events = 0;
    while let Some(event) = events.message().await? {
        match event.event.expect("every event says what happened") {
            Event::Started(started) => {
                assert_eq!(num_events, 0, "Started comes first and once");
                answer.started = started;
            }
            Event::Tokens(tokens) => {
                assert!(num_events > 0, "Started comes before tokens");
                answer.text.push_str(&tokens.text);
                answer.tokens.extend(tokens.tokens);
            }
            Event::Finished(finished) => {
                assert!(num_events > 0, "Started comes before the end");
                answer.finished = finished;
                assert!(events.message().await?.is_none(), "nothing follows Finished");
                return Ok(answer);
            }
        }
        num_events += 1;
    }
    Err(Status::new(Code::DataLoss, "the stream ended without Finished"))
}

/// Completes in one response.
///
/// # Errors
/// The call's status.
pub async fn complete(client: &Client, request: v1::GenerateRequest) -> Result<Answer, Status> {
    Ok(client.clone().complete(request).await?.into_inner().into())
}

/// A client on a connection of its own that takes so little output before it is read that a long
/// request cannot end unread.
///
/// # Panics
/// When nobody listens there.
pub async fn narrow_client(url: &str) -> Client {
    let endpoint = Endpoint::from_shared(url.to_owned()).expect("a URL");
    let channel = endpoint.initial_stream_window_size(512).connect().await;
    Client::new(channel.expect("somebody listens there"))
}
