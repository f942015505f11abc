//! Owns what every call has in common, whatever it asks: the id it is known by, the time it may
//! take, and the form of its answer. Knows no method.

use std::future::Future;
use std::time::{Duration, Instant};

use slipstream_model::clock::Micros;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Request, Response, Status};

use crate::grpc::limits;
use crate::grpc::refusal::Refusal;
use crate::grpc::sharing::tenant_of;
use crate::grpc::status::CallError;
use crate::grpc::timeout::time_allowed;

/// Name of the id in metadata, in both directions.
pub(crate) const REQUEST_ID: &str = "x-request-id";
/// Bytes of a drawn id.
const DRAWN_BYTES: usize = 16;

/// What is known of a call before its message is looked at.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// Names the call in logs and answers.
    pub(crate) request_id: String,
    /// How long ago the call arrived: what its message took to come.
    pub(crate) age: Micros,
    /// How long the server may work on it from now on; `None` for ever.
    pub(crate) span: Option<Micros>,
    /// Tenant that its metadata names.
    pub(crate) tenant: Option<String>,
}

/// When a call arrived, before its message was there. Methods find it among the extensions of their
/// request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrived(pub(crate) Instant);

impl Caller {
    /// The caller of `call`, whose message names itself `named`: the message goes before metadata,
    /// and what is in neither was drawn. With an error comes the best id there is.
    fn of<T>(call: &Request<T>, named: Option<&str>) -> Result<Self, (CallError, String)> {
        let id = match call.extensions().get::<CallId>() {
            Some(CallId(id)) => id.clone(),
            None => draw_id(),
        };
        if let Some(given) = call.metadata().get(REQUEST_ID) {
            // Bytes that are no text are refused like text that is not visible.
            let checked = check_request_id(REQUEST_ID, given.to_str().unwrap_or(""));
            checked.map_err(|refusal| (refusal.into(), id.clone()))?;
        }
        let request_id = match named.map(|id| check_request_id("request_id", id)) {
            Some(Ok(named)) => named.to_owned(),
            Some(Err(refusal)) => return Err((refusal.into(), id)),
            None => id,
        };
        let tenant = match tenant_of(call.metadata()) {
            Ok(tenant) => tenant,
            Err(refusal) => return Err((refusal.into(), request_id)),
        };
        let arrived = call.extensions().get::<Arrived>();
        let age = arrived.map_or(Duration::ZERO, |arrived| arrived.0.elapsed());
        let age = Micros(u64::try_from(age.as_micros()).unwrap_or(u64::MAX));
        match time_allowed(call.metadata()) {
            Ok(span) => {
                let span = span.map(|span| Micros(span.0.saturating_sub(age.0)));
                Ok(Self { request_id, age, span, tenant })
            }
            Err(refusal) => Err((refusal.into(), request_id)),
        }
    }
}

/// The id of a call as far as its metadata tells: what it has, if that can be one, or a drawn one.
/// Methods find it among the extensions of their request.
#[derive(Clone, Debug)]
pub(crate) struct CallId(pub(crate) String);

impl CallId {
    /// That of a call with these headers.
    pub(crate) fn of(headers: &http::HeaderMap) -> Self {
        let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
        let valid = given.filter(|id| check_request_id(REQUEST_ID, id).is_ok());
        Self(valid.map_or_else(draw_id, str::to_owned))
    }
}

/// The id, if it is one.
///
/// # Errors
/// [`Refusal`] naming `field` and the limit.
pub(crate) fn check_request_id<'a>(field: &str, id: &'a str) -> Result<&'a str, Refusal> {
    let is_visible = id.bytes().all(|byte| byte.is_ascii_graphic());
    if id.is_empty() || id.len() > limits::REQUEST_ID_BYTES_MAX || !is_visible {
        let problem = format!(
            "must be 1 to {} visible ASCII characters, got {} bytes",
            limits::REQUEST_ID_BYTES_MAX,
            id.len()
        );
        return Err(Refusal::argument(field, problem));
    }
    Ok(id)
}

/// An id that nobody else has. Where the operating system gives no random numbers it says so
/// instead: the call fails for its seed anyway.
fn draw_id() -> String {
    let mut bytes = [0; DRAWN_BYTES];
    match getrandom::fill(&mut bytes) {
        Ok(()) => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        Err(_) => "undrawn".to_owned(),
    }
}

/// Answers one call: finds out who calls, runs `work` within its time, and puts the call's id on
/// whatever comes of it. The time counts from the call's arrival.
///
/// # Errors
/// The status of the call.
pub(crate) async fn answer<Q, A, Work>(
    call: Request<Q>,
    named: impl FnOnce(&Q) -> Option<&str>,
    work: impl FnOnce(Caller, Q) -> Work,
) -> Result<Response<A>, Status>
where
    Work: Future<Output = Result<A, CallError>>,
{
    let caller = Caller::of(&call, named(call.get_ref()))
        .map_err(|(error, request_id)| error.into_status(&request_id))?;
    let request_id = caller.request_id.clone();
    tracing::Span::current().record("request_id", request_id.as_str());
    let span = caller.span;
    match within(span, work(caller, call.into_inner())).await {
        Ok(answer) => {
            let mut response = Response::new(answer);
            tag(response.metadata_mut(), &request_id);
            Ok(response)
        }
        Err(error) => Err(error.into_status(&request_id)),
    }
}

/// Puts the call's id into the metadata of its answer.
fn tag(metadata: &mut MetadataMap, request_id: &str) {
    if let Ok(id) = MetadataValue::try_from(request_id) {
        metadata.insert(REQUEST_ID, id);
    }
}

/// Runs `work` for `span` at most, and not at all when that is nothing. The engine keeps deadlines
/// too, but looks at them between steps; dropping the work cancels its request.
async fn within<T>(
    span: Option<Micros>,
    work: impl Future<Output = Result<T, CallError>>,
) -> Result<T, CallError> {
    match span {
        None => work.await,
        Some(Micros(0)) => Err(CallError::DeadlineExceeded),
        Some(span) => tokio::time::timeout(Duration::from_micros(span.0), work)
            .await
            .unwrap_or(Err(CallError::DeadlineExceeded)),
    }
}

#[cfg(test)]
mod tests {
    use slipstream_model::clock::Micros;
    use tonic::{Code, Request};

    use super::{CallId, Caller, answer};
    use crate::grpc::status::CallError;

    fn call(id: Option<&str>, timeout: &str) -> Request<Option<&'static str>> {
        let mut call = Request::new(None);
        let timeout = timeout.parse().expect("a header's value");
        call.metadata_mut().insert("grpc-timeout", timeout);
        call.extensions_mut().insert(CallId("drawn".to_owned()));
        if let Some(id) = id {
            call.metadata_mut().insert("x-request-id", id.parse().expect("a header's value"));
        }
        call
    }

    #[tokio::test]
    async fn nothing_is_begun_for_a_caller_who_has_stopped_waiting() {
        for timeout in ["0S", "999n"] {
            let answered = answer(
                call(None, timeout),
                |id| *id,
                |_, _| async { Err::<(), _>(CallError::Internal("it was begun")) },
            );
            let status = answered.await.expect_err("no time is left");
            assert_eq!(status.code(), Code::DeadlineExceeded);
        }
        let never = answer(
            call(None, "1m"),
            |id| *id,
            |caller: Caller, _| {
                assert_eq!(caller.span, Some(Micros(950)), "less a twentieth for the answer's way");
                std::future::pending::<Result<(), CallError>>()
            },
        );
        assert_eq!(never.await.expect_err("its time passes").code(), Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn both_answers_and_errors_carry_the_id() {
        let fine = answer(call(None, "1H"), |id| *id, |_, _| async { Ok(()) }).await;
        assert_eq!(fine.expect("fine").metadata().get("x-request-id").expect("tagged"), "drawn");
        let failed = answer(
            call(None, "1H"),
            |_| Some("named"),
            |caller: Caller, _| async move {
                assert_eq!(caller.request_id, "named");
                Err::<(), _>(CallError::Loading)
            },
        );
        let status = failed.await.expect_err("it fails");
        assert_eq!(status.metadata().get("x-request-id").expect("tagged"), "named");
        for (id, named) in [(Some("not an id"), None), (None, Some("not an id"))] {
            let refused = answer(call(id, "1H"), |_| named, |_, _| async { Ok(()) }).await;
            let status = refused.expect_err("ids have no spaces");
            assert_eq!(status.code(), Code::InvalidArgument);
            assert_eq!(status.metadata().get("x-request-id").expect("tagged"), "drawn");
        }
    }
}
