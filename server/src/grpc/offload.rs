//! Owns the way off the async threads for work on what clients sent: how much of it may be under
//! way at once, and that huge texts wait for each other. Knows nothing of what is done.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::grpc::status::CallError;

/// Requests that may be in validation or tokenisation at once. It bounds the memory that waiting
/// texts hold.
const OFFLOADED_MAX: usize = 512;

/// Text above this many bytes is tokenised one request at a time: a handful of clients with huge
/// prompts must not take all cores and memory from those with small ones.
const LARGE_TEXT_BYTES: usize = 64 * 1024;

/// Large texts that wait for their turn. More would take the places of small ones.
const LARGE_WAITING_MAX: usize = 32;

/// Runs work on blocking threads, within bounds. Clones share the bounds.
#[derive(Clone, Debug)]
pub(crate) struct Offload {
    places: Arc<Semaphore>,
    /// One permit: see [`LARGE_TEXT_BYTES`].
    large: Arc<Semaphore>,
    large_places: Arc<Semaphore>,
}

impl Offload {
    /// Nothing is under way yet.
    pub(crate) fn new() -> Self {
        Self {
            places: Arc::new(Semaphore::new(OFFLOADED_MAX)),
            large: Arc::new(Semaphore::new(1)),
            large_places: Arc::new(Semaphore::new(LARGE_WAITING_MAX)),
        }
    }

    /// Runs `work`, which looks at a text of `text_bytes`.
    ///
    /// # Errors
    /// [`CallError::EdgeFull`] when too much is under way, and a panic of `work` as an internal
    /// error.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        text_bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, CallError> {
        let (places, limit) = match text_bytes > LARGE_TEXT_BYTES {
            true => (&self.large_places, LARGE_WAITING_MAX),
            false => (&self.places, OFFLOADED_MAX),
        };
        let place = Arc::clone(places).try_acquire_owned();
        let place = place.map_err(|_| CallError::EdgeFull { limit })?;
        let turn = match text_bytes > LARGE_TEXT_BYTES {
            true => Arc::clone(&self.large).acquire_owned().await.ok(),
            false => None,
        };
        let running = tokio::task::spawn_blocking(move || {
            let _held = (place, turn); // even when the client is gone before its turn comes
            work()
        });
        running.await.map_err(|_| CallError::Internal("work on the request panicked"))
    }
}
