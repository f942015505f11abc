//! Owns the HTTP/2 settings of the port. Knows no engine and no services.

use std::future::Future;
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

/// Streams of one connection. Far above HTTP/2's usual 100 to 200: one client process multiplexes
/// all its completions over one connection.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
/// A quiet connection is asked for a sign of life this often.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// A connection that gives none for this long is closed, and its requests are cancelled.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// All headers of one request together, in bytes.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// Streams a peer may open and reset before the server has looked at them (rapid reset).
const PENDING_RESETS_MAX: usize = 64;

/// Serves until `stop` resolves and every connection has closed.
///
/// # Errors
/// Errors of the transport itself; those of single connections only end them.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .add_routes(Routes::from(router))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop)
        .await
}
