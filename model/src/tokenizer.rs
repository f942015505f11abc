//! Owns text -> token ids and the identity of a vocabulary. The loaders in `load/` make it from
//! `tokenizer.json` or GGUF metadata; it knows neither files nor models. Ids -> text goes through
//! [`TokenBytes`], never through the `tokenizers` crate.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::ids::TokenId;
use crate::token_bytes::TokenBytes;

/// Separates vocabulary fingerprints from every other use of blake3.
const FINGERPRINT_CONTEXT: &str = "slipstream vocabulary fingerprint v1";

/// Text that the tokenizer cannot encode (an unknown character without a fallback).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the text cannot be tokenised: {reason}")]
pub struct EncodeError {
    /// What the tokenizer said.
    pub reason: String,
}

/// What a vocabulary has at one id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TokenEntry {
    /// Ordinary text.
    Text(Vec<u8>),
    /// Controls the model; stands for no text. Its name in the vocabulary.
    Special(String),
    /// No token has this id.
    Hole,
}

/// Ids with a meaning of their own, as the model's files name them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NamedIds {
    /// Begins every text, if the model wants that.
    pub(crate) bos: Option<TokenId>,
    /// End a completion.
    pub(crate) eos: Vec<TokenId>,
}

/// A loaded tokenizer. Immutable and shared between threads.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    token_bytes: Arc<TokenBytes>,
    /// Whether each id is special, `[vocab]`.
    special: Vec<bool>,
    named: NamedIds,
    fingerprint: [u8; 32],
    content_hash: [u8; 32],
}

impl Tokenizer {
    /// `entries` in id order; `content` is the JSON text that `inner` was made from.
    pub(crate) fn new(
        inner: tokenizers::Tokenizer,
        entries: &[TokenEntry],
        named: NamedIds,
        content: &[u8],
    ) -> Self {
        let token_bytes = TokenBytes::new(entries.iter().map(|entry| match entry {
            TokenEntry::Text(bytes) => bytes.as_slice(),
            TokenEntry::Special(_) | TokenEntry::Hole => &[],
        }));
        Self {
            inner,
            token_bytes: Arc::new(token_bytes),
            special: entries.iter().map(|e| matches!(e, TokenEntry::Special(_))).collect(),
            named,
            fingerprint: fingerprint(entries),
            content_hash: *blake3::hash(content).as_bytes(),
        }
    }

    /// Token ids of a text. With `add_special` the tokenizer's own template is applied (for most
    /// models a begin-of-sequence token). Names of special tokens inside `text` become those
    /// tokens, as they do elsewhere.
    ///
    /// # Errors
    /// [`EncodeError`] for text the vocabulary cannot spell; byte-level ones spell everything.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        // Text and tokenizer both come from outside; a panic of the crate must not cross this line.
        let encoded = catch_unwind(AssertUnwindSafe(|| self.inner.encode_fast(text, add_special)));
        match encoded {
            Ok(Ok(encoding)) => Ok(encoding.get_ids().iter().map(|id| TokenId(*id)).collect()),
            Ok(Err(error)) => Err(EncodeError { reason: error.to_string() }),
            Err(_) => Err(EncodeError { reason: "the tokenizers crate gave up on it".to_owned() }),
        }
    }

    /// The table from id to bytes.
    #[must_use]
    pub fn token_bytes(&self) -> Arc<TokenBytes> {
        Arc::clone(&self.token_bytes)
    }

    /// The tokenizer's own ids are `0 .. vocab_size`. The model's vocabulary may be larger: padded.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.special.len()
    }

    /// Identity of the vocabulary: equal for two tokenizers exactly when every id means the same
    /// bytes, or the same special token, in both. Padding of the models does not count, and neither
    /// do the rules by which text is split. A draft must have its verifier's fingerprint.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The token that begins a text, if the model names one.
    #[must_use]
    pub fn bos_id(&self) -> Option<TokenId> {
        self.named.bos
    }

    /// Tokens that end a completion, as [`eos_ids`](crate::config::LlamaConfig::eos_ids) of the
    /// configuration has them.
    #[must_use]
    pub fn eos_ids(&self) -> &[TokenId] {
        &self.named.eos
    }

    /// Whether a token controls the model and stands for no text.
    #[must_use]
    pub fn is_special(&self, id: TokenId) -> bool {
        self.special.get(id.index()).copied().unwrap_or(false)
    }

    /// Hash of everything the tokenizer was made from, splitting rules included.
    pub(crate) fn content_hash(&self) -> [u8; 32] {
        self.content_hash
    }
}

fn fingerprint(entries: &[TokenEntry]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(FINGERPRINT_CONTEXT);
    hasher.update(&(entries.len() as u64).to_le_bytes());
    for entry in entries {
        let (kind, bytes) = match entry {
            TokenEntry::Text(bytes) => (0u8, bytes.as_slice()),
            TokenEntry::Special(name) => (1, name.as_bytes()),
            TokenEntry::Hole => (2, [].as_slice()),
        };
        hasher.update(&[kind]);
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::{TokenEntry, fingerprint};

    #[test]
    fn fingerprints_tell_vocabularies_apart() {
        let text = |s: &str| TokenEntry::Text(s.as_bytes().to_vec());
        let special = |s: &str| TokenEntry::Special(s.to_owned());
        let vocabularies = [
            vec![],
            vec![text("ab"), text("c")],
            vec![text("a"), text("bc")],
            vec![text("c"), text("ab")],
            vec![text("ab"), special("c")],
            vec![text("ab"), special("d")],
            vec![text("ab"), text("c"), TokenEntry::Hole],
            vec![text("ab"), text("c"), text("")],
        ];
        let mut prints: Vec<[u8; 32]> = vocabularies.iter().map(|v| fingerprint(v)).collect();
        prints.sort_unstable();
        prints.dedup();
        assert_eq!(prints.len(), vocabularies.len());
    }
}
