//! Owns the counts of what happens to connections, for the metrics. Knows no names or units of
//! theirs.

use crate::metrics::tally::Count;

/// Why the server let a connection go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CloseReason {
    /// It began no request in time.
    FirstRequest,
    /// It had no request in progress for too long.
    Idle,
    /// It was old.
    Age,
    /// It sent more control frames than anything explains.
    Flood,
    /// Its peer took nothing of an HTTP/1 response.
    Stall,
}

impl CloseReason {
    /// All of them, in the order of their declaration.
    pub(crate) const ALL: [Self; 5] =
        [Self::FirstRequest, Self::Idle, Self::Age, Self::Flood, Self::Stall];

    /// The name that metrics and logs give it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::FirstRequest => "first_request",
            Self::Idle => "idle",
            Self::Age => "age",
            Self::Flood => "flood",
            Self::Stall => "stall",
        }
    }
}

/// What happened to the connections of one server, over all its ports.
#[derive(Debug, Default)]
pub(crate) struct NetStats {
    /// Connections that were accepted and served.
    pub(crate) opened: Count,
    /// Those of them that their peers have ended, or an error.
    pub(crate) left: Count,
    /// Connections that were closed as they came, because there were too many.
    pub(crate) refused: Count,
    /// Connections that could not be accepted.
    pub(crate) accept_errors: Count,
    /// HTTP/2 streams that were reset because their peer took nothing.
    pub(crate) streams_stalled: Count,
    /// Those of them that the server let go and that have ended, by [`CloseReason`].
    let_go: [Count; CloseReason::ALL.len()],
}

impl NetStats {
    /// Connections that the server let go for this reason.
    pub(crate) fn let_go(&self, reason: CloseReason) -> &Count {
        &self.let_go[reason as usize]
    }

    /// Connections that are open now.
    pub(crate) fn num_open(&self) -> u64 {
        // Read in this order, the difference can never be negative.
        let let_go: u64 = self.let_go.iter().map(Count::get).sum();
        let closed = self.left.get() + let_go;
        self.opened.get().saturating_sub(closed)
    }
}
