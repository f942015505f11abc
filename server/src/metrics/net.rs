//! Owns what the connection layer counts. Knows no sockets.

use super::tally::{Count, Label, Tally};

/// Why a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CloseReason {
    /// The peer closed it, or it ended in order.
    Peer,
    /// It had nothing to do for too long, or did not begin.
    Idle,
    /// It had reached its age.
    Age,
    /// The peer gave no sign of life, or took nothing.
    Lost,
    /// The peer broke the protocol or a limit of it.
    Protocol,
    /// The operating system reported an error.
    Io,
    /// The server stops.
    Stopping,
}

impl Label for CloseReason {
    const ALL: &'static [Self] =
        &[Self::Peer, Self::Idle, Self::Age, Self::Lost, Self::Protocol, Self::Io, Self::Stopping];

    fn index(self) -> usize {
        self as usize
    }

    fn name(self) -> &'static str {
        match self {
            Self::Peer => "peer",
            Self::Idle => "idle",
            Self::Age => "age",
            Self::Lost => "lost",
            Self::Protocol => "protocol",
            Self::Io => "io",
            Self::Stopping => "stopping",
        }
    }
}

/// Counts of the connection layer.
#[derive(Debug, Default)]
pub(crate) struct NetCounters {
    /// Connections taken.
    pub(crate) opened: Count,
    /// Connections that are over, of those taken.
    pub(crate) closed: Tally<{ CloseReason::ALL.len() }>,
    /// Connections closed as they came, because there were too many.
    pub(crate) refused: Count,
    /// Times that the operating system had no connection to give, as without file descriptors.
    pub(crate) accept_errors: Count,
    /// Streams that the server reset because their peer took nothing.
    pub(crate) streams_reset: Count,
}

impl NetCounters {
    /// Connections that are open now.
    pub(crate) fn num_open(&self) -> u64 {
        // What is closed is read first: a connection that opens and closes in between must not make
        // the difference negative.
        let closed = self.closed.total();
        self.opened.get().saturating_sub(closed)
    }
}
