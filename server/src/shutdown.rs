//! Owns the process's signals: the first asks for a drain, the second ends the process at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit code of a process that was told twice to end.
const FORCED_EXIT: i32 = 1;

/// SIGTERM and ctrl-c, listened to from construction on.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Listens. Needs a running tokio runtime.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Resolves at the first signal. The next one ends the process at once.
    pub(crate) async fn first(mut self) {
        self.next().await;
        tracing::info!("signal received: draining; a second one ends the process at once");
        tokio::spawn(async move {
            self.next().await;
            tracing::warn!("second signal received: ending at once");
            std::process::exit(FORCED_EXIT);
        });
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
