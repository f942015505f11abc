//! `slipstream serve`: listen, run, drain at the first signal, end at once at the second.

use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;

use super::address::Address;
use crate::config::{Config, ConfigError, EdgeConfig, ServeFlags};
use crate::run::run_reporting;
use crate::shutdown::Signals;
use crate::{logging, notify, stage};

/// Serves until a signal.
pub(super) async fn run(flags: ServeFlags) -> anyhow::Result<()> {
    logging::start(flags.log_format, &flags.log)?;
    let config = Config::new(
        &flags.model,
        EdgeConfig::with_grace(Duration::from_secs(flags.grace_seconds)),
    )?;
    let address = Address::to_listen_on(&flags.listen)
        .map_err(|problem| ConfigError::new("listen", problem.to_string()))?;
    let listener = listen(&address).await?;
    let bound = listener.local_addr()?;
    if !bound.ip().is_loopback() {
        tracing::warn!(
            address = %bound,
            "reachable from other machines, without TLS and authentication: put a proxy before it \
             unless everybody on that network may use it"
        );
    }
    tracing::info!(address = %bound, "listening");
    let signals = Signals::listen()?;
    let (reported, stage) = stage::channel();
    tokio::spawn(notify::follow(stage));
    run_reporting(config, listener.into(), signals.shutdown(), reported).await?;
    tracing::info!("stopped");
    Ok(())
}

/// Listens on the first address of the host that can be had.
async fn listen(address: &Address) -> anyhow::Result<TcpListener> {
    let resolved = tokio::net::lookup_host((address.host.as_str(), address.port)).await;
    let resolved: Vec<_> = resolved
        .with_context(|| format!("cannot resolve the host {:?} of --listen", address.host))?
        .collect();
    TcpListener::bind(&resolved[..]).await.with_context(|| {
        format!("cannot listen on {address}: choose another address with --listen")
    })
}
