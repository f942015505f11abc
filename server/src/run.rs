//! Owns the life of a server: serve health at once, load, serve requests, drain, end. Knows the
//! order of these things; how each is done is in `startup.rs`, `grpc/` and the engine.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use slipstream_model::clock::{Clock, MonotonicClock};
use slipstream_proto::v1::completions_server::CompletionsServer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::backend::Backend;
use crate::config::Config;
use crate::engine::runner::EngineThread;
use crate::grpc::calls::Calls;
use crate::grpc::service::CompletionsService;
use crate::grpc::transport;
use crate::handle::EngineHandle;
use crate::http::HttpParts;
use crate::metrics::Metrics;
use crate::stage::{self, Stage};
use crate::startup::{self, StartupError};

/// How long connections may take to close once every call has its status.
const CLOSING_GRACE: Duration = Duration::from_secs(1);

/// How long the step in hand may take when the engine is told to stop.
const ENGINE_GRACE: Duration = Duration::from_secs(60);

/// Names that health is reported under: the whole server and its one service.
const HEALTH_NAMES: [&str; 2] = ["", <CompletionsServer<CompletionsService> as NamedService>::NAME];

/// Why a server ended other than by its shutdown signal.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The models or the engine could not be started.
    #[error(transparent)]
    Startup(#[from] StartupError),
    /// The network side failed.
    #[error("the network side failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// The engine thread panicked. Requests ended as UNAVAILABLE.
    #[error("the engine ended unexpectedly; its panic is on stderr")]
    EngineEnded,
}

/// Runs a server on `listener` until `shutdown` resolves: loads the models, serves, then lets
/// running requests finish within the configured grace. Health says NOT_SERVING before and after.
///
/// # Errors
/// [`RunError`] when the server cannot start or dies.
pub async fn run(
    config: Config,
    listener: TcpListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let mut shutdown = pin!(shutdown);
    let health = HealthReporter::new();
    report(&health, ServingStatus::NotServing).await;
    let backend = Arc::new(OnceLock::new());
    let clock: Arc<dyn Clock> = Arc::new(MonotonicClock::start());
    let (stage, stages) = stage::channel();
    let metrics = Arc::new(Metrics::new(&clock, stages));
    let parts = HttpParts { metrics: Arc::clone(&metrics) };
    let mut server = Server::start(listener, Arc::clone(&backend), health, parts);
    let grace = config.edge.grace;
    let mut loading = off_the_runtime("loader", move || startup::start(&config, clock, &metrics))?;

    let loaded = tokio::select! {
        loaded = &mut loading => loaded.map_err(|_| RunError::EngineEnded)?,
        () = &mut shutdown => return server.close().await,
        ended = &mut server.task => return transport_result(ended),
    };
    let (ready, thread) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            server.close().await?;
            return Err(error.into());
        }
    };
    let engine = ready.engine.clone();
    let mut engine_end = watch(thread)?;
    // The cell is filled here and nowhere else.
    let _ = backend.set(ready);
    stage.send_replace(Stage::Serving);
    report(&server.health, ServingStatus::Serving).await;
    tracing::info!("ready");

    tokio::select! {
        () = &mut shutdown => {
            stage.send_replace(Stage::Draining);
            drain(server, &engine, engine_end, grace).await
        }
        _ = &mut engine_end => {
            server.close().await?;
            Err(RunError::EngineEnded)
        }
        ended = &mut server.task => {
            engine.stop();
            transport_result(ended)
        }
    }
}

/// Lets running requests finish, ends the rest, and waits for the engine.
async fn drain(
    server: Server,
    engine: &EngineHandle,
    engine_end: oneshot::Receiver<bool>,
    grace: Duration,
) -> Result<(), RunError> {
    tracing::info!(running = engine.num_live(), grace_s = grace.as_secs(), "draining");
    engine.drain();
    let closed = server.finish(grace).await;
    engine.stop();
    // The engine looks at its queue between steps, and a step may be long: its requests have their
    // ends only when it has ended, and connections close only behind that.
    let ended = tokio::time::timeout(ENGINE_GRACE, engine_end).await;
    let result = match closed {
        Ok(result) => result,
        Err(unfinished) => {
            tracing::warn!("grace is over: the rest was ended");
            unfinished.close().await
        }
    };
    match ended {
        Ok(Ok(true)) => result,
        Ok(_) | Err(_) => Err(RunError::EngineEnded),
    }
}

/// The network side: one task that ends when it was told to and its connections have closed.
struct Server {
    task: JoinHandle<Result<(), tonic::transport::Error>>,
    stop: Option<oneshot::Sender<()>>,
    health: HealthReporter,
    calls: Calls,
}

impl Server {
    fn start(
        listener: TcpListener,
        backend: Arc<OnceLock<Backend>>,
        health: HealthReporter,
        http: HttpParts,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let stopped = async move {
            let _ = stopped.await; // a dropped sender means stop, too
        };
        let calls = Calls::new();
        let service = CompletionsService::new(backend, calls.clone());
        let serving = transport::serve(listener, service, (health.clone(), http), stopped);
        Self { task: tokio::spawn(serving), stop: Some(stop), health, calls }
    }

    /// Stops accepting, tells every peer, and waits for the calls in progress. Gives itself back
    /// when they are not done within `grace`. A peer without a call that leaves its connection open
    /// is not waited for.
    async fn finish(mut self, grace: Duration) -> Result<Result<(), RunError>, Self> {
        self.stop_accepting().await;
        let calls = self.calls.clone();
        let quiet = async {
            calls.all_ended().await;
            tokio::time::sleep(CLOSING_GRACE).await;
        };
        tokio::select! {
            ended = &mut self.task => Ok(transport_result(ended)),
            over = tokio::time::timeout(grace, quiet) => match over {
                Ok(()) => {
                    self.task.abort();
                    Ok(Ok(()))
                }
                Err(_) => Err(self),
            },
        }
    }

    /// Stops accepting and gives the connections a moment to close.
    async fn close(mut self) -> Result<(), RunError> {
        self.stop_accepting().await;
        match tokio::time::timeout(CLOSING_GRACE, &mut self.task).await {
            Ok(ended) => transport_result(ended),
            Err(_) => {
                self.task.abort();
                Ok(())
            }
        }
    }

    /// Health watchers learn that the server goes, then their streams end: they must not hold up
    /// the end of their connections.
    async fn stop_accepting(&mut self) {
        report(&self.health, ServingStatus::NotServing).await;
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(()); // the task may have ended by itself
        }
        for name in HEALTH_NAMES {
            self.health.clear_service_status(name).await;
        }
    }
}

async fn report(health: &HealthReporter, status: ServingStatus) {
    for name in HEALTH_NAMES {
        health.set_service_status(name, status).await;
    }
}

fn transport_result(
    ended: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>,
) -> Result<(), RunError> {
    match ended {
        Ok(result) => Ok(result?),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Ok(()), // cut after its grace
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
