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
    /// It proposed something that no proposal may be.
    #[error("the draft proposed nonsense: {0}")]
    Nonsense(&'static str),
}
