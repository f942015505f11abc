//! Owns the count of calls in progress, so that a drain knows when the last one has ended. Knows
//! nothing about what they do.

use std::sync::Arc;

use tokio::sync::watch;

/// The calls in progress. Clones count together.
#[derive(Clone, Debug)]
pub(crate) struct Calls {
    count: Arc<watch::Sender<usize>>,
}

impl Calls {
    /// No calls yet.
    pub(crate) fn new() -> Self {
        Self { count: Arc::new(watch::Sender::new(0)) }
    }

    /// Counts a call until its guard is dropped.
    pub(crate) fn begin(&self) -> CallGuard {
        self.count.send_modify(|count| *count += 1);
        CallGuard { count: Arc::clone(&self.count) }
    }

    /// Calls in progress now.
    #[cfg(test)]
    pub(crate) fn num_in_progress(&self) -> usize {
        *self.count.borrow()
    }

    /// Resolves when no call is in progress.
    pub(crate) async fn all_ended(&self) {
        // The error case is a dropped sender, which `self` holds.
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// One call in progress.
#[derive(Debug)]
pub(crate) struct CallGuard {
    count: Arc<watch::Sender<usize>>,
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        self.count.send_modify(|count| *count -= 1);
    }
}
