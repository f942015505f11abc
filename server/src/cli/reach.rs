//! Owns how a command comes to a server: a running one, or one of its own. Says what to do where
//! nobody answers.

use std::error::Error;
use std::io;
use std::time::Duration;

use tonic::transport::Endpoint;

use super::OWN_SERVER_GRACE;
use super::address::Address;
use super::client::{self, Client};
use crate::config::{Config, ConfigError, EdgeConfig, ModelFlags};
use crate::local::LocalServer;

/// The one model flag that means something to a running server.
const MODEL_NAME: &str = "model-name";

/// How long a server may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a server that is waited for is asked for a sign of life, and how long it may take to
/// give one: a machine that has gone, or a port where somebody only listens, must not hold a
/// command for ever.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// See [`KEEPALIVE_INTERVAL`].
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A server that answers.
pub(super) struct Reached {
    /// A client of it.
    pub(super) client: Client,
    own: Option<LocalServer>,
}

/// Nobody answers.
#[derive(Debug, thiserror::Error)]
#[error("{problem}: {advice}")]
struct NoServer {
    problem: String,
    advice: &'static str,
}

impl Reached {
    /// Reaches the server of this address, or starts one. `given` names the model flags on the
    /// command line.
    pub(super) async fn new(
        server: Option<&str>,
        model: &ModelFlags,
        given: &[String],
    ) -> anyhow::Result<Self> {
        let Some(text) = server else {
            let config = Config::new(model, EdgeConfig::with_grace(OWN_SERVER_GRACE))?;
            let own = LocalServer::start(config).await?;
            return Ok(Self { client: client::client(own.channel()), own: Some(own) });
        };
        let address = Address::to_ask(text)
            .map_err(|problem| ConfigError::new("server", problem.to_string()))?;
        refuse_model_flags(given)?;
        let endpoint = Endpoint::from_shared(address.url())
            .map_err(|problem| ConfigError::new("server", problem.to_string()))?
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        match endpoint.connect().await {
            Ok(channel) => Ok(Self { client: client::client(channel), own: None }),
            Err(error) => Err(no_server(&address, &error).into()),
        }
    }

    /// Ends the server if it was started for this command.
    pub(super) async fn leave(self) -> anyhow::Result<()> {
        drop(self.client);
        match self.own {
            Some(server) => Ok(server.stop().await?),
            None => Ok(()),
        }
    }
}

fn no_server(address: &Address, error: &tonic::transport::Error) -> NoServer {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    let last = causes.last();
    let kind = last.and_then(|error| error.downcast_ref::<io::Error>()).map(io::Error::kind);
    let why = last.map_or_else(|| error.to_string(), ToString::to_string);
    let advice = match kind {
        Some(io::ErrorKind::ConnectionRefused) => {
            "nothing listens there; start a server with `slipstream serve`, or leave --server out"
        }
        Some(io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable) => {
            "check the host, and that a firewall lets the port through"
        }
        // The kinds of the operating system are not ours to list.
        Some(_) | None => "check host and port, or leave --server out to start one",
    };
    NoServer { problem: format!("no server at {address} ({why})"), advice }
}

/// A running server has its models already.
fn refuse_model_flags(given: &[String]) -> Result<(), ConfigError> {
    let Some(flag) = given.iter().find(|flag| *flag != MODEL_NAME) else { return Ok(()) };
    let problem = format!(
        "a running server has its models and settings already, so --{flag} does not apply: leave \
         one of the two out"
    );
    Err(ConfigError::new("server", problem))
}

#[cfg(test)]
mod tests {
    use super::refuse_model_flags;

    #[test]
    fn only_the_name_of_a_model_goes_to_a_running_server() {
        assert_eq!(refuse_model_flags(&["model-name".to_owned()]), Ok(()));
        let error = refuse_model_flags(&["model-name".to_owned(), "threads".to_owned()]);
        assert!(error.expect_err("refused").to_string().contains("--threads"));
    }
}
