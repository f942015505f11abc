//! Owns the record of gRPC calls: how often each method ended with each code, and how long that
//! took. Sees headers and trailers; knows no messages.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tonic::Code;

use crate::grpc::methods::METHODS;

/// Codes that gRPC has, `OK` included.
const NUM_CODES: usize = 17;
/// What calls of unknown methods are counted under, so that their names cannot fill memory.
const OTHER: &str = "other";
/// The header or trailer that holds the code.
const GRPC_STATUS: &str = "grpc-status";

/// Calls that have ended, by method and code. Bounded by the number of methods.
#[derive(Debug)]
pub(crate) struct CallLog {
    /// `[METHODS.len() + 1]`; the last is everything else.
    rows: Vec<Row>,
}

#[derive(Debug, Default)]
struct Row {
    /// `[NUM_CODES]`.
    counts: [AtomicU64; NUM_CODES],
    total_micros: AtomicU64,
}

/// How often one method ended with one code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallCount {
    /// `/service/method`, or `other`.
    pub(crate) method: &'static str,
    /// What they ended with.
    pub(crate) code: Code,
    /// How often.
    pub(crate) num_calls: u64,
}

impl CallLog {
    /// No calls yet.
    pub(crate) fn new() -> Self {
        Self { rows: (0..=METHODS.len()).map(|_| Row::default()).collect() }
    }

    /// Every pair of method and code that has occurred.
    pub(crate) fn counts(&self) -> Vec<CallCount> {
        let mut counts = Vec::new();
        for (index, row) in self.rows.iter().enumerate() {
            for (code, count) in (0..).zip(&row.counts) {
                let num_calls = count.load(Ordering::Relaxed);
                if num_calls > 0 {
                    let method = name_of(index);
                    counts.push(CallCount { method, code: Code::from_i32(code), num_calls });
                }
            }
        }
        counts
    }

    /// What all calls of each method took together.
    pub(crate) fn durations(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        self.rows.iter().enumerate().map(|(index, row)| {
            let total = Duration::from_micros(row.total_micros.load(Ordering::Relaxed));
            (name_of(index), total)
        })
    }

    fn add(&self, index: usize, code: Code, took: Duration) {
        let row = &self.rows[index];
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        row.total_micros.fetch_add(micros, Ordering::Relaxed);
        let code = usize::try_from(i32::from(code)).expect("codes are 0 to 16");
        row.counts[code].fetch_add(1, Ordering::Relaxed);
    }
}

fn name_of(index: usize) -> &'static str {
    METHODS.get(index).map_or(OTHER, |method| method.path)
}

/// One call under way. It is recorded when this is dropped: as cancelled unless its code was seen.
#[derive(Debug)]
pub(crate) struct Recorder {
    log: Arc<CallLog>,
    index: usize,
    begun: Instant,
    code: Option<Code>,
    request_id: String,
    span: tracing::Span,
}

impl Recorder {
    /// A call of the method at `index` of [`METHODS`] begins, whose log lines belong to `span`.
    pub(crate) fn begin(log: Arc<CallLog>, index: Option<usize>, span: tracing::Span) -> Self {
        let index = index.unwrap_or(METHODS.len());
        let request_id = String::new();
        Self { log, index, begun: Instant::now(), code: None, request_id, span }
    }

    /// Watches the answer for its code.
    pub(crate) fn watch(mut self, response: Response, request_id: &str) -> Response {
        request_id.clone_into(&mut self.request_id);
        self.look_at(response.headers());
        response.map(|inner| Body::new(RecordedBody { inner, recorder: self }))
    }

    fn look_at(&mut self, headers: &HeaderMap) {
        if let Some(code) = headers.get(GRPC_STATUS) {
            self.code = Some(Code::from_bytes(code.as_bytes()));
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let took = self.begun.elapsed();
        self.log.add(self.index, code, took);
        let (method, request_id) = (name_of(self.index), self.request_id.as_str());
        let ms = took.as_micros() as f64 / 1000.0;
        let _entered = self.span.enter();
        if code == Code::Internal {
            tracing::error!(method, request_id, ms, "call failed inside the server");
        } else {
            tracing::debug!(method, request_id, ?code, ms, "call ended");
        }
    }
}

/// A body whose trailers are seen by the recorder.
struct RecordedBody {
    inner: Body,
    recorder: Recorder,
}

impl http_body::Body for RecordedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(trailers) = frame.trailers_ref()
        {
            self.recorder.look_at(trailers);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
