//! Owns how a server is told to end: first drain, then at once. Process signals are one way to say
//! it, a server's owner in the same process is another. Knows nothing of what ends.

use std::io;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// Exit code of a process that was told twice to end and had to be cut.
const FORCED_EXIT: i32 = 1;
/// How long a server that was told to end at once may take before its process is ended for it.
const FORCED_END: Duration = Duration::from_secs(2);
/// Signals that come this close behind the first are the same one: tools that end a process often
/// tell it and then its whole group.
const SAME_SIGNAL: Duration = Duration::from_millis(50);

/// What a server was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Run,
    Drain,
    Force,
}

/// Tells a server to end. Dropping it says to drain.
#[derive(Debug)]
pub struct Stopper {
    level: watch::Sender<Level>,
}

/// What `run` waits for.
#[derive(Debug)]
pub struct Shutdown {
    level: watch::Receiver<Level>,
}

impl Shutdown {
    /// A way to tell one server to end, and what that server waits for.
    #[must_use]
    pub fn new() -> (Stopper, Self) {
        let (sender, receiver) = watch::channel(Level::Run);
        (Stopper { level: sender }, Self { level: receiver })
    }

    /// Resolves when the server shall drain.
    pub(crate) async fn drain(&mut self) {
        // An error means that the sender is gone: the same.
        let _ = self.level.wait_for(|level| *level >= Level::Drain).await;
    }

    /// Resolves when the server shall end at once.
    pub(crate) async fn force(&mut self) {
        if self.level.wait_for(|level| *level == Level::Force).await.is_err() {
            std::future::pending().await
        }
    }
}

impl Stopper {
    /// Tells the server to let running requests finish within its grace.
    pub fn drain(&self) {
        self.raise(Level::Drain);
    }

    /// Tells the server that its grace is over: every request gets its status now.
    pub fn force(&self) {
        self.raise(Level::Force);
    }

    fn raise(&self, to: Level) {
        self.level.send_if_modified(|level| {
            let is_more = *level < to;
            *level = to.max(*level);
            is_more
        });
    }
}

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

    /// Passes signals on: the first as drain, the second as force. The third ends the process, as
    /// does a server that hangs behind the second.
    pub(crate) fn shutdown(mut self) -> Shutdown {
        let (stopper, shutdown) = Shutdown::new();
        tokio::spawn(async move {
            self.next().await;
            tracing::info!("signal received: draining; a second one ends everything at once");
            stopper.drain();
            let same_until = Instant::now() + SAME_SIGNAL;
            self.next().await;
            while Instant::now() < same_until {
                self.next().await;
            }
            tracing::warn!("second signal received: ending at once");
            stopper.force();
            tokio::select! {
                () = self.next() => {}
                () = tokio::time::sleep(FORCED_END) => {}
            }
            std::process::exit(FORCED_EXIT);
        });
        shutdown
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether it is ready without waiting.
    async fn is_ready(future: impl Future<Output = ()>) -> bool {
        tokio::select! {
            biased;
            () = future => true,
            () = std::future::ready(()) => false,
        }
    }

    #[tokio::test]
    async fn force_means_drain_and_a_lost_stopper_means_drain_only() {
        let (stopper, mut shutdown) = Shutdown::new();
        assert!(!is_ready(shutdown.drain()).await);
        stopper.force();
        stopper.drain(); // it never goes back
        assert!(is_ready(shutdown.drain()).await && is_ready(shutdown.force()).await);
        let (stopper, mut shutdown) = Shutdown::new();
        drop(stopper);
        assert!(is_ready(shutdown.drain()).await);
        assert!(!is_ready(shutdown.force()).await);
    }
}
