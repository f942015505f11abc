//! Owns what a draft hands to a verifier. Knows neither of them.

use crate::ids::{DraftEpoch, SequenceId, TokenId};

/// Tokens that a draft suggests for one sequence in one step. May be empty: the step then
/// decodes plainly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// The sequence it continues.
    pub sequence: SequenceId,
    /// Epoch of the draft, and of the KV it proposed from.
    pub epoch: DraftEpoch,
    /// Proposed continuation of the sequence's known tokens, `[0 ..= draft_len]`.
    pub tokens: Vec<TokenId>,
}
