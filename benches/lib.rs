//! What the benches share. A bench prints the plain figure beside every speculative one, compares
//! within one run, and gives medians and spans: see `README.md` here.

pub mod arrivals;
pub mod checkpoint;
pub mod constructed_draft;
pub mod drive;
pub mod machine;
pub mod network;
pub mod pair;
pub mod random_model;
pub mod roofline;
pub mod serving;
pub mod stats;
pub mod wire_table;

use slipstream_server::engine::request::Speculation;

/// Beginnings of Rust code, written for these benches.
pub const PROMPTS: [&str; 4] = [
    "/// Returns the number of bytes that the header takes.\npub fn header_len(",
    "impl<T: Clone> Stack<T> {\n    pub fn push(&mut self, value: T) {\n",
    "#[test]\nfn parses_an_empty_list() {\n    let ",
    "use std::collections::HashMap;\n\npub struct Cache {\n    entries: HashMap<String, ",
];

/// The verifier of the micro pair, a GGUF file.
pub const MICRO_VERIFIER: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../models/micro/verifier.gguf");
/// The draft of the micro pair, a GGUF file.
pub const MICRO_DRAFT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/micro/draft.gguf");

/// The embedded verifier, as a GGUF file.
pub const RUST_VERIFIER: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../models/rust/verifier.gguf");
/// The embedded draft, as a GGUF file.
pub const RUST_DRAFT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/rust/draft.gguf");

/// What tables call a way to speculate.
#[must_use]
pub fn label(speculation: Speculation) -> String {
    match speculation {
        Speculation::Off => "plain".to_owned(),
        Speculation::Fixed(draft_len) => format!("draft_len {draft_len}"),
        Speculation::Auto => "auto".to_owned(),
    }
}
