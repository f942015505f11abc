//! Owns the life of a server: answer probes at once, load, serve requests, drain, end. Knows the
//! order of these things; how each is done is in `startup.rs`, `grpc/`, `net/` and the engine.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use slipstream_model::clock::{Clock, MonotonicClock};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

use crate::backend::Backend;
use crate::config::{Config, EdgeConfig};
use crate::engine::runner::EngineThread;
use crate::grpc::calls::Calls;
use crate::grpc::routes::{self, GrpcParts};
use crate::handle::EngineHandle;
use crate::http::{self, HttpParts};
use crate::metrics::Metrics;
use crate::net::files;
use crate::net::listener::{Port, PortParts};
use crate::shutdown::Shutdown;
use crate::stage::{self, Stage};
use crate::startup::{self, StartupError};

/// How long connections may take to close once every call has its status.
const CLOSING_GRACE: Duration = Duration::from_secs(1);
/// The same within the grace: answers that are on their way shall arrive on slow lines too.
const CLOSING_GRACE_MAX: Duration = Duration::from_secs(5);
/// How long the step in hand may take when the engine is told to stop.
const ENGINE_GRACE: Duration = Duration::from_secs(60);
/// The same for both, one after the other, when the server is told to end at once.
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
    /// The engine did not end although it was told to.
    #[error("the engine was still inside a step {ENGINE_GRACE:?} after it was told to end")]
    EngineStuck,
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
    run_reporting(config, listeners.into(), shutdown, stage).await
}

/// [`run`], and `stage` follows the server's life.
pub(crate) async fn run_reporting(
    config: Config,
    listeners: Listeners,
    mut shutdown: Shutdown,
    stage: watch::Sender<Stage>,
) -> Result<(), RunError> {
    let backend = Arc::new(OnceLock::new());
    let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
    let metrics = Arc::new(Metrics::new(&clock, stage.subscribe()));
    let mut edge =
        Edge::open(listeners, &config.edge, Arc::clone(&backend), (stage, Arc::clone(&metrics)))
            .await;
    let grace = config.edge.grace;
    let mut loading = off_the_runtime("loader", move || startup::start(&config, clock, &metrics))?;
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
    let mut engine_end = watch(thread)?;
    // The cell is filled here and nowhere else.
    let _ = backend.set(ready);
    edge.stage.send_replace(Stage::Serving);
    tracing::info!("ready");
    tokio::select! {
        () = shutdown.drain() => {}
        _ = &mut engine_end => {
            edge.begin_drain();
            edge.close(CLOSING_GRACE).await;
            return Err(RunError::EngineEnded);
        }
        never = edge.ended() => match never {},
    }
    Drain { edge, engine, engine_end, shutdown }.run(grace).await
}

/// The last part of a server's life.
struct Drain {
    edge: Edge,
    engine: EngineHandle,
    engine_end: oneshot::Receiver<bool>,
    shutdown: Shutdown,
}

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

impl Drain {
    /// Lets running requests finish, ends the rest, and waits for the engine.
    async fn run(mut self, grace: Duration) -> Result<(), RunError> {
        let begun = Instant::now();
        tracing::info!(running = self.engine.num_live(), grace_s = grace.as_secs(), "draining");
        self.engine.drain();
        self.edge.begin_drain();
        let mut waited = tokio::select! {
            biased;
            () = self.shutdown.force() => Waited::Forced,
            () = self.edge.calls.all_ended() => Waited::Finished,
            () = tokio::time::sleep(grace) => Waited::GraceOver,
        };
        if waited == Waited::GraceOver {
            tracing::warn!(running = self.engine.num_live(), "grace is over: the rest is ended");
        }
        // The engine looks at its queue between steps, and a step may be long: its requests have
        // their ends only when it has ended, and connections close only behind that.
        self.engine.stop();
        let ended = tokio::select! {
            ended = tokio::time::timeout(ENGINE_GRACE, &mut self.engine_end) => ended,
            () = self.shutdown.force() => {
                waited = Waited::Forced;
                tokio::time::timeout(FORCED_GRACE, &mut self.engine_end).await
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
            (Waited::Forced, _) => Err(RunError::Forced),
            (Waited::Finished | Waited::GraceOver, Ok(Ok(true))) => Ok(()),
            (Waited::Finished | Waited::GraceOver, Ok(_)) => Err(RunError::EngineEnded),
            (Waited::Finished | Waited::GraceOver, Err(_)) => Err(RunError::EngineStuck),
        }
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
        let http_parts = HttpParts { metrics };
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

/// Tells when the engine thread has ended, and whether as it should.
fn watch(thread: EngineThread) -> Result<oneshot::Receiver<bool>, RunError> {
    off_the_runtime("engine-watch", move || thread.join().is_ok())
}
