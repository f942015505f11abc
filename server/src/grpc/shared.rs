//! Owns what the services have in common: the backend once it is there, the bounds on work off the
//! async threads, and the calls in progress. Knows no messages.

use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

use crate::backend::Backend;
use crate::grpc::calls::Calls;
use crate::grpc::live_calls::LiveCalls;
use crate::grpc::offload::Offload;
use crate::grpc::status::CallError;
use crate::stage::Stage;

/// What the services share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Shared {
    /// What answers, once it is loaded.
    pub(crate) backend: Arc<OnceLock<Backend>>,
    /// What a drain waits for.
    pub(crate) calls: Calls,
    /// Completions in progress.
    pub(crate) live: Arc<LiveCalls>,
    /// The way off the async threads.
    pub(crate) offload: Offload,
    /// Where the server stands.
    pub(crate) stage: watch::Receiver<Stage>,
}

impl Shared {
    /// What answers.
    ///
    /// # Errors
    /// [`CallError::Loading`] until it is there.
    pub(crate) fn backend(&self) -> Result<&Backend, CallError> {
        self.backend.get().ok_or(CallError::Loading)
    }

    /// Refuses new work early while the server drains; the engine would refuse it too.
    ///
    /// # Errors
    /// [`CallError::ShuttingDown`] then.
    pub(crate) fn check_stage(&self) -> Result<(), CallError> {
        match *self.stage.borrow() {
            Stage::Loading | Stage::Serving | Stage::Stuck => Ok(()),
            Stage::Draining => Err(crate::engine::request::SubmitError::ShuttingDown.into()),
        }
    }
}
