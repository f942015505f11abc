//! Owns the methods of `Completions`: validate off the async threads, submit, end by id. What
//! becomes of a request that was taken is in `completion.rs`. Decides no codes and translates no
//! messages itself.

use std::sync::Arc;

use slipstream_model::clock::Micros;
use slipstream_proto::v1;
use slipstream_proto::v1::completions_server::Completions;
use slipstream_proto::v1::generate_request::Prompt;
use tonic::{Request, Response, Status};

use crate::engine::event::CancelReason;
use crate::grpc::caller::{Caller, answer, check_request_id};
use crate::grpc::completion::{About, Completion, EventStream};
use crate::grpc::events;
use crate::grpc::limits;
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
        let tenant = caller.tenant;
        let admission = Admission { arrival, deadline, tenant, drawn_seed: draw_seed()? };
        let model = Arc::clone(&backend.model);
        let token_bytes = wire.token_bytes.then(|| model.tokenizer.token_bytes());
        let text_bytes = match &wire.prompt {
            Some(Prompt::Text(text)) => text.len(),
            Some(Prompt::TokenIds(_)) | None => 0,
        };
        let validation =
            self.shared.offload.run(text_bytes, move || validate(wire, &model, admission));
        let Validated { request, num_samples, stop_strings } = validation.await??;
        let wanted = num_samples as usize;
        let limit = backend.engine.max_requests();
        if wanted > limit {
            return Err(CallError::OverPlaces { wanted, limit });
        }
        if deadline.is_some_and(|deadline| backend.clock.now() >= deadline) {
            return Err(CallError::DeadlineExceeded);
        }
        if let Some(reason) = entry.cancelled() {
            return Err(self.cancelled(reason));
        }
        let started = v1::Started {
            request_id: request_id.clone(),
            model: backend.model.name.clone(),
            fingerprint: backend.model.fingerprint.clone(),
            seed: request.params.seed,
            prompt_tokens: events::wire_count(request.prompt.len()),
        };
        let cancellers = entry.cancellers(wanted);
        let streams = backend.engine.submit_samples(request, &cancellers).await?;
        let first = streams.first().map(RequestStream::id);
        tracing::debug!(request_id, sequence = ?first, samples = wanted, "request taken");
        let stall_limit = self.shared.live.stall_limit();
        let about = About { entry, request_id, stop_strings, token_bytes, stall_limit };
        Ok((started, Completion::new(streams, about)))
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
