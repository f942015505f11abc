//! Owns where the life of the server stands. Everything that says whether it takes requests reads
//! it here: gRPC health, `/ready`, systemd, the service itself.

use tokio::sync::watch;

/// Where a server stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The models are not there yet.
    Loading,
    /// Requests are taken.
    Serving,
    /// Requests would be taken, but the engine hangs inside a step; it may come back.
    Stuck,
    /// Requests are refused; those taken go on within the grace.
    Draining,
}

impl Stage {
    /// The name that probes and logs give it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Serving => "serving",
            Self::Stuck => "stuck",
            Self::Draining => "draining",
        }
    }
}

/// Says when the stage changes. It begins as [`Stage::Loading`].
pub(crate) fn channel() -> (watch::Sender<Stage>, watch::Receiver<Stage>) {
    watch::channel(Stage::Loading)
}
