//! Owns what surrounds every gRPC call, whatever its method: the content type, the call's id and
//! its log lines, the checks on frames, and the form of answers that tonic makes by itself. Knows
//! no messages.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{ALLOW, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{Method, StatusCode, Uri};
use tonic::{Code, Status};
use tracing::Instrument;

use crate::grpc::caller::{Arrived, CallId, REQUEST_ID};
use crate::grpc::framing::{FrameLimits, FramedBody};
use crate::grpc::methods::{self, METHODS};
use crate::grpc::record::Recorder;
use crate::grpc::status::CallError;
use crate::grpc::timeout::time_allowed_by;
use crate::grpc::trace_context::TraceContext;
use crate::metrics::calls::CallCounters;

/// Characters of an unknown path that its error repeats.
const PATH_SHOWN_MAX: usize = 100;
/// Tells clients which compressions they may use.
const GRPC_ACCEPT_ENCODING: &str = "grpc-accept-encoding";

/// What all calls need.
#[derive(Clone)]
pub(crate) struct Surroundings {
    /// Where calls are recorded.
    pub(crate) counters: Arc<CallCounters>,
    /// One request message, in bytes.
    pub(crate) message_bytes_max: usize,
}

/// Lets a call through to its method, and its answer back.
pub(crate) async fn around(
    State(surroundings): State<Surroundings>,
    mut request: Request,
    next: Next,
) -> Response {
    if request.method() != Method::POST {
        return not_post();
    }
    if !is_grpc(request.headers()) {
        return not_grpc();
    }
    let id = CallId::of(request.headers());
    let index = methods::index_of(request.uri().path());
    let span = span_of(index, request.headers());
    let recorder = Recorder::begin(surroundings.counters.begin(index), span.clone());
    let Some(index) = index else {
        span.record(REQUEST_ID_FIELD, id.0.as_str());
        return recorder.watch(unknown_method(request.uri(), &id), &id.0);
    };
    let limits = FrameLimits {
        message_bytes_max: surroundings.message_bytes_max,
        takes_many: METHODS[index].takes_many,
        deadline: time_allowed_by(request.headers()).map(|span| Duration::from_micros(span.0)),
    };
    request.extensions_mut().insert(id.clone());
    request.extensions_mut().insert(Arrived(Instant::now()));
    let request = request.map(|body| Body::new(FramedBody::new(body, limits, id.0.clone())));
    let response = next.run(request).instrument(span).await;
    let response = in_our_form(response, &id, limits.message_bytes_max);
    let named = response.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok());
    let named = named.unwrap_or(&id.0).to_owned();
    recorder.watch(response, &named)
}

/// Answers a gRPC call that no route is for; `None` for what is no gRPC call.
pub(crate) fn unknown_call(counters: &Arc<CallCounters>, request: &Request) -> Option<Response> {
    if !is_grpc(request.headers()) {
        return None;
    }
    let id = CallId::of(request.headers());
    let span = span_of(None, request.headers());
    let recorder = Recorder::begin(counters.begin(None), span);
    Some(recorder.watch(unknown_method(request.uri(), &id), &id.0))
}

/// The field of a call's span that its method fills in.
const REQUEST_ID_FIELD: &str = "request_id";

/// A span for the log lines of one call.
fn span_of(index: Option<usize>, headers: &HeaderMap) -> tracing::Span {
    let span = tracing::debug_span!(
        "call",
        method = index.map_or("unknown", |index| METHODS[index].path),
        request_id = tracing::field::Empty,
        trace_id = tracing::field::Empty,
        parent_id = tracing::field::Empty,
    );
    if !span.is_disabled()
        && let Some(trace) = TraceContext::of(headers)
    {
        span.record("trace_id", trace.trace_id.as_str());
        span.record("parent_id", trace.parent_id.as_str());
    }
    span
}

/// Whether a request says that it is gRPC with protobuf messages.
fn is_grpc(headers: &HeaderMap) -> bool {
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = value.split(';').next().unwrap_or("").trim();
    ["application/grpc", "application/grpc+proto"]
        .iter()
        .any(|kind| essence.eq_ignore_ascii_case(kind))
}

/// gRPC calls are POST requests. Were others served, a mere link could make a browser send a call.
fn not_post() -> Response {
    let text = "gRPC calls are POST requests over HTTP/2\n";
    (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "POST")], text).into_response()
}

fn not_grpc() -> Response {
    let text = "this path speaks gRPC over HTTP/2: its content-type is application/grpc\n";
    (StatusCode::UNSUPPORTED_MEDIA_TYPE, text).into_response()
}

fn unknown_method(uri: &Uri, id: &CallId) -> Response {
    let path = uri.path().chars().take(PATH_SHOWN_MAX).collect();
    CallError::UnknownMethod { path, known: methods::listed() }.into_status(&id.0).into_http()
}

/// Gives answers that tonic made before a method was reached the codes of the protocol file, and
/// the call's id. The methods' own answers have it already. tonic says INTERNAL for what only a
/// client can have got wrong; left so, anybody could fill the log with errors.
fn in_our_form(mut response: Response, id: &CallId, limit: usize) -> Response {
    if response.headers().contains_key(REQUEST_ID) {
        return response;
    }
    let status = Status::from_header_map(response.headers());
    let error = match status.as_ref().map(|status| (status.code(), status.message())) {
        Some((Code::Internal, message)) => CallError::Malformed(message.to_owned()),
        Some((Code::ResourceExhausted, _)) => {
            CallError::MessageTooLarge { size: "more bytes once decompressed".to_owned(), limit }
        }
        Some(_) | None => {
            if let Ok(value) = HeaderValue::from_str(&id.0) {
                response.headers_mut().insert(REQUEST_ID, value);
            }
            return response;
        }
    };
    let mut ours: Response = error.into_status(&id.0).into_http();
    if let Some(accepted) = response.headers().get(GRPC_ACCEPT_ENCODING) {
        ours.headers_mut().insert(GRPC_ACCEPT_ENCODING, accepted.clone());
    }
    ours
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::body::Body;
    use axum::extract::Request;
    use axum::middleware::from_fn_with_state;
    use axum::response::Response;
    use axum::routing::post;
    use http_body_util::BodyExt;
    use slipstream_model::clock::MonotonicClock;
    use tower::ServiceExt;
    use tracing::Level;

    use super::{Surroundings, around};
    use crate::grpc::status::CallError;
    use crate::metrics::calls::CallCounters;

    const LIST: &str = "/slipstream.v1.Models/List";
    const GET: &str = "/slipstream.v1.Models/Get";

    /// What was logged.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("nobody panics").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// Two methods: one that fails inside the server and says so in the log, and one without end.
    fn router(counters: &Arc<CallCounters>) -> Router {
        let failing = || async {
            tracing::debug!("inside the method");
            CallError::Internal("a defect").into_status("its-id").into_http::<Body>()
        };
        let endless = || std::future::pending::<Response>();
        let counters = Arc::clone(counters);
        let surroundings = Surroundings { counters, message_bytes_max: 100 };
        Router::new()
            .route(LIST, post(failing))
            .route(GET, post(endless))
            .route("/other/Method", post(endless))
            .layer(from_fn_with_state(surroundings, around))
    }

    fn call(path: &str) -> Request {
        let request = Request::post(path)
            .header("content-type", "application/grpc")
            .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        request.body(Body::from(vec![0; 5])).expect("a well-formed request")
    }

    fn no_calls() -> Arc<CallCounters> {
        Arc::new(CallCounters::new(Arc::new(MonotonicClock::start())))
    }

    /// Pairs of method and code that occurred, with how often.
    fn counts(counters: &CallCounters) -> Vec<(String, String, f64)> {
        let all = counters.ended().into_iter().filter(|(_, count)| *count > 0.0);
        all.map(|(labels, count)| (labels[0].clone(), labels[1].clone(), count)).collect()
    }

    /// One after the other: a line that is first reached where nobody listens may stay unheard.
    #[tokio::test]
    async fn calls_are_logged_with_their_trace_and_recorded_once() {
        log_lines_of_a_call_name_its_trace().await;
        every_call_is_recorded_once_under_a_known_name().await;
    }

    async fn log_lines_of_a_call_name_its_trace() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .with_max_level(Level::DEBUG)
            .with_writer(move || writer.clone())
            .finish();
        let guard = tracing::subscriber::set_default(subscriber);
        let answer = router(&no_calls()).oneshot(call(LIST)).await.expect("routers answer");
        drop(answer);
        drop(guard);
        let text = String::from_utf8(lines.0.lock().expect("nobody panics").clone());
        let text = text.expect("lines are text");
        let ours: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("inside the method") || line.contains("call failed"))
            .collect();
        assert_eq!(ours.len(), 2, "{text}");
        for line in ours {
            assert!(line.contains("4bf92f3577b34da6a3ce929d0e0e4736"), "{line}");
            assert!(line.contains("00f067aa0ba902b7"), "{line}");
        }
        let is_error = |line: &&str| line.contains("ERROR") && line.contains("its-id");
        assert_eq!(text.lines().filter(is_error).count(), 1, "{text}");
    }

    async fn every_call_is_recorded_once_under_a_known_name() {
        let counters = no_calls();
        let router = router(&counters);
        for _ in 0..3 {
            let answer = router.clone().oneshot(call(LIST)).await.expect("routers answer");
            answer.into_body().collect().await.expect("its body ends");
        }
        for name in ["/other/Method", "/other/Method"] {
            drop(router.clone().oneshot(call(name)).await.expect("routers answer"));
        }
        // Dropped before its answer, as when the client has gone.
        tokio::select! {
            biased;
            _ = router.clone().oneshot(call(GET)) => panic!("it has no answer"),
            () = std::future::ready(()) => {}
        }
        let expected = [(LIST, "INTERNAL", 3.0), (GET, "CANCELLED", 1.0)];
        let expected = expected.map(|(path, code, num)| (path.trim_start_matches('/'), code, num));
        let expected = expected.into_iter().chain([("other", "UNIMPLEMENTED", 2.0)]);
        let expected = expected.map(|(path, code, num)| (path.to_owned(), code.to_owned(), num));
        assert_eq!(counts(&counters), expected.collect::<Vec<_>>());
        assert!(counters.in_progress().iter().all(|(_, count)| *count == 0.0));
    }
}
