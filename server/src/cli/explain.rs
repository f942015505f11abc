//! Owns what a failed call means for the person who made it: the code in words, the details that
//! the server sent, and what to do next. As text and as JSON.

use std::error::Error;
use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};
use slipstream_proto::v1;
use tonic::{Code, Status, TimeoutExpired};
use tonic_types::{ErrorDetails, StatusExt};

use super::client::Completion;

/// What a command does about a status, in lines: meaning and message, then the details.
pub(super) fn text(status: &Status, partial: &Completion) -> String {
    let mut text = format!("{}: {}", meaning(status, partial), message(status));
    let details = status.get_error_details();
    for violation in details.bad_request().into_iter().flat_map(|bad| &bad.field_violations) {
        // Most messages name the field already.
        if !status.message().contains(&violation.description) {
            line(&mut text, &format!("{}: {}", violation.field, violation.description));
        }
    }
    for violation in details.quota_failure().into_iter().flat_map(|quota| &quota.violations) {
        if !status.message().contains(&violation.description) {
            line(&mut text, &format!("{}: {}", violation.subject, violation.description));
        }
    }
    if let Some(delay) = retry_delay(&details) {
        line(&mut text, &format!("try again in {}", shown(delay)));
    }
    if let Some(info) = details.error_info() {
        line(&mut text, &format!("reason {} ({})", info.reason, info.domain));
    }
    if let Some(id) = request_id(&details, partial) {
        line(
            &mut text,
            &format!("request id {id}, as in the server's log (with --log debug there)"),
        );
    }
    text
}

/// The same for programs.
pub(super) fn json(status: &Status, partial: &Completion) -> Value {
    let details = status.get_error_details();
    let violations = details.bad_request().into_iter().flat_map(|bad| &bad.field_violations);
    let fields: Vec<Value> = violations
        .map(|violation| json!({ "field": violation.field, "problem": violation.description }))
        .collect();
    json!({
        "code": name(status.code()),
        "message": status.message(),
        "meaning": meaning(status, partial),
        "reason": details.error_info().map(|info| info.reason.clone()),
        "fields": fields,
        "retry_after_ms": retry_delay(&details).map(|delay| delay.as_millis() as u64),
        "request_id": request_id(&details, partial),
    })
}

fn line(text: &mut String, detail: &str) {
    let _ = write!(text, "\n  {detail}"); // memory takes everything
}

fn retry_delay(details: &ErrorDetails) -> Option<Duration> {
    details.retry_info()?.retry_delay
}

fn shown(delay: Duration) -> String {
    match delay.as_millis() {
        0..1000 => format!("{} ms", delay.as_millis()),
        _ => format!("{:.1} s", delay.as_secs_f64()),
    }
}

fn request_id(details: &ErrorDetails, partial: &Completion) -> Option<String> {
    let sent = details.request_info().map(|info| info.request_id.clone());
    sent.or_else(|| Some(partial.started.request_id.clone())).filter(|id| !id.is_empty())
}

/// The server's message; where there is none, what the connection says.
fn message(status: &Status) -> String {
    let causes = std::iter::successors(status.source(), |&error| error.source());
    match causes.last() {
        Some(cause) if !status.message().contains(&cause.to_string()) => {
            format!("{} ({cause})", status.message())
        }
        Some(_) | None if status.message().is_empty() => format!("{:?}", status.code()),
        Some(_) | None => status.message().to_owned(),
    }
}

/// What a code means for the reader of the message that came with it.
fn meaning(status: &Status, partial: &Completion) -> &'static str {
    let has_started = partial.started != v1::Started::default();
    // What the client library makes of its own clock.
    if status.message() == TimeoutExpired(()).to_string() {
        return "the time that --timeout gives is over, and nothing came from the server";
    }
    if !has_started && is_no_answer(status) {
        return "the connection broke before there was an answer: the server ended just then, or \
                what listens there does not speak gRPC as it is asked to; check the port \
                (--http-listen's is another), and whether it wants TLS, which is not supported yet";
    }
    match status.code() {
        Code::InvalidArgument | Code::OutOfRange | Code::NotFound => "the request is refused",
        Code::ResourceExhausted if has_started => "the server ended the stream",
        // Nothing to wait for: it is the request that is too large.
        Code::ResourceExhausted if reason(status).is_some() && !may_pass(status) => {
            "the request is more than this server can take"
        }
        Code::ResourceExhausted => "the server is full, try again later",
        Code::Unimplemented => {
            "this is no slipstream server, or another version of one: check the address and \
             `slipstream --version` on both sides"
        }
        Code::Unavailable if !has_started => {
            "the server takes no requests now, try again or elsewhere"
        }
        Code::Unavailable | Code::Unknown | Code::DataLoss => "the stream broke off",
        Code::DeadlineExceeded if reason(status).as_deref() == Some("DEADLINE_TOO_SHORT") => {
            "the time that --timeout gives is too short for this prompt on this server now"
        }
        Code::DeadlineExceeded => "the time that --timeout gives is over",
        Code::Cancelled => "somebody else cancelled the request",
        // Codes that no version of this server sends, and plain failures.
        _ => "the server could not complete this",
    }
}

/// The server's reason, for programs.
fn reason(status: &Status) -> Option<String> {
    status.get_error_details().error_info().map(|info| info.reason.clone())
}

/// Whether the server says when to try again.
fn may_pass(status: &Status) -> bool {
    retry_delay(&status.get_error_details()).is_some()
}

/// Whether prompt and output are too long for the server together: for the model, or for the memory
/// that it has.
pub(super) fn is_too_long(status: &Status) -> bool {
    let is_over_pool = reason(status).as_deref() == Some("OVER_KV_POOL");
    status.code() == Code::OutOfRange || is_over_pool
}

/// Whether nothing came that gRPC could have said: no HTTP/2, a lost connection, or a web server.
fn is_no_answer(status: &Status) -> bool {
    let is_transport = status.source().is_some_and(|cause| cause.is::<tonic::transport::Error>());
    is_transport || status.message().contains("HTTP status code")
}

/// A code as the protocol files spell it.
pub(super) fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt};

    use super::{Completion, is_too_long, json, text};

    #[test]
    fn details_of_the_server_become_lines() {
        let mut details = ErrorDetails::new();
        details
            .add_bad_request_violation("temperature", "must be 0 or more")
            .set_retry_info(Some(Duration::from_millis(250)))
            .set_error_info("QUEUE_FULL", "slipstream", [])
            .set_request_info("r-1", "");
        let status =
            Status::with_error_details(Code::InvalidArgument, "one field is wrong", details);
        let told = text(&status, &Completion::default());
        let lines: Vec<&str> = told.lines().map(str::trim).collect();
        let expected = [
            "the request is refused: one field is wrong",
            "temperature: must be 0 or more",
            "try again in 250 ms",
            "reason QUEUE_FULL (slipstream)",
            "request id r-1, as in the server's log (with --log debug there)",
        ];
        assert_eq!(lines, expected);
        let object = json(&status, &Completion::default());
        assert_eq!(object["code"], "INVALID_ARGUMENT");
        assert_eq!(object["fields"][0]["field"], "temperature");
        assert_eq!(object["retry_after_ms"], 250);
        assert_eq!(
            (&object["reason"], &object["request_id"]),
            (&"QUEUE_FULL".into(), &"r-1".into())
        );
    }

    #[test]
    fn what_never_fits_is_told_apart_from_what_is_full() {
        let status = |code, reason: &str, retry| {
            let mut details = ErrorDetails::new();
            details.set_error_info(reason, "slipstream", []).set_retry_info(retry);
            Status::with_error_details(code, "why", details)
        };
        let soon = Some(Duration::from_millis(1));
        let cases = [
            (Code::ResourceExhausted, "QUEUE_FULL", soon, "the server is full", false),
            (Code::ResourceExhausted, "OVER_KV_POOL", None, "the request is more than", true),
            (Code::ResourceExhausted, "OVER_PLACES", None, "the request is more than", false),
            (Code::OutOfRange, "OVER_CONTEXT", None, "the request is refused", true),
            (Code::DeadlineExceeded, "DEADLINE_TOO_SHORT", None, "too short", false),
            (Code::DeadlineExceeded, "DEADLINE_EXCEEDED", None, "is over", false),
        ];
        for (code, reason, retry, meaning, is_long) in cases {
            let status = status(code, reason, retry);
            let told = text(&status, &Completion::default());
            assert!(told.contains(meaning), "{told}");
            assert_eq!(is_too_long(&status), is_long, "{reason}");
        }
    }

    #[test]
    fn a_bare_status_is_one_line() {
        let told = text(&Status::unavailable("loading"), &Completion::default());
        assert!(told.ends_with(": loading") && told.lines().count() == 1, "{told}");
    }
}
