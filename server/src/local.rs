//! Owns a server on a free loopback port inside this process, for commands and tests that speak to
//! a server of their own through the real network path.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};

use crate::config::Config;
use crate::run::{Listeners, RunError, run_reporting};
use crate::shutdown::{Shutdown, Stopper};
use crate::stage::{self, Stage};
use crate::startup::Around;

/// Why a local server is not there.
#[derive(Debug, thiserror::Error)]
pub enum LocalServerError {
    /// No port could be had.
    #[error("cannot listen on the loopback address: {0}")]
    Listen(#[from] io::Error),
    /// It could not be reached.
    #[error("cannot reach the server just started: {0}")]
    Connect(#[from] tonic::transport::Error),
    /// The server failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// It ended although nobody told it to.
    #[error("the server ended unexpectedly")]
    Ended,
}

/// A server in this process. Dropping it tells it to drain; [`stop`](Self::stop) also waits.
#[derive(Debug)]
pub struct LocalServer {
    address: SocketAddr,
    channel: Channel,
    stopper: Stopper,
    stage: watch::Receiver<Stage>,
    task: JoinHandle<Result<(), RunError>>,
}

impl LocalServer {
    /// Starts a server and waits until it is ready.
    ///
    /// # Errors
    /// [`LocalServerError`] when it does not get that far.
    pub async fn start(config: Config) -> Result<Self, LocalServerError> {
        Self::start_around(config, Box::new(|verifier| verifier)).await
    }

    /// The same with something around its verifier.
    ///
    /// # Errors
    /// [`LocalServerError`] when it does not get that far.
    pub async fn start_around(config: Config, around: Around) -> Result<Self, LocalServerError> {
        let mut server = Self::load(config, around).await?;
        // An error means that the server has ended, and with it the sender.
        let has_begun = server.stage.wait_for(|stage| *stage != Stage::Loading).await.is_ok();
        if has_begun {
            return Ok(server);
        }
        flatten(server.task.await)?;
        Err(LocalServerError::Ended)
    }

    /// Starts a server that may still be loading when this returns.
    ///
    /// # Errors
    /// [`LocalServerError`] when no port can be had or reached.
    pub async fn start_loading(config: Config) -> Result<Self, LocalServerError> {
        Self::load(config, Box::new(|verifier| verifier)).await
    }

    async fn load(config: Config, around: Around) -> Result<Self, LocalServerError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (stopper, shutdown) = Shutdown::new();
        let (reported, stage) = stage::channel();
        let listeners = Listeners::from(listener);
        let task = tokio::spawn(run_reporting(config, listeners, shutdown, (reported, around)));
        match connect(&format!("http://{address}")).await {
            Ok(channel) => Ok(Self { address, channel, stopper, stage, task }),
            Err(unreachable) => {
                // Most likely it has ended already, and knows better why.
                drop(stopper);
                flatten(task.await)?;
                Err(unreachable.into())
            }
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A connection to it. Clones share it.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Tells it to drain, and does not wait.
    pub fn drain(&self) {
        self.stopper.drain();
    }

    /// Tells it to end at once, and does not wait: [`stop`](Self::stop) then says
    /// [`RunError::Forced`].
    pub fn force(&self) {
        self.stopper.force();
    }

    /// Tells it to drain and waits for its end.
    ///
    /// # Errors
    /// What `run` returned.
    pub async fn stop(self) -> Result<(), LocalServerError> {
        self.stopper.drain();
        drop(self.channel);
        flatten(self.task.await)
    }
}

/// A connection to a server at `http://host:port`.
///
/// # Errors
/// When the address is malformed or nobody listens there.
pub async fn connect(address: &str) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_shared(address.to_owned())?.tcp_nodelay(true).connect().await
}

fn flatten(
    ended: Result<Result<(), RunError>, tokio::task::JoinError>,
) -> Result<(), LocalServerError> {
    match ended {
        Ok(result) => Ok(result?),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(LocalServerError::Ended),
    }
}
