//! One verification: the rows of all sequences and their proposals go through the target in one
//! ragged forward, the target chooses its own token at each row, and the proposal is kept as far
//! as it agrees. Knows nothing of where proposals come from: `verifier` and `draft` never meet.

pub mod acceptance;
pub mod verifier;
