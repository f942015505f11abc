//! Owns the life of one request as seen from the network side, and the one cancel that it has: who
//! is first ends it. Never touches engine state.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam::channel::Sender;
use slipstream_model::ids::SequenceId;
use tokio::sync::OwnedSemaphorePermit;

use crate::engine::event::CancelReason;
use crate::engine::request::SubmitError;
use crate::handle::{Command, Submission};

/// Ends one request from outside its stream. Clones are the same canceller. It holds the request's
/// place among the live ones, and with it the room that is reserved for its one cancel in the
/// engine's queue; whoever is first takes both: the stream's drop, a canceller, or the engine.
#[derive(Clone, Debug, Default)]
pub struct Canceller {
    state: Arc<Mutex<Life>>,
}

/// How far the life of a request is, as seen from the network side.
#[derive(Debug, Default)]
enum Life {
    /// The engine does not know it yet.
    #[default]
    New,
    /// The engine may work on it.
    Live { id: SequenceId, commands: Sender<Command>, permit: OwnedSemaphorePermit },
    /// The engine has ended it; events may be unread.
    Ended,
    /// It was told to end before anything else ended it, or what is unread shall go.
    Cancelled(CancelReason),
}

impl Canceller {
    /// Ends the request. Events that it has handed over can still be read, further ones will not
    /// come. Returns whether it was alive and this was the call that ended it.
    pub fn cancel(&self, reason: CancelReason) -> bool {
        let mut state = self.lock();
        if matches!(*state, Life::Cancelled(_)) {
            return false;
        }
        match std::mem::replace(&mut *state, Life::Cancelled(reason)) {
            Life::New => true,
            Life::Live { id, commands, permit } => {
                // Room for this command was reserved with the permit; a closed queue means that
                // there is no engine left to tell.
                let _ = commands.try_send(Command::Cancel(id, reason, permit));
                true
            }
            Life::Ended | Life::Cancelled(_) => false,
        }
    }

    /// Why the request was cancelled, if it was.
    #[must_use]
    pub fn cancelled(&self) -> Option<CancelReason> {
        match *self.lock() {
            Life::Cancelled(reason) => Some(reason),
            Life::New | Life::Live { .. } | Life::Ended => None,
        }
    }

    /// Gives the place back of a request that the engine has ended or never took.
    pub(crate) fn release(&self) {
        let mut state = self.lock();
        if matches!(*state, Life::Live { .. }) {
            *state = Life::Ended;
        }
    }

    /// Sends the request off. Returns false when it was cancelled before.
    ///
    /// # Errors
    /// [`SubmitError`] without an engine, and for a canceller that has a request already.
    pub(crate) fn submit(
        &self,
        submission: Box<Submission>,
        commands: &Sender<Command>,
        permit: OwnedSemaphorePermit,
    ) -> Result<bool, SubmitError> {
        let mut state = self.lock();
        match *state {
            Life::New => {}
            Life::Cancelled(_) => return Ok(false),
            Life::Live { .. } | Life::Ended => {
                return Err(SubmitError::Invalid("its canceller belongs to another request"));
            }
        }
        let id = submission.id;
        commands.try_send(Command::Submit(submission)).map_err(|_| SubmitError::ShuttingDown)?;
        *state = Life::Live { id, commands: commands.clone(), permit };
        Ok(true)
    }

    fn lock(&self) -> MutexGuard<'_, Life> {
        // No code that could panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
