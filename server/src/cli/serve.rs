//! `slipstream serve`: listen, run, drain at the first signal, end at once at the second.

use anyhow::Context;
use tokio::net::TcpListener;

use super::address::Address;
use super::listen::Listen;
use crate::config::ServeFlags;
use crate::run::{Listeners, run_reporting};
use crate::shutdown::Signals;
use crate::{notify, stage};

/// The flag of the port for probes and metrics alone.
const HTTP_LISTEN: &str = "http-listen";

/// Serves until a signal.
pub(super) async fn run(flags: ServeFlags) -> anyhow::Result<()> {
    let config = flags.config()?;
    let Listen { main, http } = Listen::new(&flags)?;
    let main = listen(&main, "listen").await?;
    let http = match &http {
        Some(address) => Some(listen(address, HTTP_LISTEN).await?),
        None => None,
    };
    let signals = Signals::listen()?;
    let (reported, stage) = stage::channel();
    tokio::spawn(notify::follow(stage));
    let around = Box::new(|verifier| verifier);
    let listeners = Listeners { main, http };
    run_reporting(config, listeners, signals.shutdown(), (reported, around)).await?;
    tracing::info!("stopped");
    Ok(())
}

/// Listens on the first address of the host that can be had, and says so.
async fn listen(address: &Address, flag: &str) -> anyhow::Result<TcpListener> {
    let resolved = tokio::net::lookup_host((address.host.as_str(), address.port)).await;
    let resolved: Vec<_> = resolved
        .with_context(|| format!("cannot resolve the host {:?} of --{flag}", address.host))?
        .collect();
    let listener = TcpListener::bind(&resolved[..]).await.with_context(|| {
        format!("cannot listen on {address}: choose another address with --{flag}")
    })?;
    let bound = listener.local_addr()?;
    if !bound.ip().is_loopback() {
        tracing::warn!(
            address = %bound,
            "reachable from other machines, without TLS and authentication: put a proxy before it \
             unless everybody on that network may use it"
        );
    }
    match flag {
        HTTP_LISTEN => tracing::info!(address = %bound, "listening for probes and metrics"),
        _ => tracing::info!(address = %bound, "listening"),
    }
    Ok(listener)
}
