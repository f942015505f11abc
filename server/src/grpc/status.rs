//! Owns the mapping of every error to its gRPC status: code, reason, details and when to try again.
//! One match, no default arm. Knows no fields but those that errors name.

use std::collections::HashMap;
use std::time::Duration;

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::engine::event::SequenceFault;
use crate::engine::request::SubmitError;
use crate::grpc::caller::REQUEST_ID;
use crate::grpc::refusal::Refusal;

/// Whose reasons these are, in ErrorInfo.
pub(crate) const DOMAIN: &str = "slipstream";
/// When a client's own retries may begin; see gRPC's proposal A6.
const RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";

/// Validation takes milliseconds, so its queue is another one soon.
const EDGE_RETRY: Duration = Duration::from_millis(200);
/// Completions take seconds: by then one of those that fill the queue has likely ended.
const QUEUE_RETRY: Duration = Duration::from_secs(1);
/// Small models load in about this time; large ones are asked for a few times more.
const LOADING_RETRY: Duration = Duration::from_secs(2);
/// Another server is there already, or this one's successor soon: balancers take about as long to
/// notice.
const ELSEWHERE_RETRY: Duration = Duration::from_secs(1);
/// Going on is cheap, but whatever kept the client from reading should be over.
const STALLED_RETRY: Duration = Duration::from_secs(1);

/// How a client goes on behind what it has received.
const RESUME: &str = "send what you received as output_prefix, with the same seed, to go on";

/// Why a call ends without what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// The request is not one that can be served.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The engine did not take it.
    #[error(transparent)]
    NotTaken(#[from] SubmitError),
    /// The models are not loaded yet.
    #[error("the server is still loading its models: try again")]
    Loading,
    /// Too many requests are being validated at once.
    #[error("{limit} requests are being tokenised already: try again later")]
    EdgeFull {
        /// The bound.
        limit: usize,
    },
    /// The deadline passed.
    #[error("the call's deadline passed")]
    DeadlineExceeded,
    /// The client cancelled or went away.
    #[error("the request was cancelled")]
    Cancelled,
    /// The server has fewer places than the request has samples.
    #[error("n: {wanted} samples are {wanted} requests, the server holds {limit} at most")]
    OverPlaces {
        /// Samples.
        wanted: usize,
        /// Places for requests, in all.
        limit: usize,
    },
    /// Somebody called Abort.
    #[error("the request was aborted by its id: {}", RESUME)]
    Aborted,
    /// The client does not read its stream.
    #[error(
        "nothing of the stream was taken for longer than the stall limit of {limit:?}: read \
         faster, or {}",
        RESUME
    )]
    Stalled {
        /// The limit.
        limit: Duration,
    },
    /// The server stopped before the request was done.
    #[error("the server stopped before the completion was done: {} elsewhere", RESUME)]
    ShuttingDown,
    /// This request failed, others did not.
    #[error("the request failed: {0}")]
    Fault(SequenceFault),
    /// The engine thread ended before it could say why: the server is on its way out.
    #[error("the engine has ended before the completion was done: {} elsewhere", RESUME)]
    EngineGone,
    /// One message is larger than the server takes.
    #[error("the message has {size}, the limit is {limit} bytes (--max-message)")]
    MessageTooLarge {
        /// Its size, in words.
        size: String,
        /// The bound.
        limit: usize,
    },
    /// The message did not come in full in time.
    #[error("the message was not there in full after {limit:?}: send it faster")]
    MessageLate {
        /// The bound.
        limit: Duration,
    },
    /// What came is not the message that the method takes.
    #[error("not a message of this method: {0}")]
    Malformed(String),
    /// There is no such method.
    #[error("there is no method {path:?} on this port; gRPC has {known}, on the port of --listen")]
    UnknownMethod {
        /// What was called.
        path: String,
        /// What could have been.
        known: String,
    },
    /// Something that only a defect of the edge explains.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

/// What a status says beyond its message.
#[derive(Debug)]
struct Meaning<'a> {
    code: Code,
    /// For programs. Never changes once published.
    reason: &'static str,
    /// When trying again may help.
    retry: Option<Duration>,
    detail: Detail<'a>,
}

/// The detail that only some errors have.
#[derive(Debug)]
enum Detail<'a> {
    None,
    /// A wrong field, and what is wrong with it.
    Field(&'a str, String),
    /// What is full, and its bound.
    Full(&'static str, usize),
    /// A field whose wish the server could never grant, and what is wrong with it: how much it
    /// takes of what, and how much there is.
    Never {
        field: &'a str,
        problem: String,
        subject: &'static str,
        wanted: usize,
        capacity: usize,
    },
    /// A model that is not there.
    Model(&'a str),
}

fn plain(code: Code, reason: &'static str) -> Meaning<'static> {
    Meaning { code, reason, retry: None, detail: Detail::None }
}

fn again(code: Code, reason: &'static str, after: Duration) -> Meaning<'static> {
    Meaning { retry: Some(after), ..plain(code, reason) }
}

fn full(
    reason: &'static str,
    what: &'static str,
    limit: usize,
    after: Duration,
) -> Meaning<'static> {
    Meaning { detail: Detail::Full(what, limit), ..again(Code::ResourceExhausted, reason, after) }
}

fn field<'a>(code: Code, reason: &'static str, name: &'a str, problem: String) -> Meaning<'a> {
    Meaning { code, reason, retry: None, detail: Detail::Field(name, problem) }
}

fn over_pool(field: &str, problem: String, wanted: usize, capacity: usize) -> Meaning<'_> {
    let subject = "positions of the KV pool";
    let detail = Detail::Never { field, problem, subject, wanted, capacity };
    Meaning { detail, ..plain(Code::ResourceExhausted, "OVER_KV_POOL") }
}

impl CallError {
    /// The one place that decides what errors mean.
    fn meaning(&self) -> Meaning<'_> {
        match self {
            Self::Refused(Refusal::Argument { field: name, problem }) => {
                field(Code::InvalidArgument, "INVALID_FIELD", name, problem.clone())
            }
            Self::Refused(Refusal::Range { field: name, problem }) => {
                field(Code::OutOfRange, "OVER_CONTEXT", name, problem.clone())
            }
            Self::Refused(Refusal::Pool { field, problem, wanted, capacity }) => {
                over_pool(field, problem.clone(), *wanted, *capacity)
            }
            Self::Refused(Refusal::UnknownModel { wanted, .. }) => {
                Meaning { detail: Detail::Model(wanted), ..plain(Code::NotFound, "UNKNOWN_MODEL") }
            }
            Self::NotTaken(SubmitError::Invalid(_)) => {
                plain(Code::InvalidArgument, "INVALID_REQUEST")
            }
            Self::NotTaken(SubmitError::OverContext { .. }) => {
                field(Code::OutOfRange, "OVER_CONTEXT", "max_tokens", self.to_string())
            }
            Self::NotTaken(SubmitError::NeverFits { wanted, capacity }) => {
                over_pool("max_tokens", self.to_string(), *wanted, *capacity)
            }
            Self::OverPlaces { wanted, limit } => {
                let (problem, subject) = (self.to_string(), "places for requests");
                let (wanted, capacity) = (*wanted, *limit);
                let detail = Detail::Never { field: "n", problem, subject, wanted, capacity };
                Meaning { detail, ..plain(Code::ResourceExhausted, "OVER_PLACES") }
            }
            Self::NotTaken(SubmitError::QueueFull { limit, retry_after }) => {
                // Up to the millisecond that metadata can say: earlier is too early.
                let retry = Duration::from_millis(retry_after.0.div_ceil(1_000));
                full("QUEUE_FULL", "requests running or waiting", *limit, retry)
            }
            Self::NotTaken(SubmitError::TooLate { .. }) => {
                plain(Code::DeadlineExceeded, "DEADLINE_TOO_SHORT")
            }
            Self::NotTaken(SubmitError::TooManyRequests { limit }) => {
                full("TOO_MANY_REQUESTS", "live requests", *limit, QUEUE_RETRY)
            }
            Self::EdgeFull { limit } => {
                full("EDGE_FULL", "requests being tokenised", *limit, EDGE_RETRY)
            }
            Self::NotTaken(SubmitError::ShuttingDown) | Self::ShuttingDown => {
                again(Code::Unavailable, "SHUTTING_DOWN", ELSEWHERE_RETRY)
            }
            Self::Loading => again(Code::Unavailable, "LOADING", LOADING_RETRY),
            Self::EngineGone => again(Code::Unavailable, "ENGINE_GONE", ELSEWHERE_RETRY),
            Self::DeadlineExceeded => plain(Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
            Self::Cancelled => plain(Code::Cancelled, "CANCELLED"),
            Self::Aborted => plain(Code::Cancelled, "ABORTED"),
            Self::Stalled { .. } => again(Code::ResourceExhausted, "STALLED", STALLED_RETRY),
            Self::Fault(SequenceFault::Choice(_)) => plain(Code::Internal, "NO_TOKEN"),
            Self::Fault(SequenceFault::VerifierFailed) => plain(Code::Internal, "VERIFIER_FAILED"),
            Self::MessageTooLarge { .. } => plain(Code::ResourceExhausted, "MESSAGE_TOO_LARGE"),
            Self::MessageLate { .. } => plain(Code::DeadlineExceeded, "MESSAGE_LATE"),
            Self::Malformed(_) => plain(Code::InvalidArgument, "MALFORMED_MESSAGE"),
            Self::UnknownMethod { .. } => plain(Code::Unimplemented, "UNKNOWN_METHOD"),
            Self::Internal(_) => plain(Code::Internal, "INTERNAL"),
        }
    }

    /// The status of a call that is known as `request_id`.
    pub(crate) fn into_status(self, request_id: &str) -> Status {
        let meaning = self.meaning();
        let message = self.to_string();
        let mut details = ErrorDetails::new();
        details.set_error_info(meaning.reason, DOMAIN, HashMap::new());
        details.set_request_info(request_id, "");
        let mut metadata = MetadataMap::new();
        if let Ok(id) = MetadataValue::try_from(request_id) {
            metadata.insert(REQUEST_ID, id);
        }
        if let Some(delay) = meaning.retry {
            details.set_retry_info(Some(delay));
            let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
            metadata.insert(RETRY_PUSHBACK, MetadataValue::from(delay_ms));
        }
        match meaning.detail {
            Detail::None => {}
            Detail::Field(name, problem) => drop(details.add_bad_request_violation(name, problem)),
            Detail::Full(what, limit) => {
                details.add_quota_failure_violation(what, format!("{limit} of {limit} in use"));
            }
            Detail::Never { field, problem, subject, wanted, capacity } => {
                details.add_bad_request_violation(field, problem);
                let description = format!("{wanted} needed, {capacity} in all");
                details.add_quota_failure_violation(subject, description);
            }
            Detail::Model(name) => {
                details.set_resource_info("model", name, "", message.clone());
            }
        }
        Status::with_error_details_and_metadata(meaning.code, message, details, metadata)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use slipstream_model::choice::ChoiceFault;
    use slipstream_model::clock::Micros;
    use tonic::Code;
    use tonic_types::StatusExt;

    use super::{CallError, DOMAIN, RETRY_PUSHBACK};
    use crate::engine::event::SequenceFault;
    use crate::engine::request::SubmitError;
    use crate::grpc::caller::REQUEST_ID;
    use crate::grpc::refusal::Refusal;

    /// What one error has to become: code, reason, milliseconds until a retry, the field it names,
    /// the number in its quota.
    type Case = (CallError, Code, &'static str, Option<u64>, Option<&'static str>, Option<usize>);

    fn refusals() -> Vec<Case> {
        let unknown = Refusal::UnknownModel { wanted: "a".into(), served: "b".into() };
        let (field, problem) = ("max_tokens".into(), "much".into());
        let pool = Refusal::Pool { field, problem, wanted: 33, capacity: 32 };
        let over_context = SubmitError::OverContext { wanted: 9, context_len: 8 };
        let never_fits = SubmitError::NeverFits { wanted: 9, capacity: 8 };
        vec![
            (
                Refusal::argument("top_p", "is 2").into(),
                Code::InvalidArgument,
                "INVALID_FIELD",
                None,
                Some("top_p"),
                None,
            ),
            (
                Refusal::range("prompt", "long").into(),
                Code::OutOfRange,
                "OVER_CONTEXT",
                None,
                Some("prompt"),
                None,
            ),
            (
                pool.into(),
                Code::ResourceExhausted,
                "OVER_KV_POOL",
                None,
                Some("max_tokens"),
                Some(32),
            ),
            (unknown.into(), Code::NotFound, "UNKNOWN_MODEL", None, None, None),
            (
                SubmitError::Invalid("x").into(),
                Code::InvalidArgument,
                "INVALID_REQUEST",
                None,
                None,
                None,
            ),
            (over_context.into(), Code::OutOfRange, "OVER_CONTEXT", None, Some("max_tokens"), None),
            (
                never_fits.into(),
                Code::ResourceExhausted,
                "OVER_KV_POOL",
                None,
                Some("max_tokens"),
                Some(8),
            ),
        ]
    }

    fn exhausted() -> Vec<Case> {
        let code = Code::ResourceExhausted;
        let queue = SubmitError::QueueFull { limit: 7, retry_after: Micros(1_000_000) };
        let soon = SubmitError::QueueFull { limit: 7, retry_after: Micros(37_400) };
        let requests = SubmitError::TooManyRequests { limit: 8 };
        let places = CallError::OverPlaces { wanted: 16, limit: 3 };
        let large = CallError::MessageTooLarge { size: "9 bytes".into(), limit: 8 };
        vec![
            (queue.into(), code, "QUEUE_FULL", Some(1000), None, Some(7)),
            (soon.into(), code, "QUEUE_FULL", Some(38), None, Some(7)),
            (places, code, "OVER_PLACES", None, Some("n"), Some(3)),
            (requests.into(), code, "TOO_MANY_REQUESTS", Some(1000), None, Some(8)),
            (CallError::EdgeFull { limit: 9 }, code, "EDGE_FULL", Some(200), None, Some(9)),
            (
                CallError::Stalled { limit: Duration::from_secs(3) },
                code,
                "STALLED",
                Some(1000),
                None,
                None,
            ),
            (large, code, "MESSAGE_TOO_LARGE", None, None, None),
        ]
    }

    fn ends() -> Vec<Case> {
        let away = Code::Unavailable;
        let unknown = CallError::UnknownMethod { path: "/a".into(), known: "/b".into() };
        let choice = CallError::Fault(SequenceFault::Choice(ChoiceFault::AllMasked));
        let failed = CallError::Fault(SequenceFault::VerifierFailed);
        let too_late = SubmitError::TooLate { left: Micros(7), needed: Micros(9) };
        vec![
            (too_late.into(), Code::DeadlineExceeded, "DEADLINE_TOO_SHORT", None, None, None),
            (SubmitError::ShuttingDown.into(), away, "SHUTTING_DOWN", Some(1000), None, None),
            (CallError::ShuttingDown, away, "SHUTTING_DOWN", Some(1000), None, None),
            (CallError::Loading, away, "LOADING", Some(2000), None, None),
            (CallError::EngineGone, away, "ENGINE_GONE", Some(1000), None, None),
            (
                CallError::DeadlineExceeded,
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
                None,
                None,
                None,
            ),
            (
                CallError::MessageLate { limit: Duration::from_secs(9) },
                Code::DeadlineExceeded,
                "MESSAGE_LATE",
                None,
                None,
                None,
            ),
            (CallError::Cancelled, Code::Cancelled, "CANCELLED", None, None, None),
            (CallError::Aborted, Code::Cancelled, "ABORTED", None, None, None),
            (choice, Code::Internal, "NO_TOKEN", None, None, None),
            (failed, Code::Internal, "VERIFIER_FAILED", None, None, None),
            (CallError::Internal("x"), Code::Internal, "INTERNAL", None, None, None),
            (
                CallError::Malformed("x".into()),
                Code::InvalidArgument,
                "MALFORMED_MESSAGE",
                None,
                None,
                None,
            ),
            (unknown, Code::Unimplemented, "UNKNOWN_METHOD", None, None, None),
        ]
    }

    #[test]
    fn every_error_has_its_code_its_details_and_its_time_to_retry() {
        for (error, code, reason, retry_ms, field, quota) in
            [refusals(), exhausted(), ends()].into_iter().flatten()
        {
            let message = error.to_string();
            let status = error.clone().into_status("r-1");
            assert_eq!((status.code(), status.message()), (code, message.as_str()));
            let details = status.get_error_details();
            let info = details.error_info().expect("every error has a reason");
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason, DOMAIN));
            assert_eq!(details.request_info().expect("every error").request_id, "r-1");
            assert_eq!(status.metadata().get(REQUEST_ID).expect("every error"), "r-1");
            let delay = details.retry_info().and_then(|info| info.retry_delay);
            assert_eq!(delay, retry_ms.map(Duration::from_millis), "{reason}");
            let pushback = status.metadata().get(RETRY_PUSHBACK);
            let pushback = pushback.map(|value| value.to_str().expect("digits").to_owned());
            assert_eq!(pushback, retry_ms.map(|ms| ms.to_string()), "{reason}");
            let violation = details.bad_request().map(|bad| bad.field_violations[0].clone());
            assert_eq!(violation.map(|bad| bad.field), field.map(str::to_owned), "{reason}");
            let violation = details.quota_failure().map(|quota| quota.violations[0].clone());
            assert_eq!(violation.is_some(), quota.is_some(), "{reason}");
            let names_limit = |limit: usize| {
                violation.as_ref().is_some_and(|full| full.description.contains(&limit.to_string()))
            };
            assert!(quota.is_none_or(names_limit), "{reason}");
            assert_eq!(details.resource_info().is_some(), reason == "UNKNOWN_MODEL");
        }
    }
}
