//! What the tests share. Knows the public API of the crates under test and nothing of their
//! insides.
#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the place and the value")]
#![allow(clippy::disallowed_methods, reason = "statistics and table models never reach output")]

pub mod attacks;
pub mod checkers;
pub mod child_server;
pub mod client;
pub mod collected;
pub mod drive;
pub mod exposition;
pub mod flaky_proxy;
pub mod gguf_builder;
pub mod hash_lm;
pub mod held_loading;
pub mod kernel_checks;
pub mod micro_pair;
pub mod model_draft;
pub mod naive_choice;
pub mod pieces;
pub mod plain_http;
pub mod process;
pub mod proposers;
pub mod proxy;
pub mod random;
pub mod raw_call;
pub mod raw_http2;
pub mod reference;
pub mod requests;
pub mod serving;
pub mod sim;
pub mod stats;
pub mod table_lm;
pub mod timing;
