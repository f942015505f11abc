//! Owns the settings of connections: what one peer may take of the server before it is anybody's
//! request. Knows no requests.

use std::time::Duration;

/// Bounds of connections, HTTP/2 and HTTP/1 alike unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Connections at the same time; more are closed as they come.
    pub connections_max: usize,
    /// HTTP/2 streams of one connection at the same time. Far above HTTP/2's usual 100 to 200: one
    /// client process multiplexes all its completions over one connection.
    pub streams_max: u32,
    /// Bytes that a peer may send on one HTTP/2 stream before the server has read them.
    pub stream_window_bytes: u32,
    /// Bytes that a peer may send on all HTTP/2 streams of a connection before they are read.
    pub connection_window_bytes: u32,
    /// Bytes of one HTTP/2 stream that wait for a peer to take them.
    pub send_buffer_bytes: usize,
    /// All headers of one request together, in bytes.
    pub header_bytes_max: u32,
    /// HTTP/2 streams that a peer may open and reset before the server has looked at them.
    pub pending_resets_max: usize,
    /// A quiet HTTP/2 connection is asked for a sign of life this often.
    pub keepalive_interval: Duration,
    /// A connection that gives none for this long is closed, and its requests are cancelled.
    pub keepalive_timeout: Duration,
    /// A new connection has to begin its first request within this time. HTTP/1 connections have
    /// no more than that from one request to the next, either.
    pub first_request_timeout: Duration,
    /// A connection without a request in progress is told to go after this time.
    pub idle_timeout: Duration,
    /// A connection is told to go at this age; `None` never. Clients then connect anew, maybe to
    /// another server.
    pub age_max: Option<Duration>,
    /// What a connection that was told to go may take to finish its requests before it is cut.
    pub age_grace: Duration,
    /// A stream whose peer takes nothing for this long is reset. Longer than the stall limit of
    /// completions, which ends them with a status first.
    pub stream_stall_timeout: Duration,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            streams_max: 1024,
            stream_window_bytes: 256 << 10,
            connection_window_bytes: 1 << 20,
            send_buffer_bytes: 64 << 10,
            header_bytes_max: 16 << 10,
            pending_resets_max: 64,
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(20),
            first_request_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            age_max: None,
            age_grace: Duration::from_secs(30),
            stream_stall_timeout: Duration::from_secs(60),
        }
    }
}
