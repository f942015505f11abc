//! Owns the HTTP/2 settings and the services of the port. Knows no engine.

use std::future::Future;
use std::time::Duration;

use slipstream_proto::v1::completions_server::CompletionsServer;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

use crate::grpc::limits;
use crate::grpc::service::CompletionsService;
use crate::http::{self, HttpParts};

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
    completions: CompletionsService,
    (health, http_parts): (HealthReporter, HttpParts),
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let completions =
        CompletionsServer::new(completions).max_decoding_message_size(limits::MESSAGE_BYTES_MAX);
    let health = HealthServer::new(HealthService::from_health_reporter(health));
    let router = Routes::new(health).add_service(completions).into_axum_router();
    let router = router.merge(http::routes(http_parts.clone()));
    Server::builder()
        .accept_http1(true)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS_MAX))
        .add_routes(Routes::from(http::with_fallback(router, http_parts)))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop)
        .await
}
