//! Owns one streamed completion as a client sees it: what came, and when by the client's clock.

use std::time::{Duration, Instant};

use slipstream_proto::v1;
use slipstream_proto::v1::completions_client::CompletionsClient;
use slipstream_proto::v1::generate_event::Event;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Largest response message a command takes, in bytes: several thousand tokens with all extras.
const RESPONSE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A completion received in full.
#[derive(Clone, Debug, Default)]
pub(super) struct Completion {
    /// The server's first word.
    pub(super) started: v1::Started,
    /// All text.
    pub(super) text: String,
    /// All tokens.
    pub(super) tokens: Vec<v1::Token>,
    /// The server's last word.
    pub(super) finished: v1::Finished,
    /// From sending the request to the first token's arrival.
    pub(super) first_token: Duration,
    /// Tokens that arrived together with the first.
    first_len: usize,
    /// From the first token's arrival to the last event's.
    streaming: Duration,
}

impl Completion {
    /// Tokens per second after the first event; `None` when there were none.
    pub(super) fn tokens_per_second(&self) -> Option<f64> {
        let later = self.tokens.len() - self.first_len;
        (later > 0).then(|| later as f64 / self.streaming.as_secs_f64())
    }

    /// Speculation counts.
    pub(super) fn speculation(&self) -> v1::SpeculationStats {
        self.finished.speculation.clone().unwrap_or_default()
    }
}

/// A client on a connection.
pub(super) fn client(channel: Channel) -> CompletionsClient<Channel> {
    CompletionsClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX)
}

/// Streams a completion. `on_tokens` sees every event as it comes.
///
/// # Errors
/// The call's status, or that of a stream that broke off.
pub(super) async fn stream(
    mut client: CompletionsClient<Channel>,
    request: v1::GenerateRequest,
    mut on_tokens: impl FnMut(&v1::Tokens),
) -> Result<Completion, Status> {
    let sent = Instant::now();
    let mut events = client.generate(request).await?.into_inner();
    let mut completion = Completion::default();
    let mut first = None;
    while let Some(event) = events.message().await? {
        match event.event {
            Some(Event::Started(started)) => completion.started = started,
            Some(Event::Tokens(tokens)) => {
                if first.is_none() && !tokens.tokens.is_empty() {
                    first = Some(Instant::now());
                    completion.first_len = tokens.tokens.len();
                    completion.first_token = sent.elapsed();
                }
                on_tokens(&tokens);
                completion.text.push_str(&tokens.text);
                completion.tokens.extend(tokens.tokens);
            }
            Some(Event::Finished(finished)) => {
                completion.finished = finished;
                completion.streaming = first.map_or(Duration::ZERO, |first| first.elapsed());
                return Ok(completion);
            }
            None => {} // an event of a newer server
        }
    }
    Err(Status::new(Code::DataLoss, "the stream broke off before the completion was complete"))
}
