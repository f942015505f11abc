//! `slipstream serve`: listen, run, drain at the first signal.

use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;

use crate::config::{Config, ServeFlags};
use crate::logging;
use crate::shutdown::Signals;

/// Serves until a signal.
pub(super) async fn run(flags: ServeFlags) -> anyhow::Result<()> {
    logging::start(flags.log_format, &flags.log)?;
    let config = Config::new(&flags.model, Duration::from_secs(flags.grace_seconds))?;
    let listener = TcpListener::bind(flags.listen).await.with_context(|| {
        format!("cannot listen on {}: choose another address with --listen", flags.listen)
    })?;
    tracing::info!(address = %listener.local_addr()?, "listening");
    let signals = Signals::listen()?;
    crate::run::run(config, listener, signals.first()).await?;
    tracing::info!("stopped");
    Ok(())
}
