//! Owns where the micro pair lies and how a server is told to run on it. Most tests need a pair and
//! not the embedded one, which takes several times as long for a token. Knows no server.

use slipstream_server::config::ModelFlags;

/// The verifier, a GGUF file.
pub const VERIFIER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/micro/verifier.gguf");
/// The draft, a GGUF file.
pub const DRAFT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/micro/draft.gguf");
/// Entries of its vocabulary.
pub const VOCAB_SIZE: usize = 1024;
/// Positions of the verifier's context.
pub const CONTEXT_LEN: usize = 1024;

/// The pair on a command line.
pub const FLAGS: [&str; 4] = ["--model", VERIFIER, "--draft-model", DRAFT];

/// The pair and the engine's defaults.
#[must_use]
pub fn flags() -> ModelFlags {
    ModelFlags {
        model: Some(VERIFIER.to_owned()),
        draft_model: Some(DRAFT.to_owned()),
        ..ModelFlags::default()
    }
}
