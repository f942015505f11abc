//! Owns calls whose every byte the test chooses, and what comes back of them: for what a proper
//! client never sends. Knows gRPC's framing and no messages.

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use slipstream_server::local::LocalServer;
use tokio::net::TcpStream;
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};

/// What a gRPC request says of itself.
pub const GRPC: &str = "application/grpc";

/// What came back.
#[derive(Clone, Debug)]
pub struct RawAnswer {
    /// Of HTTP.
    pub http_status: StatusCode,
    /// At the beginning.
    pub headers: HeaderMap,
    /// In between.
    pub body: Bytes,
    /// At the end; empty when there were none.
    pub trailers: HeaderMap,
}

impl RawAnswer {
    /// The gRPC status, wherever it came.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn status(&self) -> Status {
        let found = Status::from_header_map(&self.headers);
        found.or_else(|| Status::from_header_map(&self.trailers)).expect("an answer has a status")
    }
}

/// One framed message: flag, length as claimed, content.
#[must_use]
pub fn framed(flag: u8, claimed_len: u32, content: &[u8]) -> Vec<u8> {
    [&[flag], claimed_len.to_be_bytes().as_slice(), content].concat()
}

/// A message framed as it should be.
///
/// # Panics
/// When it is longer than a prefix can say.
#[must_use]
pub fn whole(content: &[u8]) -> Vec<u8> {
    framed(0, u32::try_from(content.len()).expect("short"), content)
}

/// Posts `body` to `path` with these headers, on a connection of its own.
///
/// # Panics
/// When no answer comes.
pub async fn post(
    server: &LocalServer,
    path: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> RawAnswer {
    let socket = TcpStream::connect(server.address()).await.expect("the server listens");
    let handshake = http2::handshake(TokioExecutor::new(), TokioIo::new(socket));
    let (mut sender, connection) = handshake.await.expect("the server speaks HTTP/2");
    let connection = tokio::spawn(connection);
    let uri = format!("http://{}{path}", server.address());
    let mut request = Request::post(uri).header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(body))).expect("a well-formed request");
    let answer = sender.send_request(request).await.expect("an answer comes");
    let (parts, body) = answer.into_parts();
    let collected = body.collect().await.expect("the answer ends");
    connection.abort();
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let (http_status, headers) = (parts.status, parts.headers);
    RawAnswer { http_status, headers, body: collected.to_bytes(), trailers }
}

/// The reason that an error names for programs.
///
/// # Panics
/// When it names none.
#[must_use]
pub fn reason(status: &Status) -> String {
    let details: ErrorDetails = status.get_error_details();
    details.error_info().unwrap_or_else(|| panic!("{status:?} has no reason")).reason.clone()
}
