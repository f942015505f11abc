//! Owns one port: accepts connections within their number, whatever goes wrong, and ends them with
//! the server. Knows nothing of what they carry.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::Instant;

use super::connection::{self, Shared};
use super::settings::NetConfig;
use super::stats::{CloseReason, NetStats};

/// How long accepting pauses when the process has no more files or memory for connections.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The same trouble is logged this often at most.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// What a port is served with.
#[derive(Debug)]
pub(crate) struct PortParts {
    /// Bounds of its connections.
    pub(crate) config: Arc<NetConfig>,
    /// Connections at the same time.
    pub(crate) connections_max: usize,
    /// What answers requests.
    pub(crate) router: axum::Router,
    /// Where happenings are counted.
    pub(crate) stats: Arc<NetStats>,
}

/// A port that is served by a task of its own. Dropping it cuts everything.
#[derive(Debug)]
pub(crate) struct Port {
    task: JoinHandle<()>,
    going: watch::Sender<bool>,
    closing: watch::Sender<bool>,
}

impl Port {
    /// Begins to serve.
    pub(crate) fn open(listener: TcpListener, parts: PortParts) -> Self {
        let (going, told_to_go) = watch::channel(false);
        let (closing, is_closing) = watch::channel(false);
        let acceptor = Acceptor {
            shared: Shared {
                config: parts.config,
                router: parts.router,
                stats: parts.stats,
                going: told_to_go,
            },
            connections_max: parts.connections_max,
            connections: JoinSet::new(),
            errors: LogBudget::default(),
            refusals: LogBudget::default(),
        };
        let task = tokio::spawn(acceptor.run(listener, is_closing));
        Self { task, going, closing }
    }

    /// Tells the connections of now to finish their requests and go. New ones are taken on.
    pub(crate) fn tell_to_go(&self) {
        self.going.send_replace(true);
    }

    /// Stops accepting and cuts what has not closed when `grace` resolves.
    pub(crate) async fn close(mut self, grace: impl Future<Output = ()>) {
        self.tell_to_go();
        self.closing.send_replace(true);
        tokio::select! {
            ended = &mut self.task => pass_panic_on(ended),
            () = grace => {}
        }
    }

    /// Passes the panic on by which a port ends that nobody closed.
    pub(crate) async fn ended(&mut self) -> Infallible {
        pass_panic_on((&mut self.task).await);
        std::future::pending().await
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn pass_panic_on(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
}

/// Accepts. Its connections end with it.
struct Acceptor {
    shared: Shared,
    connections_max: usize,
    connections: JoinSet<Option<CloseReason>>,
    errors: LogBudget,
    refusals: LogBudget,
}

impl Acceptor {
    async fn run(mut self, listener: TcpListener, mut closing: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.take(stream),
                    Err(error) => self.fail(&error).await,
                },
                Some(ended) = self.connections.join_next() => self.note_end(ended),
                // Without a sender there is nobody left to serve for.
                _ = closing.changed() => break,
            }
        }
        drop(listener);
        while let Some(ended) = self.connections.join_next().await {
            self.note_end(ended);
        }
    }

    fn take(&mut self, stream: TcpStream) {
        let stats = &self.shared.stats;
        if self.connections.len() >= self.connections_max {
            stats.refused.add_one();
            if let Some(unlogged) = self.refusals.take() {
                let limit = self.connections_max;
                tracing::warn!(limit, unlogged, "too many connections: the new one is closed");
            }
            return;
        }
        stats.opened.add_one();
        prepare(&stream, &self.shared.config);
        let mut shared = self.shared.clone();
        // A connection that comes while the server drains is served: probes must see that it does.
        shared.going.mark_unchanged();
        self.connections.spawn(connection::serve(stream, shared));
    }

    /// Accepting goes on whatever happens. It pauses when there are no more files or no memory,
    /// which passes when connections close; what is wrong with one connection holds up no other.
    async fn fail(&mut self, error: &io::Error) {
        self.shared.stats.accept_errors.add_one();
        if is_of_one_connection(error) {
            return;
        }
        if let Some(unlogged) = self.errors.take() {
            tracing::warn!(%error, unlogged, "cannot accept a connection");
        }
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }

    fn note_end(&self, ended: Result<Option<CloseReason>, JoinError>) {
        let stats = &self.shared.stats;
        match ended {
            Ok(Some(reason)) => stats.let_go(reason).add_one(),
            Ok(None) => stats.left.add_one(),
            Err(error) => {
                stats.left.add_one();
                if error.is_panic() {
                    tracing::error!("a connection's task panicked; the panic is on stderr");
                }
            }
        }
    }
}

/// Whether the error is of the connection that was to be accepted, and not of accepting.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// Small messages go out at once, and the system finds dead peers of HTTP/1 connections too. A
/// socket that cannot do that serves all the same.
fn prepare(stream: &TcpStream, config: &NetConfig) {
    let keepalive = TcpKeepalive::new()
        .with_time(config.keepalive_interval)
        .with_interval(config.keepalive_timeout);
    let prepared =
        stream.set_nodelay(true).and_then(|()| SockRef::from(stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = prepared {
        tracing::debug!(%error, "cannot set the options of a connection");
    }
}

/// Lets one line per interval through.
#[derive(Debug, Default)]
struct LogBudget {
    last: Option<Instant>,
    unlogged: u64,
}

impl LogBudget {
    /// How many lines were left out since the last, if this one may be logged.
    fn take(&mut self) -> Option<u64> {
        let now = Instant::now();
        if self.last.is_some_and(|last| now < last + LOG_INTERVAL) {
            self.unlogged += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}
