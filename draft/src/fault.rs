//! Owns what can go wrong with a draft. None of it ever reaches a client: the step decodes plainly,
//! the fault is counted, and a draft that keeps failing is quarantined by the engine.

use slipstream_model::choice::ChoiceFault;
use slipstream_model::forward::ForwardError;

/// Why a draft proposed nothing in a step.
#[derive(Debug, thiserror::Error)]
pub enum DraftFault {
    /// Its forward pass failed.
    #[error("the draft's forward pass failed: {0}")]
    Forward(#[from] ForwardError),
    /// No token could be chosen from its logits.
    #[error("no token could be chosen from the draft's logits: {0}")]
    Choice(#[from] ChoiceFault),
    /// It panicked. Caught by the engine.
    #[error("the draft panicked: {0}")]
    Panicked(String),
    /// It took more than twice its time. Running out of time is no fault: it then returns what it
    /// has. Not returning is.
    #[error("the draft took {taken_us} microseconds of {budget_us}")]
    OverBudget {
        /// Time it took.
        taken_us: u64,
        /// Time it had.
        budget_us: u64,
    },
}
