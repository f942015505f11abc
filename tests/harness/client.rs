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
use tonic::{Code, IntoRequest, Status, Streaming};

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
        match stream_samples(client, request.clone()).await {
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

/// The same, `n` times.
#[must_use]
pub fn samples_of(request: v1::GenerateRequest, n: i32) -> v1::GenerateRequest {
    v1::GenerateRequest { n: Some(n), ..request }
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

    /// Prompt tokens that were not computed for it.
    #[must_use]
    pub fn cached_len(&self) -> u32 {
        self.finished.usage.unwrap_or_default().cached_prompt_tokens
    }

    /// Speculation counts.
    #[must_use]
    pub fn speculation(&self) -> v1::SpeculationStats {
        self.finished.speculation.clone().unwrap_or_default()
    }
}

/// Streams a completion of one sample to its end and checks the order of its events.
///
/// # Errors
/// The call's status.
///
/// # Panics
/// When events come in an order that the protocol does not have.
pub async fn stream(client: &Client, request: v1::GenerateRequest) -> Result<Answer, Status> {
    Ok(only(stream_samples(client, request).await?))
}

/// Streams all samples of a completion to their end and checks the order of events.
///
/// # Errors
/// The call's status.
///
/// # Panics
/// As [`stream`].
pub async fn stream_samples(
    client: &Client,
    request: impl IntoRequest<v1::GenerateRequest>,
) -> Result<Vec<Answer>, Status> {
    let request = request.into_request();
    let num_samples = request.get_ref().n.unwrap_or(1).max(1) as usize;
    let mut events = client.clone().generate(request).await?.into_inner();
    let mut answers: Vec<Option<Answer>> = vec![None; num_samples];
    let mut ended = Vec::new();
    while let Some(event) = events.message().await? {
        let is_first = answers.iter().all(Option::is_none);
        match event.event.expect("every event says what happened") {
            Event::Started(started) => {
                assert!(is_first, "Started comes first and once");
                let answer = Answer { started, ..Answer::default() };
                answers.fill(Some(answer));
            }
            Event::Tokens(tokens) => {
                let answer = going(&mut answers, &ended, tokens.sample);
                answer.text.push_str(&tokens.text);
                answer.tokens.extend(tokens.tokens);
            }
            Event::Finished(finished) => {
                let sample = finished.sample;
                going(&mut answers, &ended, sample).finished = finished;
                ended.push(sample);
            }
        }
    }
    if ended.len() < num_samples {
        return Err(Status::new(Code::DataLoss, "the stream ended without Finished"));
    }
    Ok(answers.into_iter().flatten().collect())
}

/// The sample that has news.
fn going<'a>(answers: &'a mut [Option<Answer>], ended: &[u32], sample: u32) -> &'a mut Answer {
    assert!(!ended.contains(&sample), "nothing follows Finished");
    answers[sample as usize].as_mut().expect("Started comes first")
}

fn only(answers: Vec<Answer>) -> Answer {
    assert_eq!(answers.len(), 1, "one sample was asked for");
    answers.into_iter().next().unwrap_or_default()
}

/// Completes one sample in one response.
///
/// # Errors
/// The call's status.
///
/// # Panics
/// When more samples come.
pub async fn complete(client: &Client, request: v1::GenerateRequest) -> Result<Answer, Status> {
    Ok(only(complete_samples(client, request).await?))
}

/// Completes all samples in one response.
///
/// # Errors
/// The call's status.
pub async fn complete_samples(
    client: &Client,
    request: impl IntoRequest<v1::GenerateRequest>,
) -> Result<Vec<Answer>, Status> {
    let response = client.clone().complete(request).await?.into_inner();
    let started = response.started.unwrap_or_default();
    let (text, tokens, finished) = (response.text, response.tokens, response.finished);
    let first = v1::Sample { text, tokens, finished };
    let samples = std::iter::once(first).chain(response.more_samples);
    let answer = |sample: v1::Sample| Answer {
        started: started.clone(),
        text: sample.text,
        tokens: sample.tokens,
        finished: sample.finished.unwrap_or_default(),
    };
    Ok(samples.map(answer).collect())
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
