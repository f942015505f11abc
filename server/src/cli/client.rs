//! Owns one streamed completion as a client sees it: what came, and how it ended early. What that
//! means for people is in `explain.rs`.

use std::io;
use std::time::{Duration, Instant};

use slipstream_proto::v1;
use slipstream_proto::v1::completions_client::CompletionsClient;
use slipstream_proto::v1::generate_event::Event;
use tonic::transport::Channel;
use tonic::{IntoRequest, Request, Status};

use super::explain;
use crate::grpc::limits;

/// Largest response message a command takes, in bytes: several thousand tokens with all extras.
const RESPONSE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Samples that are listened for, whatever was asked: more than any server gives.
const SAMPLES_MAX: usize = limits::SAMPLES_MAX;

/// A client on a connection.
pub(super) type Client = CompletionsClient<Channel>;

/// A completion as far as it came.
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
    /// Which sample of its seed this is.
    pub(super) sample_index: u32,
    /// The samples behind this one, where several were asked for.
    pub(super) others: Vec<Completion>,
}

impl Completion {
    /// Nothing has come of what this asks for.
    pub(super) fn of(message: &v1::GenerateRequest) -> Self {
        let num_others = usize::try_from(message.n.unwrap_or(1).saturating_sub(1)).unwrap_or(0);
        let sample = |offset| Self {
            sample_index: message.sample_index.saturating_add(offset),
            ..Self::default()
        };
        let others = (1..).take(num_others.min(SAMPLES_MAX - 1)).map(sample).collect();
        Self { others, ..sample(0) }
    }

    /// All samples, this one first.
    pub(super) fn samples(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(&self.others)
    }

    fn sample_mut(&mut self, sample: u32) -> Option<&mut Self> {
        match sample {
            0 => Some(self),
            sample => self.others.get_mut(sample as usize - 1),
        }
    }

    fn start(&mut self, started: v1::Started) {
        self.others.iter_mut().for_each(|other| other.started = started.clone());
        self.started = started;
    }

    /// Tokens per second after the first, by the server's clock. `None` where it would tell
    /// nothing: fewer than two tokens, or all of them from one step.
    pub(super) fn tokens_per_second(&self) -> Option<f64> {
        let timings = self.finished.timings.unwrap_or_default();
        let later = self.finished.usage.unwrap_or_default().output_tokens.checked_sub(1)?;
        let span_ms = timings.total_ms - timings.first_token_ms?;
        let is_telling = later > 0 && self.speculation().steps > 1 && span_ms > 0.0;
        is_telling.then(|| f64::from(later) * 1000.0 / span_ms)
    }

    /// Speculation counts.
    pub(super) fn speculation(&self) -> v1::SpeculationStats {
        self.finished.speculation.clone().unwrap_or_default()
    }
}

/// Why a completion is not there in full.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    /// The server said no, failed or went away.
    #[error("{}", explain::text(.status, .partial))]
    Call {
        /// The call's status.
        status: Status,
        /// What came before.
        partial: Box<Completion>,
    },
    /// The person at the keyboard ended it.
    #[error("interrupted")]
    Interrupted {
        /// What came before.
        partial: Box<Completion>,
    },
    /// The tokens could not be passed on.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// A client on a connection.
pub(super) fn client(channel: Channel) -> Client {
    CompletionsClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX)
}

/// Streams a completion. `on_tokens` sees every event as it comes; its error ends the request.
///
/// # Errors
/// [`StreamError`], with all that came before it.
pub(super) async fn stream(
    client: Client,
    request: impl IntoRequest<v1::GenerateRequest>,
    on_tokens: impl FnMut(&v1::Tokens) -> io::Result<()>,
) -> Result<Completion, StreamError> {
    stream_until(client, request, on_tokens, std::future::pending()).await
}

/// The same, until `interrupted` resolves: the stream is dropped then, which ends the request.
///
/// # Errors
/// [`StreamError`], with all that came before it.
pub(super) async fn stream_until(
    client: Client,
    request: impl IntoRequest<v1::GenerateRequest>,
    on_tokens: impl FnMut(&v1::Tokens) -> io::Result<()>,
    interrupted: impl Future<Output = ()>,
) -> Result<Completion, StreamError> {
    let request = request.into_request();
    let mut completion = Completion::of(request.get_ref());
    let received = tokio::select! {
        // First, so that ctrl-c is listened to before the request leaves.
        biased;
        () = interrupted => Err(Broken::Interrupted),
        received = receive(client, request, on_tokens, &mut completion) => received,
    };
    let partial = Box::new(completion);
    match received {
        Ok(()) => Ok(*partial),
        Err(Broken::Call(status)) => Err(StreamError::Call { status, partial }),
        Err(Broken::Interrupted) => Err(StreamError::Interrupted { partial }),
        Err(Broken::Output(error)) => Err(StreamError::Output(error)),
    }
}

/// A [`StreamError`] that does not hold the completion yet.
enum Broken {
    Call(Status),
    Interrupted,
    Output(io::Error),
}

async fn receive(
    mut client: Client,
    request: Request<v1::GenerateRequest>,
    mut on_tokens: impl FnMut(&v1::Tokens) -> io::Result<()>,
    completion: &mut Completion,
) -> Result<(), Broken> {
    let sent = Instant::now();
    let mut num_left = completion.samples().count();
    let mut events = client.generate(request).await.map_err(Broken::Call)?.into_inner();
    while let Some(event) = events.message().await.map_err(Broken::Call)? {
        match event.event {
            Some(Event::Started(started)) => completion.start(started),
            Some(Event::Tokens(tokens)) => {
                let sample = completion.sample_mut(tokens.sample).ok_or_else(unasked)?;
                if sample.tokens.is_empty() && !tokens.tokens.is_empty() {
                    sample.first_token = sent.elapsed();
                }
                on_tokens(&tokens).map_err(Broken::Output)?;
                sample.text.push_str(&tokens.text);
                sample.tokens.extend(tokens.tokens);
            }
            Some(Event::Finished(finished)) => {
                let sample = completion.sample_mut(finished.sample).ok_or_else(unasked)?;
                sample.finished = finished;
                num_left -= 1;
                if num_left == 0 {
                    return Ok(());
                }
            }
            None => {} // an event of a newer server
        }
    }
    Err(Broken::Call(Status::data_loss("the server ended it before it was complete")))
}

fn unasked() -> Broken {
    Broken::Call(Status::data_loss("the server sent a sample that nobody asked for"))
}

#[cfg(test)]
mod tests {
    use super::Completion;
    use slipstream_proto::v1;

    #[test]
    fn a_rate_needs_two_tokens_and_two_steps() {
        let rate = |output_tokens, steps| {
            let finished = v1::Finished {
                usage: Some(v1::Usage { output_tokens, ..v1::Usage::default() }),
                timings: Some(v1::Timings {
                    first_token_ms: Some(10.0),
                    total_ms: 20.0,
                    ..v1::Timings::default()
                }),
                speculation: Some(v1::SpeculationStats {
                    steps,
                    ..v1::SpeculationStats::default()
                }),
                ..v1::Finished::default()
            };
            Completion { finished, ..Completion::default() }.tokens_per_second()
        };
        assert_eq!(rate(11, 4), Some(1000.0));
        assert_eq!([rate(0, 0), rate(1, 1), rate(2, 1)], [None; 3]);
        assert_eq!(Completion::default().tokens_per_second(), None);
    }
}
