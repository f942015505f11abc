//! Owns one connection from its socket to its end: hyper's future, driven until it ends or has to
//! go. Knows no routes.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::frame_meter::{ControlBudget, DENSE_READ_BYTES, FrameParser, Turn, UNSTARTED_MAX};
use super::lifetime::{Lifetime, Order, Seen};
use super::request::{Answering, StreamTasks, Traffic};
use super::settings::NetConfig;
use super::stats::{CloseReason, NetStats};

/// The least that hyper takes as bound of its HTTP/1 buffers.
const HTTP1_BUFFER_BYTES_MIN: usize = 8 << 10;

/// What all connections of a port share.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    /// Their bounds.
    pub(super) config: Arc<NetConfig>,
    /// What answers their requests.
    pub(super) router: axum::Router,
    /// What happened to them.
    pub(super) stats: Arc<NetStats>,
    /// Becomes true when they are told to go.
    pub(super) going: watch::Receiver<bool>,
}

/// Serves one connection to its end. Says why the server let it go, if it did.
pub(super) async fn serve(stream: TcpStream, shared: Shared) -> Option<CloseReason> {
    let Shared { config, router, stats, mut going } = shared;
    let mut let_go = None;
    let traffic = Arc::new(Traffic::new(Instant::now()));
    let mut lifetime = Lifetime::new(&config, Instant::now(), draw_jitter());
    let builder = builder(&config, &traffic);
    let metered = Metered::new(stream, Arc::clone(&traffic));
    let answering = Answering { router, traffic: Arc::clone(&traffic) };
    let mut connection = pin!(builder.serve_connection(TokioIo::new(metered), answering));
    loop {
        let next_look = lifetime.next_look(Instant::now(), seen(&traffic));
        tokio::select! {
            // Its future has ended and is never polled again.
            _ = connection.as_mut() => {
                return if traffic.is_flood() { Some(CloseReason::Flood) } else { let_go };
            }
            changed = going.changed() => {
                if changed.is_err() {
                    return let_go;
                }
                if lifetime.end_with_the_server() {
                    connection.as_mut().graceful_shutdown();
                }
            }
            () = tokio::time::sleep_until(next_look) => {
                let stalled = traffic.end_stalled(config.stream_stall_timeout, traffic.now_ms());
                (0..stalled.streams).for_each(|_| stats.streams_stalled.add_one());
                if stalled.is_connection {
                    return Some(CloseReason::Stall);
                }
                match lifetime.look(Instant::now(), seen(&traffic)) {
                    Order::Keep => {}
                    Order::TellToGo(reason) => {
                        let_go.get_or_insert(reason);
                        tracing::debug!(reason = reason.name(), "connection told to go");
                        connection.as_mut().graceful_shutdown();
                    }
                    Order::Cut => return let_go,
                }
            }
        }
    }
}

fn seen(traffic: &Traffic) -> Seen {
    Seen { has_begun: traffic.num_begun() > 0, idle_since: traffic.idle_since() }
}

/// From 0 to 1. Without random numbers connections end together: no reason to refuse one.
fn draw_jitter() -> f64 {
    let mut byte = [u8::MAX / 2];
    let _ = getrandom::fill(&mut byte);
    f64::from(byte[0]) / f64::from(u8::MAX)
}

fn builder(config: &NetConfig, traffic: &Arc<Traffic>) -> Builder<StreamTasks> {
    let mut builder = Builder::new(StreamTasks(Arc::clone(traffic)));
    let header_bytes = usize::try_from(config.header_bytes_max).unwrap_or(usize::MAX);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(config.first_request_timeout)
        // A request's headers have to fit into the buffer. Their number is bounded by hyper, to
        // 100.
        .max_buf_size(header_bytes.max(HTTP1_BUFFER_BYTES_MIN));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.streams_max)
        .initial_stream_window_size(config.stream_window_bytes)
        .initial_connection_window_size(config.connection_window_bytes)
        .max_send_buf_size(config.send_buffer_bytes)
        .max_header_list_size(config.header_bytes_max)
        .max_pending_accept_reset_streams(config.pending_resets_max)
        .keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.keepalive_timeout);
    builder
}

/// A socket whose peer may send a bounded number of control frames, and has its turn like others.
#[derive(Debug)]
struct Metered {
    stream: TcpStream,
    parser: FrameParser,
    budget: ControlBudget,
    turn: Turn,
    traffic: Arc<Traffic>,
}

impl Metered {
    fn new(stream: TcpStream, traffic: Arc<Traffic>) -> Self {
        let (parser, budget) = (FrameParser::new(), ControlBudget::new());
        Self { stream, parser, budget, turn: Turn::default(), traffic }
    }

    /// Reads what is there, less of it behind dense frames.
    fn read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let stream = Pin::new(&mut self.stream);
        if !self.turn.is_dense() || buffer.remaining() <= DENSE_READ_BYTES {
            return stream.poll_read(cx, buffer);
        }
        let mut bytes = [0; DENSE_READ_BYTES];
        let mut few = ReadBuf::new(&mut bytes);
        ready!(stream.poll_read(cx, &mut few))?;
        buffer.put_slice(few.filled());
        Poll::Ready(Ok(()))
    }

    fn meter(&mut self, bytes: &[u8]) -> io::Result<()> {
        let num_frames = self.parser.num_frames();
        let cost = self.parser.cost(bytes);
        self.turn.note(bytes.len(), self.parser.num_frames() - num_frames);
        let Self { traffic, budget, .. } = self;
        if cost == 0 || budget.take(cost, traffic.now_ms(), traffic.data_frames()) {
            return Ok(());
        }
        traffic.note_flood();
        tracing::debug!(reason = CloseReason::Flood.name(), "connection closed");
        Err(io::Error::other("more control frames than anything explains"))
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.turn.is_over() || self.traffic.num_unstarted() >= UNSTARTED_MAX {
            // What was read is worked on and answered first, and other tasks come before the rest.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let begin = buffer.filled().len();
        match self.read(cx, buffer) {
            Poll::Ready(Ok(())) => Poll::Ready(self.meter(&buffer.filled()[begin..])),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                self.turn.end();
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
