//! Owns the record of one gRPC call: what it ended with, for the metrics and the log. Sees headers
//! and trailers; knows no messages.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tonic::Code;

use crate::metrics::calls::CallInProgress;

/// The header or trailer that holds the code.
const GRPC_STATUS: &str = "grpc-status";

/// One call under way. It is recorded when this is dropped: as cancelled unless its code was seen.
pub(crate) struct Recorder {
    call: CallInProgress,
    request_id: String,
    span: tracing::Span,
}

impl Recorder {
    /// `call` begins, whose log lines belong to `span`.
    pub(crate) fn begin(call: CallInProgress, span: tracing::Span) -> Self {
        Self { call, request_id: String::new(), span }
    }

    /// Watches the answer for its code.
    pub(crate) fn watch(mut self, response: Response, request_id: &str) -> Response {
        request_id.clone_into(&mut self.request_id);
        self.look_at(response.headers());
        response.map(|inner| Body::new(RecordedBody { inner, recorder: self }))
    }

    fn look_at(&mut self, headers: &HeaderMap) {
        if let Some(code) = headers.get(GRPC_STATUS) {
            self.call.has_code(Code::from_bytes(code.as_bytes()));
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let (method, code) = (self.call.method(), self.call.code());
        let (request_id, ms) = (self.request_id.as_str(), self.call.age().as_millis_f64());
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
