//! Owns a server on a free loopback port inside this process, for commands and tests that speak to
//! a server of their own through the real network path.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::config::Config;
use crate::run::{RunError, run};

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
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), RunError>>,
}

impl LocalServer {
    /// Starts a server and waits until it is ready.
    ///
    /// # Errors
    /// [`LocalServerError`] when it does not get that far.
    pub async fn start(config: Config) -> Result<Self, LocalServerError> {
        let mut server = Self::start_loading(config).await?;
        let health = HealthClient::new(server.channel.clone());
        tokio::select! {
            () = until_serving(health) => Ok(server),
            ended = &mut server.task => {
                flatten(ended)?;
                Err(LocalServerError::Ended)
            }
        }
    }

    /// Starts a server that may still be loading when this returns.
    ///
    /// # Errors
    /// [`LocalServerError`] when no port can be had or reached.
    pub async fn start_loading(config: Config) -> Result<Self, LocalServerError> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let shutdown = async move {
            let _ = stopped.await; // a dropped sender means stop, too
        };
        let task = tokio::spawn(run(config, listener, shutdown));
        match connect(&format!("http://{address}")).await {
            Ok(channel) => Ok(Self { address, channel, stop, task }),
            Err(unreachable) => {
                // Most likely it has ended already, and knows better why.
                drop(stop);
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

    /// Tells it to drain and waits for its end.
    ///
    /// # Errors
    /// What `run` returned.
    pub async fn stop(self) -> Result<(), LocalServerError> {
        let _ = self.stop.send(()); // it may have ended by itself
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

/// Resolves when the server says that it serves; never when it ends before.
async fn until_serving(mut health: HealthClient<Channel>) {
    let request = HealthCheckRequest { service: String::new() };
    if let Ok(response) = health.watch(request).await {
        let mut statuses = response.into_inner();
        while let Some(Ok(status)) = statuses.next().await {
            if status.status() == ServingStatus::Serving {
                return;
            }
        }
    }
    std::future::pending().await
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
