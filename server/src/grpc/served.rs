//! Owns what the edge knows of the model that is served. Immutable once loaded.

use slipstream_model::ids::{DraftEpoch, TokenId};
use slipstream_model::tokenizer::Tokenizer;

use crate::metrics::ServedName;

/// The model that answers, as far as requests are concerned.
#[derive(Debug)]
pub(crate) struct ServedModel {
    /// The name clients may ask for.
    pub(crate) name: String,
    /// Numerics version and verifier digest: what output depends on.
    pub(crate) fingerprint: String,
    /// Identity of the vocabulary, shortened.
    pub(crate) vocabulary_fingerprint: String,
    /// Makes token ids out of prompt text.
    pub(crate) tokenizer: Tokenizer,
    /// Token ids below this exist.
    pub(crate) vocab_size: usize,
    /// Positions that prompt and output of one request may have together: the model's context, or
    /// the KV pool if that is smaller. What a client hears of it depends on which of the two it is.
    pub(crate) context_len: usize,
    /// Positions of the model's context, whatever the KV pool holds: defaults follow it, so that
    /// the size of the pool cannot change an output.
    pub(crate) model_context_len: usize,
    /// Tokens that end a completion unless the client ignores them.
    pub(crate) eos_ids: Vec<TokenId>,
    /// Longest draft length a client may ask for.
    pub(crate) draft_len_max: usize,
    /// What proposes, if anything does.
    pub(crate) draft: Option<ServedDraft>,
}

/// The draft, as far as clients see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServedDraft {
    /// Its own name.
    pub(crate) name: String,
    /// Its version number.
    pub(crate) epoch: DraftEpoch,
}

impl ServedModel {
    /// As metrics and probes name it.
    pub(crate) fn to_name(&self) -> ServedName {
        ServedName { model: self.name.clone(), fingerprint: self.fingerprint.clone() }
    }
}
