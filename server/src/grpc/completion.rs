//! Owns a completion that the engine works on, seen from the wire: its samples, asked in turn, as
//! one stream of events or one response, and how the end of one of them ends the others. A client
//! that goes away drops it, and with it the engine's requests. Decides no codes and translates no
//! messages itself.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use slipstream_model::token_bytes::TokenBytes;
use slipstream_proto::v1;
use slipstream_proto::v1::generate_event;
use tokio_stream::Stream;
use tonic::Status;

use crate::engine::event::{CancelReason, Event};
use crate::grpc::events;
use crate::grpc::live_calls::Entry;
use crate::grpc::status::CallError;
use crate::handle::RequestStream;

/// What a completion is known by and what its events need.
pub(crate) struct About {
    /// Its place among the live calls.
    pub(crate) entry: Entry,
    /// Names it in logs.
    pub(crate) request_id: String,
    /// The stop strings as text, in the request's order.
    pub(crate) stop_strings: Vec<String>,
    /// For clients that want the bytes of every token.
    pub(crate) token_bytes: Option<Arc<TokenBytes>>,
    /// What its client may take nothing for.
    pub(crate) stall_limit: Duration,
}

/// A request that the engine works on. Dropping it cancels the request.
pub(crate) struct Completion {
    samples: Vec<Sample>,
    /// The sample that is asked first: the one behind that which last had news.
    next: usize,
    /// How the call ends once all samples have, because one of them failed.
    failed: Option<CallError>,
    about: About,
    /// Where its log lines belong.
    span: tracing::Span,
}

/// One sample of it.
struct Sample {
    stream: RequestStream,
    is_over: bool,
}

impl Completion {
    /// The completion whose samples have these streams, at least one.
    pub(crate) fn new(streams: Vec<RequestStream>, about: About) -> Self {
        let samples = streams.into_iter().map(|stream| Sample { stream, is_over: false }).collect();
        let span = tracing::Span::current();
        Self { samples, next: 0, failed: None, about, span }
    }

    /// The next news of any sample. The last is an error, or the `Finished` behind which all
    /// samples [are over](Self::is_over).
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<generate_event::Event, CallError>> {
        let num_samples = self.samples.len();
        let mut is_pending = false;
        for index in (self.next..num_samples).chain(0..self.next) {
            let sample = &mut self.samples[index];
            if sample.is_over {
                continue;
            }
            match sample.stream.poll_next(cx) {
                Poll::Pending => is_pending = true,
                Poll::Ready(Some(Event::Tokens(event))) => {
                    self.next = (index + 1) % num_samples;
                    let tokens = events::tokens(event, index, self.about.token_bytes.as_deref());
                    return Poll::Ready(Ok(generate_event::Event::Tokens(tokens)));
                }
                Poll::Ready(end) => {
                    sample.is_over = true;
                    self.about.entry.sample_is_over(index);
                    match self.end_of(index, end) {
                        Ok(end) => return Poll::Ready(Ok(generate_event::Event::Finished(end))),
                        Err(error) => self.fail(error),
                    }
                }
            }
        }
        if is_pending {
            return Poll::Pending;
        }
        let asked_behind = CallError::Internal("a completion was asked behind its end");
        Poll::Ready(Err(self.failed.take().unwrap_or(asked_behind)))
    }

    /// Whether every sample came to a good end, and the last of them was told.
    fn is_over(&self) -> bool {
        self.failed.is_none() && self.samples.iter().all(|sample| sample.is_over)
    }

    /// What the end of a sample's events means.
    fn end_of(&self, index: usize, end: Option<Event>) -> Result<v1::Finished, CallError> {
        let _entered = self.span.enter();
        let request_id = self.about.request_id.as_str();
        let Some(Event::Finished(event)) = end else {
            let reason = self.samples[index].stream.cancelled();
            tracing::debug!(request_id, sample = index, ?reason, "request cut short");
            return Err(match reason {
                Some(reason) => events::cancelled(reason, self.about.stall_limit),
                None => CallError::EngineGone,
            });
        };
        tracing::debug!(
            request_id,
            sample = index,
            reason = ?event.reason,
            output_tokens = event.usage.output_tokens,
            total_ms = event.timings.total.as_millis_f64(),
            "request ended"
        );
        events::finished(event, index, &self.about.stop_strings, self.about.stall_limit)
    }

    /// The call will end with the first error, behind what is certain of the other samples. A fault
    /// is one sample's own, so the others are told to end; what else ends a sample early ends all
    /// of them by itself, and their last tokens are on the way.
    fn fail(&mut self, error: CallError) {
        if matches!(error, CallError::Fault(_)) {
            self.about.entry.cancel(CancelReason::ClientGone);
        }
        self.failed.get_or_insert(error);
    }

    /// All of it in one response.
    pub(crate) async fn collect(
        mut self,
        started: v1::Started,
    ) -> Result<v1::CompleteResponse, CallError> {
        let mut samples = vec![v1::Sample::default(); self.samples.len()];
        while !self.is_over() {
            match poll_fn(|cx| self.poll_next(cx)).await? {
                generate_event::Event::Started(_) => {}
                generate_event::Event::Tokens(tokens) => {
                    let sample = &mut samples[tokens.sample as usize];
                    sample.text.push_str(&tokens.text);
                    sample.tokens.extend(tokens.tokens);
                }
                generate_event::Event::Finished(finished) => {
                    let sample = &mut samples[finished.sample as usize];
                    sample.finished = Some(finished);
                }
            }
        }
        let mut samples = samples.into_iter();
        let v1::Sample { text, tokens, finished } = samples.next().unwrap_or_default();
        let more_samples = samples.collect();
        Ok(v1::CompleteResponse { started: Some(started), text, tokens, finished, more_samples })
    }
}

/// The events of one call. Polled only when the event before has gone into the peer's window, so
/// that a slow reader holds back nothing but its own queues.
pub(crate) struct EventStream {
    started: Option<v1::Started>,
    completion: Option<Completion>,
}

impl EventStream {
    /// The stream of a completion that has just been taken.
    pub(crate) fn new(started: v1::Started, completion: Completion) -> Self {
        let unread = completion.samples.iter().map(|sample| sample.stream.unread());
        completion.about.entry.watch(unread);
        Self { started: Some(started), completion: Some(completion) }
    }
}

impl Stream for EventStream {
    type Item = Result<v1::GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(completion) = this.completion.as_mut() else { return Poll::Ready(None) };
        completion.about.entry.asked();
        if let Some(started) = this.started.take() {
            completion.about.entry.answered(false);
            let event = Some(generate_event::Event::Started(started));
            return Poll::Ready(Some(Ok(v1::GenerateEvent { event })));
        }
        let news = completion.poll_next(cx);
        completion.about.entry.answered(news.is_pending());
        let news = ready!(news);
        let is_last = news.is_err() || completion.is_over();
        let item = match news {
            Ok(event) => Ok(v1::GenerateEvent { event: Some(event) }),
            Err(error) => Err(error.into_status(&completion.about.request_id)),
        };
        if is_last {
            this.completion = None;
        }
        Poll::Ready(Some(item))
    }
}
