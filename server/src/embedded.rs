//! Owns the models inside the binary: the pair of `models/rust`, as GGUF files. Knows nothing about
//! them.

/// The embedded verifier, a GGUF file.
#[cfg(feature = "embedded-pair")]
pub(crate) const VERIFIER: &[u8] = include_bytes!("../../models/rust/verifier.gguf");
/// The embedded draft, a GGUF file.
#[cfg(feature = "embedded-pair")]
pub(crate) const DRAFT: &[u8] = include_bytes!("../../models/rust/draft.gguf");

/// Stands in for the embedded verifier in a binary without it; settings that ask for it are
/// refused.
#[cfg(not(feature = "embedded-pair"))]
pub(crate) const VERIFIER: &[u8] = &[];
/// Stands in for the embedded draft in a binary without it; settings that ask for it are refused.
#[cfg(not(feature = "embedded-pair"))]
pub(crate) const DRAFT: &[u8] = &[];
