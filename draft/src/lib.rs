//! Everything about proposing: the [`Proposer`] seam, the model proposer behind it, and what counts
//! as a fault of a draft. Knows nothing of verification: `verifier` and `draft` never meet.

pub mod fault;
pub mod proposer;
