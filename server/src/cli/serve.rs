//! `slipstream serve`: listen, run, drain at the first signal.

use anyhow::Context;
use tokio::net::TcpListener;

use super::address::Address;
use super::listen::Listen;
use crate::config::ServeFlags;
use crate::shutdown::Signals;

/// Serves until a signal.
pub(super) async fn run(flags: ServeFlags) -> anyhow::Result<()> {
    let config = flags.config()?;
    let Listen { main: address, http: _ } = Listen::new(&flags)?;
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
    crate::run::run(config, listener, signals.first()).await?;
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
