//! Owns the two methods of `Completions`: validate off the async threads, submit, pass events on.
//! A client that goes away drops its stream, and with it the engine's request. Decides no codes and
//! translates no messages itself.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use slipstream_model::clock::Micros;
use slipstream_model::token_bytes::TokenBytes;
use slipstream_proto::v1;
use slipstream_proto::v1::completions_server::Completions;
use slipstream_proto::v1::generate_event;
use slipstream_proto::v1::generate_request::Prompt;
use tokio::sync::Semaphore;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::backend::Backend;
use crate::engine::event::Event;
use crate::grpc::calls::{CallGuard, Calls};
use crate::grpc::events;
use crate::grpc::status::CallError;
use crate::grpc::timeout::time_allowed;
use crate::grpc::validate::{Admission, Validated, validate};
use crate::handle::RequestStream;

/// Requests that may be in validation at once. It bounds the memory that waiting prompts hold.
const VALIDATING_MAX: usize = 512;

/// Prompt text above this many bytes is tokenised one request at a time: a handful of clients with
/// huge prompts must not take all cores and memory from those with small ones.
const LARGE_PROMPT_BYTES: usize = 64 * 1024;

/// The `Completions` service. Refuses everything until its backend is there.
pub(crate) struct CompletionsService {
    backend: Arc<OnceLock<Backend>>,
    calls: Calls,
    validating: Arc<Semaphore>,
    /// One permit: see [`LARGE_PROMPT_BYTES`].
    large_prompt: Arc<Semaphore>,
}

impl CompletionsService {
    /// A service for a backend that may still be loading, whose calls are counted in `calls`.
    pub(crate) fn new(backend: Arc<OnceLock<Backend>>, calls: Calls) -> Self {
        let validating = Arc::new(Semaphore::new(VALIDATING_MAX));
        Self { backend, calls, validating, large_prompt: Arc::new(Semaphore::new(1)) }
    }

    /// Takes a call as far as the engine's queue.
    async fn begin(
        &self,
        call: Request<v1::GenerateRequest>,
        span: Option<Micros>,
    ) -> Result<(v1::Started, Completion), CallError> {
        let backend = self.backend.get().ok_or(CallError::Loading)?;
        let arrival = backend.clock.now();
        let guard = self.calls.begin();
        let deadline = span.map(|span| arrival.plus(span));
        let permit = Arc::clone(&self.validating)
            .try_acquire_owned()
            .map_err(|_| CallError::EdgeFull { limit: VALIDATING_MAX })?;
        let (drawn_seed, drawn_id) = draw()?;
        let admission = Admission { arrival, deadline, drawn_seed, drawn_id };
        let model = Arc::clone(&backend.model);
        let token_bytes = call.get_ref().token_bytes.then(|| model.tokenizer.token_bytes());
        let turn = match is_large(call.get_ref()) {
            true => Arc::clone(&self.large_prompt).acquire_owned().await.ok(),
            false => None,
        };
        let validation = tokio::task::spawn_blocking(move || {
            let _held = (permit, turn); // even when the client is gone before its turn comes
            validate(call.into_inner(), &model, admission)
        });
        let Validated { request, request_id, stop_strings } =
            validation.await.map_err(|_| CallError::Internal("validation panicked"))??;
        if deadline.is_some_and(|deadline| backend.clock.now() >= deadline) {
            return Err(CallError::DeadlineExceeded);
        }
        let started = v1::Started {
            request_id: request_id.clone(),
            model: backend.model.name.clone(),
            fingerprint: backend.model.fingerprint.clone(),
            seed: request.params.seed,
            prompt_tokens: events::wire_count(request.prompt.len()),
        };
        let stream = backend.engine.submit(request).await?;
        tracing::debug!(request_id, sequence = %stream.id(), "request taken");
        Ok((started, Completion { stream, request_id, stop_strings, token_bytes, _guard: guard }))
    }
}

fn is_large(request: &v1::GenerateRequest) -> bool {
    matches!(&request.prompt, Some(Prompt::Text(text)) if text.len() > LARGE_PROMPT_BYTES)
}

/// A seed and a request id from the operating system.
fn draw() -> Result<(u64, String), CallError> {
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes)
        .map_err(|_| CallError::Internal("the operating system gives no random numbers"))?;
    let (seed, id) = bytes.split_at(8);
    let seed = seed.iter().fold(0, |seed, &byte| (seed << 8) | u64::from(byte));
    let id = id.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((seed, id))
}

/// A request that the engine works on, seen from the wire. Dropping it cancels the request.
struct Completion {
    stream: RequestStream,
    request_id: String,
    stop_strings: Vec<String>,
    /// For clients that want the bytes of every token.
    token_bytes: Option<Arc<TokenBytes>>,
    _guard: CallGuard,
}

impl Completion {
    /// The next news; the last is either `Finished` or an error.
    async fn next(&mut self) -> Result<generate_event::Event, CallError> {
        match self.stream.next().await {
            Some(Event::Tokens(event)) => {
                let tokens = events::tokens(event, self.token_bytes.as_deref());
                Ok(generate_event::Event::Tokens(tokens))
            }
            Some(Event::Finished(event)) => {
                tracing::debug!(
                    request_id = self.request_id,
                    reason = ?event.reason,
                    output_tokens = event.usage.output_tokens,
                    total_ms = event.timings.total.as_millis_f64(),
                    "request ended"
                );
                events::finished(event, &self.stop_strings).map(generate_event::Event::Finished)
            }
            None => Err(CallError::EngineGone),
        }
    }

    /// All of it in one response.
    async fn collect(mut self, started: v1::Started) -> Result<v1::CompleteResponse, CallError> {
        let mut response = v1::CompleteResponse { started: Some(started), ..Default::default() };
        loop {
            match self.next().await? {
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

/// Runs `work` for `span` at most. The engine keeps deadlines too, but looks at them between steps;
/// dropping the work cancels its request.
async fn within<T>(
    span: Option<Micros>,
    work: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    match span {
        None => work.await,
        Some(span) => tokio::time::timeout(Duration::from_micros(span.0), work)
            .await
            .unwrap_or(Err(CallError::DeadlineExceeded)),
    }
}

type NextEvent =
    Pin<Box<dyn Future<Output = (Completion, Result<generate_event::Event, CallError>)> + Send>>;

fn next_event(mut completion: Completion) -> NextEvent {
    Box::pin(async move {
        let event = completion.next().await;
        (completion, event)
    })
}

/// The events of one call. Polled only when the connection can send, so that a slow reader holds
/// back nothing but its own queue.
pub(crate) struct EventStream {
    started: Option<v1::Started>,
    next: Option<NextEvent>,
}

impl Stream for EventStream {
    type Item = Result<v1::GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(started) = self.started.take() {
            let event = Some(generate_event::Event::Started(started));
            return Poll::Ready(Some(Ok(v1::GenerateEvent { event })));
        }
        let Some(next) = self.next.as_mut() else { return Poll::Ready(None) };
        let (completion, event) = ready!(next.as_mut().poll(cx));
        let is_last = !matches!(event, Ok(generate_event::Event::Tokens(_)));
        self.next = if is_last { None } else { Some(next_event(completion)) };
        let item = event.map(|event| v1::GenerateEvent { event: Some(event) });
        Poll::Ready(Some(item.map_err(Status::from)))
    }
}

#[tonic::async_trait]
impl Completions for CompletionsService {
    type GenerateStream = EventStream;

    async fn generate(
        &self,
        call: Request<v1::GenerateRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let span = time_allowed(call.metadata()).map_err(CallError::from)?;
        let (started, completion) = within(span, self.begin(call, span)).await?;
        let next = Some(next_event(completion));
        Ok(Response::new(EventStream { started: Some(started), next }))
    }

    async fn complete(
        &self,
        call: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::CompleteResponse>, Status> {
        let span = time_allowed(call.metadata()).map_err(CallError::from)?;
        let response = within(span, async {
            let (started, completion) = self.begin(call, span).await?;
            completion.collect(started).await
        });
        Ok(Response::new(response.await?))
    }

    async fn abort(
        &self,
        _call: Request<v1::AbortRequest>,
    ) -> Result<Response<v1::AbortResponse>, Status> {
        Err(Status::unimplemented("not served yet"))
    }
}
