//! Everything about proposing: the [`proposer::Proposer`] seam, the model proposer behind it, and
//! what counts as a fault of a draft. Knows nothing of verification: `verifier` and `draft` never
//! meet.

pub mod fault;
mod kv_cache;
pub mod model_proposer;
pub mod proposer;
