//! Owns a way to hold servers of this process in their loading: the loader says in the log that the
//! models are loaded before the server may serve, and while held, that line is not taken. Knows
//! nothing of servers but where they log.

use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Where the loader logs.
const LOADER: &str = "slipstream_server::startup";

/// How many hold, and who waits for them to let go.
static NUM_HOLDERS: Mutex<usize> = Mutex::new(0);
static RELEASED: Condvar = Condvar::new();

fn num_holders() -> MutexGuard<'static, usize> {
    NUM_HOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it lives, no server of this process finishes loading.
#[derive(Debug)]
pub struct HeldLoading(());

impl HeldLoading {
    /// Holds all loading from now on.
    ///
    /// # Panics
    /// When the process logs to somebody else.
    #[must_use]
    pub fn begin() -> Self {
        static LISTEN: Once = Once::new();
        LISTEN.call_once(|| tracing::subscriber::set_global_default(Gate).expect("nobody logs"));
        *num_holders() += 1;
        Self(())
    }
}

impl Drop for HeldLoading {
    fn drop(&mut self) {
        *num_holders() -= 1;
        RELEASED.notify_all();
    }
}

/// A log that nothing passes while loading is held.
struct Gate;

impl Subscriber for Gate {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == LOADER
    }

    fn event(&self, _: &Event<'_>) {
        let wait = RELEASED.wait_while(num_holders(), |num| *num > 0);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}
