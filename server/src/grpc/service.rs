//! Owns the methods of `Completions`: validate off the async threads, submit, pass events on, end
//! by id. A client that goes away drops its stream, and with it the engine's request. Decides no
//! codes and translates no messages itself.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use slipstream_model::clock::Micros;
use slipstream_model::token_bytes::TokenBytes;
use slipstream_proto::v1;
use slipstream_proto::v1::completions_server::Completions;
use slipstream_proto::v1::generate_event;
use slipstream_proto::v1::generate_request::Prompt;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::engine::event::{CancelReason, Event};
use crate::grpc::caller::{Caller, answer, check_request_id};
use crate::grpc::events;
use crate::grpc::limits;
use crate::grpc::live_calls::Entry;
use crate::grpc::refusal::Refusal;
use crate::grpc::shared::Shared;
use crate::grpc::status::CallError;
use crate::grpc::validate::{Admission, Validated, over_limit, validate};
use crate::handle::RequestStream;

/// The `Completions` service. Refuses everything until its backend is there.
#[derive(Clone)]
pub(crate) struct CompletionsService {
    shared: Shared,
}

impl CompletionsService {
    /// A service over what all share.
    pub(crate) fn new(shared: Shared) -> Self {
        Self { shared }
    }

    /// Takes a call as far as the engine's queue.
    async fn begin(
        &self,
        caller: Caller,
        wire: v1::GenerateRequest,
    ) -> Result<(v1::Started, Completion), CallError> {
        let backend = self.shared.backend()?;
        self.shared.check_stage()?;
        let now = backend.clock.now();
        let arrival = Micros(now.0.saturating_sub(caller.age.0));
        let deadline = caller.span.map(|span| now.plus(span));
        let request_id = caller.request_id;
        let entry = self.shared.live.enter(&request_id, self.shared.calls.begin());
        let admission = Admission { arrival, deadline, drawn_seed: draw_seed()? };
        let model = Arc::clone(&backend.model);
        let token_bytes = wire.token_bytes.then(|| model.tokenizer.token_bytes());
        let text_bytes = match &wire.prompt {
            Some(Prompt::Text(text)) => text.len(),
            Some(Prompt::TokenIds(_)) | None => 0,
        };
        let validation =
            self.shared.offload.run(text_bytes, move || validate(wire, &model, admission));
        let Validated { request, stop_strings } = validation.await??;
        if deadline.is_some_and(|deadline| backend.clock.now() >= deadline) {
            return Err(CallError::DeadlineExceeded);
        }
        if let Some(reason) = entry.canceller().cancelled() {
            return Err(self.cancelled(reason));
        }
        let started = v1::Started {
            request_id: request_id.clone(),
            model: backend.model.name.clone(),
            fingerprint: backend.model.fingerprint.clone(),
            seed: request.params.seed,
            prompt_tokens: events::wire_count(request.prompt.len()),
        };
        let stream = backend.engine.submit(request, entry.canceller()).await?;
        tracing::debug!(request_id, sequence = %stream.id(), "request taken");
        let stall_limit = self.shared.live.stall_limit();
        let span = tracing::Span::current();
        let completion =
            Completion { stream, entry, request_id, stop_strings, token_bytes, stall_limit, span };
        Ok((started, completion))
    }

    fn cancelled(&self, reason: CancelReason) -> CallError {
        events::cancelled(reason, self.shared.live.stall_limit())
    }
}

/// A seed from the operating system.
fn draw_seed() -> Result<u64, CallError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes)
        .map_err(|_| CallError::Internal("the operating system gives no random numbers"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// A request that the engine works on, seen from the wire. Dropping it cancels the request.
struct Completion {
    stream: RequestStream,
    entry: Entry,
    request_id: String,
    stop_strings: Vec<String>,
    /// For clients that want the bytes of every token.
    token_bytes: Option<Arc<TokenBytes>>,
    stall_limit: Duration,
    /// Where its log lines belong.
    span: tracing::Span,
}

impl Completion {
    /// The next news; the last is either `Finished` or an error.
    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<generate_event::Event, CallError>> {
        let event = match ready!(self.stream.poll_next(cx)) {
            Some(Event::Tokens(event)) => {
                let tokens = events::tokens(event, self.token_bytes.as_deref());
                return Poll::Ready(Ok(generate_event::Event::Tokens(tokens)));
            }
            Some(Event::Finished(event)) => event,
            None => return Poll::Ready(Err(self.cut_short())),
        };
        let _entered = self.span.enter();
        tracing::debug!(
            request_id = self.request_id,
            reason = ?event.reason,
            output_tokens = event.usage.output_tokens,
            total_ms = event.timings.total.as_millis_f64(),
            "request ended"
        );
        let finished = events::finished(event, &self.stop_strings, self.stall_limit);
        Poll::Ready(finished.map(generate_event::Event::Finished))
    }

    /// Why there is no end.
    fn cut_short(&self) -> CallError {
        let _entered = self.span.enter();
        let reason = self.stream.cancelled();
        tracing::debug!(request_id = self.request_id, ?reason, "request cut short");
        match reason {
            Some(reason) => events::cancelled(reason, self.stall_limit),
            None => CallError::EngineGone,
        }
    }

    /// All of it in one response.
    async fn collect(mut self, started: v1::Started) -> Result<v1::CompleteResponse, CallError> {
        let mut response = v1::CompleteResponse { started: Some(started), ..Default::default() };
        loop {
            match poll_fn(|cx| self.poll_next(cx)).await? {
                generate_event::Event::Started(_) => {}
                generate_event::Event::Tokens(tokens) => {
                    response.text.push_str(&tokens.text);
                    response.tokens.extend(tokens.tokens);
                }
                generate_event::Event::Finished(finished) => {
                    response.finished = Some(finished);
                    return Ok(response);
                }
            }
        }
    }
}

/// The events of one call. Polled only when the event before has gone into the peer's window, so
/// that a slow reader holds back nothing but its own queue.
pub(crate) struct EventStream {
    started: Option<v1::Started>,
    completion: Option<Completion>,
}

impl EventStream {
    fn new(started: v1::Started, completion: Completion) -> Self {
        completion.entry.watch(completion.stream.unread());
        Self { started: Some(started), completion: Some(completion) }
    }
}

impl Stream for EventStream {
    type Item = Result<v1::GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(completion) = this.completion.as_mut() else { return Poll::Ready(None) };
        completion.entry.asked();
        if let Some(started) = this.started.take() {
            completion.entry.answered(false);
            let event = Some(generate_event::Event::Started(started));
            return Poll::Ready(Some(Ok(v1::GenerateEvent { event })));
        }
        let news = completion.poll_next(cx);
        completion.entry.answered(news.is_pending());
        let item = match ready!(news) {
            Ok(event @ generate_event::Event::Tokens(_)) => {
                return Poll::Ready(Some(Ok(v1::GenerateEvent { event: Some(event) })));
            }
            Ok(event) => Ok(v1::GenerateEvent { event: Some(event) }),
            Err(error) => Err(error.into_status(&completion.request_id)),
        };
        this.completion = None; // that was its end
        Poll::Ready(Some(item))
    }
}

fn check_abort(request: &v1::AbortRequest) -> Result<(), Refusal> {
    let ids = &request.request_ids;
    if ids.is_empty() {
        return Err(Refusal::argument("request_ids", "must hold at least one id"));
    }
    if ids.len() > limits::ABORT_IDS_MAX {
        let problem = over_limit(ids.len(), limits::ABORT_IDS_MAX, "ids");
        return Err(Refusal::argument("request_ids", problem));
    }
    for (index, id) in ids.iter().enumerate() {
        check_request_id(&format!("request_ids[{index}]"), id)?;
    }
    Ok(())
}

#[tonic::async_trait]
impl Completions for CompletionsService {
    type GenerateStream = EventStream;

    async fn generate(
        &self,
        call: Request<v1::GenerateRequest>,
    ) -> Result<Response<EventStream>, Status> {
        answer(call, named, |caller, wire| async move {
            let (started, completion) = self.begin(caller, wire).await?;
            Ok(EventStream::new(started, completion))
        })
        .await
    }

    async fn complete(
        &self,
        call: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::CompleteResponse>, Status> {
        answer(call, named, |caller, wire| async move {
            let (started, completion) = self.begin(caller, wire).await?;
            completion.collect(started).await
        })
        .await
    }

    async fn abort(
        &self,
        call: Request<v1::AbortRequest>,
    ) -> Result<Response<v1::AbortResponse>, Status> {
        answer(
            call,
            |_| None,
            |_, wire: v1::AbortRequest| async move {
                check_abort(&wire)?;
                let ids = wire.request_ids.iter();
                let num_aborted = ids.map(|id| self.shared.live.abort(id)).sum();
                Ok(v1::AbortResponse { aborted: events::wire_count(num_aborted) })
            },
        )
        .await
    }
}

fn named(wire: &v1::GenerateRequest) -> Option<&str> {
    wire.request_id.as_deref()
}
