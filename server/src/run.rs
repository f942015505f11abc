//! Owns the life of a server: answer probes at once, load, serve requests, drain, end. Knows the
//! order of these things; how each is done is in `startup.rs`, `watchdog.rs`, `grpc/`, `net/` and
//! the engine.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use slipstream_model::clock::{Clock, MonotonicClock};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

use crate::backend::Backend;
use crate::config::{Config, EdgeConfig};
use crate::engine::runner::{EngineError, EngineThread};
use crate::grpc::calls::Calls;
use crate::grpc::routes::{self, GrpcParts};
use crate::handle::EngineHandle;
use crate::http::{self, HttpParts};
use crate::metrics::Metrics;
use crate::net::files;
use crate::net::listener::{Port, PortParts};
use crate::shutdown::Shutdown;
use crate::stage::{self, Stage};
use crate::startup::{self, Around, StartupError};
use crate::watchdog::Watchdog;

/// How long connections may take to close once every call has its status.
const CLOSING_GRACE: Duration = Duration::from_secs(1);
/// The same within the grace: answers that are on their way shall arrive on slow lines too.
const CLOSING_GRACE_MAX: Duration = Duration::from_secs(5);
/// How long the engine and, after it, connections may take when the server is told to end at once.
const FORCED_GRACE: Duration = Duration::from_millis(400);

/// Why a server ended other than by its shutdown signal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The models or the engine could not be started.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// The engine thread panicked. Requests ended as UNAVAILABLE.
    #[error("the engine ended unexpectedly; its panic is on stderr")]
    EngineEnded,
    /// The engine ended by rule: the verifier failed in several steps in a row, or panicked. The
    /// requests of these steps ended as INTERNAL, all others as UNAVAILABLE.
    #[error("the verifier keeps failing, so the engine has ended; the log says how it failed")]
    VerifierFailed,
    /// The engine did not come back from a step. Requests ended as UNAVAILABLE, and its thread was
    /// left behind.
    #[error("the engine hangs: it has been inside one step for {age:?} (--step-limit {limit:?})")]
    EngineHung {
        /// How long, when it was given up.
        age: Duration,
        /// The limit, of which it took twice as much.
        limit: Duration,
    },
    /// The server was told to end at once while it was draining.
    #[error("ended at once, as told: what was running was cut off")]
    Forced,
}

/// The ports of a server, bound already.
#[derive(Debug)]
pub struct Listeners {
    /// For gRPC, and for HTTP unless that has its own.
    pub main: TcpListener,
    /// For HTTP: probes and metrics.
    pub http: Option<TcpListener>,
}

impl From<EngineError> for RunError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::VerifierFailed => Self::VerifierFailed,
            EngineError::Panicked => Self::EngineEnded,
        }
    }
}

impl From<TcpListener> for Listeners {
    fn from(main: TcpListener) -> Self {
        Self { main, http: None }
    }
}

/// Runs a server on `listeners` until `shutdown` says so: loads the models, serves, then lets
/// running requests finish within the configured grace. Probes hear that it is not ready before and
/// after. What the grace does not cover ends as UNAVAILABLE, and that is no error.
///
/// # Errors
/// [`RunError`] when the server cannot start, dies, or is told to end at once.
pub async fn run(
    config: Config,
    listeners: impl Into<Listeners>,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    let (stage, _) = stage::channel();
    let around: Around = Box::new(|verifier| verifier);
    run_reporting(config, listeners.into(), shutdown, (stage, around)).await
}

/// [`run`], and `stage` follows the server's life, and the verifier is wrapped.
pub(crate) async fn run_reporting(
    config: Config,
    listeners: Listeners,
    mut shutdown: Shutdown,
    (stage, around): (watch::Sender<Stage>, Around),
) -> Result<(), RunError> {
    let backend = Arc::new(OnceLock::new());
    let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
    let metrics = Arc::new(Metrics::new(&clock, stage.subscribe()));
    let limit = config.edge.step_limit;
    let watchdog = Watchdog::new(Arc::clone(&metrics), limit, stage.clone());
    let mut edge =
        Edge::open(listeners, &config.edge, Arc::clone(&backend), (stage, Arc::clone(&metrics)))
            .await;
    let edge_config = config.edge.clone();
    let work = move || startup::start(&config, clock, &metrics, around);
    let mut loading = off_the_runtime("loader", work)?;
    let loaded = tokio::select! {
        loaded = &mut loading => loaded.map_err(|_| RunError::EngineEnded)?,
        () = shutdown.drain() => {
            edge.begin_drain();
            edge.close(CLOSING_GRACE).await;
            return Ok(());
        }
        never = edge.ended() => match never {},
    };
    let (ready, thread) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            edge.close(CLOSING_GRACE).await;
            return Err(error.into());
        }
    };
    let engine = ready.engine.clone();
    let engine_end = watch(thread)?;
    // The cell is filled here and nowhere else.
    let _ = backend.set(ready);
    edge.stage.send_replace(Stage::Serving);
    tracing::info!("ready");
    Served { edge, engine, engine_end, watchdog, shutdown }.run(&edge_config).await
}

/// A server that is loaded.
struct Served {
    edge: Edge,
    engine: EngineHandle,
    engine_end: EngineEnd,
    watchdog: Watchdog,
    shutdown: Shutdown,
}

/// Tells how the engine thread has ended.
type EngineEnd = oneshot::Receiver<Result<(), EngineError>>;

/// How the wait for running calls ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waited {
    /// There are none left.
    Finished,
    /// Some are left.
    GraceOver,
    /// Some may be left, and nobody waits for them.
    Forced,
}

impl Served {
    /// Serves, drains when told to, and ends.
    async fn run(mut self, config: &EdgeConfig) -> Result<(), RunError> {
        tokio::select! {
            () = self.shutdown.drain() => {}
            ended = &mut self.engine_end => {
                self.edge.begin_drain();
                self.edge.close(CLOSING_GRACE).await;
                return Err(unasked_end(ended));
            }
            age = self.watchdog.hung() => return self.give_up(age, config).await,
            never = self.edge.ended() => match never {},
        }
        self.drain(config).await
    }

    /// Lets running requests finish, ends the rest, and waits for the engine.
    async fn drain(mut self, config: &EdgeConfig) -> Result<(), RunError> {
        let begun = Instant::now();
        let grace = config.grace;
        tracing::info!(running = self.engine.num_live(), grace_s = grace.as_secs(), "draining");
        self.engine.drain();
        self.edge.begin_drain();
        let mut waited = tokio::select! {
            biased;
            () = self.shutdown.force() => Waited::Forced,
            () = self.edge.calls.all_ended() => Waited::Finished,
            () = tokio::time::sleep(grace) => Waited::GraceOver,
            age = self.watchdog.hung() => return self.give_up(age, config).await,
        };
        if waited == Waited::GraceOver {
            tracing::warn!(running = self.engine.num_live(), "grace is over: the rest is ended");
        }
        // The engine looks at its queue between steps, and a step may be long: its requests have
        // their ends only when it has ended, and connections close only behind that.
        self.engine.stop();
        let ended = tokio::select! {
            ended = &mut self.engine_end => Some(ended),
            age = self.watchdog.hung(), if waited != Waited::Forced => {
                return self.give_up(age, config).await;
            }
            () = self.shutdown.force() => {
                waited = Waited::Forced;
                tokio::time::timeout(FORCED_GRACE, &mut self.engine_end).await.ok()
            }
        };
        let closing_grace = match waited {
            Waited::Finished => {
                let left = grace.saturating_sub(begun.elapsed());
                left.clamp(CLOSING_GRACE, CLOSING_GRACE_MAX)
            }
            Waited::GraceOver => CLOSING_GRACE,
            Waited::Forced => FORCED_GRACE,
        };
        self.edge.close(closing_grace).await;
        match (waited, ended) {
            (Waited::Forced, _) | (_, None) => Err(RunError::Forced),
            (Waited::Finished | Waited::GraceOver, Some(Ok(Ok(())))) => Ok(()),
            (Waited::Finished | Waited::GraceOver, Some(ended)) => Err(unasked_end(ended)),
        }
    }

    /// Ends without the engine, which does not come back: its calls get their status from the
    /// edge, and its thread is left behind.
    async fn give_up(self, age: Duration, config: &EdgeConfig) -> Result<(), RunError> {
        let age_ms = age.as_millis() as u64;
        tracing::error!(running = self.engine.num_live(), age_ms, "giving the engine up");
        self.engine.give_up();
        self.edge.begin_drain();
        self.edge.close(CLOSING_GRACE).await;
        Err(RunError::EngineHung { age, limit: config.step_limit })
    }
}

/// Why the engine thread ended that was not told to.
fn unasked_end(ended: Result<Result<(), EngineError>, oneshot::error::RecvError>) -> RunError {
    match ended {
        Ok(Err(error)) => error.into(),
        Ok(Ok(())) | Err(_) => RunError::EngineEnded,
    }
}

/// The side that clients see: the ports, and what the server says about itself.
struct Edge {
    main: Port,
    http: Option<Port>,
    stage: watch::Sender<Stage>,
    calls: Calls,
}

impl Edge {
    async fn open(
        listeners: Listeners,
        config: &EdgeConfig,
        backend: Arc<OnceLock<Backend>>,
        (stage, metrics): (watch::Sender<Stage>, Arc<Metrics>),
    ) -> Self {
        let calls = Calls::new();
        let grpc = routes::routes(GrpcParts {
            backend,
            calls: calls.clone(),
            edge: config.clone(),
            stage: stage.subscribe(),
            counters: Arc::clone(&metrics.calls),
        })
        .await;
        let stats = Arc::clone(&metrics.net);
        let http_parts = HttpParts { metrics, step_limit: config.step_limit };
        let http = http::routes(http_parts.clone());
        let num_ports = 1 + usize::from(listeners.http.is_some());
        let connections_max = files::make_room(config.net.connections_max * num_ports) / num_ports;
        let net = Arc::new(config.net.clone());
        let parts = |router: axum::Router| PortParts {
            config: Arc::clone(&net),
            connections_max: connections_max.max(1),
            router,
            stats: Arc::clone(&stats),
        };
        let whole = |router| http::with_fallback(router, http_parts.clone());
        let (main, http) = match listeners.http {
            None => (Port::open(listeners.main, parts(whole(grpc.merge(http)))), None),
            Some(listener) => {
                let http = Port::open(listener, parts(whole(http)));
                (Port::open(listeners.main, parts(whole(grpc))), Some(http))
            }
        };
        Self { main, http, stage, calls }
    }

    /// Says everywhere that the server goes. The ports stay open: a probe is to hear that, not to
    /// find nobody.
    fn begin_drain(&self) {
        self.stage.send_replace(Stage::Draining);
        self.main.tell_to_go();
    }

    /// Stops accepting, and cuts what has not closed within `grace`.
    async fn close(self, grace: Duration) {
        self.main.close(tokio::time::sleep(grace)).await;
        if let Some(http) = self.http {
            http.close(std::future::ready(())).await;
        }
    }

    /// Passes a port's panic on.
    async fn ended(&mut self) -> Infallible {
        match &mut self.http {
            None => self.main.ended().await,
            Some(http) => tokio::select! {
                never = self.main.ended() => never,
                never = http.ended() => never,
            },
        }
    }
}

/// Runs blocking work on a thread that neither the runtime nor the process's end waits for.
fn off_the_runtime<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<oneshot::Receiver<T>, RunError> {
    let (sender, receiver) = oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // Nobody waits any more when the server was shut down meanwhile.
            let _ = sender.send(work());
        })
        .map_err(RunError::Thread)?;
    Ok(receiver)
}

/// Tells when the engine thread has ended, and how.
fn watch(thread: EngineThread) -> Result<EngineEnd, RunError> {
    off_the_runtime("engine-watch", move || thread.join())
}
